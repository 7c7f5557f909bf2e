"""Codes in the order of levels and of latents, by counting, in Triton.

Codes are counted into bins and placed behind what is counted before their bin. Within a bin, atomic
counters hand out the places in any order; codes then take the place of their rank in it, so that
every sum over them adds in the same order, whatever the order of execution was.
"""

# Triton annotates what a kernel takes on the device, not what a launch takes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_lens_matryoshka.kernels import sums as eager
from sae_lens_matryoshka.kernels.layout import Layout
from sae_lens_matryoshka.kernels.selection import Codes

_CODES = 128  # codes that one program handles
_RIVALS = 16  # codes of its bin that a code is compared with at once
_ROWS_PER_BIN = 1024  # of a latent that fires on every row: what a code is compared with at most


def order(
    codes: Codes, batch_size: int, levels: torch.Tensor, n_levels: int, are_levels_ascending: bool
) -> tuple[Codes, Layout]:
    """As `eager.order`, without a sort and without waiting for the device."""
    n, d_sae, device = len(codes.rows), len(levels), codes.rows.device
    if n == 0:
        return eager.order(codes, batch_size, levels, n_levels, are_levels_ascending)
    n_used = codes.n_used if codes.n_used is not None else torch.full((), n, device=device)
    row_starts = torch.searchsorted(codes.rows, torch.arange(batch_size + 1, device=device))
    row_starts = torch.minimum(row_starts, n_used)
    bags = torch.zeros(n, dtype=torch.int32, device=device)
    places = torch.arange(n, dtype=torch.int32, device=device)
    bag_starts = torch.empty(batch_size * n_levels + 1, dtype=torch.int32, device=device)
    _order_rows[(batch_size,)](
        codes.latents, levels, row_starts, bags, places, bag_starts, batch_size, n_levels, _CODES
    )
    if not are_levels_ascending:
        codes = codes.in_order(places)
    latents = codes.latents.int()
    by_latent, latent_starts = _by_latent(latents, codes.rows, n_used, batch_size, d_sae)
    return codes, Layout(latents, bags, bag_starts, by_latent, latent_starts)


def _by_latent(
    latents: torch.Tensor, rows: torch.Tensor, n_used: torch.Tensor, batch_size: int, d_sae: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n, device = len(latents), latents.device
    bins_per_latent = triton.cdiv(batch_size, _ROWS_PER_BIN)
    counts = torch.zeros(d_sae * bins_per_latent, dtype=torch.int32, device=device)
    bins, places = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
    grid = (triton.cdiv(n, _CODES),)
    _count[grid](
        latents, rows, counts, bins, places, n_used, bins_per_latent, _ROWS_PER_BIN, _CODES
    )
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    unordered, by_latent = torch.empty_like(bins), torch.zeros_like(bins)
    _place[grid](bins, places, starts, unordered, n_used, _CODES)
    _rank[grid](bins, starts, unordered, by_latent, n_used, _CODES, _RIVALS)
    return by_latent, starts[::bins_per_latent].contiguous()


@triton.jit
def _order_rows(
    latents,
    levels,
    row_starts,
    bags,
    places,
    bag_starts,
    batch_size,
    n_levels,
    CODES: tl.constexpr,
):
    row = tl.program_id(0)
    start = tl.load(row_starts + row)
    end = tl.load(row_starts + row + 1)
    placed = start
    for level in range(n_levels):
        bag = row * n_levels + level
        tl.store(bag_starts + bag, placed.to(tl.int32))
        for first in range(start, end, CODES):
            codes = first + tl.arange(0, CODES)
            latent = tl.load(latents + codes, mask=codes < end, other=0)
            own = (codes < end) & (tl.load(levels + latent, mask=codes < end, other=0) == level)
            slots = placed + tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(places + slots, codes.to(tl.int32), mask=own)
            tl.store(bags + slots, tl.zeros_like(codes).to(tl.int32) + bag, mask=own)
            placed += tl.sum(own.to(tl.int32), 0)
    if row == batch_size - 1:
        tl.store(bag_starts + batch_size * n_levels, end.to(tl.int32))


@triton.jit
def _count(
    latents,
    rows,
    counts,
    bins,
    places,
    n_used,
    bins_per_latent,
    ROWS_PER_BIN: tl.constexpr,
    CODES: tl.constexpr,
):
    codes = tl.program_id(0) * CODES + tl.arange(0, CODES)
    mask = codes < tl.load(n_used)
    row = tl.load(rows + codes, mask=mask, other=0)
    latent = tl.load(latents + codes, mask=mask, other=0)
    bin = latent * bins_per_latent + (row // ROWS_PER_BIN).to(tl.int32)
    tl.store(bins + codes, bin, mask=mask)
    tl.store(places + codes, tl.atomic_add(counts + bin, 1, mask=mask, sem="relaxed"), mask=mask)


@triton.jit
def _place(bins, places, starts, unordered, n_used, CODES: tl.constexpr):
    codes = tl.program_id(0) * CODES + tl.arange(0, CODES)
    mask = codes < tl.load(n_used)
    start = tl.load(starts + tl.load(bins + codes, mask=mask, other=0), mask=mask, other=0)
    slots = start + tl.load(places + codes, mask=mask, other=0)
    tl.store(unordered + slots, codes, mask=mask)


@triton.jit
def _rank(bins, starts, unordered, by_latent, n_used, CODES: tl.constexpr, RIVALS: tl.constexpr):
    slots = tl.program_id(0) * CODES + tl.arange(0, CODES)
    mask = slots < tl.load(n_used)
    own = tl.load(unordered + slots, mask=mask, other=0)
    bin = tl.load(bins + own, mask=mask, other=0)
    start = tl.load(starts + bin, mask=mask, other=0)
    size = tl.load(starts + bin + 1, mask=mask, other=0) - start
    ranks = tl.zeros((CODES,), tl.int32)
    for first in range(0, tl.max(size, 0), RIVALS):
        rivals = first + tl.arange(0, RIVALS)
        among = rivals[None, :] < size[:, None]
        rival = tl.load(unordered + start[:, None] + rivals[None, :], mask=among, other=0)
        ranks += tl.sum((among & (rival < own[:, None])).to(tl.int32), 1)
    tl.store(by_latent + start + ranks, own, mask=mask)
