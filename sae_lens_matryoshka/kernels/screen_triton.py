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
_DOTS = 8  # that a program computes at once
_GUESSES = 512  # that a program makes at once
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
    (batch_size, d_in), d_sae = x.shape, len(b_enc)
    x, encoder_rows = x.contiguous(), W_enc.T.contiguous()
    limits, bound = skip_limits(floor, b_enc, norms)
    by_row, row_norms, row_errors = _round(x)
    by_latent, latent_norms, latent_errors = _round(encoder_rows)
    added = slice(d_in, d_in + N_ADDED)
    by_row[:, added] = columns_of_rows(row_norms, row_errors, d_in)
    by_latent[:, added] = columns_of_latents(latent_norms, latent_errors, limits)
    with _sums_in_float32():
        product = by_row @ by_latent.T

    no_limit = torch.zeros(1, dtype=torch.int32, device=x.device)  # a score passes above 0
    passing = candidates_above(
        no_limit, matrix_of(product), n_keep, torch.float32, or_else_largest=False
    )
    capacity = len(passing.keys)
    known = {
        "flat_index_ptr": passing.flat_index,
        "values_ptr": passing.values,
        "by_row_ptr": by_row,
        "by_latent_ptr": by_latent,
        "b_enc_ptr": b_enc,
        "norms_ptr": b_enc if norms is None else norms,
        "n_found_ptr": passing.n_found,
        "n_unfit_blocks_ptr": passing.n_unfit_blocks,
        "d_in": d_in,
        "width": by_row.shape[1],
        "n_latents": d_sae,
        "SUM_ERROR": sum_error(d_in),
        "TINY": TINY,
        "HAS_NORMS": norms is not None,
    }
    n = n_programs(x.device)
    likely = passing._replace(keys=torch.zeros_like(passing.keys))
    _guess[(min(triton.cdiv(capacity, _GUESSES), n),)](
        **known, likely_ptr=likely.keys, GUESSES=_GUESSES
    )
    exact = passing._replace(
        keys=torch.zeros_like(passing.keys), values=torch.empty_like(passing.values)
    )
    # the likeliest first; the smallest of them bounds what could still reach the cut
    for ranked, is_guessed in ((likely, True), (exact, False)):
        _score[(min(triton.cdiv(capacity, _DOTS), n),)](
            **known,
            x_ptr=x,
            encoder_rows_ptr=encoder_rows,
            cut_ptr=nth_largest(ranked, n_keep),
            keys_ptr=exact.keys,
            pre_acts_ptr=exact.values,
            IS_GUESSED=is_guessed,
            WIDTH=_WIDTH,
            DOTS=_DOTS,
        )
    codes = keep_largest(exact, n_keep, batch_size, d_sae, torch.float32)
    # no score that is not a candidate exceeds the bound
    is_settled = (codes.cut > bound) | (bound <= 0)
    is_settled &= (passing.n_unfit_blocks[0] == 0) & (bound < LARGEST)
    is_settled &= row_norms.max().clamp(min=1) * latent_norms.max() < LARGEST
    return codes if is_settled.item() else None


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
def _keys_of_screen(
    places,
    mask,
    flat_index_ptr,  # (capacity,) count, row * d_sae + latent
    values_ptr,  # (capacity,) float32, of the screen
    by_row_ptr,  # (B, width) bfloat16
    by_latent_ptr,  # (d_sae, width) bfloat16
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    d_in,
    width,
    n_latents,
    SUM_ERROR: tl.constexpr,
    TINY: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Of candidates: keys of a likely score and of the largest; row, latent, bias and norm."""
    flat_index = tl.load(flat_index_ptr + places, mask=mask, other=0)
    row = (flat_index // n_latents).to(tl.int64)
    latent = (flat_index % n_latents).to(tl.int64)
    biases = tl.load(b_enc_ptr + latent, mask=mask, other=0.0)
    norms = tl.load(norms_ptr + latent, mask=mask, other=0.0)

    of_row, of_latent = by_row_ptr + row * width + d_in, by_latent_ptr + latent * width + d_in
    margins = tl.zeros_like(biases)
    for column in range(2):
        factor = tl.load(of_row + column, mask=mask, other=0.0).to(tl.float32)
        margins += factor * tl.load(of_latent + column, mask=mask, other=0.0).to(tl.float32)
    limits = -tl.load(of_latent + 2, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(values_ptr + places, mask=mask, other=0.0)
    # a value errs by its rounding to bfloat16 and by the part of the limit in its sum
    errors = values * 0.0078125 + 2 * SUM_ERROR * tl.abs(limits) + TINY
    likely, _ = keys_from(
        values + limits - margins, biases, norms, True, HAS_NORMS, tl.float32, tl.float32
    )
    largest, _ = keys_from(
        values + limits + errors, biases, norms, True, HAS_NORMS, tl.float32, tl.float32
    )
    return likely, largest, row, latent, biases, norms


@triton.jit
def _guess(
    flat_index_ptr,  # (capacity,) count, row * d_sae + latent
    values_ptr,  # (capacity,) float32, of the screen
    by_row_ptr,  # (B, width) bfloat16
    by_latent_ptr,  # (d_sae, width) bfloat16
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_found_ptr,  # (1,) count
    n_unfit_blocks_ptr,  # (1,) int32, above 0 if there are no candidates
    likely_ptr,  # (capacity,) int32 keys, written
    d_in,
    width,
    n_latents,
    SUM_ERROR: tl.constexpr,
    TINY: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    GUESSES: tl.constexpr,
):
    """The key of each candidate's likely score."""
    if tl.load(n_unfit_blocks_ptr) > 0:
        return
    n = tl.load(n_found_ptr).to(tl.int32)
    for start in range(tl.program_id(0) * GUESSES, n, tl.num_programs(0) * GUESSES):
        places = start + tl.arange(0, GUESSES)
        likely, _, _, _, _, _ = _keys_of_screen(
            places,
            places < n,
            flat_index_ptr,
            values_ptr,
            by_row_ptr,
            by_latent_ptr,
            b_enc_ptr,
            norms_ptr,
            d_in,
            width,
            n_latents,
            SUM_ERROR,
            TINY,
            HAS_NORMS,
        )
        tl.store(likely_ptr + places, likely, mask=places < n)


@triton.jit
def _score(
    flat_index_ptr,  # (capacity,) count, row * d_sae + latent
    values_ptr,  # (capacity,) float32, of the screen
    by_row_ptr,  # (B, width) bfloat16
    by_latent_ptr,  # (d_sae, width) bfloat16
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_found_ptr,  # (1,) count
    n_unfit_blocks_ptr,  # (1,) int32, above 0 if there are no candidates
    x_ptr,  # (B, d_in)
    encoder_rows_ptr,  # (d_sae, d_in)
    cut_ptr,  # (1,) int32 key, of a likely score or of a lower bound of the cut
    keys_ptr,  # (capacity,) int32, 0 where not computed; written
    pre_acts_ptr,  # (capacity,) float32, written
    d_in,
    width,
    n_latents,
    SUM_ERROR: tl.constexpr,
    TINY: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    IS_GUESSED: tl.constexpr,
    WIDTH: tl.constexpr,
    DOTS: tl.constexpr,
):
    """The scores, from float32 products, of candidates that likely or possibly reach the cut."""
    if tl.load(n_unfit_blocks_ptr) > 0:
        return
    n, cut = tl.load(n_found_ptr).to(tl.int32), tl.load(cut_ptr)
    for start in range(tl.program_id(0) * DOTS, n, tl.num_programs(0) * DOTS):
        places = start + tl.arange(0, DOTS)
        likely, largest, row, latent, biases, norms = _keys_of_screen(
            places,
            places < n,
            flat_index_ptr,
            values_ptr,
            by_row_ptr,
            by_latent_ptr,
            b_enc_ptr,
            norms_ptr,
            d_in,
            width,
            n_latents,
            SUM_ERROR,
            TINY,
            HAS_NORMS,
        )
        reached = likely if IS_GUESSED else largest
        mask = (places < n) & (reached >= cut) & (reached > 0)
        mask &= tl.load(keys_ptr + places, mask=mask, other=1) == 0
        products = tl.zeros((DOTS, WIDTH), tl.float32)
        for first in range(0, d_in, WIDTH):
            columns = (first + tl.arange(0, WIDTH))[None, :]
            both = mask[:, None] & (columns < d_in)
            x = tl.load(x_ptr + row[:, None] * d_in + columns, mask=both, other=0.0)
            of_latent = encoder_rows_ptr + latent[:, None] * d_in
            products += x * tl.load(of_latent + columns, mask=both, other=0.0)
        products = tl.sum(products, 1)
        keys, pre_acts = keys_from(products, biases, norms, True, HAS_NORMS, tl.float32, tl.float32)
        tl.store(keys_ptr + places, keys, mask=mask)
        tl.store(pre_acts_ptr + places, pre_acts, mask=mask)
