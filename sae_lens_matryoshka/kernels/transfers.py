"""Small copies between host and device that make neither wait for the other."""

from collections.abc import Sequence

import torch


def to_device(
    values: Sequence[float], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """`values` as a tensor on `device`."""
    tensor = torch.tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the device
    return tensor.to(device, non_blocking=True)


class TrueIndices:
    """The indices at which a mask (n,) is true, without waiting for the device to count them.

    The count starts its way to the host when the object is made. Call `get` after launching other
    work: the count has then arrived, and the device is still busy.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask
        self._counted: torch.cuda.Event | None = None
        if mask.is_cuda:
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_(mask.sum(), non_blocking=True)
            self._counted = torch.cuda.Event()
            self._counted.record(torch.cuda.current_stream(mask.device))

    def get(self) -> torch.Tensor:
        """(number of true elements,) int64, ascending."""
        if self._counted is None:
            return self._mask.nonzero().flatten()
        self._counted.synchronize()
        n = int(self._count)
        if n == 0:
            return torch.empty(0, dtype=torch.int64, device=self._mask.device)
        return self._mask.to(torch.uint8).argsort(descending=True, stable=True)[:n]
