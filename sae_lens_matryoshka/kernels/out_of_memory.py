"""Errors that say which tensor a GPU had no room for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def name_tensor_on_oom(what: str, shape: Sequence[int], dtype: torch.dtype) -> Iterator[None]:
    """Name the largest tensor that is made inside where the device runs out of memory.

    Raises:
        torch.OutOfMemoryError: with the tensor's name, shape and size in front of PyTorch's words.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        gib = math.prod(shape) * dtype.itemsize / 2**30
        raise torch.OutOfMemoryError(
            f"No room for {what}, of shape {tuple(shape)} and {gib:.2f} GiB as {dtype}. No weight "
            "was changed by this batch, and checkpoints saved before it are intact; a smaller "
            f"train_batch_size_tokens or d_sae takes less. {error}"
        ) from error
