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
def _why_no_launch(device: str = "cuda") -> str | None:
    """Why small selections fail: launching a kernel needs a C compiler, for example.

    Their kernels ask for more of Triton than the others do, so an old Triton shows here.
    """
    W_enc = torch.arange(64.0, device=device).view(2, 32)
    identity, biases = torch.eye(2, device=device), torch.zeros(32, device=device)
    try:
        # importing the kernels needs Triton, which not every machine has
        from sae_lens_matryoshka.kernels.selection_triton import select

        by_product = select(identity, W_enc, biases, None, 3, None, "product")
        by_screen = select(identity, W_enc, biases, None, 3, 60.0, "screen")
        kept = [codes.rows * 32 + codes.latents for codes in (by_product, by_screen)]
        is_right = all(codes.tolist() == [61, 62, 63] for codes in kept)
    except Exception as error:
        return f"a first kernel failed ({type(error).__name__}: {error})"
    return None if is_right else "a first kernel gave a wrong result"
