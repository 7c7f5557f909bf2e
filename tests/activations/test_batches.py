"""Batches: their order, its quality, resuming, several processes, and what ends them."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_lens_matryoshka.activations import batches as module
from sae_lens_matryoshka.activations.batches import (
    ActivationBatches,
    ActivationsEnded,
    rows_per_buffer,
)
from sae_lens_matryoshka.activations.index import BLOCK_ROWS

D_IN = 4
SHARDS = (1000, 7, 0, 2500, 256)  # rows of each
N_ROWS = sum(SHARDS)


def numbered(n: int = N_ROWS, first: int = 0) -> torch.Tensor:
    """Rows that hold their own number."""
    return torch.arange(first, first + n, dtype=torch.float32)[:, None].repeat(1, D_IN)


def shards() -> list[torch.Tensor]:
    return list(numbered().split(SHARDS))


class Again:
    """An iterable that can be read again, of tensors as in `shards`."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(shards())


SOURCES = {"shards": shards, "iterable": Again}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of three blocks, so that an epoch has several."""
    monkeypatch.setattr(module, "_BUFFER_ELEMENTS", 3 * BLOCK_ROWS * D_IN)


def drawn(source: Any, batch_size: int, n: int, **options: Any) -> torch.Tensor:
    """The numbers of the rows in the next `n` batches: (n, batch_size)."""
    if not isinstance(source, ActivationBatches):
        source = ActivationBatches(source, batch_size, **options)
    batches = [next(source) for _ in range(n)]
    assert all(batch.shape == (batch_size, D_IN) for batch in batches)
    assert all((batch == batch[:, :1]).all() for batch in batches)
    return torch.stack(batches)[:, :, 0].long()


@pytest.mark.parametrize("name", SOURCES)
def test_every_epoch_has_each_row_once_in_another_order(name: str) -> None:
    order = drawn(SOURCES[name](), 53, 3 * N_ROWS // 53 + 1).flatten()
    epochs = [order[i * N_ROWS :][:N_ROWS] for i in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(N_ROWS))
    assert not any(torch.equal(epochs[i], epochs[i + 1]) for i in range(2))


@pytest.mark.parametrize("name", SOURCES)
def test_order_is_of_the_seed_alone(name: str, tmp_path: Path) -> None:
    order = drawn(SOURCES[name](), 100, 20, seed=3)
    assert torch.equal(order, drawn(SOURCES[name](), 100, 20, seed=3))
    assert torch.equal(order.flatten(), drawn(SOURCES[name](), 50, 40, seed=3).flatten())
    assert not torch.equal(order, drawn(SOURCES[name](), 100, 20, seed=4))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    drawn(SOURCES[name](), 100, 20)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_batches_have_the_dtype_asked_for_and_memory_of_their_own(dtype: torch.dtype) -> None:
    batches = ActivationBatches(numbered(256).to(torch.float16), 256, dtype=dtype)
    first, second = next(batches), next(batches)
    assert first.dtype == second.dtype == dtype
    first.zero_()
    assert second.sum() > 0
    assert next(batches).sum() > 0


def test_int8_becomes_floating(tmp_path: Path) -> None:
    values = torch.arange(-100, 100).to(torch.int8)[:, None].repeat(1, D_IN)
    scales = torch.rand(200)
    save_file({"activations": values, "scales": scales}, tmp_path / "x.safetensors")
    batch = next(ActivationBatches(tmp_path, 200, dtype=torch.float32))
    expected = values[:, 0] * scales
    assert torch.equal(batch[:, 0].sort().values, expected.sort().values)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(SOURCES)),
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=2),
    n_before=st.integers(0, 40),
    ranks=st.lists(st.integers(1, 4), min_size=2, max_size=2),
)
def test_resuming_at_any_row_with_any_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    sizes: list[int],
    n_before: int,
    ranks: list[int],
) -> None:
    """From any position, R processes draw together what one would have drawn."""
    path = tmp_path_factory.mktemp("checkpoint")
    (size, resumed_size), (world, resumed_world) = sizes, ranks
    position = n_before * size * world
    first = ActivationBatches(SOURCES[name](), size, seed=1, rank=world - 1, world_size=world)
    for _ in range(n_before):
        next(first)
    assert first.position == position
    first.save_to_checkpoint(path)

    joined, n = resumed_size * resumed_world, 3
    parts = []
    for rank in range(resumed_world):
        batches = ActivationBatches(
            SOURCES[name](), resumed_size, seed=1, rank=rank, world_size=resumed_world
        )
        batches.load_from_checkpoint(path)
        batches.load_from_checkpoint(path)  # SAELens' runner does it once more
        parts.append(drawn(batches, resumed_size, n))
        assert batches.position == position + n * joined
    together = torch.cat(parts, dim=1).flatten()

    whole = ActivationBatches(SOURCES[name](), 1000, seed=1)
    needed = -(-(position + n * joined) // 1000)
    expected = drawn(whole, 1000, needed).flatten()[position : position + n * joined]
    assert torch.equal(together, expected)


def test_resuming_reads_only_the_buffer_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = ActivationBatches(numbered(100 * BLOCK_ROWS), 64)
    read = []
    source: Any = batches._source
    read_block = source._activations.read_block
    monkeypatch.setattr(
        source._activations, "read_block", lambda block: (read.append(block), read_block(block))[1]
    )
    batches.position = 50 * BLOCK_ROWS
    rows = next(batches._order.rows(batches.position))
    assert len(read) <= 2 * 3
    assert len(rows) == BLOCK_ROWS, "the first two blocks of the buffer come before the position"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_joined_batch_is_split_in_order(world_size: int) -> None:
    joined = drawn(shards(), 60, 5)
    size = 60 // world_size
    for rank in range(world_size):
        part = drawn(shards(), size, 5, rank=rank, world_size=world_size)
        assert torch.equal(part, joined[:, rank * size : (rank + 1) * size])


def test_shuffle_mixes_all_shards_and_separates_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/activations.md, on a file 20 times the buffer, d_in = 768 there."""
    n_buffer = 2**26 // 768
    monkeypatch.setattr(module, "_BUFFER_ELEMENTS", n_buffer)
    n_rows = 20 * n_buffer // BLOCK_ROWS * BLOCK_ROWS
    batch_size = 4096
    x = torch.arange(n_rows, dtype=torch.float64)[:, None]
    source = ActivationBatches(x, batch_size, dtype=torch.float64)
    batch = torch.stack([next(source)[:, 0] for _ in range(n_rows // batch_size + 1)]).long()
    order, batch = batch.flatten()[:n_rows], batch[:-1]  # the last one begins another epoch

    of_a_block = torch.stack([torch.bincount(b // BLOCK_ROWS).max() for b in batch]).double()
    assert of_a_block.max() / batch_size < 0.01  # 1/341 on average
    # the rows of a batch come from all over the file: their mean place is the middle
    spread = batch.double().mean(1) / n_rows
    assert (spread - 0.5).abs().max() < 0.06
    assert batch.double().std(1).div(n_rows).sub(12**-0.5).abs().max() < 0.03

    place = torch.empty(n_rows, dtype=torch.long)
    place[order] = torch.arange(n_rows)
    step = (place[1:] - place[:-1]).abs()
    inside = torch.arange(n_rows - 1) % BLOCK_ROWS != BLOCK_ROWS - 1
    # rows of one block stay in one buffer, a third of its length apart on average
    assert step[inside].double().mean() == pytest.approx(n_buffer / 3, rel=0.02)
    # the last row of a block and the first of the next one: a third of the epoch apart
    assert step[~inside].double().mean() == pytest.approx(n_rows / 3, rel=0.05)
    assert (step == 1).double().mean() < 1e-4, "neighbours on disk are no neighbours in an epoch"


def test_small_shards_are_shuffled_as_far_as_large_ones() -> None:
    order = drawn(list(numbered().split(2)), 64, N_ROWS // 64).flatten()
    assert (order[:64] - order[:64].float().mean()).abs().max() > N_ROWS / 3
    buffer = order[: rows_per_buffer(D_IN)]
    assert len((buffer // 2).unique()) <= len(buffer) / 2 + 1, "whole blocks of two rows"
    assert ((buffer[1:] - buffer[:-1]).abs() == 1).float().mean() < 0.01


@pytest.mark.parametrize("name", SOURCES)
def test_memory_is_bounded(name: str) -> None:
    batches = ActivationBatches(SOURCES[name](), 64)
    pointers, rows = set(), batches._order.rows(0)
    for _ in range(20):
        part = next(rows)
        assert len(part) < rows_per_buffer(D_IN) + BLOCK_ROWS
        pointers.add(part.data_ptr())
    assert len(pointers) <= 4, "two buffers, each grown once"
    assert rows_per_buffer(10**9) == BLOCK_ROWS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not accepted: give a positive integer"),
        ({"batch_size": 1001}, r"holds 1,000 rows, fewer than a batch of 1,001"),
        ({"batch_size": 501, "world_size": 2}, r"fewer than a batch of 1,002"),
        ({"seed": -1}, "seed=-1 is not accepted"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not accepted: give a number below world_size=2"),
    ],
)
def test_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationBatches(numbered(1000), **{"batch_size": 10, **options})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: iter([]), "the iterable of activations is empty"),
        (lambda: iter(["a"]), "item 0 of the activations='a' is not accepted: give a tensor"),
        (lambda: iter([torch.ones(3)]), r"shape \(3,\): give two dimensions"),
        (lambda: 3, "activations=3 is not accepted"),
    ],
)
def test_source_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationBatches(source(), 10)


def test_generator_that_ends_is_named() -> None:
    batches = ActivationBatches(iter(shards()), 1000)
    order = torch.cat([next(batches)[:, 0] for _ in range(3)])
    assert len(order.unique()) == 3000
    for _ in range(2):  # and no StopIteration afterwards
        with pytest.raises(ActivationsEnded, match=r"ended after 3,763 rows, before the training"):
            next(batches)
    assert batches.position == 3000


def test_generator_can_not_be_resumed(tmp_path: Path) -> None:
    batches = ActivationBatches(iter(shards()), 1000)
    next(batches)
    batches.save_to_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="can't be read again, so no run can be resumed with it"):
        ActivationBatches(iter(shards()), 1000).load_from_checkpoint(tmp_path)
    again = ActivationBatches(Again(), 1000)
    again.load_from_checkpoint(tmp_path)
    assert torch.equal(next(again), next(batches))


def test_checkpoint_of_other_activations_is_refused(tmp_path: Path) -> None:
    ActivationBatches(numbered(1000), 10, seed=1).save_to_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"was trained with n_rows=1000, and .* has n_rows=999"):
        ActivationBatches(numbered(999), 10, seed=1).load_from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"was trained with seed=1, and .* has seed=2"):
        ActivationBatches(numbered(1000), 10, seed=2).load_from_checkpoint(tmp_path)
    state = {"n_dataset_processed": torch.tensor(3)}
    save_file(state, tmp_path / "activations_store_state.safetensors")
    with pytest.raises(ValueError, match="was trained on a model's activations, not on the act"):
        ActivationBatches(numbered(1000), 10).load_from_checkpoint(tmp_path)


def test_error_in_the_thread_reaches_the_caller_each_time() -> None:
    x = numbered(1000)
    x[400, 2] = torch.nan
    batches = ActivationBatches(x, 100)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the activations, row 400: not finite\."):
            next(batches)
    assert batches.position == 0


def test_a_generator_is_not_read_on_after_an_error() -> None:
    broken = numbered(100)
    broken[4, 2] = torch.nan
    batches = ActivationBatches(iter([broken, *[numbered(100)] * 3]), 100)
    for _ in range(2):
        with pytest.raises(ValueError, match="row 4: not finite"):
            next(batches)


def test_an_iterable_of_one_generator_is_read_once() -> None:
    class Once:
        def __init__(self) -> None:
            self.tensors = iter([numbered(100)] * 3)

        def __iter__(self) -> Iterator[torch.Tensor]:
            return self.tensors

    batches = ActivationBatches(Once(), 100)
    assert torch.cat([next(batches) for _ in range(3)]).sum() == 3 * numbered(100).sum()
    with pytest.raises(ActivationsEnded, match="ended after 300 rows"):
        next(batches)


def test_threads_end_with_the_batches() -> None:
    before = set(threading.enumerate())
    batches = ActivationBatches(numbered(1000), 100)
    next(batches)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    del batches
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_batches_left_to_the_garbage_collector_block_nothing() -> None:
    """They may be collected in any thread, such as one that is starting another thread."""
    threshold = gc.get_threshold()
    gc.set_threshold(50)
    try:
        for _ in range(60):
            batches: Any = ActivationBatches(numbered(1000), 100)
            batches.itself = batches
            next(batches)
    finally:
        gc.set_threshold(*threshold)


def test_widths_in_an_iterable_are_compared() -> None:
    source = iter([np.zeros((300, 4), np.float32), np.zeros((300, 5), np.float32)])
    with pytest.raises(ValueError, match="has 5 columns, and the first one 4"):
        drawn(source, 200, 4)
