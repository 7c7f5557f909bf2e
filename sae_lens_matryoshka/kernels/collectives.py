"""What `torch.distributed` lacks."""

import torch
import torch.distributed as dist


def gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(n_processes, …): the `tensor` (…) of each process, by rank."""
    by_rank = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(by_rank, tensor, group=group)
    return torch.stack(by_rank)
