"""Sums over codes in Triton: residuals of every level, gradients of codes and of weights.

Every number is written once, by one program, which adds in the order of the codes. No float is
added atomically, so equal inputs give equal bits. Sums are float32, whatever the weights' dtype.

A program handles one block of columns. Programs of one block follow each other, so that what they
gather, a few columns of a matrix, stays in the L2 cache. A long sum, of a latent that is often
active or a row with thousands of codes, is split: codes are cut into chunks of equal size, chunks
within one bag are summed first, and the bag's own program adds these sums to the codes around them.
"""

# Triton's annotations are of what a kernel sees on the device, not of what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels.codes import Layout
from sae_lens_matryoshka.kernels.rounding_triton import rounded
from sae_lens_matryoshka.kernels.sums import StopGradient

_WIDTH = 256  # elements of a row that a program handles at once; divides the d_in of most models
_CODES = 8  # of a row, loaded at once: enough to hide latency, few enough for registers
_CODES_OF_LATENT = 4  # of a latent, loaded at once: most latents have fewer in a batch
_CHUNK = 128  # codes; a bag that covers whole chunks is split over programs
_LATENTS = 4  # summed by a program one after the other: its start costs as much as a latent
_ROWS = 16  # mixed by a program one after the other, while it sums the gradient of b_dec


