"""What one pass over the tokens gathers: a folder of sparse codes, and sums of activations.

    index.json               sizes, what was read, and the shards in their order
    00000.safetensors, …     the codes of some 65,536 tokens, and the texts where there are any
    sums-00016.safetensors   sums over the tokens of the first 16 shards
    ablation.safetensors     only if it was asked for: see `tree.ablation`

A shard holds, sorted by latent and then by row:

    starts     int64   (d_sae + 1,)             latent j's codes are starts[j] to starts[j + 1] − 1
    rows       int32   (n_codes,)               row of the shard
    values     float32 (n_codes,)               activation of the latent, as `sae.encode` gives it
    tokens     int32   (n_contexts, context)    only if a model ran: its input
    positions  int32   (n_rows,)                only then: place of a row in `tokens`, flattened

and the sums hold

    sums       float32 (d_sae, d_in)            Σ x over the tokens where a latent fires
    shifted    float32 (d_sae, d_in)            the same in the shifted copy, `shifted_pieces`
    total      float64 (d_in,)                  Σ x over all tokens
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from scipy import sparse

from sae_lens_matryoshka.util.files import atomic_file

# scipy.sparse has no types, and those that pyright infers are wrong
SparseArray: TypeAlias = Any

INDEX_FILENAME = "index.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    """A shard: its file, its rows, and the batches of the source that they come from."""

    name: str
    n_rows: int
    n_batches: int


@dataclass(frozen=True)
class Index:
    """The contents of a folder.

    Attributes:
        d_sae: Number of latents.
        d_in: Width of an activation.
        settings: What the codes depend on: the SAE, the source and the number of tokens.
        is_complete: Whether all tokens are gathered.
        sums: File of the sums over the tokens of `shards`.
        shards: In their order.
    """

    d_sae: int
    d_in: int
    settings: dict[str, Any]
    is_complete: bool = False
    sums: str | None = None
    shards: list[ShardEntry] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the folder's index, all or nothing."""
        text = json.dumps({"format_version": _FORMAT_VERSION, **asdict(self)}, indent=1)
        with atomic_file(folder / INDEX_FILENAME) as path:
            path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """The index of a folder.

        Raises:
            ValueError: it is missing, broken, or of a later version of this package.
        """
        path = folder / INDEX_FILENAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format_version")
            if version != _FORMAT_VERSION:
                raise ValueError(f"its format_version is {version!r}, not {_FORMAT_VERSION}")
            shards = [ShardEntry(**shard) for shard in values.pop("shards")]
            return cls(**values, shards=shards)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} can't be read: {error}.") from error


class Piece(NamedTuple):
    """Rows of a shard beside as many rows of a shard of the shifted copy."""

    shard: int
    start: int
    shifted_shard: int
    shifted_start: int
    n_rows: int


