"""Rows per second that training reads from disk, beside a plain read of the same file in its order.

    python benchmarks/reading.py

Both turn rows of width 768 into float32 batches of 4,096. The plain read takes memory-mapped
float16 files from their start to their end; `ActivationBatches` reads them shuffled, checks that
all numbers are finite, and prefetches. Turns alternate, and the table holds the median of each.
What is measured is the reading, not the disk: the files, 1 GB, fit into the page cache.
"""

import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from sae_lens_matryoshka.activations.batches import ActivationBatches
from sae_lens_matryoshka.activations.caching import stored
from sae_lens_matryoshka.activations.index import Index, write_shard
from sae_lens_matryoshka.util.markdown import markdown_table

D_IN, BATCH, N_SHARDS, N_ROWS = 768, 4096, 3, 21 * 4096
N_BATCHES = N_SHARDS * N_ROWS // BATCH  # of an epoch, which is a turn


def plain(folder: Path) -> Iterator[torch.Tensor]:
    while True:
        for path in sorted(folder.iterdir()):
            rows = torch.from_numpy(np.load(path, mmap_mode="c"))
            yield from (batch.float() for batch in rows.split(BATCH))


def write(folder: Path) -> dict[str, Iterator[torch.Tensor]]:
    """Write the same rows in several ways, and open them."""
    generator = torch.Generator().manual_seed(0)
    for name in ("npy", "float16", "int8"):
        (folder / name).mkdir()
    indices = {dtype: Index(D_IN, dtype, {}, {}) for dtype in ("float16", "int8")}
    for i in range(N_SHARDS):
        rows = torch.randn(N_ROWS, D_IN, generator=generator)
        np.save(folder / "npy" / f"{i}.npy", rows.half().numpy())
        for dtype, index in indices.items():
            indices[dtype] = write_shard(folder / dtype, index, i, stored(rows, dtype), 1)
    return {
        "plain read, float16": plain(folder / "npy"),
        "float16 in .npy": ActivationBatches(folder / "npy", BATCH),
        "float16 from `cache`, with checksums": ActivationBatches(folder / "float16", BATCH),
        "int8 from `cache`, with checksums": ActivationBatches(folder / "int8", BATCH),
        "float16 in .npy, one of 4 processes": ActivationBatches(
            folder / "npy", BATCH, rank=1, world_size=4
        ),
    }


def rows_per_second(batches: Iterator[torch.Tensor]) -> float:
    start = time.perf_counter()
    for batch in islice(batches, N_BATCHES):
        assert batch.shape == (BATCH, D_IN)
    return N_BATCHES * BATCH / (time.perf_counter() - start)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        readers = write(Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(args.turns + 1):
            for name, batches in readers.items():
                rates[name].append(rows_per_second(batches))
    cells = [
        [name, *(f"{f(rate[1:]):,.0f}" for f in (statistics.median, min, max))]  # first: warm-up
        for name, rate in rates.items()
    ]
    print(markdown_table(["rows per second", "median", "least", "most"], cells))
    print(f"\n{torch.get_num_threads()} threads of PyTorch, {args.turns} turns")


if __name__ == "__main__":
    main()
