"""Exact BatchTopK selection from a bfloat16 product: a screen.

The product in bfloat16 decides which scores could be among the `n_keep` largest; only those are
computed in float32. With x̃ and w̃ the factors rounded to bfloat16, p = ⟨x, w⟩ and p̂ its float32
value, summed in any order,

    |⟨x̃, w̃⟩ − p̂| ≤ m,    m = ‖x̃ − x‖ ‖w‖ + ‖x̃‖ ‖w̃ − w‖ + e ‖x̃‖ ‖w‖

because ⟨x̃, w̃⟩ − p = ⟨x̃ − x, w⟩ + ⟨x̃, w̃ − w⟩. The differences are exact in float32; their norms
are about 2.5 times smaller than rounding could make them. e bounds the errors of the float32 sums.
It is twice that of a sum whose every addition truncates: a quarter of it is enough for p̂, which is
rounded to nearest, and three quarters for a product whose units truncate each summand of, at least,
4 products and the sum so far, and then their sum (tensor cores do).

Both m and the limit that a pre-activation has to reach are sums of products of something of the row
and something of the latent, so they become columns of the factors:

    [x̃, ‖x̃ − x‖ + e ‖x̃‖, ‖x̃‖, 1] · [w̃, ‖w‖, ‖w̃ − w‖, −limit]  <  0    ⟹    p̂ < limit

and the sign of the product is the screen. The added columns are rounded towards passing, by more
than the error of summing them. Units for bfloat16 flush subnormal numbers to 0, which `_TINY_NORM`
and `TINY` cover. If a sum could overflow or a factor is not finite, the screen returns None.

Of the scores that pass, the `n_keep` that seem largest are computed first. The smallest of these is
a lower bound of the cut, so of the others only those are computed that could reach it.
"""

import logging
import time
from functools import cache
from typing import Literal, NamedTuple

import torch

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.cut import flat_nonzero, nth_largest, settle, skip_limits

N_ADDED = 3  # columns of the bound and the limit
MAX_D_IN = 2**13  # for larger sums the rounding of the added columns is not enough
LARGEST = 2.0**120  # of norms and their products, so that no sum overflows
_TINY_NORM = 2.0**-56  # √d_in · 2⁻⁶³ or more: squares below 2⁻¹²⁶ may be lost in a norm
TINY = 2.0**-110  # 2 · d_in · 2⁻¹²⁶ or more, for products and sums below it
_BLOCK_LATENTS = 2048  # in one product
_CACHED_ELEMENTS = 2**17  # that are rounded at a time
_MAX_PASSING = 16  # times n_keep; more cost as much as a full ranking

_MIN_SPEEDUP = 2.0  # of the bfloat16 product, for the screen to pay
_MEASURED_SHAPE = (512, 512, 2048)  # rows, d_in, latents
_log = logging.getLogger(__name__)

Selection = Literal["auto", "screen", "product"]


def can_screen(x: torch.Tensor, W_enc: torch.Tensor, selection: Selection) -> bool:
    """Whether the bound holds here, and the user lets it."""
    if selection == "product" or torch.is_autocast_enabled(x.device.type):
        return False
    return x.dtype == W_enc.dtype == torch.float32 and x.shape[1] <= MAX_D_IN


def sum_error(d_in: int) -> float:
    """Relative error of a sum of d_in products and the added ones, each of which is truncated."""
    return (d_in + N_ADDED) * 2**-23


def columns_of_rows(norms: torch.Tensor, errors: torch.Tensor, d_in: int) -> torch.Tensor:
    """(B, 3) bfloat16, from the norms of the rows and of their rounding errors."""
    norms = norms * (1 + 2**-7) + _TINY_NORM  # no less than those of the rounded rows
    errors = errors + _TINY_NORM + 2 * sum_error(d_in) * norms
    return torch.stack([_up(errors), _up(norms), torch.ones_like(norms).bfloat16()], 1)


def columns_of_latents(
    norms: torch.Tensor, errors: torch.Tensor, limits: torch.Tensor
) -> torch.Tensor:
    """(d_sae, 3) bfloat16, from the norms of the encoder rows and of their rounding errors."""
    limits = limits.clamp(-LARGEST, LARGEST)
    limits = (limits - limits.abs() * 2**-7 - TINY).bfloat16()
    norms = norms * (1 + 2**-7) + _TINY_NORM
    return torch.stack([_up(norms), _up(errors + _TINY_NORM), -limits], 1)


