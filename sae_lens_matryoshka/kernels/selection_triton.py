"""Exact BatchTopK selection in Triton, without sorting B × d_sae scores or waiting for the device.

Scores are ranked by their keys: the bits of a non-negative float32, read as an integer, keep its
order, and NaN comes before infinity. One pass over the pre-activations counts the scores above a
floor, a little below the last step's cut, and a second one picks them as candidates, among which
the cut is found from histograms, ten bits of the key at a time. Where the floor was wrong (fewer
candidates than codes to keep, or more than there is room for), kernels that otherwise return at
once find the cut that way in the whole matrix. The host launches the same whatever the numbers are.
"""

# Triton annotates what a kernel takes on the device, not what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels.rounding_triton import rounded
from sae_lens_matryoshka.kernels.selection import Codes

_SCORES = 1024  # of one row, that a program looks at at once
_PROGRAMS = 2048  # fill a GPU; what returns at once costs the less, the fewer there are of it
_ROOM = 16  # candidates there is room for, as a multiple of the codes to keep
_DIGITS = ((20, 2048), (10, 1024), (0, 1024))  # (shift, number of values) of a key's 31 bits
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def select(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    floor: torch.Tensor | float | None,
) -> Codes:
    """As `selection.select`, but for three things.

    Of scores that tie at the cut, those of the lowest rows, and in a row of the lowest latents, are
    kept. There are always `n_keep` codes, of which the first `n_used` count. Only a tensor is taken
    as a floor: what another implementation left as a number would have to be copied to the device.
    """
    product = x @ W_enc
    (n_rows, n_latents), device = product.shape, x.device
    pre_dtype = torch.promote_types(product.dtype, b_enc.dtype)
    score_dtype = pre_dtype if norms is None else torch.promote_types(pre_dtype, norms.dtype)
    pre_acts = torch.empty(n_keep, dtype=pre_dtype, device=device)
    scores = torch.empty(n_keep, dtype=score_dtype, device=device)
    places = torch.empty(2, n_keep, dtype=torch.int64, device=device)
    if n_keep == 0:
        return Codes(places[0], places[1], scores, pre_acts, 0.0)

    blocks_per_row = triton.cdiv(n_latents, _SCORES)
    n_blocks = n_rows * blocks_per_row
    room = min(_ROOM * n_keep, product.numel())
    matrix: dict[str, Any] = {
        "product": product,
        "b_enc": b_enc,
        "norms": norms if norms is not None else b_enc,
        "n_latents": n_latents,
        "blocks_per_row": blocks_per_row,
        "n_blocks": n_blocks,
        "HAS_NORMS": norms is not None,
        "PRE": _DTYPES[pre_dtype],
        "SCORE": _DTYPES[score_dtype],
        "SCORES": _SCORES,
    }
    if isinstance(floor, torch.Tensor):
        limit = floor.float().clamp(min=0).reshape(1).view(torch.int32)
    else:  # nothing is known of the cut
        limit = torch.zeros(1, dtype=torch.int32, device=device)
    wanted = torch.empty(1, dtype=torch.int64, device=device)
    is_wrong = torch.ones_like(limit)
    grid = (min(n_blocks, _PROGRAMS),)

    counts = torch.empty(2, n_blocks, dtype=torch.int64, device=device)
    _count[grid](**matrix, counts=counts, limit=limit, runs=is_wrong)
    _judge_floor[(1,)](counts[0].sum(), limit, wanted, is_wrong, n_keep, room)
    for shift, n_values in _DIGITS:
        search = _search(limit, wanted, is_wrong, shift, n_values)
        _histogram[grid](**matrix, **search)
        _narrow[(1,)](**search)
    _count[grid](**matrix, counts=counts, limit=limit, runs=is_wrong)

    keys = torch.zeros(room, dtype=torch.int32, device=device)
    flat_places = torch.empty(room, dtype=torch.int64, device=device)
    candidates = torch.empty(room, dtype=pre_dtype, device=device)
    _pick_candidates[grid](
        **matrix,
        counts=counts,
        sums=counts.cumsum(1),
        limit=limit,
        n_keep=n_keep,
        keys=keys,
        flat_places=flat_places,
        candidates=candidates,
        room=room,
    )

    cut, wanted = torch.zeros_like(limit), torch.full_like(wanted, n_keep)
    always, n_blocks = torch.ones_like(limit), triton.cdiv(room, _SCORES)
    for shift, n_values in _DIGITS:
        search = _search(cut, wanted, always, shift, n_values)
        _histogram_keys[(min(n_blocks, _PROGRAMS),)](
            keys=keys, room=room, n_blocks=n_blocks, **search, SCORES=_SCORES
        )
        _narrow[(1,)](**search)
    counts = torch.empty(2, n_blocks, dtype=torch.int64, device=device)
    _count_keys[(n_blocks,)](keys, counts, cut, room, n_blocks, _SCORES)
    n_used = torch.empty((), dtype=torch.int64, device=device)
    _pick_codes[(n_blocks,)](
        keys,
        flat_places,
        candidates,
        counts,
        counts.cumsum(1),
        cut,
        places,
        scores,
        pre_acts,
        n_used,
        room,
        n_blocks,
        n_keep,
        n_rows,
        n_latents,
        _DTYPES[score_dtype],
        _SCORES,
    )
    return Codes(places[0], places[1], scores, pre_acts, cut.view(torch.float32)[0], n_used)


