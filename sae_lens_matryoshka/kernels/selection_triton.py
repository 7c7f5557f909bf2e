"""Exact BatchTopK selection in Triton, without sorting B × d_sae scores or waiting for the device.

Scores are ranked by their keys: the bits of a non-negative float32, read as an integer, have its
order, and NaN ranks above infinity. One pass over the pre-activations counts the scores above a
floor, a little below the last step's cut; a second picks them as candidates. The cut is then found
among the candidates from histograms, one digit of the key at a time. If the floor was wrong (fewer
candidates than codes to keep, or more than fit the buffer), kernels that otherwise return at once
find a floor in the same way from the whole matrix. The host launches the same kernels either way.
"""

# Triton's annotations are of what a kernel sees on the device, not of what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.cut import FLOOR_FRACTION
from sae_lens_matryoshka.kernels.rounding_triton import rounded
from sae_lens_matryoshka.kernels.selection import Selection

_SCORES = 1024  # scores of one row that a program reads at once
_PROGRAMS = 2048  # enough to fill a GPU; a launch that returns at once costs less with fewer
_CAPACITY = 16  # of the candidates' buffer, as a multiple of the codes to keep
_DIGITS = ((20, 2048), (10, 1024), (0, 1024))  # (shift, number of values) in a key's 31 bits
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def select(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    last_cut: float | torch.Tensor | None,
    selection: Selection = "auto",
) -> Codes:
    """As `selection.select`, with four differences.

    Of scores that tie at the cut, those of the lowest rows are kept, and within a row those of the
    lowest latents. There are always `n_keep` codes, the last of them padding if fewer scores are
    positive. A cut that is no tensor on the device is ignored. There is no screen: `selection` says
    nothing.
    """
    product = x @ W_enc
    (n_rows, n_latents), device = product.shape, x.device
    pre_dtype = torch.promote_types(product.dtype, b_enc.dtype)
    score_dtype = pre_dtype if norms is None else torch.promote_types(pre_dtype, norms.dtype)
    pre_acts = torch.empty(n_keep, dtype=pre_dtype, device=device)
    scores = torch.empty(n_keep, dtype=score_dtype, device=device)
    rows, latents = torch.empty(2, n_keep, dtype=torch.int64, device=device)
    if n_keep == 0:
        return Codes(rows, latents, scores, pre_acts, 0.0)

    matrix = _source(product, b_enc, norms, pre_dtype, score_dtype)
    capacity = min(_CAPACITY * n_keep, product.numel())
    if isinstance(last_cut, torch.Tensor) and last_cut.device == device:
        floor = FLOOR_FRACTION * last_cut.float()
        limit = floor.clamp(min=0).reshape(1).view(torch.int32)
    else:
        limit = torch.zeros(1, dtype=torch.int32, device=device)
    wanted = torch.empty(1, dtype=torch.int64, device=device)
    is_floor_wrong = torch.ones_like(limit)
    counts = _counts(matrix, limit, is_floor_wrong)
    _judge_floor[(1,)](counts[0].sum(), limit, wanted, is_floor_wrong, n_keep, capacity)
    _find_limit(matrix, limit, wanted, is_floor_wrong)
    _counts(matrix, limit, is_floor_wrong, counts)

    keys = torch.zeros(capacity, dtype=torch.int32, device=device)
    flat_index = torch.empty(capacity, dtype=torch.int64, device=device)
    candidates = torch.empty(capacity, dtype=pre_dtype, device=device)
    _pick_candidates[_grid(matrix)](
        **matrix,
        counts_ptr=counts,
        sums_ptr=counts.cumsum(1),
        limit_ptr=limit,
        n_keep=n_keep,
        keys_ptr=keys,
        flat_index_ptr=flat_index,
        candidates_ptr=candidates,
        capacity=capacity,
    )

    # keys are scores' bits, so the candidates are a matrix of one row whose scores are its product
    row = _source(keys.view(1, -1).view(torch.float32), None, None, torch.float32, torch.float32)
    cut, wanted, always = torch.zeros_like(limit), wanted.fill_(n_keep), torch.ones_like(limit)
    _find_limit(row, cut, wanted, always)
    counts = _counts(row, cut, always)
    n_valid = torch.empty((), dtype=torch.int64, device=device)
    _pick_codes[(row["n_blocks"],)](
        keys,
        flat_index,
        candidates,
        counts,
        counts.cumsum(1),
        cut,
        rows,
        latents,
        scores,
        pre_acts,
        n_valid,
        capacity,
        row["n_blocks"],
        n_keep,
        n_rows,
        n_latents,
        _DTYPES[score_dtype],
        _SCORES,
    )
    return Codes(rows, latents, scores, pre_acts, cut.view(torch.float32)[0], n_valid)


