"""Writing a model's activations in shards, so that many runs can train on them.

A shard holds the rows of whole batches of prompts in the order of the data set, mixed within the
shard by a seed of its own. So what a shard holds depends on its place alone, and writing resumes
after the last whole shard by skipping the texts before it, without running the model on them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig
from sae_lens.config import HfDataset
from sae_lens.load_model import load_model
from tqdm.auto import tqdm

from sae_lens_matryoshka.activations.index import (
    BLOCK_ROWS,
    INDEX_FILENAME,
    METADATA_FIELDS,
    Index,
    ShardEntry,
    write_shard,
)
from sae_lens_matryoshka.util.checks import checked_count, invalid_option
from sae_lens_matryoshka.util.devices import warn_of_slow_autocast
from sae_lens_matryoshka.util.files import check_writable

DTYPES = ("float16", "bfloat16", "float32", "int8")
_SETTINGS = (
    "autocast_lm",
    "model_kwargs",
    "seed",
    "store_batch_size_prompts",
    "use_chat_formatting",
)
_SHARD_ELEMENTS = 2**26  # 128 MiB in float16
_INT8_MAX = 127


class Cache:
    """A folder of shards that is filled with the activations of a run's config.

    Args:
        cfg: What to run, on which texts, and `training_tokens`, the number of rows. The options of
            its SAE do not matter, but for d_in.
        folder: Where shards are written; one that holds the same rows is continued.
        dtype: "float16", "bfloat16", "float32", or "int8" with a scale per row.
        rows_per_shard: About how many rows a shard holds, at least those of one batch of prompts;
            by default as many as take 128 MiB in float16.

    Attributes:
        index: What is written so far.

    Raises:
        ValueError: an option is not accepted, or the folder holds other activations.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        folder: Path | str,
        dtype: str = "float16",
        rows_per_shard: int | None = None,
    ):
        self.cfg, self.folder = cfg, Path(folder)
        if dtype not in DTYPES:
            raise invalid_option("dtype", dtype, f"one of {', '.join(DTYPES)}")
        checked_count("seed", cfg.seed, 0)
        if cfg.use_cached_activations:
            accepted = "false: a cache is written from a model"
            raise invalid_option("use_cached_activations", True, accepted)
        warn_of_slow_autocast(cfg.llm_device or cfg.device, autocast_lm=cfg.autocast_lm)
        d_in = cfg.sae.d_in
        n_rows = max(BLOCK_ROWS, _SHARD_ELEMENTS // d_in)
        if rows_per_shard is not None:
            n_rows = checked_count("rows_per_shard", rows_per_shard)
        n_positions = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
        self._batches_per_shard = max(1, n_rows // (cfg.store_batch_size_prompts * n_positions))
        self.index = Index(
            d_in, dtype, _of_config(cfg, METADATA_FIELDS), _of_config(cfg, _SETTINGS)
        )
        check_writable("out", self.folder)
        if (self.folder / INDEX_FILENAME).is_file():
            written = Index.read(self.folder)
            if written.shards:
                _check_same(self.folder, written, self.index)
                self.index = written
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds something else: give a new or an empty folder.")

    @property
    def is_complete(self) -> bool:
        """Whether all rows are written, and no shard is missing or truncated."""
        enough = self.index.n_rows >= self.cfg.training_tokens
        return enough and all(self._is_whole(shard) for shard in self.index.shards)

    def _is_whole(self, shard: ShardEntry) -> bool:
        try:
            shard.check_size(self.folder)
        except ValueError:
            return False
        return True

    @torch.no_grad()
    def write(self, override_model: Any = None, override_dataset: HfDataset | None = None) -> bool:
        """Write the rows that are missing.

        Args:
            override_model: Used instead of the config's model, like `override_dataset`.
            override_dataset: Instead of the config's data set.

        Returns:
            Whether all rows were written; otherwise the texts have ended before.

        Raises:
            ValueError: a number is too large for the dtype, or not finite; the shards before are
                kept.
            OSError: a shard could not be written; the shards before are kept.
        """
        cfg = self.cfg
        if self.is_complete:
            return True
        model = override_model
        if model is None:
            model = load_model(
                cfg.model_class_name,
                cfg.model_name,
                device=cfg.llm_device or cfg.device,
                model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
                hook_names=[cfg.hook_name],
            )
        if cfg.hook_name not in model.hook_dict:
            raise invalid_option("hook_name", cfg.hook_name, f"a hook of {cfg.model_name}")
        store = ActivationsStore.from_config(model, cfg, override_dataset=override_dataset)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index.write(self.folder)  # first: a folder with files but no index is refused
        n_whole = sum(shard.n_rows for shard in self.index.shards if self._is_whole(shard))
        options: dict[str, Any] = {"unit": " tokens", "unit_scale": True}
        with tqdm(
            desc="Caching activations", total=cfg.training_tokens, initial=n_whole, **options
        ) as bar:
            return self._write(store, bar)

    def _write(self, store: ActivationsStore, bar: Any) -> bool:
        """Write every shard that is not whole, and then new ones."""
        n_skipped = i = 0
        while True:
            if i < len(self.index.shards):
                shard = self.index.shards[i]
                n_batches, n_rows = shard.n_batches, shard.n_rows
            else:
                shard, n_batches = None, self._batches_per_shard
                n_rows = self.cfg.training_tokens - self.index.n_rows
                if n_rows <= 0:
                    return True
            if shard is not None and self._is_whole(shard):
                n_skipped += n_batches
            else:
                _skip(store, n_skipped, self.index)
                n_skipped = 0
                batches = self._read(store, n_batches, n_rows, bar)
                if shard is not None and len(batches) < n_batches:
                    raise _other_data(self.index)
                if batches:
                    self._write_shard(i, batches, n_rows)
                if len(batches) < n_batches:
                    return self.is_complete
            i += 1

    def _read(
        self, store: ActivationsStore, n_batches: int, n_rows: int, bar: Any
    ) -> list[dict[str, torch.Tensor]]:
        """The next batches of prompts, no more than hold so many rows."""
        batches: list[dict[str, torch.Tensor]] = []
        n_read = 0
        for rows in _batches(store, n_batches):
            self._check_batch(rows)
            batches.append(stored(rows.cpu(), self.index.dtype))
            bar.update(min(len(rows), n_rows - n_read))
            n_read += len(rows)
            if n_read >= n_rows:
                break
        return batches

    def _check_batch(self, rows: Float[torch.Tensor, "rows d_in"]) -> None:
        dtype = torch.float32 if self.index.dtype == "int8" else getattr(torch, self.index.dtype)
        largest = rows.abs().max().item() if len(rows) else 0.0
        if not largest < float("inf"):
            raise ValueError("the model's activations are not finite.")
        most = torch.finfo(dtype).max
        if largest > most:
            place = ", in a new folder" if self.index.shards else ""
            raise ValueError(
                f"dtype={self.index.dtype!r} is not accepted: the activations reach "
                f"{largest:,.0f}, and {self.index.dtype} holds at most {most:,.0f}. Give "
                f"bfloat16{place}."
            )

    def _write_shard(self, i: int, batches: list[dict[str, torch.Tensor]], n_rows: int) -> None:
        """Write at most so many rows of these batches, the first ones, mixed."""
        tensors = {name: torch.cat([b[name] for b in batches])[:n_rows] for name in batches[0]}
        generator = torch.Generator().manual_seed(self.cfg.seed + i)
        order = torch.randperm(len(tensors["activations"]), generator=generator)
        tensors = {name: tensor[order] for name, tensor in tensors.items()}
        self.index = write_shard(self.folder, self.index, i, tensors, len(batches))


def _of_config(cfg: LanguageModelSAERunnerConfig[Any], names: Sequence[str]) -> dict[str, Any]:
    """These fields as JSON gives them back."""
    return json.loads(json.dumps({name: getattr(cfg, name) for name in names}, default=str))


def _check_same(folder: Path, written: Index, wanted: Index) -> None:
    """Check that a folder holds what is wanted; ValueError names what differs."""

    def fields(index: Index) -> dict[str, Any]:
        own = {"sae.d_in": index.d_in, "dtype": index.dtype}
        return own | index.metadata | index.settings

    before = fields(written)
    for name, value in fields(wanted).items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} holds activations with {name}={before.get(name)!r}, and this run has "
                f"{name}={value!r}: give another folder, or the same value."
            )


