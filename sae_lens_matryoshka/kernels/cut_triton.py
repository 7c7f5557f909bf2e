"""What the Triton ways of selecting share: candidates above a limit, and the codes above the cut.

Scores are ranked by their keys: the bits of a non-negative float32, read as an integer, have its
order, and NaN ranks above infinity. One pass over a matrix picks the scores above a limit as
candidates. An atomic counter hands out their slots, in any order; running sums of the blocks'
counts then tell each candidate's rank by row and latent, so the result is the same in each run. The
n-th largest of the candidates is found from histograms, one digit of the key at a time.
"""

# Triton's annotations are of what a kernel sees on the device, not of what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.rounding_triton import rounded

_SCORES = 1024  # of one row, that a program reads at once
_CANDIDATES = 512  # that a program reads at once: there are few, and a GPU has many processors
_CAPACITY = 16  # of the candidates' buffer, as a multiple of the codes to keep
_DIGITS = ((20, 2048), (10, 1024), (0, 1024))  # (shift, number of values) in a key's 31 bits
_INT32_SCORES = 2**31  # from this many scores on, counts and indices have 64 bits
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Matrix = dict[str, Any]  # scores, as arguments of the kernels that read them


class Candidates(NamedTuple):
    """The scores above a limit, by row and latent. All on the device.

    Attributes:
        keys: (capacity,) int32 of their scores; 0 behind the candidates.
        flat_index: (capacity,) row * d_sae + latent.
        values: (capacity,) pre-activations.
        n_found: (1,) number of scores above the limit.
        n_unfit_blocks: (1,) int32: 0 if at least `n_keep` scores were found, or all above 0, and
            they fit in the list. Else the blocks of the matrix.
        n_list_blocks: (1,) int32, blocks of the list that the candidates fill.
    """

    keys: torch.Tensor
    flat_index: torch.Tensor
    values: torch.Tensor
    n_found: torch.Tensor
    n_unfit_blocks: torch.Tensor
    n_list_blocks: torch.Tensor


def matrix_of(
    product: torch.Tensor,
    b_enc: torch.Tensor | None = None,
    norms: torch.Tensor | None = None,
    pre_dtype: torch.dtype = torch.float32,
    score_dtype: torch.dtype = torch.float32,
) -> Matrix:
    """Scores (product + b_enc) * norms, (B, d_sae), of any dtypes."""
    return _matrix_of(product, b_enc, norms, pre_dtype, score_dtype, _SCORES)


def _list_of(keys: torch.Tensor) -> Matrix:
    """A matrix of one row: keys are scores' bits."""
    scores = keys.view(1, -1).view(torch.float32)
    return _matrix_of(scores, None, None, torch.float32, torch.float32, _CANDIDATES)


def _matrix_of(
    product: torch.Tensor,
    b_enc: torch.Tensor | None,
    norms: torch.Tensor | None,
    pre_dtype: torch.dtype,
    score_dtype: torch.dtype,
    n_scores: int,
) -> Matrix:
    n_rows, n_latents = product.shape
    blocks_per_row = triton.cdiv(n_latents, n_scores)
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
        "SCORES": n_scores,
    }


@cache
def n_programs(device: torch.device) -> int:
    """Programs that fill the device; a launch that returns at once costs less with few of them."""
    if device.type == "cpu":
        return 16
    return 7 * torch.cuda.get_device_properties(device).multi_processor_count


