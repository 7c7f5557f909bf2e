"""Whether this machine can run Triton kernels."""

import importlib.util
import os
from functools import cache

import torch

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interprets_triton() -> bool:
    """Whether kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton() -> str | None:
    """What this machine lacks, or None where it can run Triton kernels."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interprets_triton():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return _why_no_launch()


@cache
def _why_no_launch() -> str | None:
    """Why a first kernel fails: launching one needs a C compiler, for example."""
    from sae_lens_matryoshka.kernels.rounding_triton import round_one

    try:
        rounded = round_one(torch.ones(1, device="cuda"))
    except Exception as error:
        return f"a first kernel failed ({type(error).__name__}: {error})"
    return None if rounded.item() == 1 else "a first kernel gave a wrong result"
