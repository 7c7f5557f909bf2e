"""The screen on CUDA: one bfloat16 product, and exact ones of the few scores that could be kept.

`screen` says why nothing is lost, and which scores are computed. Here the scores that pass are the
candidates of `cut_triton`, so neither their number nor the cut comes to the host, and ties at the
cut need no full ranking. What does come to the host is whether the set is settled.
"""

# Triton's annotations are of what a kernel sees on the device, not of what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.cut import skip_limits
from sae_lens_matryoshka.kernels.cut_triton import (
    Candidates,
    candidates_above,
    keep_largest,
    keys_from,
    matrix_of,
    n_programs,
    nth_largest,
)
from sae_lens_matryoshka.kernels.rounding_triton import rounded
from sae_lens_matryoshka.kernels.screen import (
    LARGEST,
    N_ADDED,
    TINY,
    columns_of_latents,
    columns_of_rows,
    sum_error,
)

_WIDTH = 256  # elements of a row that a program handles at once; divides the d_in of most models
_ROWS = 8  # that a program rounds at once
_DOTS = 8  # products that a program computes at once
_BOUNDS = 512  # that a program computes at once
_ALIGNMENT = 8  # elements: rows of 16 bytes or a multiple, which tensor cores need

_MIN_CAPABILITY = (8, 0)  # the first with bfloat16
# Multiplications, about a millisecond in float32 on an H100: for fewer, what the screen launches,
# and its question to the device, cost what it saves.
_MIN_PRODUCTS = 2**35


def pays_off(x: torch.Tensor, W_enc: torch.Tensor) -> bool:
    """Whether a bfloat16 product, and what comes with it, is faster than this float32 product."""
    if x.device.type != "cuda" or len(x) * W_enc.numel() < _MIN_PRODUCTS:
        return False
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9
        is_tf32 = matmul.fp32_precision == "tf32"
    else:
        is_tf32 = matmul.allow_tf32
    return not is_tf32 and torch.cuda.get_device_capability(x.device) >= _MIN_CAPABILITY


def select_screened(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    floor: float | torch.Tensor,
) -> Codes | None:
    """As `screen.select_screened`; scores that tie at the cut are settled by `keep_largest`.

    The host waits once, to learn whether the set is settled.
    """
    x, encoder_rows = x.contiguous(), W_enc.T.contiguous()
    limits, bound = skip_limits(floor, b_enc, norms)
    passing, largest, is_bounded = _screen(x, encoder_rows, b_enc, norms, limits, n_keep)
    exact = passing._replace(
        keys=torch.zeros_like(passing.keys), values=torch.empty_like(passing.values)
    )
    # the likeliest first; the smallest of them bounds what could still reach the cut
    for keys, ranked in ((passing.keys, passing), (largest, exact)):
        _score[_grid(keys, _DOTS)](
            keys,
            nth_largest(ranked, n_keep),
            passing.flat_index,
            x,
            encoder_rows,
            b_enc,
            b_enc if norms is None else norms,
            passing.n_found,
            passing.n_unfit_blocks,
            exact.keys,
            exact.values,
            x.shape[1],
            len(b_enc),
            norms is not None,
            _WIDTH,
            _DOTS,
        )
    codes = keep_largest(exact, n_keep, len(x), len(b_enc), torch.float32)
    # no score that is not a candidate exceeds the bound
    is_settled = (codes.cut > bound) | (bound <= 0)
    is_settled &= is_bounded & (bound < LARGEST) & (passing.n_unfit_blocks[0] == 0)
    return codes if is_settled.item() else None


