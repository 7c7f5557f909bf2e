"""How the model's loss changes if a latent is ablated, estimated by gradient.

With the activation x = x̂ + error, ablating latent j on a token takes a_j d_j from x, where d_j is
its decoder row. To first order the loss of the text changes by

    −a_j ⟨∂L/∂x, d_j⟩,      L = Σ of the losses of the context's tokens, in nats

so one backward pass gives the change for every latent that fires on any token of the text
(attribution patching, Nanda 2023; Syed et al., arXiv 2310.10348).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from safetensors.numpy import load_file, save
from tqdm.auto import tqdm

from sae_lens_matryoshka.tree.gathered import Gathered, SparseArray
from sae_lens_matryoshka.util.files import atomic_file

_FILENAME = "ablation.safetensors"  # in the folder of what was gathered
_LOGITS = 2**26  # that are computed at a time
_SECONDS = 10  # between two writes
_NORMALIZED = ("constant_norm_rescale", "layer_norm")  # by token, so that a_j d_j is not in x


class Ablation(NamedTuple):
    """The change of the loss for each latent; 0 for one that never fires.

    Attributes:
        total: Σ of the changes over the tokens where it fires, in nats.
        n_contexts: Contexts that are done.
    """

    total: Float[np.ndarray, " d_sae"]
    n_contexts: int


def ablation_of(gathered: Gathered, sae: SAE[Any], model: Any) -> Float[np.ndarray, " d_sae"]:
    """The mean change of the loss where each latent fires, in nats; NaN if it never does.

    What is done is written to the folder of `gathered` every ten seconds, and a later call goes on
    from there.

    Args:
        gathered: With texts.
        sae: Its metadata names the hook.
        model: Its model, as SAELens loads it, with logits.

    Raises:
        ValueError: there are no texts, the model has no logits, or the SAE normalises each token.
        OSError: the file can't be written.
    """
    if not gathered.has_tokens():
        raise ValueError("the change of the loss needs texts: give a model and a dataset.")
    check_ablation(sae)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    path = gathered.folder / _FILENAME
    done = _read(path, gathered.d_sae)
    n_contexts = sum(len(gathered.tokens(i)) for i in range(len(gathered.index.shards)))
    bar = tqdm(
        desc="Change of the loss",
        total=n_contexts,
        initial=done.n_contexts,
        unit=" texts",
        leave=False,
    )
    written = time.monotonic()
    size = _contexts_at_a_time(model, gathered)
    for texts, places, codes in _batches(gathered, size, done.n_contexts):
        gradient = _gradient(sae, model, texts)
        changes = _changes(sae, gradient[torch.from_numpy(places).to(gradient.device)], codes)
        done = Ablation(done.total + changes, done.n_contexts + len(texts))
        bar.update(len(texts))
        if time.monotonic() - written > _SECONDS:
            _write(path, done)
            written = time.monotonic()
    bar.close()
    _write(path, done)
    return np.where(gathered.counts > 0, done.total / np.maximum(gathered.counts, 1), np.nan)


def check_ablation(sae: SAE[Any]) -> None:
    """Check that a latent's activation times its decoder row is a part of the activation.

    Raises:
        ValueError: it isn't, since the SAE normalises each token.
    """
    normalization = sae.cfg.normalize_activations
    if normalization in _NORMALIZED:
        raise ValueError(
            f"the change of the loss can't be estimated for normalize_activations={normalization!r}"
            ": an SAE is needed that takes the model's activations as they are."
        )


def _batches(
    gathered: Gathered, size: int, skip: int
) -> Iterator[tuple[Int[np.ndarray, "n context"], Int[np.ndarray, " rows"], SparseArray]]:
    """Contexts from the one numbered `skip` on, the places of their rows, and the codes there."""
    for i in range(len(gathered.index.shards)):
        texts, positions = gathered.tokens(i), gathered.positions(i)
        if skip < len(texts):
            codes, length = gathered.codes(i).tocsr(), texts.shape[1]
            for start in range(skip, len(texts), size):
                own = texts[start : start + size]
                ends = np.array([start, start + len(own)]) * length
                rows = slice(*np.searchsorted(positions, ends))
                yield own, positions[rows] - start * length, codes[rows]
        skip = max(0, skip - len(texts))


def _read(path: Path, d_sae: int) -> Ablation:
    if path.is_file():
        tensors = load_file(path)
        return Ablation(tensors["total"], int(tensors["n_contexts"][0]))
    return Ablation(np.zeros(d_sae), 0)


def _write(path: Path, done: Ablation) -> None:
    with atomic_file(path) as unfinished:
        n_contexts = np.array([done.n_contexts])
        unfinished.write_bytes(save({"total": done.total, "n_contexts": n_contexts}))


def _contexts_at_a_time(model: Any, gathered: Gathered) -> int:
    cfg = getattr(model, "cfg", None) or model.model.config
    width = getattr(cfg, "d_vocab", None) or cfg.vocab_size
    return max(1, _LOGITS // (gathered.tokens(0).shape[1] * width))


def _gradient(
    sae: SAE[Any], model: Any, texts: Int[np.ndarray, "n context"]
) -> Float[torch.Tensor, "places d_in"]:
    """∂L/∂x at every place of the texts, flattened."""
    metadata = sae.cfg.metadata
    leaves: list[torch.Tensor] = []

    def cut(x: torch.Tensor, hook: Any) -> torch.Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    device = next(model.parameters()).device
    tokens = torch.from_numpy(texts.astype(np.int64)).to(device)
    with torch.enable_grad(), model.hooks(fwd_hooks=[(metadata.hook_name, cut)]):
        logits = model(tokens, return_type="logits")
        if logits is None or logits.ndim != 3:
            raise ValueError(f"the model {metadata.model_name} has no logits to compute a loss of.")
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
        )
        [gradient] = torch.autograd.grad(loss, leaves)
    if metadata.hook_head_index is not None:
        gradient = gradient[:, :, metadata.hook_head_index]
    return gradient.flatten(2).flatten(0, 1)


@torch.no_grad()
def _changes(
    sae: SAE[Any], gradient: Float[torch.Tensor, "rows d_in"], codes: SparseArray
) -> Float[np.ndarray, " d_sae"]:
    """Σ of the changes over some rows, for each latent."""
    along = gradient.to(sae.device, sae.dtype) @ sae.W_dec.T
    found = codes.tocoo()
    rows, latents = (torch.from_numpy(a.astype(np.int64)) for a in found.coords)
    values = along[rows.to(along.device), latents.to(along.device)].float().cpu().numpy()
    return np.bincount(latents, -found.data * values, minlength=codes.shape[1])