def _search(
    limit: torch.Tensor, wanted: torch.Tensor, runs: torch.Tensor, shift: int, n_values: int
) -> dict[str, Any]:
    """Arguments of the kernels that find the next digit of the n-th largest key.

    `limit` has the digits found so far. `wanted` is how many are still wanted among the keys that
    share these: n at first, and −1 once it is known that fewer than n keys are above 0.
    """
    return {
        "limit": limit,
        "wanted": wanted,
        "histogram": torch.zeros(n_values, dtype=torch.int64, device=limit.device),
        "runs": runs,
        "SHIFT": shift,
        "N_VALUES": n_values,
    }


@triton.jit
def _keys_of(
    product,
    b_enc,
    norms,
    block,
    n_latents,
    blocks_per_row,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Keys, flat places and pre-activations of a block; rounded as dense code rounds them."""
    row = (block // blocks_per_row).to(tl.int64)
    latents = (block % blocks_per_row) * SCORES + tl.arange(0, SCORES)
    mask = latents < n_latents
    places = row * n_latents + latents
    pre_acts = tl.load(product + places, mask=mask, other=0.0).to(tl.float32)
    pre_acts += tl.load(b_enc + latents, mask=mask, other=0.0).to(tl.float32)
    pre_acts = rounded(pre_acts, PRE).to(tl.float32)
    scores = pre_acts
    if HAS_NORMS:
        scores *= tl.load(norms + latents, mask=mask, other=0.0).to(tl.float32)
        scores = rounded(scores, SCORE).to(tl.float32)
    keys = tl.where(scores <= 0, 0, scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.where(mask, keys, 0), places, pre_acts


@triton.jit
def _store_counts(counts, block, n_blocks, keys, limit):
    tl.store(counts + block, tl.sum((keys > limit).to(tl.int64), 0))
    tl.store(counts + n_blocks + block, tl.sum((keys == limit).to(tl.int64), 0))


@triton.jit
def _count(
    product,
    b_enc,
    norms,
    n_latents,
    blocks_per_row,
    n_blocks,
    counts,
    limit,
    runs,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """How many scores of each block are above the limit, and how many at it."""
    if tl.load(runs) == 0:
        return
    cut = tl.load(limit)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        keys, _, _ = _keys_of(
            product, b_enc, norms, block, n_latents, blocks_per_row, HAS_NORMS, PRE, SCORE, SCORES
        )
        _store_counts(counts, block, n_blocks, keys, cut)


@triton.jit
def _count_keys(keys, counts, limit, room, n_blocks, SCORES: tl.constexpr):
    block = tl.program_id(0)
    slots = block * SCORES + tl.arange(0, SCORES)
    # −1 is neither above a limit nor at it
    own = tl.load(keys + slots, mask=slots < room, other=-1)
    _store_counts(counts, block, n_blocks, own, tl.load(limit))


@triton.jit
def _judge_floor(n_above, limit, wanted, is_wrong, n_keep, room):
    """Whether the scores above the floor hold all that are to be kept, and can be held."""
    n = tl.load(n_above)
    wrong = (n > room) | ((n < n_keep) & (tl.load(limit) > 0))
    tl.store(is_wrong, wrong.to(tl.int32))
    tl.store(wanted, tl.zeros_like(n) + n_keep)


@triton.jit
def _digits(keys, found, SHIFT: tl.constexpr, N_VALUES: tl.constexpr):
    """The histogram of the next digit of those keys that share the digits found so far."""
    digits = keys >> SHIFT
    shared = keys > 0
    if SHIFT < 20:
        shared &= digits // N_VALUES == found // N_VALUES
    # the others are counted as zeros, and taken off again
    n = tl.histogram(tl.where(shared, digits % N_VALUES, 0), N_VALUES)
    n_others = tl.sum(tl.where(shared, 0, 1), 0)
    return n - tl.where(tl.arange(0, N_VALUES) == 0, n_others, 0)


@triton.jit
def _histogram(
    product,
    b_enc,
    norms,
    n_latents,
    blocks_per_row,
    n_blocks,
    limit,
    wanted,
    histogram,
    runs,
    SHIFT: tl.constexpr,
    N_VALUES: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    if tl.load(runs) == 0:
        return
    found = tl.load(limit) >> SHIFT
    n = tl.zeros((N_VALUES,), tl.int32)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        keys, _, _ = _keys_of(
            product, b_enc, norms, block, n_latents, blocks_per_row, HAS_NORMS, PRE, SCORE, SCORES
        )
        n += _digits(keys, found, SHIFT, N_VALUES)
    tl.atomic_add(histogram + tl.arange(0, N_VALUES), n.to(tl.int64), mask=n > 0, sem="relaxed")


@triton.jit
def _histogram_keys(
    keys,
    room,
    n_blocks,
    limit,
    wanted,
    histogram,
    runs,
    SHIFT: tl.constexpr,
    N_VALUES: tl.constexpr,
    SCORES: tl.constexpr,
):
    found = tl.load(limit) >> SHIFT
    n = tl.zeros((N_VALUES,), tl.int32)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        slots = block * SCORES + tl.arange(0, SCORES)
        own = tl.load(keys + slots, mask=slots < room, other=0)
        n += _digits(own, found, SHIFT, N_VALUES)
    tl.atomic_add(histogram + tl.arange(0, N_VALUES), n.to(tl.int64), mask=n > 0, sem="relaxed")


@triton.jit
def _narrow(limit, wanted, histogram, runs, SHIFT: tl.constexpr, N_VALUES: tl.constexpr):
    """The next digit of the cut: the largest with enough keys at it and above."""
    if tl.load(runs) == 0:
        return
    n_wanted = tl.load(wanted)
    if n_wanted < 0:
        return
    values = tl.arange(0, N_VALUES)
    n = tl.load(histogram + values)
    at_least = tl.sum(n, 0) - tl.cumsum(n, 0) + n
    digit = tl.sum((at_least >= n_wanted).to(tl.int32), 0) - 1
    found = tl.load(limit)
    if SHIFT == 20:
        found = found * 0
    if digit < 0:  # fewer scores than wanted are above 0: all of them are kept
        tl.store(limit, found * 0)
        tl.store(wanted, n_wanted * 0 - 1)
    else:
        tl.store(limit, found + (digit << SHIFT))
        tl.store(wanted, n_wanted - tl.sum(tl.where(values > digit, n, 0), 0))


@triton.jit
def _slots(keys, block, counts, sums, n_blocks, limit, n_keep):
    """Which keys of a block are picked, and where they go.

    All above the limit are, and of those at it as many as are missing, the first ones. Zeros, of
    which there is no end, are not.
    """
    n_above = tl.load(sums + n_blocks - 1)
    n_ties = tl.where(limit > 0, tl.maximum(n_keep - n_above, 0), 0)
    above_before = tl.load(sums + block) - tl.load(counts + block)
    ties_before = tl.load(sums + n_blocks + block) - tl.load(counts + n_blocks + block)
    ties = keys == limit
    own_ties = ties & (ties_before + tl.cumsum(ties.to(tl.int64), 0) <= n_ties)
    picked = (keys > limit) | own_ties
    before = above_before + tl.minimum(ties_before, n_ties)
    return picked, before + tl.cumsum(picked.to(tl.int64), 0) - 1


@triton.jit
def _pick_candidates(
    product,
    b_enc,
    norms,
    n_latents,
    blocks_per_row,
    n_blocks,
    counts,
    sums,
    limit,
    n_keep,
    keys,
    flat_places,
    candidates,
    room,
    HAS_NORMS: tl.constexpr,
    PRE: tl.constexpr,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    cut = tl.load(limit)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        if tl.load(counts + block) + tl.load(counts + n_blocks + block) > 0:
            own, places, pre_acts = _keys_of(
                product,
                b_enc,
                norms,
                block,
                n_latents,
                blocks_per_row,
                HAS_NORMS,
                PRE,
                SCORE,
                SCORES,
            )
            picked, slots = _slots(own, block, counts, sums, n_blocks, cut, n_keep)
            picked &= slots < room
            tl.store(keys + slots, own, mask=picked)
            tl.store(flat_places + slots, places, mask=picked)
            tl.store(candidates + slots, pre_acts.to(PRE), mask=picked)


@triton.jit
def _pick_codes(
    keys,
    flat_places,
    candidates,
    counts,
    sums,
    limit,
    places,
    scores,
    pre_acts,
    n_used,
    room,
    n_blocks,
    n_keep,
    n_rows,
    n_latents,
    SCORE: tl.constexpr,
    SCORES: tl.constexpr,
):
    block = tl.program_id(0)
    cut = tl.load(limit)
    own_slots = block * SCORES + tl.arange(0, SCORES)
    mask = own_slots < room
    own = tl.load(keys + own_slots, mask=mask, other=-1)
    picked, slots = _slots(own, block, counts, sums, n_blocks, cut, n_keep)
    flat = tl.load(flat_places + own_slots, mask=picked, other=0)
    tl.store(places + slots, flat // n_latents, mask=picked)
    tl.store(places + n_keep + slots, flat % n_latents, mask=picked)
    tl.store(scores + slots, own.to(tl.float32, bitcast=True).to(SCORE), mask=picked)
    values = tl.load(candidates + own_slots, mask=picked, other=0.0)
    tl.store(pre_acts + slots, values, mask=picked)

    # there is room for more candidates than codes, so some program looks after each unused slot
    used = tl.where(cut > 0, n_keep, tl.load(sums + n_blocks - 1))
    if block == 0:
        tl.store(n_used, used)
    unused = (own_slots >= used) & (own_slots < n_keep)
    nothing = tl.zeros_like(own)
    tl.store(places + own_slots, (nothing + n_rows - 1).to(tl.int64), mask=unused)
    tl.store(places + n_keep + own_slots, (nothing + n_latents - 1).to(tl.int64), mask=unused)
    tl.store(scores + own_slots, nothing.to(SCORE), mask=unused)
    tl.store(pre_acts + own_slots, nothing.to(pre_acts.dtype.element_ty), mask=unused)
