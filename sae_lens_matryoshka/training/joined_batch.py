"""A batch whose rows are split over the processes of a run.

Each process computes its rows with the mean loss over them, so the loss of the joined batch and its
gradients are means over the processes. What depends on the batch in another way is joined here.
"""

import torch
import torch.distributed as dist

from sae_lens_matryoshka.kernels.collectives import gathered


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor or its transpose, whichever is contiguous, as collectives need it."""
    return tensor if tensor.is_contiguous() else tensor.T


class JoinedBatch:
    """The batches of all processes of a group, by rank; without a group, this process's batch.

    Every process of the group has to call the methods in the same order.

    Args:
        group: The processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.n_processes = 1 if group is None else dist.get_world_size(group)

    @property
    def on_rank(self) -> str:
        """Where this process's rows are, for messages; empty without a group."""
        return "" if self.group is None else f" on rank {self.rank}"

    def size(self, n_rows: int) -> int:
        """Rows of the joined batch, where each process has `n_rows`."""
        return self.n_processes * n_rows

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over the processes; may overwrite `tensor`."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def min(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise minimum over the processes; may overwrite `tensor`."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def by_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n_processes, …): the `tensor` of each process."""
        if self.group is None:
            return tensor[None]
        return gathered(tensor, self.group)

    def _reduced(self, tensor: torch.Tensor, operation: "dist.ReduceOp.RedOpType") -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor

    def __deepcopy__(self, memo: object) -> "JoinedBatch":
        return self  # a process group can't be copied
