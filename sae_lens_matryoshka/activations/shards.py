"""Activations in shards: files of every accepted format, or tensors, read block by block.

Files are memory-mapped: opening them reads their headers, and a block is read when it is asked for.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_from_disk
from jaxtyping import Float, Int, Shaped
from safetensors import safe_open

from sae_lens_matryoshka.activations.index import (
    BLOCK_ROWS,
    INDEX_FILENAME,
    REMEDY,
    Index,
    ShardEntry,
    block_checksum,
    shard_checksum,
)
from sae_lens_matryoshka.util.checks import invalid_option

SUFFIXES = (".npy", ".safetensors")
_N_OPEN = 256  # shards mapped at a time, below the usual limit of 1,024 open files
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_IN_MEMORY = "the activations"
_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes


class Rows(Protocol):
    """An open shard."""

    def read(self, start: int, stop: int) -> Float[torch.Tensor, "rows d_in"]: ...


class Shard(NamedTuple):
    """A shard, not yet open.

    Attributes:
        name: What errors call it.
        n_rows: Number of rows.
        d_in: Width of a row.
        dtype: Of its numbers as they are stored.
        open: Maps it.
    """

    name: str
    n_rows: int
    d_in: int
    dtype: torch.dtype
    open: Callable[[], Rows]


class Activations:
    """Rows of activations in shards of one width and dtype.

    Attributes:
        name: Where they come from: a path, or "the activations" for those in memory.
        n_rows: Number of rows.
        d_in: Width of a row.
        dtype: Of the numbers as they are stored.
        metadata: What is known of their model, hook and data set, by SAELens' names.
        block_rows: Rows of each block: `BLOCK_ROWS`, or fewer at the end of a shard.

    Raises:
        ValueError: there are no shards, they differ in width or dtype, or rows are empty.
    """

    def __init__(
        self, name: str, shards: Sequence[Shard], metadata: Mapping[str, Any] | None = None
    ):
        if not shards:
            raise ValueError(f"{name} holds no shards: give files of {' or '.join(SUFFIXES)}.")
        first = shards[0]
        for shard in shards:
            if shard.d_in == 0:
                raise ValueError(f"{shard.name} holds rows without columns: d_in is 0.")
            for what, value, other in (
                ("columns", shard.d_in, first.d_in),
                ("numbers of type", _dtype_name(shard.dtype), _dtype_name(first.dtype)),
            ):
                if value != other:
                    raise ValueError(
                        f"{shard.name} and {first.name} differ: {what} {value} and {other}. All "
                        "shards need the same."
                    )
        self.name = name
        self.n_rows = sum(shard.n_rows for shard in shards)
        self.d_in = first.d_in
        self.dtype = first.dtype
        self.metadata = dict(metadata or {})
        self.shards = shards
        n_rows = np.array([shard.n_rows for shard in shards])
        n_blocks = -(-n_rows // BLOCK_ROWS)
        self._first_blocks = np.concatenate([[0], n_blocks.cumsum()])
        self.block_rows = np.full(self._first_blocks[-1], BLOCK_ROWS)
        is_filled = n_blocks > 0
        last_rows = (n_rows - (n_blocks - 1) * BLOCK_ROWS)[is_filled]
        self.block_rows[self._first_blocks[1:][is_filled] - 1] = last_rows
        self._open = lru_cache(_N_OPEN)(lambda i: shards[i].open())

    def read_block(self, block: int) -> Float[torch.Tensor, "rows d_in"]:
        """The rows of a block; they may share the file's memory, so don't change them.

        Raises:
            ValueError: a number is not finite, or the file is not what was written.
        """
        i = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        start = int(block - self._first_blocks[i]) * BLOCK_ROWS
        rows = self._open(i).read(start, start + int(self.block_rows[block]))
        check_finite(rows, self.shards[i].name, start)
        return rows

    def chunks(self, n_blocks: int) -> Iterator[Float[torch.Tensor, "rows d_in"]]:
        """All rows in the order of the shards, so many blocks at a time."""
        for start in range(0, len(self.block_rows), n_blocks):
            blocks = range(start, min(start + n_blocks, len(self.block_rows)))
            yield torch.cat([self.read_block(block) for block in blocks])


def open_activations(source: Any, column: str | None = None) -> Activations:
    """Open activations and check their headers.

    Args:
        source: A file or folder, a tensor or array or several of them, or a `datasets.Dataset`.
            Files are .npy or .safetensors; all dimensions but the last count as rows. A folder
            holds such files, what `sae-matryoshka cache` wrote, or a data set that
            `Dataset.save_to_disk` or SAELens' `CacheActivationsRunner` wrote.
        column: Of a data set; by default its only column of vectors.

    Raises:
        ValueError: it is missing, broken, or holds something else.
    """
    if isinstance(source, Activations):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _open_folder(path, column)
        if not path.is_file() or path.suffix not in SUFFIXES:
            raise ValueError(
                f"activations={str(source)!r} is not accepted: give an existing folder, or an "
                f"existing file of {' or '.join(SUFFIXES)}."
            )
        return Activations(str(path), [_shard_of_file(path)])
    if isinstance(source, Dataset):
        return _open_dataset(source, "the data set", column)
    tensors = [source] if isinstance(source, (torch.Tensor, np.ndarray)) else source
    if not isinstance(tensors, (list, tuple)):
        accepted = "a path, a tensor or array, a list of them, or a datasets.Dataset"
        raise invalid_option("activations", source, accepted)
    names = [f"activations[{i}]" for i in range(len(tensors))]
    if len(tensors) == 1:
        names = [_IN_MEMORY]
    shards = [
        _shard_of_rows(_MappedRows(name, torch.as_tensor(tensor)))
        for name, tensor in zip(names, tensors, strict=True)
    ]
    return Activations(_IN_MEMORY, shards)


def check_finite(rows: Float[torch.Tensor, "rows d_in"], name: str, start: int) -> None:
    """Check the rows of a shard from row `start` on.

    Raises:
        ValueError: a number is not finite; naming the shard and the row.
    """
    # a sum is faster than a test of each number; rows are tested only if it isn't finite
    if not math.isfinite(rows.sum(dtype=torch.float32).item()):
        broken = (~rows.isfinite().all(1)).nonzero()
        if len(broken):
            raise ValueError(f"{name}, row {start + broken[0].item()}: not finite.")


class _MappedRows:
    """Rows of a tensor, with a scale per row if they are int8, and the checksums of its blocks."""

    def __init__(
        self,
        name: str,
        values: Shaped[torch.Tensor, "... d_in"],
        scales: Float[torch.Tensor, "..."] | None = None,
        checksums: Int[torch.Tensor, " blocks"] | None = None,
    ):
        if values.ndim < 2:
            raise ValueError(
                f"{name} holds activations of shape {tuple(values.shape)}: give two dimensions or "
                "more, the last of them d_in."
            )
        if not (values.dtype in _DTYPES or (values.dtype == torch.int8 and scales is not None)):
            raise ValueError(
                f"{name} holds numbers of type {_dtype_name(values.dtype)}: give float32, float16, "
                "bfloat16, or in .safetensors int8 activations and their scales."
            )
        self.name = name
        self.values = values.detach().flatten(0, -2)
        self.scales = scales
        if scales is not None:
            self.scales = scales.flatten()
            if len(self.scales) != len(self.values) or values.dtype != torch.int8:
                raise ValueError(
                    f"{name} holds {len(self.scales)} scales for {len(self.values)} rows of type "
                    f"{_dtype_name(values.dtype)}: give one for each row of int8."
                )
        self.checksums = checksums

    def read(self, start: int, stop: int) -> Float[torch.Tensor, "rows d_in"]:
        stored = [self.values[start:stop]]
        if self.scales is not None:
            stored.append(self.scales[start:stop])
        if (
            self.checksums is not None
            and block_checksum(*stored) != self.checksums[start // BLOCK_ROWS]
        ):
            raise ValueError(
                f"{self.name}, rows {start} to {stop - 1}: not what was written, their checksum "
                f"differs. {REMEDY}"
            )
        values, *scales = stored
        return values.float() * scales[0].float()[:, None] if scales else values


def _map_file(path: Path) -> _MappedRows:
    """Map a file; ValueError if it is broken or holds something else."""
    try:
        if path.suffix == ".npy":
            # copy-on-write, since PyTorch warns of read-only memory
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            return _MappedRows(str(path), torch.from_numpy(array))
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # a broken file can raise anything
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} can't be read: {error}.") from error
    if len(names) != 1 and "activations" not in tensors:
        raise ValueError(
            f"{path} holds {len(names)} tensors: give one, or call the one to read 'activations'."
        )
    values = tensors.get("activations", tensors[names[0]])
    return _MappedRows(str(path), values, tensors.get("scales"), tensors.get("checksums"))


def _shard_of_rows(rows: _MappedRows) -> Shard:
    n_rows, d_in = rows.values.shape
    return Shard(rows.name, n_rows, d_in, rows.values.dtype, lambda: rows)


def _shard_of_file(path: Path) -> Shard:
    return _shard_of_rows(_map_file(path))._replace(open=partial(_map_file, path))


def _open_folder(path: Path, column: str | None) -> Activations:
    if (path / INDEX_FILENAME).is_file():
        return _open_cached(path)
    if any((path / name).is_file() for name in _DATASET_FILES):
        try:
            data = load_from_disk(path)
        except Exception as error:  # a broken file can raise anything
            raise ValueError(f"{path} can't be read: {error}.") from error
        if not isinstance(data, Dataset):
            raise ValueError(f"{path} holds the splits {', '.join(data)}: give one's folder.")
        return _open_dataset(data, str(path), column)
    files = [
        file
        for file in sorted(path.iterdir())
        if file.suffix in SUFFIXES and not file.name.startswith(".")
    ]
    return Activations(str(path), [_shard_of_file(file) for file in files])


def _open_cached(path: Path) -> Activations:
    """What `sae-matryoshka cache` wrote; only sizes are checked before blocks are read."""
    index = Index.read(path)
    dtype = getattr(torch, index.dtype)
    for shard in index.shards:
        shard.check_size(path)

    def open_checked(shard: ShardEntry) -> Rows:
        rows = _map_file(path / shard.name)
        checksums = rows.checksums
        if checksums is None or shard_checksum(checksums) != shard.checksum:
            raise ValueError(
                f"{rows.name} is not the shard that was written, its checksum differs. {REMEDY}"
            )
        return rows

    shards = [
        Shard(str(path / shard.name), shard.n_rows, index.d_in, dtype, partial(open_checked, shard))
        for shard in index.shards
    ]
    return Activations(str(path), shards, index.metadata)


class _DatasetRows:
    """Rows of a column of vectors, or of arrays whose last dimension is d_in."""

    def __init__(self, name: str, data: Dataset, column: str):
        self.name = f"{name}, column {column}"
        self._data = data.select_columns([column]).with_format("arrow")
        self._column = column
        values = self._values(0, 1)
        shape = np.shape(data.with_format(None)[0][column])
        if not shape or values.dtype.kind != "f":
            raise ValueError(f"{self.name} holds no vectors of numbers.")
        self._rows_per_item = int(np.prod(shape[:-1]))
        self.d_in = shape[-1]
        self.n_rows = len(data) * self._rows_per_item
        self.dtype = torch.from_numpy(values).dtype

    def read(self, start: int, stop: int) -> Float[torch.Tensor, "rows d_in"]:
        first, last = start // self._rows_per_item, -(-stop // self._rows_per_item)
        values = self._values(first, last)
        if len(values) != (last - first) * self._rows_per_item * self.d_in:
            raise ValueError(
                f"{self.name}, items {first} to {last - 1}: not all of the shape of the first one."
            )
        rows = torch.from_numpy(values).reshape(-1, self.d_in)
        return rows[start - first * self._rows_per_item :][: stop - start]

    def _values(self, first: int, last: int) -> np.ndarray[Any, Any]:
        """The numbers in these items, one after the other."""
        values = self._data[first:last][self._column].combine_chunks()
        while not pa.types.is_primitive(values.type):
            if isinstance(values.type, pa.BaseExtensionType):
                values = values.storage
            elif hasattr(values, "flatten") and pa.types.is_nested(values.type):
                values = values.flatten()
            else:
                raise ValueError(f"{self.name} holds no vectors of numbers.")
        return np.array(values.to_numpy(zero_copy_only=False))  # a copy that may be written to


def _open_dataset(data: Dataset, name: str, column: str | None) -> Activations:
    if len(data) == 0:
        raise ValueError(f"{name} is empty.")
    if column is None:
        columns = [c for c in data.column_names if _holds_vectors(data, c)]
        if len(columns) != 1:
            found = ", ".join(columns) or "none"
            raise ValueError(f"{name} needs one column of vectors of numbers; it has {found}.")
        column = columns[0]
    elif column not in data.column_names:
        raise ValueError(f"{name} holds no activations of {column}.")
    rows = _DatasetRows(name, data, column)
    # CacheActivationsRunner calls the column by its hook
    metadata = {"hook_name": column} if "." in column else {}
    shard = Shard(rows.name, rows.n_rows, rows.d_in, rows.dtype, lambda: rows)
    return Activations(name, [shard], metadata)


def _holds_vectors(data: Dataset, column: str) -> bool:
    try:
        _DatasetRows("", data, column)
    except ValueError:
        return False
    return True


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
