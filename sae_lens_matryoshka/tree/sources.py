"""Where activations come from: arrays and files, or a model that runs on texts."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE, ActivationsStore
from tqdm.auto import tqdm

from sae_lens_matryoshka.activations.index import BLOCK_ROWS
from sae_lens_matryoshka.activations.shards import Activations, open_activations
from sae_lens_matryoshka.levels.stats import token_ids


class Batch(NamedTuple):
    """Activations in the order of the data, with their texts if a model ran.

    Attributes:
        x: The activations.
        tokens: What the model read.
        positions: The place of each row of `x` in `tokens`, flattened.
    """

    x: Float[torch.Tensor, "rows d_in"]
    tokens: Int[np.ndarray, "contexts context"] | None = None
    positions: Int[np.ndarray, " rows"] | None = None


class Source(Protocol):
    """Batches that can be read again from any of them on.

    Attributes:
        settings: What the batches depend on, as JSON.
    """

    settings: dict[str, Any]

    def batches(self, skip: int) -> Iterator[Batch]: ...


class StoredActivations:
    """Activations as `train --activations` takes them.

    Args:
        activations: As for `open_activations`.
        sae: The SAE that they are for.

    Raises:
        ValueError: they can't be read, or are of another width than the SAE.
    """

    def __init__(self, activations: Any, sae: SAE[Any]):
        self._activations: Activations = open_activations(activations, sae.cfg.metadata.hook_name)
        check_width(self._activations.name, self._activations.d_in, sae)
        self.n_rows = self._activations.n_rows
        self.settings = {"activations": self._activations.name, "n_rows": self.n_rows}

    def batches(self, skip: int) -> Iterator[Batch]:
        for block in range(skip, len(self._activations.block_rows)):
            yield Batch(self._activations.read_block(block).float())


class ModelOnTexts:
    """A model's activations at the hook of an SAE, on the tokens that its training would use.

    Args:
        sae: Its metadata name the hook and the context.
        model: As SAELens loads it.
        store: `ActivationsStore.from_sae(model, sae, dataset, …)`, not yet read from.
        name: What the data set is called.
    """

    def __init__(self, sae: SAE[Any], model: Any, store: ActivationsStore, name: str):
        self._sae, self._store = sae, store
        # which `from_sae` leaves out
        self._excluded = token_ids(sae.cfg.metadata.exclude_special_tokens, model)
        self.settings = {
            "dataset": name,
            "model": sae.cfg.metadata.model_name,
            "context_size": store.context_size,
            "prompts_per_batch": store.store_batch_size_prompts,
        }

    @torch.no_grad()
    def batches(self, skip: int) -> Iterator[Batch]:
        store = self._store
        hidden = skip == 0
        try:
            for _ in tqdm(range(skip), desc="Skipping read texts", leave=False, disable=hidden):
                store.get_batch_tokens(raise_at_epoch_end=True, move_to_model_device=False)
            while True:
                yield self._run(store.get_batch_tokens(raise_at_epoch_end=True))
        except StopIteration:
            return

    def _run(self, tokens: Int[torch.Tensor, "contexts context"]) -> Batch:
        store = self._store
        try:
            x = store.get_activations(tokens)
        except RuntimeError as error:  # SAELens writes the activations into rows of d_in
            if "must match" not in str(error):
                raise
            metadata = self._sae.cfg.metadata
            raise ValueError(
                f"the activations of {metadata.model_name} at {metadata.hook_name} do not have "
                f"the width of this SAE, d_in={self._sae.cfg.d_in}: {error}."
            ) from error
        places = torch.arange(tokens.numel()).view_as(tokens)[:, slice(*store.seqpos_slice)]
        seen = tokens[:, slice(*store.seqpos_slice)].cpu()
        kept = ~torch.isin(seen, self._excluded)
        return Batch(
            x[kept.to(x.device)].float(),
            tokens.cpu().numpy().astype(np.int32),
            places[kept].numpy().astype(np.int32),
        )


def check_width(name: str, d_in: int, sae: SAE[Any]) -> None:
    """Check that activations fit an SAE.

    Raises:
        ValueError: they don't; the error names both widths.
    """
    if d_in != sae.cfg.d_in:
        raise ValueError(
            f"{name} has activations of width {d_in}, and this SAE takes d_in={sae.cfg.d_in}: "
            "give activations of the model and the layer that it was trained on."
        )


def rows_per_shard(n_tokens: int, d_in: int) -> int:
    """How many rows are gathered at a time: at most 65,536, and 256 MiB in float32."""
    return max(BLOCK_ROWS, min(2**16, 2**26 // d_in, n_tokens // 16))