def _source(
    product: torch.Tensor,
    b_enc: torch.Tensor | None,
    norms: torch.Tensor | None,
    pre_dtype: torch.dtype,
    score_dtype: torch.dtype,
) -> dict[str, Any]:
    """The arguments of `_keys_of`, and the number of blocks."""
    n_rows, n_latents = product.shape
    blocks_per_row = triton.cdiv(n_latents, _SCORES)
    return {
        "product_ptr": product,
        "b_enc_ptr": product if b_enc is None else b_enc,
        "norms_ptr": product if norms is None else norms,
        "n_latents": n_latents,
        "blocks_per_row": blocks_per_row,
        "n_blocks": n_rows * blocks_per_row,
        "HAS_BIAS": b_enc is not None,
        "HAS_NORMS": norms is not None,
        "PRE": _DTYPES[pre_dtype],
        "SCORE": _DTYPES[score_dtype],
        "SCORES": _SCORES,
    }


def _grid(source: dict[str, Any]) -> tuple[int]:
    return (min(source["n_blocks"], _PROGRAMS),)


def _counts(
    source: dict[str, Any],
    limit: torch.Tensor,
    runs: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """(2, n_blocks) scores of each block above the limit, and at it; `counts` if runs is 0."""
    if counts is None:
        counts = torch.empty(2, source["n_blocks"], dtype=torch.int64, device=limit.device)
    _count[_grid(source)](**source, counts_ptr=counts, limit_ptr=limit, runs_ptr=runs)
    return counts


def _find_limit(
    source: dict[str, Any], limit: torch.Tensor, wanted: torch.Tensor, runs: torch.Tensor
) -> None:
    """Set `limit` to the key of the `wanted`-th largest score, digit by digit, unless runs is 0."""
    for shift, n_values in _DIGITS:
        histogram = torch.zeros(n_values, dtype=torch.int64, device=limit.device)
        _histogram[_grid(source)](
            **source,
            limit_ptr=limit,
            histogram_ptr=histogram,
            runs_ptr=runs,
            SHIFT=shift,
            N_VALUES=n_values,
        )
        _find_digit[(1,)](limit, wanted, histogram, runs, shift, n_values)


@triton.jit
def _keys_of(
    product_ptr,  # (B, d_sae) x @ W_enc
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    block,
    n_latents,
    blocks_per_row,
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Keys, flat indices and pre-activations of a block, rounded as dense code rounds them."""
    row = (block // blocks_per_row).to(tl.int64)
    latents = (block % blocks_per_row) * SCORES + tl.arange(0, SCORES)
    mask = latents < n_latents
    flat_index = row * n_latents + latents
    pre_acts = tl.load(product_ptr + flat_index, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        pre_acts += tl.load(b_enc_ptr + latents, mask=mask, other=0.0).to(tl.float32)
        pre_acts = rounded(pre_acts, PRE).to(tl.float32)
    scores = pre_acts
    if HAS_NORMS:
        scores *= tl.load(norms_ptr + latents, mask=mask, other=0.0).to(tl.float32)
        scores = rounded(scores, SCORE).to(tl.float32)
    keys = tl.where(scores <= 0, 0, scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.where(mask, keys, 0), flat_index, pre_acts


@triton.jit
def _count(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    n_blocks,
    counts_ptr,  # (2, n_blocks) int64, written: scores above the limit, and at it
    limit_ptr,  # (1,) int32 key
    runs_ptr,  # (1,) int32, 0 to return at once
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """How many scores of each block are above the limit, and how many at it."""
    if tl.load(runs_ptr) == 0:
        return
    limit = tl.load(limit_ptr)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        keys, _, _ = _keys_of(
            product_ptr,
            b_enc_ptr,
            norms_ptr,
            block,
            n_latents,
            blocks_per_row,
            HAS_BIAS,
            HAS_NORMS,
            PRE,
            SCORE,
            SCORES,
        )
        tl.store(counts_ptr + block, tl.sum((keys > limit).to(tl.int64), 0))
        tl.store(counts_ptr + n_blocks + block, tl.sum((keys == limit).to(tl.int64), 0))


@triton.jit
def _judge_floor(
    n_above_ptr,  # () int64
    limit_ptr,  # (1,) int32 key
    wanted_ptr,  # (1,) int64, written: n_keep
    is_floor_wrong_ptr,  # (1,) int32, written
    n_keep,
    capacity,
):
    """A right floor has at least `n_keep` scores above it, and no more than fit the buffer."""
    n = tl.load(n_above_ptr)
    wrong = (n > capacity) | ((n < n_keep) & (tl.load(limit_ptr) > 0))
    tl.store(is_floor_wrong_ptr, wrong.to(tl.int32))
    tl.store(wanted_ptr, tl.zeros_like(n) + n_keep)


@triton.jit
def _histogram(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    n_blocks,
    limit_ptr,  # (1,) int32 key, of the digits found so far
    histogram_ptr,  # (N_VALUES,) int64, added to
    runs_ptr,  # (1,) int32, 0 to return at once
    SHIFT: tl.constexpr,
    N_VALUES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """The histogram of the next digit of the scores that share the digits found so far."""
    if tl.load(runs_ptr) == 0:
        return
    found = tl.load(limit_ptr) >> SHIFT
    values = tl.arange(0, N_VALUES)
    n = tl.zeros((N_VALUES,), tl.int32)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        keys, _, _ = _keys_of(
            product_ptr,
            b_enc_ptr,
            norms_ptr,
            block,
            n_latents,
            blocks_per_row,
            HAS_BIAS,
            HAS_NORMS,
            PRE,
            SCORE,
            SCORES,
        )
        digits = keys >> SHIFT
        shared = keys > 0
        if SHIFT < 20:
            shared &= digits // N_VALUES == found // N_VALUES
        # tl.histogram takes no mask: count the other keys as zeros and subtract them
        n += tl.histogram(tl.where(shared, digits % N_VALUES, 0), N_VALUES)
        n -= tl.where(values == 0, tl.sum(tl.where(shared, 0, 1), 0), 0)
    tl.atomic_add(histogram_ptr + values, n.to(tl.int64), mask=n > 0, sem="relaxed")


@triton.jit
def _find_digit(
    limit_ptr,  # (1,) int32 key, of the digits found so far
    wanted_ptr,  # (1,) int64, the n-th largest key with these digits; −1 if fewer are positive
    histogram_ptr,  # (N_VALUES,) int64
    runs_ptr,  # (1,) int32, 0 to return at once
    SHIFT: tl.constexpr,
    N_VALUES: tl.constexpr,
):
    """The next digit of the n-th largest key: the largest with enough keys at it and above."""
    if tl.load(runs_ptr) == 0:
        return
    n_wanted = tl.load(wanted_ptr)
    if n_wanted < 0:
        return
    values = tl.arange(0, N_VALUES)
    n = tl.load(histogram_ptr + values)
    at_least = tl.sum(n, 0) - tl.cumsum(n, 0) + n
    digit = tl.sum((at_least >= n_wanted).to(tl.int32), 0) - 1
    found = tl.load(limit_ptr)
    if SHIFT == 20:
        found = found * 0
    if digit < 0:  # fewer than n scores are positive: all of them are kept
        tl.store(limit_ptr, found * 0)
        tl.store(wanted_ptr, n_wanted * 0 - 1)
    else:
        tl.store(limit_ptr, found + (digit << SHIFT))
        tl.store(wanted_ptr, n_wanted - tl.sum(tl.where(values > digit, n, 0), 0))


@triton.jit
def _slots(
    keys,
    block,
    counts_ptr,  # (2, n_blocks) int64
    sums_ptr,  # (2, n_blocks) int64, running sums of the counts
    n_blocks,
    limit,
    n_keep,
):
    """Which keys of a block are picked, and their slots.

    All above the limit are picked, and of those at it the first ones, up to `n_keep` in all. Keys
    of 0 never are.
    """
    n_above = tl.load(sums_ptr + n_blocks - 1)
    n_ties = tl.where(limit > 0, tl.maximum(n_keep - n_above, 0), 0)
    above_before = tl.load(sums_ptr + block) - tl.load(counts_ptr + block)
    ties_before = tl.load(sums_ptr + n_blocks + block) - tl.load(counts_ptr + n_blocks + block)
    ties = keys == limit
    picked_ties = ties & (ties_before + tl.cumsum(ties.to(tl.int64), 0) <= n_ties)
    picked = (keys > limit) | picked_ties
    before = above_before + tl.minimum(ties_before, n_ties)
    return picked, before + tl.cumsum(picked.to(tl.int64), 0) - 1


@triton.jit
def _pick_candidates(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    n_blocks,
    counts_ptr,  # (2, n_blocks) int64
    sums_ptr,  # (2, n_blocks) int64
    limit_ptr,  # (1,) int32 key
    n_keep,
    keys_ptr,  # (capacity,) int32, written
    flat_index_ptr,  # (capacity,) int64, written: row * d_sae + latent
    candidates_ptr,  # (capacity,) pre-activations, written
    capacity,
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    limit = tl.load(limit_ptr)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        if tl.load(counts_ptr + block) + tl.load(counts_ptr + n_blocks + block) > 0:
            keys, flat_index, pre_acts = _keys_of(
                product_ptr,
                b_enc_ptr,
                norms_ptr,
                block,
                n_latents,
                blocks_per_row,
                HAS_BIAS,
                HAS_NORMS,
                PRE,
                SCORE,
                SCORES,
            )
            picked, slots = _slots(keys, block, counts_ptr, sums_ptr, n_blocks, limit, n_keep)
            picked &= slots < capacity
            tl.store(keys_ptr + slots, keys, mask=picked)
            tl.store(flat_index_ptr + slots, flat_index, mask=picked)
            tl.store(candidates_ptr + slots, pre_acts.to(PRE), mask=picked)


@triton.jit
def _pick_codes(
    keys_ptr,  # (capacity,) int32
    flat_index_ptr,  # (capacity,) int64
    candidates_ptr,  # (capacity,) pre-activations
    counts_ptr,  # (2, n_blocks) int64
    sums_ptr,  # (2, n_blocks) int64
    cut_ptr,  # (1,) int32 key
    rows_ptr,  # (n_keep,) int64, written
    latents_ptr,  # (n_keep,) int64, written
    scores_ptr,  # (n_keep,), written
    pre_acts_ptr,  # (n_keep,), written
    n_valid_ptr,  # () int64, written
    capacity,
    n_blocks,
    n_keep,
    n_rows,
    n_latents,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    block = tl.program_id(0)
    cut = tl.load(cut_ptr)
    slots = block * SCORES + tl.arange(0, SCORES)
    mask = slots < capacity
    keys = tl.load(keys_ptr + slots, mask=mask, other=-1)
    picked, code = _slots(keys, block, counts_ptr, sums_ptr, n_blocks, cut, n_keep)
    flat_index = tl.load(flat_index_ptr + slots, mask=picked, other=0)
    tl.store(rows_ptr + code, flat_index // n_latents, mask=picked)
    tl.store(latents_ptr + code, flat_index % n_latents, mask=picked)
    tl.store(scores_ptr + code, keys.to(tl.float32, bitcast=True).to(SCORE), mask=picked)
    values = tl.load(candidates_ptr + slots, mask=picked, other=0.0)
    tl.store(pre_acts_ptr + code, values, mask=picked)

    # capacity is at least n_keep, so the programs together write every code of the padding
    n_valid = tl.where(cut > 0, n_keep, tl.load(sums_ptr + n_blocks - 1))
    if block == 0:
        tl.store(n_valid_ptr, n_valid)
    padding = (slots >= n_valid) & (slots < n_keep)
    zeros = tl.zeros_like(keys)
    tl.store(rows_ptr + slots, (zeros + n_rows - 1).to(tl.int64), mask=padding)
    tl.store(latents_ptr + slots, (zeros + n_latents - 1).to(tl.int64), mask=padding)
    tl.store(scores_ptr + slots, zeros.to(SCORE), mask=padding)
    tl.store(pre_acts_ptr + slots, zeros.to(pre_acts_ptr.dtype.element_ty), mask=padding)
