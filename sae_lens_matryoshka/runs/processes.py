"""The processes of a run under torchrun: how they start, agree before each step, and fail.

Before each step the processes tell each other whether they have a batch and whether a signal has
come, so that all of them stop at the same step. A process that fails within a step leaves a message
in torchrun's store; the others find their collectives broken, read it, and name that process.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from sae_lens_matryoshka.kernels.collectives import gathered
from sae_lens_matryoshka.util.checks import checked_number

DEFAULT_TIMEOUT = 1800.0  # seconds; gloo's
_GRACE = 5.0  # seconds in which a living process notices that a collective is broken
_POLL = 0.05  # seconds
_LONGEST = 10**7  # seconds of a timeout
_MAY_DIFFER = ("checkpoint_path", "logger.wandb_id", "logger.run_name")  # SAELens draws them
_n_started = itertools.count()


class ProcessFailed(RuntimeError):
    """Another process of the run failed, ended or did not answer; the message names it."""


class AgreedStop(BaseException):
    """A signal reached one of the processes, and all of them stop before the same step."""

    def __init__(self, signum: int, rank: int) -> None:
        super().__init__(signum, rank)
        self.signum, self.rank = signum, rank


class Processes:
    """The processes of a run, this one among them; see `start`.

    Attributes:
        group: Their process group: gloo for tensors on the CPU, NCCL for those on CUDA.
        rank: The number of this process.
        n: How many there are.
        n_texts: How many texts each had read, by rank, when they last agreed to go on.
    """

    def __init__(self, store: Store, timeout: float, device: str) -> None:
        assert dist.group.WORLD is not None
        self.group = dist.group.WORLD
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self.n_texts = [0] * self.n
        self._store = store
        self._is_on_gpu = torch.device(device).type == "cuda"
        self._timeout = timedelta(seconds=timeout)

    @classmethod
    def start(cls, device: str, timeout: float = DEFAULT_TIMEOUT) -> "Processes | None":
        """Join the processes that torchrun has started; None if this process is the only one.

        Args:
            device: The config's device. "cuda" is a GPU of its own for each process of a machine.
            timeout: Seconds that a process waits for the others before all of them give up.

        Raises:
            ValueError: the timeout or the device is not accepted, or the processes can't meet.
        """
        accepted = f"a positive number of seconds, at most {_LONGEST:,}"
        checked_number("process_timeout", timeout, accepted, above=0, most=_LONGEST)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        if dist.is_initialized():
            raise ValueError(
                "torch.distributed is in use already, by this script or by a runner that has not "
                "run: a runner joins its processes itself, and leaves them when its run ends."
            )
        if torch.device(device).type == "cuda":
            _take_gpu()
        limit = timedelta(seconds=timeout)
        try:
            store, rank, n = next(rendezvous("env://", timeout=limit))
            store = PrefixStore(f"run {next(_n_started)}", store)  # keys of an earlier run stay
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=limit)
        except (dist.DistError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"The processes of this run could not meet at {address}: "
                f"{str(error).splitlines()[0]} Start all of them at once, on a free port: torchrun "
                "--standalone finds one."
            ) from error
        return cls(store, timeout, device)

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Raise what `settle_failure` says for an exception in the block."""
        try:
            yield
        except Exception as error:
            _, final = self.settle_failure(error)
            if final is error:
                raise
            raise final from error

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def exchange(self, *values: int) -> list[list[int]]:
        """The `values` of each process, by rank."""
        return gathered(torch.tensor(values), self.group).tolist()

    def check_equal(self, config: Mapping[str, Any]) -> None:
        """Check that every process has the same config, given as its fields by dotted names.

        Raises:
            ValueError: the first field that differs, with its values.
        """
        mine = {name: str(config[name]) for name in config if name not in _MAY_DIFFER}
        by_rank: list[Any] = [None] * self.n
        dist.all_gather_object(by_rank, mine, group=self.group)
        for rank, other in enumerate(by_rank):
            for name in sorted(by_rank[0].keys() | other.keys()):
                values = by_rank[0].get(name), other.get(name)
                if values[0] != values[1]:
                    raise ValueError(
                        f"The processes have different configs: {name} is {values[0]} on rank 0 "
                        f"and {values[1]} on rank {rank}. Start them with the same command."
                    )

    def from_rank_0(self, value: Any) -> Any:
        """The `value` of rank 0."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def together(
        self,
        batches: Iterator[torch.Tensor],
        signum: Callable[[], int],
        n_texts: Callable[[], int],
    ) -> Iterator[torch.Tensor]:
        """This process's `batches`, as long as every process has one and none got a signal.

        Args:
            batches: Of this process.
            signum: The signal that this process has received, 0 for none.
            n_texts: How many texts it has read.

        Raises:
            AgreedStop: a process has received a signal.
            ProcessFailed: another process has no batch.
        """
        while True:
            for rank, (received,) in enumerate(self.exchange(signum())):
                if received:
                    raise AgreedStop(received, rank)
            error: Exception | None = None
            batch = None
            try:
                batch = next(batches)
            except Exception as caught:
                error = caught
            states = self.exchange(batch is None, n_texts())
            without_batch, read = map(list, zip(*states, strict=True))
            if error is not None and not isinstance(error, StopIteration):
                raise error
            if any(without_batch):
                rank = without_batch.index(1)
                raise ProcessFailed(f"rank {rank} has no more activations")
            assert batch is not None
            self.n_texts = read
            yield batch

    def settle_failure(self, error: Exception) -> tuple[bool, Exception]:
        """After this process failed, or a collective did: see who is left, and what happened.

        Returns:
            Whether this process is the one of the remaining ones that saves; the error to raise.
        """
        is_own = not (isinstance(error, ProcessFailed) or _is_of_communication(error))
        if not self._is_on_gpu:
            self.close()  # so that those who wait for this process notice
        messages, is_writer = self._collect(f"{type(error).__name__}: {error}" if is_own else "")
        if is_own:
            return is_writer, error
        failed = [f"rank {rank} failed with {text}" for rank, text in messages.items() if text]
        missing = [f"rank {rank}" for rank in range(self.n) if rank not in messages]
        if missing and not isinstance(error, ProcessFailed):
            failed.append(f"{' and '.join(missing)} ended, or did not answer")
        if failed or not isinstance(error, ProcessFailed):
            error = ProcessFailed("; ".join(failed) or "the others gave up waiting for this one")
        return is_writer, error

    def _collect(self, message: str) -> tuple[dict[int, str], bool]:
        """Leave a message and collect those of the others; whether this process is the writer."""
        messages = {self.rank: message}
        deadline = time.monotonic() + _GRACE
        try:
            self._store.set(f"failed/{self.rank}", message)
            while len(messages) < self.n and time.monotonic() < deadline:
                for rank in set(range(self.n)) - messages.keys():
                    if self._store.check([f"failed/{rank}"]):
                        messages[rank] = self._store.get(f"failed/{rank}").decode()
                time.sleep(_POLL)
            candidate = str(min(messages))
            writer = self._store.compare_set("writer", "", candidate).decode() or candidate
            return messages, writer == str(self.rank)
        except (dist.DistError, RuntimeError):  # the store went down with its process
            return messages, self.rank == min(messages)

    def publish_saved(self, saved: Any) -> None:
        """Tell the others, who wait in `wait_for_saved`, what this process has saved."""
        self._store.set("saved", json.dumps(saved))

    def wait_for_saved(self) -> Any:
        """What the process that saves has published; None if it does not within the timeout."""
        try:
            self._store.wait(["saved"], self._timeout)
            return json.loads(self._store.get("saved"))
        except (dist.DistError, RuntimeError):
            return None


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def _take_gpu() -> None:
    n_gpus = torch.cuda.device_count()
    if local_rank() >= n_gpus:
        raise ValueError(
            f"There are more processes than GPUs on this machine: {n_gpus}. Start at most as many "
            "with --nproc-per-node."
        )
    torch.cuda.set_device(local_rank())
    # a broken collective raises here instead of ending the process
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")


def _is_of_communication(error: Exception) -> bool:
    is_named = any(name in str(error) for name in ("gloo/", "NCCL"))
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and is_named)
