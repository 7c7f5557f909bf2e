"""One pass over the tokens: every shard is encoded, summed up and written, and the pass resumes."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from safetensors.numpy import load_file, save
from scipy import sparse
from tqdm.auto import tqdm

from sae_lens_matryoshka.levels.fingerprint import fingerprint
from sae_lens_matryoshka.levels.slicing import truncate
from sae_lens_matryoshka.tree.encoding import Encoder
from sae_lens_matryoshka.tree.gathered import (
    INDEX_FILENAME,
    Gathered,
    Index,
    ShardEntry,
    SparseArray,
    read_codes,
    shifted_pieces,
)
from sae_lens_matryoshka.tree.sources import Batch, Source, rows_per_shard
from sae_lens_matryoshka.util.files import atomic_file, check_writable


def as_inference(sae: SAE[Any]) -> SAE[Any]:
    """The SAE as it is saved, taking heads of hook_z flattened."""
    if isinstance(sae, TrainingSAE):
        sae = truncate(sae, sae.cfg.d_sae)
    sae = copy.copy(sae)  # shares the weights; the caller's goes on taking heads
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


@torch.no_grad()
def gather(sae: SAE[Any], source: Source, folder: Path, n_tokens: int) -> Gathered:
    """Encode tokens and sum up activations; a folder with the same settings is continued.

    Args:
        sae: An inference SAE, on the device to compute on.
        source: The activations.
        folder: Where to; a new or an empty folder, or one that a pass was interrupted in. Without
            any shard in it, the settings may be others.
        n_tokens: How many at most; fewer if the source ends before.

    Raises:
        ValueError: the folder holds something else, or there are no activations.
        OSError: a file can't be written; the shards before it are kept.
    """
    cfg = sae.cfg
    settings = {**source.settings, "n_tokens": n_tokens, "weights": fingerprint(sae)}
    index = _index_of(folder, Index(cfg.d_sae, cfg.d_in, settings))
    if index.is_complete:
        return Gathered(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index.write(folder)  # first: a folder with files but no index is refused
    encoder = Encoder(sae)
    batches = source.batches(sum(shard.n_batches for shard in index.shards))
    n_before = sum(shard.n_rows for shard in index.shards)
    with tqdm(
        desc="Gathering",
        total=n_tokens,
        initial=n_before,
        unit=" tokens",
        unit_scale=True,
        leave=False,
    ) as bar:
        n_left, n_rows = n_tokens - n_before, rows_per_shard(n_tokens, cfg.d_in)
        while n_left > 0 and (read := _read(batches, min(n_left, n_rows), n_left)):
            n_read = sum(len(batch.x) for batch in read)
            n_batches = len(read)
            if index.shards and index.shards[0].n_rows < n_rows:  # resumed
                n_batches = index.shards[0].n_batches
            elif not index.shards and n_read < n_rows:
                # a source that ends within the first shard: the shifted copy needs several
                n_batches = ceil(n_batches / 16)
            for i in range(0, len(read), n_batches):
                index = _add_shard(encoder, folder, index, read[i : i + n_batches], bar)
            n_left -= n_read
    if not index.shards:
        raise ValueError("there are no activations to build a tree from.")
    replace(index, is_complete=True).write(folder)
    return Gathered(folder)


def discard(gathered: Gathered) -> None:
    """Empty a folder, which the next pass may fill with other settings."""
    index, folder = gathered.index, gathered.folder
    Index(index.d_sae, index.d_in, index.settings).write(folder)  # first: names no file
    for name in (*(shard.name for shard in index.shards), index.sums):
        if name:
            (folder / name).unlink(missing_ok=True)


def _index_of(folder: Path, wanted: Index) -> Index:
    """The index to continue from."""
    check_writable("out", folder)
    if (folder / INDEX_FILENAME).is_file():
        written = Index.read(folder)
        if not written.shards:
            return wanted
        for name, value in wanted.settings.items():
            before = written.settings.get(name)
            if before != value:
                what = "another SAE" if name == "weights" else f"{name}={before!r}, not {value!r}"
                raise ValueError(f"{folder} was gathered with {what}: give another folder.")
        return written
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else: give a new or an empty folder.")
    return wanted


def _read(batches: Iterator[Batch], n_rows: int, n_most: int) -> list[Batch]:
    """The next whole batches with at least `n_rows` rows; the last is cut at `n_most`."""
    read: list[Batch] = []
    n_read = 0
    while n_read < n_rows and (batch := next(batches, None)) is not None:
        if n_read + len(batch.x) > n_most:
            n_kept = n_most - n_read
            positions = None if batch.positions is None else batch.positions[:n_kept]
            batch = batch._replace(x=batch.x[:n_kept], positions=positions)
        read.append(batch)
        n_read += len(batch.x)
    return read if n_read else []


def _add_shard(
    encoder: Encoder, folder: Path, index: Index, batches: list[Batch], bar: Any
) -> Index:
    """Encode batches, and write their codes, the new sums, and last the index."""
    x, codes = torch.cat([batch.x for batch in batches]), []
    for rows in x.split(encoder.n_rows):
        codes.append(encoder(rows))
        bar.update(len(rows))
    shard = cast(SparseArray, sparse.vstack(codes, format="csc"))
    shard.sort_indices()
    n_rows, i = shard.shape[0], len(index.shards)
    tensors = {
        "starts": shard.indptr.astype(np.int64),
        "rows": shard.indices.astype(np.int32),
        "values": shard.data.astype(np.float32),
    }
    texts = [b.tokens for b in batches if b.tokens is not None]
    if texts:
        positions = [b.positions for b in batches if b.positions is not None]
        starts = np.cumsum([0, *(text.size for text in texts[:-1])])
        tensors["tokens"] = np.concatenate(texts)
        tensors["positions"] = np.concatenate(
            [places + start for places, start in zip(positions, starts, strict=True)],
            dtype=np.int32,
        )
    entry = ShardEntry(f"{i:05}.safetensors", n_rows, len(batches))
    grown = replace(index, sums=f"sums-{i + 1:05}.safetensors", shards=[*index.shards, entry])
    assert grown.sums is not None
    try:
        _write(folder / entry.name, tensors)
        _write(folder / grown.sums, _new_sums(folder, index, grown, shard, x))
        grown.write(folder)
        if index.sums:
            (folder / index.sums).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"{folder} can't be written to: {error}. The {i} shards before are whole; the same "
            "command resumes after them."
        ) from error
    return grown


def _new_sums(
    folder: Path, before: Index, after: Index, codes: SparseArray, x: torch.Tensor
) -> dict[str, np.ndarray]:
    """The sums with another shard's, whose activations are `x`."""
    sums: dict[str, np.ndarray]
    if before.sums:
        sums = load_file(folder / before.sums)
    else:
        shape = (before.d_sae, before.d_in)
        sums = {name: np.zeros(shape, np.float32) for name in ("sums", "shifted")}
        sums["total"] = np.zeros(before.d_in)
    sums["total"] += x.double().sum(0).cpu().numpy()
    sums["sums"] += _sums_where_firing(codes, x)
    i = len(before.shards)
    if i:  # rows beside the end of the data, which is not read yet, are left out
        lengths = [shard.n_rows for shard in after.shards]
        for piece in shifted_pieces(lengths, lengths[0]):
            if piece.shard == i:
                shifted = read_codes(folder, after, piece.shifted_shard)
                stop = piece.shifted_start + piece.n_rows
                rows = x[piece.start : piece.start + piece.n_rows]
                sums["shifted"] += _sums_where_firing(shifted[piece.shifted_start : stop], rows)
    return sums


def _sums_where_firing(codes: SparseArray, x: torch.Tensor) -> Float[np.ndarray, "d_sae d_in"]:
    """Σ x over the rows where each latent fires."""
    starts, rows = (torch.from_numpy(a.astype(np.int64)) for a in (codes.indptr, codes.indices))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that sparse tensors are in beta state
        fires = torch.sparse_csr_tensor(
            starts, rows, torch.ones(len(rows)), size=codes.shape[::-1], check_invariants=False
        )
    return (fires.to(x.device) @ x).cpu().numpy()


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    with atomic_file(path) as unfinished:  # not `save_file`, whose error is no OSError
        unfinished.write_bytes(data)