def select_screened(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
    floor: float | torch.Tensor,
) -> Codes | None:
    """As `selection.select`, in float32 on a CPU, from the scores that could exceed `floor`.

    None where these do not settle the set. Pre-activations are summed in another order than in the
    product of matrices, so they differ from it by rounding.
    """
    limits, at_limits = skip_limits(floor, b_enc, norms)
    bound = at_limits.item()
    if not bound < LARGEST:
        return None
    passing = _screen(x, W_enc, limits, _MAX_PASSING * n_keep)
    if passing is None or len(passing.rows) < n_keep:
        return None

    def scores(products: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        pre_acts = products + b_enc[latents]
        return pre_acts if norms is None else pre_acts * norms[latents]

    rows, latents, largest, likely = passing
    likely = scores(likely, latents)
    is_first = likely >= nth_largest(likely, n_keep)
    first = flat_nonzero(is_first)
    products = _dots(x, W_enc, rows[first], latents[first])
    lower_bound = scores(products, latents[first]).min()
    could_reach = scores(largest, latents) >= lower_bound
    others = flat_nonzero(could_reach & ~is_first)
    products = torch.cat([products, _dots(x, W_enc, rows[others], latents[others])])
    computed = torch.cat([first, others])
    return settle(rows[computed], latents[computed], products, b_enc, norms, n_keep, bound)


def products_above(
    x: torch.Tensor, W_enc: torch.Tensor, limits: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Row, latent and value of the products x @ W_enc that exceed their latent's limit.

    Some others are among them. None if more than `most` could exceed it, or sums could overflow.

    Args:
        x: (B, d_in) float32, on a CPU.
        W_enc: (d_in, d_sae) float32, fast to read by latent: `W_enc.T` should be contiguous.
        limits: (d_sae,).
        most: How many products at most.
    """
    passing = _screen(x, W_enc, limits, most)
    if passing is None:
        return None
    return passing.rows, passing.latents, _dots(x, W_enc, passing.rows, passing.latents)


class _Passing(NamedTuple):
    """The n products x @ W_enc that could reach their latent's limit, by latent and by row."""

    rows: torch.Tensor  # (n,) int32
    latents: torch.Tensor  # (n,) int32
    largest: torch.Tensor  # (n,) what the product is at most
    likely: torch.Tensor  # (n,) an estimate of the product


def _screen(
    x: torch.Tensor, W_enc: torch.Tensor, limits: torch.Tensor, most: int
) -> _Passing | None:
    """None if more than `most` products pass, or sums could overflow."""
    (batch_size, d_in), d_sae = x.shape, W_enc.shape[1]
    by_row = x.new_empty(batch_size, d_in + N_ADDED, dtype=torch.bfloat16)
    row_norms, row_errors = _round(x, by_row[:, :d_in])
    by_row[:, d_in:] = columns_of_rows(row_norms, row_errors, d_in)
    largest_row = row_norms.max().clamp(min=1)

    n_latents = min(_BLOCK_LATENTS, d_sae)
    by_latent = by_row.new_empty(n_latents, d_in + N_ADDED)
    products = by_row.new_empty(n_latents, batch_size)
    added = by_row.new_empty(d_sae, N_ADDED)
    found, values, n_found = [], [], 0
    for start in range(0, d_sae, n_latents):
        block = slice(start, min(start + n_latents, d_sae))
        size = block.stop - start
        norms, errors = _round(W_enc.T[block], by_latent[:size, :d_in])
        if not norms.max() * largest_row < LARGEST:
            return None
        added[block] = columns_of_latents(norms, errors, limits[block])
        by_latent[:size, d_in:] = added[block]
        torch.mm(by_latent[:size], by_row.T, out=products[:size])
        # numpy compares four times as fast as torch
        is_sign_clear = products[:size].view(torch.int16).numpy() >= 0
        passing = torch.from_numpy(is_sign_clear.reshape(-1).nonzero()[0])
        n_found += len(passing)
        if n_found > most:
            return None
        values.append(products.view(-1)[passing].float())
        found.append(passing + start * batch_size)

    flat_index, value = torch.cat(found), torch.cat(values)
    latents = torch.div(flat_index, batch_size, rounding_mode="floor")
    rows = flat_index - latents * batch_size
    bounds, limit = added[:, :2].float()[latents], -added[:, 2].float()[latents]
    margin = (by_row[:, d_in : d_in + 2].float()[rows] * bounds).sum(1)
    return _Passing(
        rows=rows.int(),
        latents=latents.int(),
        # a value errs by its rounding to bfloat16 and by the part of the limit in its sum
        largest=value * (1 + 2**-7) + limit + 2 * sum_error(d_in) * limit.abs() + TINY,
        likely=value + limit - margin,
    )


def _round(matrix: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to bfloat16 into `out`; the norms of the rows and of their rounding errors."""
    norms, errors = matrix.new_empty(2, len(matrix))
    n_rows = max(1, _CACHED_ELEMENTS // matrix.shape[1])
    scratch = matrix.new_empty(n_rows, matrix.shape[1])
    for start in range(0, len(matrix), n_rows):
        rows = slice(start, start + n_rows)
        torch.linalg.vector_norm(matrix[rows], dim=1, out=norms[rows])
        rounded = out[rows].copy_(matrix[rows])
        difference = scratch[: len(rounded)].copy_(rounded).sub_(matrix[rows])
        torch.linalg.vector_norm(difference, dim=1, out=errors[rows])
    return norms, errors


def _up(norms: torch.Tensor) -> torch.Tensor:
    """In bfloat16, and larger by 2⁻⁹ of itself or more."""
    return (norms * (1 + 2**-7)).bfloat16()


def _dots(
    x: torch.Tensor, W_enc: torch.Tensor, rows: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """(n,) ⟨x[rows_i], W_enc[:, latents_i]⟩; latents ascend, so each encoder row is read once."""
    no_starts = latents.new_empty(0)  # of bags, which `latents` numbers already
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        W_enc.T, x, rows, no_starts, latents, 0
    )


@cache
def pays_off() -> bool:
    """Whether this processor multiplies in bfloat16 much faster than in float32; measured once."""
    if not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    rows, d_in, latents = _MEASURED_SHAPE
    x = torch.ones(rows, d_in, dtype=torch.float32)
    weights = torch.ones(d_in, latents, dtype=torch.float32)
    plain, rounded = _seconds(x, weights), _seconds(x.bfloat16(), weights.bfloat16())
    if plain < _MIN_SPEEDUP * rounded:
        _log.debug(
            "Codes are selected from float32 products: this processor claims bfloat16, but a "
            f"product took {rounded:.1e} s in it and {plain:.1e} s in float32."
        )
    return plain >= _MIN_SPEEDUP * rounded


def _seconds(x: torch.Tensor, weights: torch.Tensor) -> float:
    """Of the fastest of a few products."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(x, weights)
        times.append(time.perf_counter() - start)
    return min(times)
