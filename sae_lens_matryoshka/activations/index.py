"""`activations.json`: what `sae-matryoshka cache` has written to a folder, with checksums.

A shard holds a checksum of each block of its rows, and the index a checksum of these checksums. So
blocks are checked as they are read, and a shard that was swapped as soon as it is opened.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors.torch import save
from xxhash import xxh3_64

from sae_lens_matryoshka.util.files import atomic_file

INDEX_FILENAME = "activations.json"
BLOCK_ROWS = 256  # rows that are read and checked together
# What SAELens copies from a run's config to the metadata of its SAE
METADATA_FIELDS = (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "hook_name",
    "hook_head_index",
    "dataset_path",
    "context_size",
    "seqpos_slice",
    "prepend_bos",
    "exclude_special_tokens",
    "sequence_separator_token",
    "disable_concat_sequences",
)
_FORMAT_VERSION = 1
REMEDY = (
    "Restore the file, or delete it and run the same `cache` again, which writes this one anew."
)


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was written.

    Attributes:
        name: File name in the folder.
        n_rows: Number of rows.
        n_batches: Whole batches of prompts that these come from.
        n_bytes: Size of the file.
        checksum: `shard_checksum` of its `checksums`.
    """

    name: str
    n_rows: int
    n_batches: int
    n_bytes: int
    checksum: str

    def check_size(self, folder: Path) -> None:
        """Check that the file in a folder has its size; ValueError says what to do otherwise."""
        path = folder / self.name
        n_bytes = path.stat().st_size if path.is_file() else 0
        if n_bytes != self.n_bytes:
            raise ValueError(
                f"{path} holds {n_bytes:,} bytes of the {self.n_bytes:,} that were written. "
                f"{REMEDY}"
            )


@dataclass
class Index:
    """The shards of a folder, and where their rows come from.

    Attributes:
        d_in: Width of a row.
        dtype: "float32", "float16", "bfloat16" or "int8".
        metadata: `METADATA_FIELDS` of the run that they come from.
        settings: Other settings that the rows depend on.
        shards: In their order.
    """

    d_in: int
    dtype: str
    metadata: dict[str, Any]
    settings: dict[str, Any]
    shards: list[ShardEntry] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        return sum(shard.n_rows for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Replace the folder's index, all or nothing."""
        text = json.dumps({"format_version": _FORMAT_VERSION, **asdict(self)}, indent=1)
        with atomic_file(folder / INDEX_FILENAME) as path:
            path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """The index of a folder.

        Raises:
            ValueError: it is broken, or of a later version of this package.
        """
        path = folder / INDEX_FILENAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format_version")
            if version != _FORMAT_VERSION:
                raise ValueError(f"its format_version is {version!r}, not {_FORMAT_VERSION}")
            shards = [ShardEntry(**shard) for shard in values.pop("shards")]
            return cls(**values, shards=shards)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} can't be read: {error}.") from error


def write_shard(
    folder: Path, index: Index, i: int, tensors: Mapping[str, torch.Tensor], n_batches: int
) -> Index:
    """Write a shard, and then the index.

    Args:
        folder: Where to.
        index: What it holds before.
        i: Place of the shard, one of those in `index` or the next one.
        tensors: The rows of the shard, as `activations`, and as `scales` if they are int8.
        n_batches: Batches of prompts that the rows come from.

    Returns:
        What the folder holds now.

    Raises:
        OSError: a file can't be written; the folder holds what it held before.
    """
    checksums = block_checksums(*tensors.values())
    # not `save_file`, whose error for a full disk is no OSError
    data = save({**tensors, "checksums": checksums})
    path = folder / f"{i:05}.safetensors"
    n_rows = len(tensors["activations"])
    shard = ShardEntry(path.name, n_rows, n_batches, len(data), shard_checksum(checksums))
    index = replace(index, shards=[*index.shards[:i], shard, *index.shards[i + 1 :]])
    try:
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(data)
        index.write(folder)
    except OSError as error:
        raise OSError(
            f"{path} can't be written: {error}. The {i} shards before it are whole; the same "
            "command resumes after them."
        ) from error
    return index


def block_checksum(*tensors: Shaped[torch.Tensor, "rows ..."]) -> int:
    """A checksum of the bytes of contiguous tensors, as a signed integer of 64 bits."""
    checksum = xxh3_64()
    for tensor in tensors:
        checksum.update(tensor.view(torch.uint8).numpy().data)
    return int(np.uint64(checksum.intdigest()).astype(np.int64))


def block_checksums(*tensors: Shaped[torch.Tensor, "rows ..."]) -> Int[torch.Tensor, " blocks"]:
    """The checksum of each block of `BLOCK_ROWS` rows."""
    blocks = zip(*(tensor.split(BLOCK_ROWS) for tensor in tensors), strict=True)
    return torch.tensor([block_checksum(*block) for block in blocks], dtype=torch.int64)


def shard_checksum(checksums: Int[torch.Tensor, " blocks"]) -> str:
    """The checksum of a shard from those of its blocks."""
    return xxh3_64(checksums.numpy().data).hexdigest()
