"""Sums over codes in Triton: residuals of every level, gradients of codes and of weights.

Every number is written once, by one program, which adds in the order of the codes. No float is
added atomically, so equal inputs give equal bits. Sums are float32, whatever the weights' dtype.
"""

# Triton's annotations are of what a kernel sees on the device, not of what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels.codes import Layout
from sae_lens_matryoshka.kernels.rounding_triton import rounded
from sae_lens_matryoshka.kernels.sums import StopGradient

_TILE = (
    4096  # elements that a program loads at once: enough to hide latency, few enough for registers
)
_WIDEST_BLOCK = 512  # elements of a row that a program handles at once


def level_residuals(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    layout: Layout,
    n_levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `sums.level_residuals`: one pass over the codes of a row, level by level."""
    (batch_size, d_in), target = target.shape, target.contiguous()
    dtype = torch.promote_types(W_dec.dtype, target.dtype)
    width, n_codes = _tile(d_in)
    n_blocks = triton.cdiv(d_in, width)
    residuals = torch.empty(batch_size, n_levels, d_in, dtype=dtype, device=target.device)
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
        residuals,
        sae_out,
        squares,
        d_in,
        n_blocks,
        n_levels,
        batch_size * n_blocks,
        width,
        n_codes,
    )
    return residuals, (squares.sum(1) / batch_size).to(dtype), sae_out


def level_gradients(
    residuals: torch.Tensor,
    scales: torch.Tensor,
    grad_sae_out: torch.Tensor | None,
    stop_gradient: StopGradient,
    W_dec: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `sums.level_gradients`: one kernel mixes the residuals, one takes the dot products."""
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
    matrix: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    layout: Layout,
    with_totals: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `sums.sum_by_latent`: one program for each latent and block of columns."""
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
    return sums, totals if with_totals else None


def _tile(d: int) -> tuple[int, int]:
    """Elements of a row, and codes, that a program handles at once."""
    width = min(_WIDEST_BLOCK, triton.next_power_of_2(d))
    return width, _TILE // width


@triton.jit
def _gather(
    matrix_ptr,  # (m, d)
    rows,
    row_mask,
    d,
    columns,
    column_mask,
):
    """(rows, columns) of a matrix as float32; 0 where a mask is false."""
    offsets = rows.to(tl.int64)[:, None] * d + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(matrix_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _residuals(
    acts_ptr,  # (n,)
    W_dec_ptr,  # (d_sae, d_in)
    b_dec_ptr,  # (d_in,)
    target_ptr,  # (B, d_in)
    latents_ptr,  # (n,) int32
    bag_starts_ptr,  # (B * P + 1,) int32
    residuals_ptr,  # (B, P, d_in), written
    sae_out_ptr,  # (B, d_in), written
    squares_ptr,  # (P, n_programs) float32, written
    d_in,
    n_blocks,
    n_levels,
    n_programs,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program sums the codes of one row, over one block of columns."""
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    columns = (program % n_blocks) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d_in
    x = tl.load(target_ptr + row * d_in + columns, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(b_dec_ptr + columns, mask=mask, other=0.0).to(tl.float32) - x
    for level in range(n_levels):
        bag = row * n_levels + level
        start = tl.load(bag_starts_ptr + bag)
        end = tl.load(bag_starts_ptr + bag + 1)
        for first in range(start, end, CODES):
            codes = first + tl.arange(0, CODES)
            code_mask = codes < end
            latent = tl.load(latents_ptr + codes, mask=code_mask, other=0)
            act = tl.load(acts_ptr + codes, mask=code_mask, other=0.0).to(tl.float32)
            decoder_rows = _gather(W_dec_ptr, latent, code_mask, d_in, columns, mask)
            residual += tl.sum(act[:, None] * decoder_rows, 0)
        stored = rounded(residual, residuals_ptr.dtype.element_ty)
        tl.store(residuals_ptr + bag * d_in + columns, stored, mask=mask)
        tl.store(squares_ptr + level * n_programs + program, tl.sum(residual * residual, 0))
    out = rounded(residual + x, sae_out_ptr.dtype.element_ty)
    tl.store(sae_out_ptr + row * d_in + columns, out, mask=mask)


@triton.jit
def _mix(
    residuals_ptr,  # (B, P, d_in)
    scales_ptr,  # (P,) float32
    grad_sae_out_ptr,  # (B, d_in)
    mixed_ptr,  # (B * P, d_in), written: R_g
    d_in,
    n_blocks,
    n_levels,
    HAS_GRAD_OUT: tl.constexpr,
    IS_SUMMED: tl.constexpr,
    ADDS_OUTERMOST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program mixes the levels of one row, outermost first, over one block of columns."""
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    columns = (program % n_blocks) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d_in
    carried = tl.zeros((WIDTH,), tl.float32)
    if HAS_GRAD_OUT:
        offsets = row * d_in + columns
        carried += tl.load(grad_sae_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for depth in range(n_levels):
        level = n_levels - 1 - depth
        offsets = (row * n_levels + level) * d_in + columns
        mixed = tl.load(residuals_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mixed = mixed * tl.load(scales_ptr + level) + carried
        tl.store(mixed_ptr + offsets, rounded(mixed, mixed_ptr.dtype.element_ty), mask=mask)
        if IS_SUMMED:
            carried = mixed
        elif ADDS_OUTERMOST:
            carried = tl.where(depth == 0, mixed, carried)
        else:
            carried = tl.zeros_like(mixed)


@triton.jit
def _dot(
    mixed_ptr,  # (B * P, d_in)
    W_dec_ptr,  # (d_sae, d_in)
    bags_ptr,  # (n,) int32
    latents_ptr,  # (n,) int32
    bag_starts_ptr,  # (B * P + 1,) int32
    grad_acts_ptr,  # (n,), written
    d_in,
    n_bags,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program computes the gradients of a few consecutive codes."""
    codes = tl.program_id(0) * CODES + tl.arange(0, CODES)
    code_mask = codes < tl.load(bag_starts_ptr + n_bags)
    bag = tl.load(bags_ptr + codes, mask=code_mask, other=0)
    latent = tl.load(latents_ptr + codes, mask=code_mask, other=0)
    dots = tl.zeros((CODES,), tl.float32)
    for first in range(0, d_in, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        mask = columns < d_in
        mixed = _gather(mixed_ptr, bag, code_mask, d_in, columns, mask)
        dots += tl.sum(mixed * _gather(W_dec_ptr, latent, code_mask, d_in, columns, mask), 1)
    tl.store(grad_acts_ptr + codes, rounded(dots, grad_acts_ptr.dtype.element_ty), mask=code_mask)


@triton.jit
def _sum_by_latent(
    matrix_ptr,  # (m, d)
    rows_ptr,  # (n,) int32
    weights_ptr,  # (n,)
    by_latent_ptr,  # (n,) int32
    latent_starts_ptr,  # (d_sae + 1,) int32
    sums_ptr,  # (d_sae, d), written
    totals_ptr,  # (d_sae,), written
    d,
    n_blocks,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program sums the codes of one latent, over one block of columns."""
    program = tl.program_id(0)
    latent = (program // n_blocks).to(tl.int64)
    block = program % n_blocks
    columns = block * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d
    start = tl.load(latent_starts_ptr + latent)
    end = tl.load(latent_starts_ptr + latent + 1)
    weighted = tl.zeros((WIDTH,), tl.float32)
    total = tl.zeros((CODES,), tl.float32)
    for first in range(start, end, CODES):
        slots = first + tl.arange(0, CODES)
        code_mask = slots < end
        codes = tl.load(by_latent_ptr + slots, mask=code_mask, other=0)
        row = tl.load(rows_ptr + codes, mask=code_mask, other=0)
        weight = tl.load(weights_ptr + codes, mask=code_mask, other=0.0).to(tl.float32)
        weighted += tl.sum(
            weight[:, None] * _gather(matrix_ptr, row, code_mask, d, columns, mask), 0
        )
        total += weight
    stored = rounded(weighted, sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + latent * d + columns, stored, mask=mask)
    if block == 0:
        tl.store(totals_ptr + latent, rounded(tl.sum(total, 0), totals_ptr.dtype.element_ty))
