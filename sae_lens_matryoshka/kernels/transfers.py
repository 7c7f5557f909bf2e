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


class ToHost:
    """A small tensor on its way to the host, where `get` waits for it.

    On CUDA the copy starts when the object is made, and waits for the work launched until then.
    What is launched before `get` keeps the device busy meanwhile.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copy = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> torch.Tensor:
        """The tensor; on the host, if it was on CUDA."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


class TrueIndices:
    """The indices at which a mask (n,) is true, without waiting for the device to count them.

    The count starts its way to the host when the object is made. Call `get` after launching other
    work: the count has then arrived, and the device is still busy.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask
        self._count = ToHost(mask.sum()) if mask.is_cuda else None

    def get(self) -> torch.Tensor:
        """(number of true elements,) int64, ascending."""
        if self._count is None:
            return self._mask.nonzero().flatten()
        n = int(self._count.get())
        if n == 0:
            return torch.empty(0, dtype=torch.int64, device=self._mask.device)
        return self._mask.to(torch.uint8).argsort(descending=True, stable=True)[:n]
