"""What `torch.distributed` lacks."""

import torch
import torch.distributed as dist


def gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(n_processes, …): the `tensor` (…) of each process, by rank."""
    by_rank = tensor.new_empty(dist.get_world_size(group) * tensor.numel())
    dist.all_gather_into_tensor(by_rank, tensor.flatten(), group=group)
    return by_rank.view(-1, *tensor.shape)
