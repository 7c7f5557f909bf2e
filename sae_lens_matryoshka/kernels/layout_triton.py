"""Codes sorted by (row, level) and by latent, by counting instead of sorting, in Triton.

Each code takes a slot behind the codes of the bins before its own. Within a bin, atomic counters
hand the slots out in any order; each code then moves to the slot of its rank within its bin. So the
order, and with it every sum over codes, is the same in each run.
"""

# Triton's annotations are of what a kernel sees on the device, not of what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels import layout
from sae_lens_matryoshka.kernels.codes import Codes, Layout

_CODES = 128  # codes that one program handles
_CODES_OF_ROW = 512  # codes of a row that are sorted at once: few rows have more
_RIVALS = 8  # codes of its bin that a code is compared with at once
_ROWS_PER_BIN = 1024  # at most this many comparisons for a code of a latent that always fires


def lay_out(
    codes: Codes,
    batch_size: int,
    level_of_latent: torch.Tensor,
    n_levels: int,
    is_sorted: bool,
) -> tuple[Codes, Layout]:
    """As `layout.lay_out`, without waiting for the device."""
    n, d_sae, device = len(codes.rows), len(level_of_latent), codes.rows.device
    if n == 0:
        return layout.lay_out(codes, batch_size, level_of_latent, n_levels, is_sorted)
    n_valid = codes.n_valid if codes.n_valid is not None else torch.full((), n, device=device)
    if is_sorted:
        bags = codes.rows.int() * n_levels + level_of_latent.index_select(0, codes.latents)
        bag_starts = _starts(bags, batch_size * n_levels, n_valid)
    else:
        codes, bags, bag_starts = _sort_by_bag(
            codes, level_of_latent, batch_size, n_levels, n_valid
        )
    latents = codes.latents.int()
    by_latent, latent_starts = _sort_by_latent(latents, codes.rows, n_valid, batch_size, d_sae)
    return codes, Layout(latents, bags, bag_starts, by_latent, latent_starts)


def _starts(ascending: torch.Tensor, n_values: int, n_valid: torch.Tensor) -> torch.Tensor:
    """(n_values + 1,) int32 where each of the values 0, 1, … starts, before the padding."""
    values = torch.arange(n_values + 1, device=ascending.device, dtype=ascending.dtype)
    return torch.searchsorted(ascending, values, out_int32=True).minimum(n_valid)


def _sort_by_bag(
    codes: Codes,
    level_of_latent: torch.Tensor,
    batch_size: int,
    n_levels: int,
    n_valid: torch.Tensor,
) -> tuple[Codes, torch.Tensor, torch.Tensor]:
    """The codes by row and level, `Layout.bags` and `Layout.bag_starts`."""
    n, device = len(codes.rows), codes.rows.device
    bags = torch.zeros(n, dtype=torch.int32, device=device)
    permutation = torch.arange(n, dtype=torch.int32, device=device)
    bag_starts = torch.empty(batch_size * n_levels + 1, dtype=torch.int32, device=device)
    _sort_rows[(batch_size,)](
        codes.latents,
        level_of_latent,
        _starts(codes.rows, batch_size, n_valid),
        bags,
        permutation,
        bag_starts,
        batch_size,
        n_levels,
        _CODES_OF_ROW,
    )
    return codes.permuted(permutation), bags, bag_starts


