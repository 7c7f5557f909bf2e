"""Whether this machine can run Triton kernels."""

from __future__ import annotations

import importlib.util
import os

import torch

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interprets_triton() -> bool:
    """Whether kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton() -> str | None:
    """What this machine lacks, or None where it can run Triton kernels."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not interprets_triton():
        return "PyTorch finds no CUDA device"
    return None