def _screen(
    x: torch.Tensor,  # (B, d_in)
    encoder_rows: torch.Tensor,  # (d_sae, d_in)
    b_enc: torch.Tensor,  # (d_sae,)
    norms: torch.Tensor | None,  # (d_sae,)
    limits: torch.Tensor,  # (d_sae,)
    n_keep: int,
) -> tuple[Candidates, torch.Tensor, torch.Tensor]:
    """What could reach its limit.

    Returns:
        Candidates, with likely scores; (capacity,) int32, the keys of the largest scores they can
        have; () whether no sum could overflow.
    """
    d_in = x.shape[1]
    by_row, row_norms, row_errors = _round(x)
    by_latent, latent_norms, latent_errors = _round(encoder_rows)
    added = slice(d_in, d_in + N_ADDED)
    by_row[:, added] = columns_of_rows(row_norms, row_errors, d_in)
    by_latent[:, added] = columns_of_latents(latent_norms, latent_errors, limits)
    with _sums_in_float32():
        product = by_row @ by_latent.T
    is_bounded = row_norms.max().clamp(min=1) * latent_norms.max() < LARGEST

    zero = torch.zeros(1, dtype=torch.int32, device=x.device)  # what passes is above it
    passing = candidates_above(
        zero, matrix_of(product), n_keep, torch.float32, or_else_largest=False
    )
    largest = torch.zeros_like(passing.keys)
    _bound[_grid(largest, _BOUNDS)](
        passing.flat_index,
        passing.values,
        by_row,
        by_latent,
        b_enc,
        b_enc if norms is None else norms,
        passing.n_found,
        passing.n_unfit_blocks,
        passing.keys,
        largest,
        d_in,
        by_row.shape[1],
        len(b_enc),
        sum_error(d_in),
        TINY,
        norms is not None,
        _BOUNDS,
    )
    return passing, largest, is_bounded


def _grid(keys: torch.Tensor, n_at_once: int) -> tuple[int]:
    return (min(triton.cdiv(len(keys), n_at_once), n_programs(keys.device)),)


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """By default a long bfloat16 product may be split, and its parts rounded to bfloat16."""
    matmul, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    is_allowed, may_split = getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)
    try:
        setattr(matmul, name, False if may_split is None else (False, may_split))
        yield
    finally:
        setattr(matmul, name, is_allowed if may_split is None else (is_allowed, may_split))