def _sort_by_latent(
    latents: torch.Tensor, rows: torch.Tensor, n_valid: torch.Tensor, batch_size: int, d_sae: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Layout.by_latent` and `Layout.latent_starts`; a bin is one latent in _ROWS_PER_BIN rows."""
    n, device = len(latents), latents.device
    bins_per_latent = triton.cdiv(batch_size, _ROWS_PER_BIN)
    counts = torch.zeros(d_sae * bins_per_latent, dtype=torch.int32, device=device)
    bins, slots = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
    grid = (triton.cdiv(n, _CODES),)
    _count[grid](
        latents, rows, counts, bins, slots, n_valid, bins_per_latent, _ROWS_PER_BIN, _CODES
    )
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    unordered, by_latent = torch.empty_like(bins), torch.zeros_like(bins)
    _place[grid](bins, slots, starts, unordered, n_valid, _CODES)
    _rank[grid](bins, starts, unordered, by_latent, n_valid, _CODES, _RIVALS)
    return by_latent, starts[::bins_per_latent].contiguous()


@triton.jit
def _sort_rows(
    latents_ptr,  # (n,) int64
    level_of_latent_ptr,  # (d_sae,) int32
    row_starts_ptr,  # (B + 1,) int32
    bags_ptr,  # (n,) int32, written
    permutation_ptr,  # (n,) int32, written
    bag_starts_ptr,  # (B * P + 1,) int32, written
    batch_size,
    n_levels,
    CODES: tl.constexpr,
):
    """One program sorts the codes of one row by level."""
    row = tl.program_id(0)
    start = tl.load(row_starts_ptr + row)
    end = tl.load(row_starts_ptr + row + 1)
    next_slot = start
    for level in range(n_levels):
        bag = row * n_levels + level
        tl.store(bag_starts_ptr + bag, next_slot)
        for first in range(start, end, CODES):
            codes = first + tl.arange(0, CODES)
            mask = codes < end
            latent = tl.load(latents_ptr + codes, mask=mask, other=0)
            own = mask & (tl.load(level_of_latent_ptr + latent, mask=mask, other=0) == level)
            slots = next_slot + tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(permutation_ptr + slots, codes, mask=own)
            tl.store(bags_ptr + slots, tl.zeros_like(codes) + bag, mask=own)
            next_slot += tl.sum(own.to(tl.int32), 0)
    if row == batch_size - 1:
        tl.store(bag_starts_ptr + batch_size * n_levels, end)


@triton.jit
def _count(
    latents_ptr,  # (n,) int32
    rows_ptr,  # (n,) int64
    counts_ptr,  # (n_bins,) int32, added to
    bins_ptr,  # (n,) int32, written
    slots_ptr,  # (n,) int32, written: an arbitrary slot within the bin
    n_valid_ptr,  # () int64
    bins_per_latent,
    ROWS_PER_BIN: tl.constexpr,
    CODES: tl.constexpr,
):
    codes = tl.program_id(0) * CODES + tl.arange(0, CODES)
    mask = codes < tl.load(n_valid_ptr)
    row = tl.load(rows_ptr + codes, mask=mask, other=0)
    latent = tl.load(latents_ptr + codes, mask=mask, other=0)
    own_bin = latent * bins_per_latent + (row // ROWS_PER_BIN).to(tl.int32)
    slot = tl.atomic_add(counts_ptr + own_bin, 1, mask=mask, sem="relaxed")
    tl.store(bins_ptr + codes, own_bin, mask=mask)
    tl.store(slots_ptr + codes, slot, mask=mask)


@triton.jit
def _place(
    bins_ptr,  # (n,) int32
    slots_ptr,  # (n,) int32, within the bin
    starts_ptr,  # (n_bins + 1,) int32, where each bin starts
    unordered_ptr,  # (n,) int32, written: the codes of each bin in any order
    n_valid_ptr,  # () int64
    CODES: tl.constexpr,
):
    codes = tl.program_id(0) * CODES + tl.arange(0, CODES)
    mask = codes < tl.load(n_valid_ptr)
    own_bin = tl.load(bins_ptr + codes, mask=mask, other=0)
    start = tl.load(starts_ptr + own_bin, mask=mask, other=0)
    slots = start + tl.load(slots_ptr + codes, mask=mask, other=0)
    tl.store(unordered_ptr + slots, codes, mask=mask)


@triton.jit
def _rank(
    bins_ptr,  # (n,) int32
    starts_ptr,  # (n_bins + 1,) int32
    unordered_ptr,  # (n,) int32
    by_latent_ptr,  # (n,) int32, written
    n_valid_ptr,  # () int64
    CODES: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Each code's rank is the number of smaller codes in its bin."""
    slots = tl.program_id(0) * CODES + tl.arange(0, CODES)
    mask = slots < tl.load(n_valid_ptr)
    own = tl.load(unordered_ptr + slots, mask=mask, other=0)
    own_bin = tl.load(bins_ptr + own, mask=mask, other=0)
    start = tl.load(starts_ptr + own_bin, mask=mask, other=0)
    size = tl.load(starts_ptr + own_bin + 1, mask=mask, other=0) - start
    ranks = tl.zeros((CODES,), tl.int32)
    for first in range(0, tl.max(size, 0), RIVALS):
        offsets = first + tl.arange(0, RIVALS)
        in_bin = offsets[None, :] < size[:, None]
        rival = tl.load(unordered_ptr + start[:, None] + offsets[None, :], mask=in_bin, other=0)
        ranks += tl.sum((in_bin & (rival < own[:, None])).to(tl.int32), 1)
    tl.store(by_latent_ptr + start + ranks, own, mask=mask)
