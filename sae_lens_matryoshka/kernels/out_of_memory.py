"""Out-of-memory errors that name the tensor."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def name_tensor_on_oom(what: str, shape: Sequence[int], dtype: torch.dtype) -> Iterator[None]:
    """Name the largest tensor allocated inside the block if the device runs out of memory there.

    Raises:
        torch.OutOfMemoryError: PyTorch's, with the tensor's name, shape and size in front.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        gib = math.prod(shape) * dtype.itemsize / 2**30
        raise torch.OutOfMemoryError(
            f"Out of memory for {what}: {tuple(shape)} of {dtype}, {gib:.2f} GiB. No weight "
            "was changed by this batch, and checkpoints saved before it are intact; a smaller "
            f"train_batch_size_tokens or d_sae takes less. {error}"
        ) from error