def _round(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `screen._round`, with zeros behind the rows, in which the added columns have room."""
    (n, d), device = matrix.shape, matrix.device
    width = triton.cdiv(d + N_ADDED, _ALIGNMENT) * _ALIGNMENT
    out = torch.empty(n, width, dtype=torch.bfloat16, device=device)
    norms, errors = torch.empty(2, n, dtype=torch.float32, device=device)
    _round_rows[(triton.cdiv(n, _ROWS),)](matrix, out, norms, errors, n, d, width, _WIDTH, _ROWS)
    return out, norms, errors


@triton.jit
def _round_rows(
    matrix_ptr,  # (n, d)
    out_ptr,  # (n, width) bfloat16, written
    norms_ptr,  # (n,) float32, written
    errors_ptr,  # (n,) float32, written
    n,
    d,
    width,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program rounds a few rows, and sums the squares of them and of what rounding changes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    error_squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, width, WIDTH):
        columns = (first + tl.arange(0, WIDTH))[None, :]
        mask = (rows < n)[:, None] & (columns < d)
        values = tl.load(matrix_ptr + rows[:, None] * d + columns, mask=mask, other=0.0)
        nearest = rounded(values, tl.bfloat16)
        mask = (rows < n)[:, None] & (columns < width)
        tl.store(out_ptr + rows[:, None] * width + columns, nearest, mask=mask)
        difference = nearest.to(tl.float32) - values
        squares += values * values
        error_squares += difference * difference
    tl.store(norms_ptr + rows, tl.sqrt(tl.sum(squares, 1)), mask=rows < n)
    tl.store(errors_ptr + rows, tl.sqrt(tl.sum(error_squares, 1)), mask=rows < n)


@triton.jit
def _bound(
    flat_index_ptr,  # (capacity,) count, row * d_sae + latent
    values_ptr,  # (capacity,) float32, of the screen
    by_row_ptr,  # (B, width) bfloat16
    by_latent_ptr,  # (d_sae, width) bfloat16
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_found_ptr,  # (1,) count
    n_unfit_blocks_ptr,  # (1,) int32, above 0 if there are no candidates
    likely_ptr,  # (capacity,) int32, written
    largest_ptr,  # (capacity,) int32, written
    d_in,
    width,
    n_latents,
    SUM_ERROR: tl.constexpr,
    TINY: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """Keys of a likely score of each candidate, and of the largest that it can have."""
    if tl.load(n_unfit_blocks_ptr) > 0:
        return
    n = tl.load(n_found_ptr).to(tl.int32)
    for start in range(tl.program_id(0) * BOUNDS, n, tl.num_programs(0) * BOUNDS):
        places = start + tl.arange(0, BOUNDS)
        mask = places < n
        flat_index = tl.load(flat_index_ptr + places, mask=mask, other=0)
        row, latent = (flat_index // n_latents).to(tl.int64), (flat_index % n_latents).to(tl.int64)
        biases = tl.load(b_enc_ptr + latent, mask=mask, other=0.0)
        norms = tl.load(norms_ptr + latent, mask=mask, other=0.0)
        of_row, of_latent = by_row_ptr + row * width + d_in, by_latent_ptr + latent * width + d_in
        margins = tl.zeros_like(biases)
        for column in range(2):
            factors = tl.load(of_row + column, mask=mask, other=0.0).to(tl.float32)
            margins += factors * tl.load(of_latent + column, mask=mask, other=0.0).to(tl.float32)
        limits = -tl.load(of_latent + 2, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(values_ptr + places, mask=mask, other=0.0)
        likely, _ = keys_from(
            values + limits - margins, biases, norms, True, HAS_NORMS, tl.float32, tl.float32
        )
        # as in `screen._screen`: 2⁻⁷ for the value's rounding
        largest = values * 1.0078125 + limits + 2 * SUM_ERROR * tl.abs(limits) + TINY
        largest, _ = keys_from(largest, biases, norms, True, HAS_NORMS, tl.float32, tl.float32)
        tl.store(likely_ptr + places, likely, mask=mask)
        tl.store(largest_ptr + places, largest, mask=mask)


@triton.jit
def _score(
    reached_ptr,  # (capacity,) int32 keys
    cut_ptr,  # (1,) int32 key
    flat_index_ptr,  # (capacity,) count, row * d_sae + latent
    x_ptr,  # (B, d_in)
    encoder_rows_ptr,  # (d_sae, d_in)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_found_ptr,  # (1,) count
    n_unfit_blocks_ptr,  # (1,) int32, above 0 if there are no candidates
    keys_ptr,  # (capacity,) int32 of the scores, 0 if not computed; written
    pre_acts_ptr,  # (capacity,) float32, written
    d_in,
    n_latents,
    HAS_NORMS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOTS: tl.constexpr,
):
    """The scores of the candidates that reach the cut, from float32 products."""
    if tl.load(n_unfit_blocks_ptr) > 0:
        return
    n, cut = tl.load(n_found_ptr).to(tl.int32), tl.load(cut_ptr)
    for start in range(tl.program_id(0) * DOTS, n, tl.num_programs(0) * DOTS):
        places = start + tl.arange(0, DOTS)
        reached = tl.load(reached_ptr + places, mask=places < n, other=0)
        mask = (reached > 0) & (reached >= cut)
        mask &= tl.load(keys_ptr + places, mask=mask, other=0) == 0
        flat_index = tl.load(flat_index_ptr + places, mask=mask, other=0)
        row, latent = (flat_index // n_latents).to(tl.int64), (flat_index % n_latents).to(tl.int64)
        biases = tl.load(b_enc_ptr + latent, mask=mask, other=0.0)
        norms = tl.load(norms_ptr + latent, mask=mask, other=0.0)
        products = tl.zeros((DOTS, WIDTH), tl.float32)
        for first in range(0, d_in, WIDTH):
            columns = (first + tl.arange(0, WIDTH))[None, :]
            both = mask[:, None] & (columns < d_in)
            x = tl.load(x_ptr + row[:, None] * d_in + columns, mask=both, other=0.0)
            of_latent = encoder_rows_ptr + latent[:, None] * d_in
            products += x * tl.load(of_latent + columns, mask=both, other=0.0)
        keys, pre_acts = keys_from(
            tl.sum(products, 1), biases, norms, True, HAS_NORMS, tl.float32, tl.float32
        )
        tl.store(keys_ptr + places, keys, mask=mask)
        tl.store(pre_acts_ptr + places, pre_acts, mask=mask)