def level_residuals(
    acts: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    target: torch.Tensor,
    layout: Layout,
    n_levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `sums.level_residuals`: one pass over the codes of a row, level by level."""
    (batch_size, d_in), target, W_dec = target.shape, target.contiguous(), W_dec.contiguous()
    dtype = torch.promote_types(W_dec.dtype, target.dtype)
    width = _width(d_in)
    n_programs = batch_size * triton.cdiv(d_in, width)
    chunk_sums = _sum_chunks(W_dec, layout.latents, acts, layout.bags, layout.bag_starts)
    residuals = torch.empty(batch_size, n_levels, d_in, dtype=dtype, device=target.device)
    sae_out = torch.empty(batch_size, d_in, dtype=dtype, device=target.device)
    squares = torch.empty(n_levels, n_programs, dtype=torch.float32, device=target.device)
    _residuals[(n_programs,)](
        acts,
        W_dec,
        b_dec,
        target,
        layout.latents,
        layout.bag_starts,
        chunk_sums,
        residuals,
        sae_out,
        squares,
        d_in,
        batch_size,
        n_levels,
        n_programs,
        width,
        _CODES,
        _CHUNK,
        num_warps=2,
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
    width, n_groups = _width(d_in), triton.cdiv(batch_size, _ROWS)
    mixed = torch.empty(batch_size * n_levels, d_in, dtype=W_dec.dtype, device=W_dec.device)
    bias_sums = torch.empty(n_groups, d_in, dtype=torch.float32, device=W_dec.device)
    _mix[(n_groups * triton.cdiv(d_in, width),)](
        residuals,
        scales.float(),
        grad_sae_out.contiguous() if grad_sae_out is not None else residuals,
        mixed,
        bias_sums,
        d_in,
        batch_size,
        n_groups,
        n_levels,
        grad_sae_out is not None,
        stop_gradient == "none",
        stop_gradient == "inner",
        width,
        _ROWS,
        num_warps=2,
    )
    grad_acts = torch.zeros(n, dtype=W_dec.dtype, device=W_dec.device)
    if n > 0:
        _dot[(triton.cdiv(n, _CODES),)](
            mixed,
            W_dec.contiguous(),
            layout.bags,
            layout.latents,
            layout.bag_starts,
            grad_acts,
            d_in,
            batch_size * n_levels,
            width,
            _CODES,
        )
    return mixed, grad_acts, bias_sums.sum(0).to(W_dec.dtype)


def sum_by_latent(
    matrix: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    layout: Layout,
    with_totals: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `sums.sum_by_latent`: one program for a few latents and a block of columns."""
    matrix, d, d_sae = matrix.contiguous(), matrix.shape[1], len(layout.latent_starts) - 1
    width, n_groups = _width(d), triton.cdiv(d_sae, _LATENTS)
    latents, rows, weights = (
        tensor.index_select(0, layout.by_latent) for tensor in (layout.latents, rows, weights)
    )
    chunk_sums = _sum_chunks(matrix, rows, weights, latents, layout.latent_starts)
    sums = torch.empty(d_sae, d, dtype=matrix.dtype, device=matrix.device)
    totals = torch.empty(d_sae, dtype=matrix.dtype, device=matrix.device) if with_totals else None
    _sum_by_latent[(n_groups * triton.cdiv(d, width),)](
        matrix,
        rows,
        weights,
        layout.latent_starts,
        chunk_sums,
        sums,
        sums if totals is None else totals,
        d,
        d_sae,
        n_groups,
        with_totals,
        width,
        _CODES_OF_LATENT,
        _CHUNK,
        _LATENTS,
        num_warps=1,
    )
    return sums, totals


def _sum_chunks(
    matrix: torch.Tensor,  # (m, d)
    rows: torch.Tensor,  # (n,) int32
    weights: torch.Tensor,  # (n,)
    bags: torch.Tensor,  # (n,) int32, ascending
    bag_starts: torch.Tensor,  # (number of bags + 1,) int32
) -> torch.Tensor:
    """(n // _CHUNK, d) float32 sums of the chunks within one bag; the others stay unwritten."""
    n_chunks, d = len(rows) // _CHUNK, matrix.shape[1]
    width = _width(d)
    sums = torch.empty(n_chunks, d, dtype=torch.float32, device=matrix.device)
    if n_chunks > 0:
        _sum_chunk[(n_chunks * triton.cdiv(d, width),)](
            matrix,
            rows,
            weights,
            bags,
            bag_starts,
            sums,
            d,
            n_chunks,
            len(bag_starts) - 1,
            width,
            _CODES,
            _CHUNK,
            num_warps=2,
        )
    return sums


def _width(d: int) -> int:
    """Elements of a row that a program handles at once."""
    return min(_WIDTH, triton.next_power_of_2(d))


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
def _sum_codes(
    matrix_ptr,  # (m, d)
    rows_ptr,  # (n,) int32
    weights_ptr,  # (n,)
    start,
    end,
    d,
    columns,
    mask,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
):
    """(columns,) the weighted sum of the matrix rows of codes start..end."""
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(start, end, CODES):
        codes = first + tl.arange(0, CODES)
        code_mask = codes < end
        row = tl.load(rows_ptr + codes, mask=code_mask, other=0)
        weight = tl.load(weights_ptr + codes, mask=code_mask, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * _gather(matrix_ptr, row, code_mask, d, columns, mask), 0)
    return total


@triton.jit
def _sum_bag(
    matrix_ptr,  # (m, d)
    rows_ptr,  # (n,) int32
    weights_ptr,  # (n,)
    chunk_sums_ptr,  # (n // CHUNK, d) float32
    start,
    end,
    d,
    columns,
    mask,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """As `_sum_codes`, for a bag: the chunks that lie in it have been summed already."""
    first_chunk, last_chunk = (start + CHUNK - 1) // CHUNK, end // CHUNK
    has_chunks = first_chunk < last_chunk
    head_end = tl.where(has_chunks, first_chunk * CHUNK, end)
    total = _sum_codes(
        matrix_ptr, rows_ptr, weights_ptr, start, head_end, d, columns, mask, WIDTH, CODES
    )
    if has_chunks:
        for first in range(first_chunk, last_chunk, CODES):
            chunks = first + tl.arange(0, CODES)
            chunk_mask = chunks < last_chunk
            total += tl.sum(_gather(chunk_sums_ptr, chunks, chunk_mask, d, columns, mask), 0)
        tail = last_chunk * CHUNK
        total += _sum_codes(
            matrix_ptr, rows_ptr, weights_ptr, tail, end, d, columns, mask, WIDTH, CODES
        )
    return total


@triton.jit
def _sum_chunk(
    matrix_ptr,  # (m, d)
    rows_ptr,  # (n,) int32
    weights_ptr,  # (n,)
    bags_ptr,  # (n,) int32
    bag_starts_ptr,  # (n_bags + 1,) int32
    sums_ptr,  # (n // CHUNK, d) float32, written where a chunk lies within one bag
    d,
    n_chunks,
    n_bags,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program sums one chunk, over one block of columns; most lie in several bags."""
    program = tl.program_id(0)
    chunk = program % n_chunks
    start, end = chunk * CHUNK, (chunk + 1) * CHUNK
    is_whole = tl.load(bags_ptr + start) == tl.load(bags_ptr + end - 1)
    if is_whole & (end <= tl.load(bag_starts_ptr + n_bags)):
        columns = (program // n_chunks) * WIDTH + tl.arange(0, WIDTH)
        mask = columns < d
        total = _sum_codes(
            matrix_ptr, rows_ptr, weights_ptr, start, end, d, columns, mask, WIDTH, CODES
        )
        tl.store(sums_ptr + chunk.to(tl.int64) * d + columns, total, mask=mask)


@triton.jit
def _residuals(
    acts_ptr,  # (n,)
    W_dec_ptr,  # (d_sae, d_in)
    b_dec_ptr,  # (d_in,)
    target_ptr,  # (B, d_in)
    latents_ptr,  # (n,) int32
    bag_starts_ptr,  # (B * P + 1,) int32
    chunk_sums_ptr,  # (n // CHUNK, d_in) float32
    residuals_ptr,  # (B, P, d_in), written
    sae_out_ptr,  # (B, d_in), written
    squares_ptr,  # (P, n_programs) float32, written
    d_in,
    batch_size,
    n_levels,
    n_programs,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program sums the codes of one row, over one block of columns."""
    program = tl.program_id(0)
    row = (program % batch_size).to(tl.int64)
    columns = (program // batch_size) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d_in
    x = tl.load(target_ptr + row * d_in + columns, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(b_dec_ptr + columns, mask=mask, other=0.0).to(tl.float32) - x
    for level in range(n_levels):
        bag = row * n_levels + level
        start = tl.load(bag_starts_ptr + bag)
        end = tl.load(bag_starts_ptr + bag + 1)
        residual += _sum_bag(
            W_dec_ptr,
            latents_ptr,
            acts_ptr,
            chunk_sums_ptr,
            start,
            end,
            d_in,
            columns,
            mask,
            WIDTH,
            CODES,
            CHUNK,
        )
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
    bias_sums_ptr,  # (n_groups, d_in) float32, written: a group's share of b_dec's gradient
    d_in,
    batch_size,
    n_groups,
    n_levels,
    HAS_GRAD_OUT: tl.constexpr,
    IS_SUMMED: tl.constexpr,
    ADDS_OUTERMOST: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program mixes the levels of a group of rows, outermost first, over a block of columns."""
    program = tl.program_id(0)
    group = (program % n_groups).to(tl.int64)
    columns = (program // n_groups) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d_in
    bias_sum = tl.zeros((WIDTH,), tl.float32)
    for row in range(group * ROWS, tl.minimum((group + 1) * ROWS, batch_size)):
        carried = tl.zeros((WIDTH,), tl.float32)
        if HAS_GRAD_OUT:
            offsets = row * d_in + columns
            carried += tl.load(grad_sae_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            bias_sum += carried
        for depth in range(n_levels):
            level = n_levels - 1 - depth
            offsets = (row * n_levels + level) * d_in + columns
            scaled = tl.load(residuals_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            scaled *= tl.load(scales_ptr + level)
            bias_sum += scaled
            mixed = scaled + carried
            tl.store(mixed_ptr + offsets, rounded(mixed, mixed_ptr.dtype.element_ty), mask=mask)
            if IS_SUMMED:
                carried = mixed
            elif ADDS_OUTERMOST:
                carried = tl.where(depth == 0, mixed, carried)
            else:
                carried = tl.zeros_like(mixed)
    tl.store(bias_sums_ptr + group * d_in + columns, bias_sum, mask=mask)


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
    products = tl.zeros((CODES, WIDTH), tl.float32)
    for first in range(0, d_in, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        mask = columns < d_in
        mixed = _gather(mixed_ptr, bag, code_mask, d_in, columns, mask)
        products += mixed * _gather(W_dec_ptr, latent, code_mask, d_in, columns, mask)
    dots = rounded(tl.sum(products, 1), grad_acts_ptr.dtype.element_ty)
    tl.store(grad_acts_ptr + codes, dots, mask=code_mask)


@triton.jit
def _sum_by_latent(
    matrix_ptr,  # (m, d)
    rows_ptr,  # (n,) int32, by latent
    weights_ptr,  # (n,), by latent
    latent_starts_ptr,  # (d_sae + 1,) int32
    chunk_sums_ptr,  # (n // CHUNK, d) float32
    sums_ptr,  # (d_sae, d), written
    totals_ptr,  # (d_sae,), written if WITH_TOTALS
    d,
    d_sae,
    n_groups,
    WITH_TOTALS: tl.constexpr,
    WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
    LATENTS: tl.constexpr,
):
    """One program sums the codes of a few latents, over one block of columns."""
    program = tl.program_id(0)
    first_latent = (program % n_groups).to(tl.int64) * LATENTS
    block = program // n_groups
    columns = block * WIDTH + tl.arange(0, WIDTH)
    mask = columns < d
    for place in range(tl.minimum(LATENTS, d_sae - first_latent)):
        latent = first_latent + place
        start = tl.load(latent_starts_ptr + latent)
        end = tl.load(latent_starts_ptr + latent + 1)
        weighted = _sum_bag(
            matrix_ptr,
            rows_ptr,
            weights_ptr,
            chunk_sums_ptr,
            start,
            end,
            d,
            columns,
            mask,
            WIDTH,
            CODES,
            CHUNK,
        )
        stored = rounded(weighted, sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + latent * d + columns, stored, mask=mask)
        if WITH_TOTALS:
            total = tl.zeros((CHUNK,), tl.float32)
            # the programs of one block compute it
            for first in range(start, tl.where(block == 0, end, start), CHUNK):
                codes = first + tl.arange(0, CHUNK)
                total += tl.load(weights_ptr + codes, mask=codes < end, other=0.0).to(tl.float32)
            rounded_total = rounded(tl.sum(total, 0), totals_ptr.dtype.element_ty)
            tl.store(totals_ptr + latent, rounded_total, mask=block == 0)