def _grid(matrix: Matrix) -> tuple[int]:
    n_blocks, n_columns = matrix["n_blocks"], matrix["blocks_per_row"]
    n = n_programs(matrix["product_ptr"].device)
    if not matrix["HAS_BIAS"]:
        return (min(n_blocks, n),)
    # a multiple of a row's blocks: a program stays in its columns and loads their biases once
    return (n_columns * max(1, min(n_blocks // n_columns, n // n_columns)),)


def _count_dtype(matrix: Matrix) -> torch.dtype:
    return torch.int32 if matrix["product_ptr"].numel() < _INT32_SCORES else torch.int64


def candidates_above(
    limit: torch.Tensor,
    matrix: Matrix,
    n_keep: int,
    value_dtype: torch.dtype,
    or_else_largest: bool,
) -> Candidates:
    """The scores whose keys are above `limit`, (1,) int32, if they are no more than 16 * n_keep.

    If they are more, or fewer than `n_keep` and the limit is not 0, the limit was wrong. With
    `or_else_largest` the candidates are then the `n_keep` largest scores, and `limit` is set to the
    smallest of them; without, there are none.
    """
    device, n_blocks, count_dtype = limit.device, matrix["n_blocks"], _count_dtype(matrix)
    capacity = min(_CAPACITY * n_keep, matrix["product_ptr"].numel())
    found = torch.empty(capacity, dtype=count_dtype, device=device)
    counts = torch.zeros(2 * n_blocks, dtype=count_dtype, device=device)
    starts = torch.empty(n_blocks, dtype=count_dtype, device=device)
    candidates = Candidates(
        keys=torch.zeros(capacity, dtype=torch.int32, device=device),
        flat_index=torch.empty(capacity, dtype=count_dtype, device=device),
        values=torch.empty(capacity, dtype=value_dtype, device=device),
        n_found=torch.zeros(1, dtype=count_dtype, device=device),
        n_unfit_blocks=torch.empty(1, dtype=torch.int32, device=device),
        n_list_blocks=torch.empty(1, dtype=torch.int32, device=device),
    )
    keys, flat_index, values, n_found, n_unfit_blocks, n_list_blocks = candidates
    _collect[_grid(matrix)](
        **matrix,
        limit_ptr=limit,
        n_found_ptr=n_found,
        counts_ptr=counts,
        starts_ptr=starts,
        found_ptr=found,
        capacity=capacity,
    )
    _judge_limit[(1,)](
        n_found, limit, n_unfit_blocks, n_list_blocks, n_keep, capacity, n_blocks, _CANDIDATES
    )
    if or_else_largest:
        _find_limit(matrix, limit, n_keep, n_unfit_blocks)
        _count[_grid(matrix)](
            **matrix, counts_ptr=counts, limit_ptr=limit, n_read_ptr=n_unfit_blocks
        )
    sums = counts.cumsum(0, dtype=count_dtype)
    _order[(min(triton.cdiv(capacity, _CANDIDATES), n_programs(device)),)](
        **{name: value for name, value in matrix.items() if name != "n_blocks"},
        found_ptr=found,
        starts_ptr=starts,
        counts_ptr=counts,
        sums_ptr=sums,
        n_found_ptr=n_found,
        n_unfit_blocks_ptr=n_unfit_blocks,
        keys_ptr=keys,
        flat_index_ptr=flat_index,
        values_ptr=values,
        CANDIDATES=_CANDIDATES,
    )
    if or_else_largest:
        _collect_again[_grid(matrix)](
            **matrix,
            counts_ptr=counts,
            sums_ptr=sums,
            limit_ptr=limit,
            n_read_ptr=n_unfit_blocks,
            n_keep=n_keep,
            keys_ptr=keys,
            flat_index_ptr=flat_index,
            values_ptr=values,
        )
    return candidates


def nth_largest(candidates: Candidates, n: int) -> torch.Tensor:
    """(1,) int32, the key of the n-th largest candidate; 0 if fewer are positive."""
    key = torch.zeros(1, dtype=torch.int32, device=candidates.keys.device)
    _find_limit(_list_of(candidates.keys), key, n, candidates.n_list_blocks)
    return key


def _find_limit(matrix: Matrix, limit: torch.Tensor, n_keep: int, n_read: torch.Tensor) -> None:
    """Set `limit` to the key of the `n_keep`-th largest of the first `n_read` blocks' scores."""
    device = limit.device
    wanted = torch.full((1,), n_keep, dtype=torch.int32, device=device)
    histograms = torch.zeros(
        len(_DIGITS), max(n for _, n in _DIGITS), dtype=_count_dtype(matrix), device=device
    )
    for (shift, n_values), histogram in zip(_DIGITS, histograms, strict=True):
        _histogram[_grid(matrix)](
            **matrix,
            limit_ptr=limit,
            histogram_ptr=histogram,
            n_read_ptr=n_read,
            SHIFT=shift,
            N_VALUES=n_values,
        )
        _find_digit[(1,)](limit, wanted, histogram, n_read, shift, n_values)


def keep_largest(
    candidates: Candidates, n_keep: int, n_rows: int, n_latents: int, score_dtype: torch.dtype
) -> Codes:
    """The codes of the `n_keep` largest candidates, with padding if fewer are positive.

    Of those that tie at the cut, the first by row and latent are kept.
    """
    row, cut = _list_of(candidates.keys), nth_largest(candidates, n_keep)
    device, n_blocks, n_read = cut.device, row["n_blocks"], candidates.n_list_blocks
    counts = torch.zeros(2 * n_blocks, dtype=_count_dtype(row), device=device)
    _count[_grid(row)](**row, counts_ptr=counts, limit_ptr=cut, n_read_ptr=n_read)
    rows, latents = torch.empty(2, n_keep, dtype=torch.int64, device=device)
    scores = torch.empty(n_keep, dtype=score_dtype, device=device)
    pre_acts = torch.empty(n_keep, dtype=candidates.values.dtype, device=device)
    n_valid = torch.empty((), dtype=torch.int64, device=device)
    _pick_codes[_grid(row)](
        candidates.keys,
        candidates.flat_index,
        candidates.values,
        counts,
        counts.cumsum(0, dtype=counts.dtype),
        cut,
        n_read,
        rows,
        latents,
        scores,
        pre_acts,
        n_valid,
        len(candidates.keys),
        n_blocks,
        n_keep,
        n_rows,
        n_latents,
        _DTYPES[score_dtype],
        _CANDIDATES,
    )
    return Codes(rows, latents, scores, pre_acts, cut.view(torch.float32)[0], n_valid)


@triton.jit
def _of_columns(
    values_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    EXISTS: tl.constexpr,
    SCORES: tl.constexpr,
):
    """float32 values of the columns of each block that this program reads, if they exist."""
    values = tl.zeros((SCORES,), tl.float32)
    if EXISTS:
        latents = (tl.program_id(0) % blocks_per_row) * SCORES + tl.arange(0, SCORES)
        values += tl.load(values_ptr + latents, mask=latents < n_latents, other=0.0)
    return values


@triton.jit
def keys_from(
    products,  # float32
    biases,  # float32
    norms,  # float32
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Keys and pre-activations, rounded as dense code rounds them."""
    pre_acts = products
    if HAS_BIAS:
        pre_acts = rounded(pre_acts + biases, PRE).to(tl.float32)
    scores = pre_acts
    if HAS_NORMS:
        scores = rounded(scores * norms, SCORE).to(tl.float32)
    return tl.where(scores <= 0, 0, scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF), pre_acts


@triton.jit
def _keys_of(
    product_ptr,  # (B, d_sae) x @ W_enc
    biases,  # (SCORES,) float32, of the block's columns
    norms,  # (SCORES,) float32
    block,
    n_latents,
    blocks_per_row,
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Keys, flat indices and pre-activations of a block."""
    first = (block // blocks_per_row).to(tl.int64) * n_latents
    latents = (block % blocks_per_row) * SCORES + tl.arange(0, SCORES)
    mask = latents < n_latents
    products = tl.load(product_ptr + first + latents, mask=mask, other=0.0).to(tl.float32)
    keys, pre_acts = keys_from(products, biases, norms, HAS_BIAS, HAS_NORMS, PRE, SCORE)
    return tl.where(mask, keys, 0), first + latents, pre_acts


@triton.jit
def _collect(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    n_blocks,
    limit_ptr,  # (1,) int32 key
    n_found_ptr,  # (1,) count, added to: scores above the limit
    counts_ptr,  # (2, n_blocks) count, the first half written: scores above the limit
    starts_ptr,  # (n_blocks,) count, written where there are any: the slot of the first of them
    found_ptr,  # (capacity,) count, written: row * d_sae + latent
    capacity,
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Write where scores are above the limit, as many as fit, block by block in any order."""
    limit = tl.load(limit_ptr)
    biases = _of_columns(b_enc_ptr, n_latents, blocks_per_row, HAS_BIAS, SCORES)
    norms = _of_columns(norms_ptr, n_latents, blocks_per_row, HAS_NORMS, SCORES)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        keys, flat_index, _ = _keys_of(
            product_ptr,
            biases,
            norms,
            block,
            n_latents,
            blocks_per_row,
            HAS_BIAS,
            HAS_NORMS,
            PRE,
            SCORE,
            SCORES,
        )
        above = (keys > limit).to(tl.int32)
        n = tl.sum(above, 0).to(n_found_ptr.dtype.element_ty)
        tl.store(counts_ptr + block, n)
        if n > 0:
            start = tl.atomic_add(n_found_ptr, n, sem="relaxed")
            tl.store(starts_ptr + block, start)
            slots = start + tl.cumsum(above, 0) - 1
            mask = (keys > limit) & (slots < capacity)
            tl.store(found_ptr + slots, flat_index.to(n.dtype), mask=mask)


@triton.jit
def _judge_limit(
    n_found_ptr,  # (1,) count
    limit_ptr,  # (1,) int32 key
    n_unfit_blocks_ptr,  # (1,) int32, written: to read again, 0 if the limit was right
    n_list_blocks_ptr,  # (1,) int32, written: that the candidates fill
    n_keep,
    capacity,
    n_blocks,
    CANDIDATES: tl.constexpr,
):
    """A right limit has at least `n_keep` scores above it, and no more than fit the buffer."""
    n = tl.load(n_found_ptr)
    wrong = (n > capacity) | ((n < n_keep) & (tl.load(limit_ptr) > 0))
    tl.store(n_unfit_blocks_ptr, tl.where(wrong, n_blocks, 0))
    n_candidates = tl.where(wrong, n_keep, n)
    tl.store(n_list_blocks_ptr, (n_candidates + CANDIDATES - 1) // CANDIDATES)


@triton.jit
def _count(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    n_blocks,
    counts_ptr,  # (2, n_blocks) count, written: scores above the limit, and at it
    limit_ptr,  # (1,) int32 key
    n_read_ptr,  # (1,) int32, blocks to read
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """How many scores of each block are above the limit, and how many at it if it is above 0."""
    limit = tl.load(limit_ptr)
    biases = _of_columns(b_enc_ptr, n_latents, blocks_per_row, HAS_BIAS, SCORES)
    norms = _of_columns(norms_ptr, n_latents, blocks_per_row, HAS_NORMS, SCORES)
    for block in range(tl.program_id(0), tl.load(n_read_ptr), tl.num_programs(0)):
        keys, _, _ = _keys_of(
            product_ptr,
            biases,
            norms,
            block,
            n_latents,
            blocks_per_row,
            HAS_BIAS,
            HAS_NORMS,
            PRE,
            SCORE,
            SCORES,
        )
        tl.store(counts_ptr + block, tl.sum((keys > limit).to(tl.int32), 0))
        ties = (keys == limit) & (limit > 0)
        tl.store(counts_ptr + n_blocks + block, tl.sum(ties.to(tl.int32), 0))


@triton.jit
def _histogram(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    n_blocks,
    limit_ptr,  # (1,) int32 key, of the digits found so far
    histogram_ptr,  # (N_VALUES,) count, added to
    n_read_ptr,  # (1,) int32, blocks to read
    SHIFT: tl.constexpr,
    N_VALUES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """The histogram of the next digit of the scores that share the digits found so far."""
    n_read = tl.load(n_read_ptr)
    if tl.program_id(0) >= n_read:
        return
    found = tl.load(limit_ptr) >> SHIFT
    values = tl.arange(0, N_VALUES)
    n = tl.zeros((N_VALUES,), tl.int32)
    biases = _of_columns(b_enc_ptr, n_latents, blocks_per_row, HAS_BIAS, SCORES)
    norms = _of_columns(norms_ptr, n_latents, blocks_per_row, HAS_NORMS, SCORES)
    for block in range(tl.program_id(0), n_read, tl.num_programs(0)):
        keys, _, _ = _keys_of(
            product_ptr,
            biases,
            norms,
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
    n = n.to(histogram_ptr.dtype.element_ty)
    tl.atomic_add(histogram_ptr + values, n, mask=n > 0, sem="relaxed")


@triton.jit
def _find_digit(
    limit_ptr,  # (1,) int32 key, of the digits found so far
    wanted_ptr,  # (1,) int32, the n-th largest key with these digits; −1 if fewer are positive
    histogram_ptr,  # (N_VALUES,) count
    n_read_ptr,  # (1,) int32, blocks to read
    SHIFT: tl.constexpr,
    N_VALUES: tl.constexpr,
):
    """The next digit of the n-th largest key: the largest with enough keys at it and above."""
    if tl.load(n_read_ptr) == 0:
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
def _order(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    found_ptr,  # (capacity,) count: row * d_sae + latent, in any order of the blocks
    starts_ptr,  # (n_blocks,) count, of each block in `found`
    counts_ptr,  # (2, n_blocks) count
    sums_ptr,  # (2, n_blocks) count, running sums of the counts
    n_found_ptr,  # (1,) count
    n_unfit_blocks_ptr,  # (1,) int32, above 0 if the floor was wrong
    keys_ptr,  # (capacity,) int32, written: by row and latent
    flat_index_ptr,  # (capacity,) count, written: row * d_sae + latent
    values_ptr,  # (capacity,) pre-activations, written
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Write the candidates by row and latent, unless they are to be collected again."""
    if tl.load(n_unfit_blocks_ptr) > 0:
        return
    n_found = tl.load(n_found_ptr).to(tl.int32)
    first, step = tl.program_id(0) * CANDIDATES, tl.num_programs(0) * CANDIDATES
    for start in range(first, n_found, step):
        slots = start + tl.arange(0, CANDIDATES)
        mask = slots < n_found
        flat_index = tl.load(found_ptr + slots, mask=mask, other=0)
        row, latent = flat_index // n_latents, flat_index % n_latents
        block = row * blocks_per_row + latent // SCORES
        ranks = slots - tl.load(starts_ptr + block, mask=mask, other=0)
        ranks += tl.load(sums_ptr + block, mask=mask, other=0)
        ranks -= tl.load(counts_ptr + block, mask=mask, other=0)
        products = tl.load(product_ptr + flat_index, mask=mask, other=0.0).to(tl.float32)
        biases = tl.load(b_enc_ptr + latent, mask=mask, other=0.0).to(tl.float32)
        norms = tl.load(norms_ptr + latent, mask=mask, other=0.0).to(tl.float32)
        keys, pre_acts = keys_from(products, biases, norms, HAS_BIAS, HAS_NORMS, PRE, SCORE)
        tl.store(keys_ptr + ranks, keys, mask=mask)
        tl.store(flat_index_ptr + ranks, flat_index, mask=mask)
        tl.store(values_ptr + ranks, pre_acts.to(PRE), mask=mask)


@triton.jit
def _ranks(
    keys,
    block,
    counts_ptr,  # (2, n_blocks) count
    sums_ptr,  # (2, n_blocks) count, running sums of the counts
    n_blocks,
    limit,
    n_keep,
):
    """Which keys of a block are picked, and their ranks by row and latent.

    All above the limit are picked, and of those at it the first ones, up to `n_keep` in all. Keys
    of 0 never are.
    """
    n_above = tl.load(sums_ptr + n_blocks - 1)
    n_ties = tl.where(limit > 0, tl.maximum(n_keep - n_above, 0), 0)
    above_before = tl.load(sums_ptr + block) - tl.load(counts_ptr + block)
    ties_before = tl.load(sums_ptr + n_blocks + block) - n_above
    ties_before -= tl.load(counts_ptr + n_blocks + block)
    ties = keys == limit
    picked_ties = ties & (ties_before + tl.cumsum(ties.to(tl.int32), 0) <= n_ties)
    picked = (keys > limit) | picked_ties
    before = above_before + tl.minimum(ties_before, n_ties)
    return picked, before + tl.cumsum(picked.to(tl.int32), 0) - 1


@triton.jit
def _collect_again(
    product_ptr,  # (B, d_sae)
    b_enc_ptr,  # (d_sae,)
    norms_ptr,  # (d_sae,)
    n_latents,
    blocks_per_row,
    n_blocks,
    counts_ptr,  # (2, n_blocks) count
    sums_ptr,  # (2, n_blocks) count
    limit_ptr,  # (1,) int32 key
    n_read_ptr,  # (1,) int32, blocks to read: none if the first floor was right
    n_keep,
    keys_ptr,  # (capacity,) int32, written: by row and latent
    flat_index_ptr,  # (capacity,) count, written: row * d_sae + latent
    values_ptr,  # (capacity,) pre-activations, written
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Write the `n_keep` largest scores, whose limit is known by now."""
    limit = tl.load(limit_ptr)
    biases = _of_columns(b_enc_ptr, n_latents, blocks_per_row, HAS_BIAS, SCORES)
    norms = _of_columns(norms_ptr, n_latents, blocks_per_row, HAS_NORMS, SCORES)
    for block in range(tl.program_id(0), tl.load(n_read_ptr), tl.num_programs(0)):
        if tl.load(counts_ptr + block) + tl.load(counts_ptr + n_blocks + block) > 0:
            keys, flat_index, pre_acts = _keys_of(
                product_ptr,
                biases,
                norms,
                block,
                n_latents,
                blocks_per_row,
                HAS_BIAS,
                HAS_NORMS,
                PRE,
                SCORE,
                SCORES,
            )
            picked, ranks = _ranks(keys, block, counts_ptr, sums_ptr, n_blocks, limit, n_keep)
            tl.store(keys_ptr + ranks, keys, mask=picked)
            flat_index = flat_index.to(flat_index_ptr.dtype.element_ty)
            tl.store(flat_index_ptr + ranks, flat_index, mask=picked)
            tl.store(values_ptr + ranks, pre_acts.to(PRE), mask=picked)


@triton.jit
def _pick_codes(
    keys_ptr,  # (capacity,) int32, 0 behind the candidates
    flat_index_ptr,  # (capacity,) count
    values_ptr,  # (capacity,) pre-activations
    counts_ptr,  # (2, n_blocks) count
    sums_ptr,  # (2, n_blocks) count
    cut_ptr,  # (1,) int32 key
    n_read_ptr,  # (1,) int32, blocks that the candidates fill
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
    CANDIDATES: tl.constexpr,
):
    """Write the codes, and the padding behind them."""
    cut = tl.load(cut_ptr)
    n_valid = tl.where(cut > 0, n_keep, tl.load(sums_ptr + n_blocks - 1))
    if tl.program_id(0) == 0:
        tl.store(n_valid_ptr, n_valid)
    # the buffer has room for `n_keep`, so these blocks hold every code and all of the padding
    n_read = tl.maximum(tl.load(n_read_ptr), (n_keep + CANDIDATES - 1) // CANDIDATES)
    for block in range(tl.program_id(0), n_read, tl.num_programs(0)):
        places = block * CANDIDATES + tl.arange(0, CANDIDATES)
        keys = tl.load(keys_ptr + places, mask=places < capacity, other=-1)
        picked, code = _ranks(keys, block, counts_ptr, sums_ptr, n_blocks, cut, n_keep)
        flat_index = tl.load(flat_index_ptr + places, mask=picked, other=0)
        tl.store(rows_ptr + code, flat_index // n_latents, mask=picked)
        tl.store(latents_ptr + code, flat_index % n_latents, mask=picked)
        tl.store(scores_ptr + code, keys.to(tl.float32, bitcast=True).to(SCORE), mask=picked)
        values = tl.load(values_ptr + places, mask=picked, other=0.0)
        tl.store(pre_acts_ptr + code, values, mask=picked)

        padding = (places >= n_valid) & (places < n_keep)
        zeros = tl.zeros_like(keys)
        tl.store(rows_ptr + places, (zeros + n_rows - 1).to(tl.int64), mask=padding)
        tl.store(latents_ptr + places, (zeros + n_latents - 1).to(tl.int64), mask=padding)
        tl.store(scores_ptr + places, zeros.to(SCORE), mask=padding)
        tl.store(pre_acts_ptr + places, zeros.to(pre_acts_ptr.dtype.element_ty), mask=padding)