class Gathered:
    """A folder that `gather` has written.

    Attributes:
        folder: Where it is.
        index: Its index.
        n_tokens: Number of tokens.
        d_sae: Number of latents.

    Raises:
        ValueError: the folder holds something else, or the pass was not finished.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.index = Index.read(self.folder)
        if not self.index.is_complete:
            raise ValueError(f"{self.folder} is not complete: run the same command again.")
        self.n_tokens = sum(shard.n_rows for shard in self.index.shards)
        self.d_sae = self.index.d_sae

    def codes(self, shard: int) -> SparseArray:
        """The codes of a shard, a csc_array (n_rows, d_sae)."""
        return read_codes(self.folder, self.index, shard)

    def activations_of(self, latent: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The tokens where a latent fires, numbered over all shards, and its activations there."""
        tokens, values = [], []
        for first, starts, rows, shard_values in self._slices(latent, latent + 1):
            assert len(starts) == 2
            tokens.append(rows.astype(np.int64) + first)
            values.append(shard_values)
        return np.concatenate(tokens), np.concatenate(values)

    def sorted_activations(
        self, start: int, stop: int
    ) -> Iterator[tuple[int, Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """Number, tokens and activations of the latents from `start` to `stop` − 1 that fire.

        The largest activation comes first; of equal ones the first token.
        """
        latents, tokens, values = [], [], []
        for first, starts, rows, shard_values in self._slices(start, stop):
            latents.append(np.repeat(np.arange(start, stop), np.diff(starts)))
            tokens.append(rows.astype(np.int64) + first)
            values.append(shard_values)
        latent, token, value = (np.concatenate(parts) for parts in (latents, tokens, values))
        order = np.lexsort((-value, latent))
        token, value = token[order], value[order]
        counts = np.bincount(latent - start, minlength=stop - start)
        ends = np.cumsum(counts)
        for i in counts.nonzero()[0].tolist():
            own = slice(ends[i] - counts[i], ends[i])
            yield start + i, token[own], value[own]

    def _slices(
        self, start: int, stop: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Number of the first row, and `starts`, `rows` and `values` of some latents, per shard."""
        first = 0
        for shard in self.index.shards:
            with _opened(self.folder / shard.name) as file:
                starts = file.get_slice("starts")[start : stop + 1]
                begin, end = int(starts[0]), int(starts[-1])
                rows, values = (  # safetensors refuses an empty slice behind the last element
                    file.get_slice(name)[begin:end] if begin < end else file.get_tensor(name)[:0]
                    for name in ("rows", "values")
                )
            yield first, starts, rows, values
            first += shard.n_rows

    @cached_property
    def counts(self) -> Int[np.ndarray, " d_sae"]:
        """Number of tokens where each latent fires."""
        of_shards = (np.diff(self._tensor(i, "starts")) for i in range(len(self.index.shards)))
        return sum(of_shards, start=np.zeros(self.d_sae, np.int64))

    @cached_property
    def sums(self) -> dict[str, np.ndarray]:
        """`sums`, `shifted` and `total`."""
        assert self.index.sums is not None
        return load_file(self.folder / self.index.sums)

    @property
    def shift(self) -> int:
        """By how many tokens the shifted copy is shifted."""
        return self.index.shards[0].n_rows

    def has_tokens(self) -> bool:
        """Whether the texts are known."""
        with _opened(self.folder / self.index.shards[0].name) as file:
            return "tokens" in file.keys()  # noqa: SIM118 not a dict

    def tokens(self, shard: int) -> Int[np.ndarray, "n_contexts context"]:
        """The contexts of a shard."""
        return self._tensor(shard, "tokens")

    def positions(self, shard: int) -> Int[np.ndarray, " n_rows"]:
        """The place of each row of a shard in its `tokens`, flattened."""
        return self._tensor(shard, "positions")

    def _tensor(self, shard: int, name: str) -> np.ndarray:
        with _opened(self.folder / self.index.shards[shard].name) as file:
            return file.get_tensor(name)


def read_codes(folder: Path, index: Index, shard: int) -> SparseArray:
    """The codes of a shard, a csc_array (n_rows, d_sae)."""
    entry = index.shards[shard]
    with _opened(folder / entry.name) as file:
        starts, rows, values = (file.get_tensor(name) for name in ("starts", "rows", "values"))
    return sparse.csc_array((values, rows, starts), shape=(entry.n_rows, index.d_sae))


def shifted_pieces(lengths: Sequence[int], shift: int) -> Iterator[Piece]:
    """A circular shift of the rows of all shards: row t stands beside row t − `shift`.

    Args:
        lengths: Rows of each shard.
        shift: From 0 to all rows.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    n_rows = int(ends[-1])
    cuts = np.unique(np.concatenate([[0], ends, (ends + shift) % n_rows, [shift % n_rows]]))
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        shifted = (start - shift) % n_rows
        shard, other = (int(np.searchsorted(ends, row, side="right")) for row in (start, shifted))
        yield Piece(
            shard,
            start - int(starts[shard]),
            other,
            shifted - int(starts[other]),
            stop - start,
        )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
