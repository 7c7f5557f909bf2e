"""The summing kernels against their twins in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import sums, sums_triton
from sae_lens_matryoshka.kernels.codes import Codes, Layout
from sae_lens_matryoshka.kernels.layout import lay_out
from sae_lens_matryoshka.training.prefixes import level_of_latent
from tests.devices import DEVICE

pytestmark = pytest.mark.gpu

WIDTHS = (3, 7, 12)
# inputs are the same on both sides, and results round once: bfloat16's at 2^-8 of their size
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums_triton, "_WIDTH", 16)
    monkeypatch.setattr(sums_triton, "_CODES", 2)
    monkeypatch.setattr(sums_triton, "_CODES_OF_LATENT", 2)
    monkeypatch.setattr(sums_triton, "_CHUNK", 2)
    monkeypatch.setattr(sums_triton, "_LATENTS", 5)
    monkeypatch.setattr(sums_triton, "_ROWS", 3)


class Case:
    """n codes of a batch, and the weights that they meet."""

    def __init__(
        self, seed: int, batch: int, d_in: int, n: int, dtype: torch.dtype, n_latents: int = 12
    ):
        torch.manual_seed(seed)
        # on few latents, the last ones, sums are long
        latents = WIDTHS[-1] - n_latents + torch.randperm(n_latents)
        keys = (torch.arange(batch)[:, None] * WIDTHS[-1] + latents).flatten()
        keys = keys[torch.randperm(len(keys))[:n]].sort().values
        n = len(keys)
        values = (torch.rand(n) + 0.1).to(dtype)
        codes = Codes(keys // WIDTHS[-1], keys % WIDTHS[-1], values, values, 0.0)
        levels = level_of_latent(WIDTHS, "cpu")
        _, layout = lay_out(codes, batch, levels, len(WIDTHS), True)
        self.layout = Layout(*(tensor.to(DEVICE) for tensor in layout))
        self.acts = values.to(DEVICE)
        self.W_dec = torch.randn(WIDTHS[-1], d_in, dtype=dtype).to(DEVICE)
        self.b_dec = torch.randn(d_in, dtype=dtype).to(DEVICE)
        self.target = torch.randn(batch, d_in, dtype=dtype).to(DEVICE)
        self.residuals = torch.randn(batch, len(WIDTHS), d_in, dtype=dtype).to(DEVICE)
        self.scales = torch.rand(len(WIDTHS)).to(DEVICE)
        self.grad_out = torch.randn(batch, d_in, dtype=dtype).to(DEVICE)


cases = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 12),
    d_in=st.sampled_from([1, 5, 8, 16, 24, 40]),
    n=st.integers(0, 60),
    dtype=st.sampled_from(list(TOLERANCE)),
    n_latents=st.sampled_from([1, 2, 12]),
)


def assert_close(
    actual: tuple[torch.Tensor, ...], expected: Any, dtype: torch.dtype, size_of_terms: float = 1.0
) -> None:
    # terms may cancel: rounding is measured on the scale of what was summed
    scale = max(size_of_terms, *(twin.norm().item() for twin in expected))
    for ours, twin in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == twin.shape
        assert (ours.double() - twin).norm() < TOLERANCE[dtype] * scale


@given(case=cases)
@settings(max_examples=25)
def test_residuals(case: Case) -> None:
    inputs = (case.acts, case.W_dec, case.b_dec, case.target)
    expected = sums.level_residuals(*(t.double() for t in inputs), case.layout, len(WIDTHS))
    actual = sums_triton.level_residuals(*inputs, case.layout, len(WIDTHS))
    assert_close(actual, expected, case.W_dec.dtype)


@given(
    case=cases, stop_gradient=st.sampled_from(["none", "all", "inner"]), has_grad_out=st.booleans()
)
@settings(max_examples=25)
def test_gradients(case: Case, stop_gradient: Any, has_grad_out: bool) -> None:
    grad_out = case.grad_out if has_grad_out else None
    expected = sums.level_gradients(
        case.residuals.double(),
        case.scales.double(),
        None if grad_out is None else grad_out.double(),
        stop_gradient,
        case.W_dec.double(),
        case.layout,
    )
    actual = sums_triton.level_gradients(
        case.residuals, case.scales, grad_out, stop_gradient, case.W_dec, case.layout
    )
    assert_close(actual[::2], expected[::2], case.W_dec.dtype)
    # the mixes are rounded before the codes meet them, and what comes of it is once more
    mixes = expected[0][case.layout.bags.long()].norm(dim=1)
    rows = case.W_dec.double()[case.layout.latents.long()].norm(dim=1)
    terms = 2 * (mixes * rows).norm().item()
    assert_close(actual[1:2], expected[1:2], case.W_dec.dtype, max(1.0, terms))


@given(case=cases, with_totals=st.booleans())
@settings(max_examples=25)
def test_sum_by_latent(case: Case, with_totals: bool) -> None:
    rows = case.layout.bags
    matrix = case.residuals.flatten(0, 1)
    expected = sums.sum_by_latent(matrix.double(), rows, case.acts.double(), case.layout)
    actual, totals = sums_triton.sum_by_latent(matrix, rows, case.acts, case.layout, with_totals)
    assert_close((actual,), expected[:1], case.W_dec.dtype)
    silent = case.layout.latent_starts.diff() == 0
    assert not actual[silent].any()
    if totals is None:
        assert not with_totals
    else:
        assert_close((totals,), expected[1:], case.W_dec.dtype)
        assert not totals[silent].any()


def test_equal_inputs_give_equal_bits() -> None:
    case = Case(0, 4, 40, 40, torch.float32)
    runs = [
        (
            *sums_triton.level_residuals(
                case.acts, case.W_dec, case.b_dec, case.target, case.layout, len(WIDTHS)
            ),
            *sums_triton.sum_by_latent(case.target, case.layout.bags // 3, case.acts, case.layout),
        )
        for _ in range(2)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that PyTorch hands out holds anything; here it holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    for n in (0, 5, 36):
        case = Case(1, 3, 24, n, torch.float32)
        inputs = (case.acts, case.W_dec, case.b_dec, case.target, case.layout, len(WIDTHS))
        results = [
            *sums_triton.level_residuals(*inputs),
            *sums_triton.level_gradients(
                case.residuals, case.scales, None, "none", case.W_dec, case.layout
            ),
            *sums_triton.sum_by_latent(case.target, case.layout.bags // 3, case.acts, case.layout),
        ]
        assert all(tensor.isfinite().all() for tensor in results)
