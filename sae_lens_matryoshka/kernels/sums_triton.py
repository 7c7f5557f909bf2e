"""The sums over codes in Triton: reconstructions, the gradients of codes, those of weights.

Every number is written once, by one program, which adds in the order of the codes: there are no
atomic additions of floats, and equal inputs give equal bits. Sums are float32, whatever the dtype
of the weights.
"""

# Triton annotates what a kernel takes on the device, not what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels.layout import Layout
from sae_lens_matryoshka.kernels.rounding_triton import rounded
from sae_lens_matryoshka.training.options import StopGradient

# Elements of weight rows that a program has in flight: enough loads at once to hide their latency,
# few enough to stay in registers.
_TILE = 4096
_WIDEST_BLOCK = 512  # elements of a row that a program handles at once


def residuals(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    layout: Layout,
    n_levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `eager.residuals`: one pass over the codes of a row, level by level."""
    (batch_size, d_in), target = target.shape, target.contiguous()
    dtype = torch.promote_types(W_dec.dtype, target.dtype)
    width, n_codes = _tile(d_in)
    n_blocks = triton.cdiv(d_in, width)
    left = torch.empty(batch_size, n_levels, d_in, dtype=dtype, device=target.device)
    sae_out = torch.empty(batch_size, d_in, dtype=dtype, device=target.device)
    squares = torch.empty(
        n_levels, batch_size * n_blocks, dtype=torch.float32, device=target.device
    )
    _residuals[(batch_size * n_blocks,)](
        acts,
        W_dec.contiguous(),
        b_dec,
        target,
        layout.latents,
        layout.bag_starts,
        left,
        sae_out,
        squares,
        d_in,
        n_blocks,
        n_levels,
        batch_size * n_blocks,
        width,
        n_codes,
    )
    return left, (squares.sum(1) / batch_size).to(dtype), sae_out


def gradients(
    residuals: torch.Tensor,
    scales: torch.Tensor,
    grad_sae_out: torch.Tensor | None,
    stop_gradient: StopGradient,
    W_dec: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `eager.gradients`: one kernel mixes the residuals, one meets the mixes with the codes."""
    (batch_size, n_levels, d_in), n = residuals.shape, len(layout.latents)
    width, n_codes = _tile(d_in)
    n_blocks = triton.cdiv(d_in, width)
    scales = scales.float()
    mixed = torch.empty(batch_size * n_levels, d_in, dtype=W_dec.dtype, device=W_dec.device)
    _mix[(batch_size * n_blocks,)](
        residuals,
        scales,
        grad_sae_out.contiguous() if grad_sae_out is not None else residuals,
        mixed,
        d_in,
        n_blocks,
        n_levels,
        grad_sae_out is not None,
        stop_gradient == "none",
        stop_gradient == "inner",
        width,
    )
    grad_acts = torch.zeros(n, dtype=W_dec.dtype, device=W_dec.device)
    if n > 0:
        _dot[(triton.cdiv(n, n_codes),)](
            mixed,
            W_dec.contiguous(),
            layout.bags,
            layout.latents,
            layout.bag_starts,
            grad_acts,
            d_in,
            batch_size * n_levels,
            width,
            n_codes,
        )
    grad_b_dec = (residuals.sum(0, dtype=torch.float32) * scales[:, None]).sum(0)
    if grad_sae_out is not None:
        grad_b_dec += grad_sae_out.sum(0, dtype=torch.float32)
    return mixed, grad_acts, grad_b_dec.to(W_dec.dtype)


def sum_by_latent(
    matrix: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `eager.sum_by_latent`: one program for each latent and block of columns."""
    d, d_sae = matrix.shape[1], len(layout.latent_starts) - 1
    width, n_codes = _tile(d)
    n_blocks = triton.cdiv(d, width)
    sums = torch.empty(d_sae, d, dtype=matrix.dtype, device=matrix.device)
    totals = torch.empty(d_sae, dtype=matrix.dtype, device=matrix.device)
    _sum_by_latent[(d_sae * n_blocks,)](
        matrix.contiguous(),
        rows,
        weights,
        layout.by_latent,
        layout.latent_starts,
        sums,
        totals,
        d,
        n_blocks,
        width,
        n_codes,
    )
    return sums, totals


def _tile(d: int) -> tuple[int, int]:
    """Elements of a row, and codes, that a program handles at once."""
    width = min(_WIDEST_BLOCK, triton.next_power_of_2(d))
    return width, _TILE // width


@triton.jit
def _gather(matrix, rows, own, d, columns, mask):
    """Columns of some rows of a matrix (m, d), as float32; zeros where there is no own row."""
    places = rows.to(tl.int64)[:, None] * d + columns[None, :]
    return tl.load(matrix + places, mask=own[:, None] & mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _residuals(
    acts,
    W_dec,
    b_dec,
    target,
    latents,
    bag_starts,
    left,
    sae_out,
    squares,
    d_in,
    n_blocks,
    n_levels,
    n_programs,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    columns = (program % n_blocks) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d_in
    x = tl.load(target + row * d_in + columns, mask=mask, other=0.0).to(tl.float32)
    sums = tl.load(b_dec + columns, mask=mask, other=0.0).to(tl.float32) - x
    for level in range(n_levels):
        bag = row * n_levels + level
        start = tl.load(bag_starts + bag)
        end = tl.load(bag_starts + bag + 1)
        for first in range(start, end, CODES):
            codes = first + tl.arange(0, CODES)
            own = codes < end
            latent = tl.load(latents + codes, mask=own, other=0)
            act = tl.load(acts + codes, mask=own, other=0.0).to(tl.float32)
            rows = _gather(W_dec, latent, own, d_in, columns, mask)
            sums += tl.sum(act[:, None] * rows, 0)
        tl.store(left + bag * d_in + columns, rounded(sums, left.dtype.element_ty), mask=mask)
        tl.store(squares + level * n_programs + program, tl.sum(sums * sums, 0))
    out = rounded(sums + x, sae_out.dtype.element_ty)
    tl.store(sae_out + row * d_in + columns, out, mask=mask)


@triton.jit
def _mix(
    residuals,
    scales,
    grad_sae_out,
    mixed,
    d_in,
    n_blocks,
    n_levels,
    HAS_GRAD_OUT: tl.constexpr,
    IS_SUMMED: tl.constexpr,
    ADDS_OUTERMOST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    columns = (program % n_blocks) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d_in
    carried = tl.zeros((WIDTH,), tl.float32)
    if HAS_GRAD_OUT:
        carried += tl.load(grad_sae_out + row * d_in + columns, mask=mask, other=0.0).to(tl.float32)
    for depth in range(n_levels):
        level = n_levels - 1 - depth
        places = (row * n_levels + level) * d_in + columns
        mix = tl.load(residuals + places, mask=mask, other=0.0).to(tl.float32)
        mix = mix * tl.load(scales + level) + carried
        tl.store(mixed + places, rounded(mix, mixed.dtype.element_ty), mask=mask)
        if IS_SUMMED:
            carried = mix
        elif ADDS_OUTERMOST:
            carried = tl.where(depth == 0, mix, carried)
        else:
            carried = tl.zeros_like(mix)


@triton.jit
def _dot(
    mixed,
    W_dec,
    bags,
    latents,
    bag_starts,
    grad_acts,
    d_in,
    n_bags,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
):
    codes = tl.program_id(0) * CODES + tl.arange(0, CODES)
    own = codes < tl.load(bag_starts + n_bags)
    bag = tl.load(bags + codes, mask=own, other=0)
    latent = tl.load(latents + codes, mask=own, other=0)
    dots = tl.zeros((CODES,), tl.float32)
    for first in range(0, d_in, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        mask = columns < d_in
        mix = _gather(mixed, bag, own, d_in, columns, mask)
        dots += tl.sum(mix * _gather(W_dec, latent, own, d_in, columns, mask), 1)
    tl.store(grad_acts + codes, rounded(dots, grad_acts.dtype.element_ty), mask=own)


@triton.jit
def _sum_by_latent(
    matrix,
    rows,
    weights,
    by_latent,
    latent_starts,
    sums,
    totals,
    d,
    n_blocks,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
):
    program = tl.program_id(0)
    latent = (program // n_blocks).to(tl.int64)
    block = program % n_blocks
    columns = block * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d
    start = tl.load(latent_starts + latent)
    end = tl.load(latent_starts + latent + 1)
    sum = tl.zeros((WIDTH,), tl.float32)
    total = tl.zeros((CODES,), tl.float32)
    for first in range(start, end, CODES):
        slots = first + tl.arange(0, CODES)
        own = slots < end
        codes = tl.load(by_latent + slots, mask=own, other=0)
        row = tl.load(rows + codes, mask=own, other=0)
        weight = tl.load(weights + codes, mask=own, other=0.0).to(tl.float32)
        sum += tl.sum(weight[:, None] * _gather(matrix, row, own, d, columns, mask), 0)
        total += weight
    tl.store(sums + latent * d + columns, rounded(sum, sums.dtype.element_ty), mask=mask)
    if block == 0:
        tl.store(totals + latent, rounded(tl.sum(total, 0), totals.dtype.element_ty))
