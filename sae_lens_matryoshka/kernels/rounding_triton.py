"""Rounding that is the same on a GPU and in Triton's interpreter."""

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