def _skip(store: ActivationsStore, n_batches: int, index: Index) -> None:
    """Read the texts of so many batches, without running the model."""
    hidden = n_batches == 0
    try:
        for _ in tqdm(range(n_batches), desc="Skipping cached texts", leave=False, disable=hidden):
            store.get_batch_tokens(raise_at_epoch_end=True, move_to_model_device=False)
    except StopIteration:
        raise _other_data(index) from None


def _other_data(index: Index) -> ValueError:
    n_batches = sum(shard.n_batches for shard in index.shards)
    return ValueError(
        f"the data set ends before the {n_batches:,} batches of prompts that are cached: it is not "
        "the one that the cache was written from."
    )


def _batches(store: ActivationsStore, n: int) -> Iterator[Float[torch.Tensor, "rows d_in"]]:
    """The rows of the next `n` batches of prompts, without special tokens; fewer at the end."""
    with suppress(StopIteration):
        for _ in range(n):
            yield store.get_filtered_llm_batch(raise_on_epoch_end=True)


def stored(rows: Float[torch.Tensor, "rows d_in"], dtype: str) -> dict[str, torch.Tensor]:
    """The tensors of a shard: the rows in a dtype of `DTYPES`, with their scales if it is int8."""
    if dtype != "int8":
        return {"activations": rows.to(getattr(torch, dtype))}
    scales = rows.abs().amax(1) / _INT8_MAX
    values = (rows / scales.clamp(min=torch.finfo(scales.dtype).tiny)[:, None]).round()
    return {"activations": values.to(torch.int8), "scales": scales}
