"""Rounding that is the same on a GPU and in Triton's interpreter."""

# Triton's annotations are of what a kernel sees on the device, not of what it is called with.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 rounded to the nearest of `dtype`, ties to even; Triton's interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


def round_one(number: torch.Tensor) -> torch.Tensor:
    """A float32 number (1,) as bfloat16: the smallest kernel, to see whether kernels run."""
    nearest = torch.empty_like(number, dtype=torch.bfloat16)
    _round_one[(1,)](number, nearest)
    return nearest


@triton.jit
def _round_one(
    number_ptr,  # (1,) float32
    nearest_ptr,  # (1,) bfloat16, written
):
    tl.store(nearest_ptr, rounded(tl.load(number_ptr), tl.bfloat16))
