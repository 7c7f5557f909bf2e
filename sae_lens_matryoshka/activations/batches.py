"""Shuffled batches of activations, prefetched, and resumable to the row.

The order of all rows in an epoch depends on the seed and the epoch alone. Blocks of 256 rows, which
are neighbours on disk, come in random order over all shards. Some hundred blocks that follow each
other in that order fill a buffer, whose rows are shuffled. So the position in the order is all that
a resumption needs: it starts with the buffer that holds it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from typing_extensions import override

from sae_lens_matryoshka.activations.index import BLOCK_ROWS
from sae_lens_matryoshka.activations.shards import Activations, open_activations
from sae_lens_matryoshka.util.checks import checked_count, invalid_option

STATE_FILENAME = "activations_store_state.safetensors"  # SAELens' name
_BUFFER_ELEMENTS = 2**26  # numbers in a buffer: 87,381 rows of width 768
_N_PREFETCHED = 2  # batches that wait

T = TypeVar("T")


class ActivationsEnded(RuntimeError):
    """An iterator from Python ended before the training did."""


class Buffer(NamedTuple):
    """Blocks that are shuffled together.

    Attributes:
        start: Place of its first row in the order of the epoch.
        block_rows: Rows of each block.
        blocks: Reads the blocks.
    """

    start: int
    block_rows: list[int]
    blocks: Iterable[Float[torch.Tensor, "rows d_in"]]


class ActivationBatches(Iterator[torch.Tensor]):
    """Endless shuffled batches, which SAELens' runner and trainer take for an activation store.

    Each epoch has another order. A batch that begins at the end of an epoch is filled from the next
    one, so that every row is used once per epoch. Of R processes, each gets B rows of the R·B that
    one process with that batch size would get, rank r those from r·B to (r+1)·B. A checkpoint holds
    the position in rows of all processes, so a resumed run may have another number of them.

    An iterable of tensors is read in its order, in buffers that are shuffled: resuming reads it
    from the start, which needs an iterable that can be read again, so no generator.

    Args:
        source: What `open_activations` takes, or an iterable of tensors (…, d_in).
        batch_size: Rows of a batch, B.
        seed: Of the order, 0 or more.
        device: Where batches are put.
        dtype: Of the batches.
        rank: This process, from 0.
        world_size: Number of processes, R.

    Attributes:
        d_in: Width of a row.
        n_rows: Number of rows; None for an iterable.
        position: Rows that all processes have drawn since the first epoch began.

    Raises:
        ValueError: `source` can't be read, or is smaller than a batch of all processes; when
            drawing, a number is not finite or a shard is not what was written.
        ActivationsEnded: when drawing, an iterator that can't be read again ended.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
    ):
        checked_count("batch_size", batch_size)
        self.seed = checked_count("seed", seed, 0)
        checked_count("world_size", world_size)
        checked_count("rank", rank, 0)
        if rank >= world_size:
            raise invalid_option("rank", rank, f"a number below world_size={world_size}")
        self._source = source = (
            _Stream(source) if _is_stream(source) else _Shuffled(open_activations(source))
        )
        self.d_in, self.n_rows = source.d_in, source.n_rows
        self.name, self.metadata = source.name, source.metadata
        self._step = batch_size * world_size
        if self.n_rows is not None and self.n_rows < self._step:
            raise ValueError(
                f"{self.name} holds {self.n_rows:,} rows, fewer than a batch of {self._step:,} "
                "(train_batch_size_tokens)."
            )
        # A separate object: if the prefetching thread referred to `self`, it would keep it alive.
        self._order = _Order(
            source, batch_size, self.seed, torch.device(device), dtype, rank, world_size
        )
        self.position = 0
        self._batches: Iterator[torch.Tensor] | None = None
        self._error: BaseException | None = None  # after which a generator can't be read on

    @override
    def __next__(self) -> Float[torch.Tensor, "batch d_in"]:
        if self._error is not None:
            raise self._error
        if self._batches is None:
            self._batches = _ahead(self._order.batches(self.position), _N_PREFETCHED)
        try:
            batch = next(self._batches)
        except BaseException as error:
            self._batches = None  # so that the next call meets the same error
            self._error = None if self._source.is_rereadable else error
            raise
        self.position += self._step
        return batch

    def save_to_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Write the position to a folder, in the file that SAELens' store uses."""
        epoch, row = divmod(self.position, self.n_rows) if self.n_rows else (0, self.position)
        state = {"epoch": epoch, "row": row, "n_rows": self.n_rows or 0, "seed": self.seed}
        tensors = {name: torch.tensor(value) for name, value in state.items()}
        save_file(tensors, Path(checkpoint_path) / STATE_FILENAME)

    def load_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Continue at the position in a folder.

        Raises:
            ValueError: the checkpoint is of other activations or another seed, or `source` is an
                iterator that can't be read again.
        """
        state = {
            name: int(value)
            for name, value in load_file(Path(checkpoint_path) / STATE_FILENAME).items()
        }
        if "row" not in state:
            raise ValueError(
                f"{checkpoint_path} was trained on a model's activations, not on {self.name}: "
                "resume it without activations."
            )
        for name, value in (("n_rows", self.n_rows or 0), ("seed", self.seed)):
            if state[name] != value:
                raise ValueError(
                    f"{checkpoint_path} was trained with {name}={state[name]}, and {self.name} has "
                    f"{name}={value}: it can't be resumed with them."
                )
        position = state["epoch"] * state["n_rows"] + state["row"]
        has_begun = position != self.position or self._batches is not None
        if has_begun and not self._source.is_rereadable:
            raise ValueError(
                f"{self.name} can't be read again, so no run can be resumed with it: give one that "
                "can, such as a list."
            )
        self.position, self._batches = position, None


@dataclass(frozen=True)
class _Order:
    """The batches of one rank; its fields are those of `ActivationBatches`."""

    source: "_Shuffled | _Stream"
    batch_size: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int

    def batches(self, position: int) -> Iterator[Float[torch.Tensor, "batch d_in"]]:
        """The batches of this rank from a position on."""
        n_filled, is_pinned = 0, self.device.type == "cuda"
        batch = torch.empty(0)
        for part in _ahead(self.rows(position), 1):
            n_read = 0
            while n_read < len(part):
                if n_filled == 0:
                    shape = self.batch_size, self.source.d_in
                    batch = torch.empty(shape, dtype=part.dtype, pin_memory=is_pinned)
                n = min(len(part) - n_read, self.batch_size - n_filled)
                batch[n_filled : n_filled + n] = part[n_read : n_read + n]
                n_read, n_filled = n_read + n, n_filled + n
                if n_filled == self.batch_size:
                    n_filled = 0
                    # in this order fewer bytes go to the device
                    yield batch.to(self.device).to(self.dtype)

    def rows(self, position: int) -> Iterator[Float[torch.Tensor, "rows d_in"]]:
        """The rows of this rank from a position on, a buffer at a time, shuffled.

        The memory of a buffer is used again for the next but one.
        """
        memory = [torch.empty(0, self.source.d_in, dtype=self.source.dtype)] * 2
        n_total = self.source.n_rows
        epoch, start = divmod(position, n_total) if n_total else (0, position)
        n_before = 0  # rows of all ranks since `position`
        while True:
            stop = 0
            for buffer in self.source.buffers(self.seed, epoch):
                n_rows = sum(buffer.block_rows)
                stop = buffer.start + n_rows
                if stop <= start:
                    continue
                order = _permutation(n_rows, self.seed, epoch, buffer.start + 1)
                order = order[max(0, start - buffer.start) :]
                count = np.arange(n_before, n_before + len(order))
                n_before += len(order)
                order = order[count // self.batch_size % self.world_size == self.rank]
                memory.reverse()
                if len(memory[0]) < len(order):
                    memory[0] = memory[0].new_empty(len(order), self.source.d_in)
                yield _gather(buffer, order, memory[0])
            epoch, start = epoch + 1, max(0, start - stop)


class _Shuffled:
    """Activations in shards, their blocks in another order for each epoch."""

    is_rereadable = True

    def __init__(self, activations: Activations):
        self._activations = activations
        self.name, self.metadata = activations.name, activations.metadata
        self.d_in, self.n_rows = activations.d_in, activations.n_rows
        # int8 is read with its scales
        self.dtype = torch.float32 if activations.dtype == torch.int8 else activations.dtype

    def buffers(self, seed: int, epoch: int) -> Iterator[Buffer]:
        activations = self._activations
        order = _permutation(len(activations.block_rows), seed, epoch)
        stops = activations.block_rows[order].cumsum()
        is_last = np.diff((stops - 1) // rows_per_buffer(self.d_in)) > 0
        start = 0
        for blocks in np.split(order, is_last.nonzero()[0] + 1):
            blocks.sort()  # files are read faster in their own order
            block_rows = activations.block_rows[blocks].tolist()
            yield Buffer(start, block_rows, map(activations.read_block, blocks))
            start += sum(block_rows)


class _Stream:
    """An iterable of tensors, in buffers in its own order."""

    name = "the iterable of activations"
    n_rows = None

    def __init__(self, tensors: Iterable[Any]):
        self._n_read = 0
        iterator = iter(tensors)
        self.is_rereadable = iter(tensors) is not iterator
        try:
            first = next(iterator)
        except StopIteration:
            raise ValueError(f"{self.name} is empty.") from None
        self._tensors = tensors if self.is_rereadable else chain([first], iterator)
        opened = _opened(first, 0)
        self.d_in, self.dtype, self.metadata = opened.d_in, opened.dtype, opened.metadata

    def buffers(self, seed: int, epoch: int) -> Iterator[Buffer]:
        start = n_rows = 0
        n_read_before = self._n_read
        blocks: list[torch.Tensor] = []
        for block in self._blocks():
            blocks.append(block)
            n_rows += len(block)
            if n_rows >= rows_per_buffer(self.d_in):
                yield _buffer_of(blocks, start)
                start, n_rows, blocks = start + n_rows, 0, []
        if blocks:
            yield _buffer_of(blocks, start)
        if not self.is_rereadable or self._n_read == n_read_before:
            raise ActivationsEnded(
                f"{self.name} ended after {self._n_read:,} rows, before the training did: give "
                "more, fewer training_tokens, or an iterable that can be read again, such as a "
                "list."
            )

    def _blocks(self) -> Iterator[Float[torch.Tensor, "rows d_in"]]:
        for i, tensor in enumerate(self._tensors):
            opened = _opened(tensor, i)
            if opened.d_in != self.d_in:
                raise ValueError(
                    f"{opened.name} has {opened.d_in} columns, and the first one {self.d_in}."
                )
            for block in map(opened.read_block, range(len(opened.block_rows))):
                self._n_read += len(block)
                yield block


def rows_per_buffer(d_in: int) -> int:
    """About how many rows are shuffled together: as many as hold 2^26 numbers."""
    return max(BLOCK_ROWS, _BUFFER_ELEMENTS // d_in)


def _gather(
    buffer: Buffer, order: np.ndarray[Any, Any], memory: torch.Tensor
) -> Float[torch.Tensor, "rows d_in"]:
    """The rows of a buffer with these numbers, in this order, in `memory`."""
    place = np.full(sum(buffer.block_rows), -1)
    place[order] = np.arange(len(order))
    places = torch.from_numpy(place).split(buffer.block_rows)
    for block, where in zip(buffer.blocks, places, strict=True):
        if len(order) < len(place):  # the other rows are of other ranks, or were read before
            block, where = block[where >= 0], where[where >= 0]
        memory.index_copy_(0, where, block.to("cpu", memory.dtype))
    return memory[: len(order)]


def _permutation(n: int, *seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).permutation(n)


def _buffer_of(blocks: list[torch.Tensor], start: int) -> Buffer:
    return Buffer(start, [len(block) for block in blocks], blocks)


def _opened(tensor: Any, i: int) -> Activations:
    if not isinstance(tensor, (torch.Tensor, np.ndarray)):
        raise invalid_option(f"item {i} of the activations", tensor, "a tensor or an array")
    return open_activations(tensor)


def _is_stream(source: Any) -> bool:
    known = str, Path, Dataset, torch.Tensor, np.ndarray, list, tuple
    return isinstance(source, Iterable) and not isinstance(source, known)


def _ahead(items: Iterator[T], n: int) -> Iterator[T]:
    """The items, of which a thread makes the next `n` while one is used.

    The thread ends by itself once nobody refers to the items. Waiting for it here could block
    forever, since Python may close this generator in any thread, while that thread holds a lock.
    """
    end, thread = object(), ThreadPoolExecutor(1)
    made: deque[Future[Any]] = deque(thread.submit(next, items, end) for _ in range(n))
    while (item := made.popleft().result()) is not end:
        made.append(thread.submit(next, items, end))
        yield item
