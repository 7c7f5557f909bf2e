"""The screen keeps what ranking all float32 scores keeps, however bfloat16 rounds the factors."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import screen, selection
from sae_lens_matryoshka.kernels.cut import skip_limits
from sae_lens_matryoshka.kernels.screen import select_screened
from sae_lens_matryoshka.kernels.selection import select

KINDS = [
    "plain",
    "worst rounding",
    "cancellation",
    "uneven rows and latents",
    "subnormal",
    "squares below the smallest number",
    "huge bias",
    "few positive",
    "ties",
]


def drawn(kind: str, seed: int, batch: int, d_in: int, d_sae: int) -> dict[str, torch.Tensor]:
    """Activations, encoder and biases that bfloat16 gets wrong, each kind in its own way."""
    torch.manual_seed(seed)
    x, W, b = torch.randn(batch, d_in), torch.randn(d_sae, d_in), torch.randn(d_sae)
    if kind == "worst rounding":  # every factor lies halfway, and all errors have one sign
        halfway = 1 + 2**-8 + torch.randint(0, 64, x.shape) * 2**-7
        x = halfway * (1 + torch.randint(-1, 2, x.shape) * 2**-22)
        W = (1 + 2**-8) * (1 + torch.randint(-1, 2, W.shape) * 2**-22)
        b = -d_in * torch.rand(d_sae)
    elif kind in ("cancellation", "squares below the smallest number"):
        x[:, 1::2] = -x[:, : d_in // 2 * 2 : 2] * (1 + 2**-9)
        W[:, 1::2] = W[:, : d_in // 2 * 2 : 2]
        b = b * 1e-3
        if kind != "cancellation":
            x, b = x * 1e-24, b * 0
    elif kind == "uneven rows and latents":
        x *= 10.0 ** torch.randint(-12, 13, (batch, 1))
        W *= 10.0 ** torch.randint(-6, 7, (d_sae, 1))
    elif kind == "subnormal":
        x, W, b = x * 2.0**-120, W * 2.0**-8, b * 2.0**-126
    elif kind == "huge bias":
        b = b * 1e6
    elif kind == "few positive":
        b = b - 3 * d_in**0.5
    elif kind == "ties":
        x, W, b = x.sign(), W.sign(), b.sign()
    return {"x": x, "W_enc": W.T, "b_enc": b}


def all_scores(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, norms: torch.Tensor | None
) -> torch.Tensor:
    """(B, d_sae) every score, its dot product summed as the screen's candidates are."""
    (n_rows, _), (_, d_sae) = x.shape, W_enc.shape
    rows = torch.arange(n_rows, dtype=torch.int32).repeat(d_sae)
    latents = torch.arange(d_sae, dtype=torch.int32).repeat_interleave(n_rows)
    pre_acts = screen._dots(x, W_enc, rows, latents).view(d_sae, n_rows).T + b_enc
    return pre_acts if norms is None else pre_acts * norms


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 24),
    d_in=st.integers(1, 80),
    d_sae=st.integers(1, 300),
    k=st.floats(0.1, 8),
    floor=st.sampled_from([0.0, 0.3, 0.8, 0.9, 0.99, 1.0, 1.1]),
    ranks_by_norm=st.booleans(),
)
@settings(max_examples=400)
def test_keeps_what_ranking_every_float32_score_keeps(
    kind: str,
    seed: int,
    batch: int,
    d_in: int,
    d_sae: int,
    k: float,
    floor: float,
    ranks_by_norm: bool,
) -> None:
    inputs = drawn(kind, seed, batch, d_in, d_sae)
    norms = torch.rand(d_sae) + 0.1 if ranks_by_norm else None
    if norms is not None:
        norms[seed % d_sae] = 0
    n_keep = max(1, int(min(k, d_sae) * batch))
    scores = all_scores(**inputs, norms=norms)
    cut = scores.flatten().topk(n_keep).values[-1].item()
    codes = select_screened(**inputs, norms=norms, n_keep=n_keep, floor=floor * max(cut, 0))
    if codes is None:
        return  # the slower way decides; see the tests below for when it must not
    kept = (scores >= cut) & (scores > 0)
    assert kept.sum() == n_keep or cut <= 0
    rows, latents = kept.nonzero(as_tuple=True)
    assert torch.equal(codes.rows, rows)
    assert torch.equal(codes.latents, latents)
    assert torch.equal(codes.scores, scores[kept])
    assert codes.cut == max(cut, 0)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 16),
    d_in=st.integers(1, 200),
    d_sae=st.integers(1, 100),
    floor=st.sampled_from([1e-24, 1e-3, 0.3, 3.0, 30.0]),
)
@settings(max_examples=300)
def test_nothing_above_its_limit_is_screened_out(
    kind: str, seed: int, batch: int, d_in: int, d_sae: int, floor: float
) -> None:
    inputs = drawn(kind, seed, batch, d_in, d_sae)
    limits, _ = skip_limits(floor, inputs["b_enc"], None)
    passing = screen._screen(inputs["x"], inputs["W_enc"], limits, most=batch * d_sae)
    assert passing is not None
    exact = inputs["x"].double() @ inputs["W_enc"].double()
    passed = torch.zeros(batch, d_sae, dtype=torch.bool)
    passed[passing.rows.long(), passing.latents.long()] = True
    assert passed[exact >= limits.double()].all()
    assert (passing.largest.double() >= exact[passing.rows.long(), passing.latents.long()]).all()


def test_the_bound_is_reached_within_a_factor_of_two() -> None:
    """Factors halfway between two bfloat16 numbers, all rounded down: errors add up."""
    x = torch.full((1, 512), 1 + 2**-8)
    limits = torch.tensor([1.0])
    passing = screen._screen(x, x.T.contiguous(), limits, most=1)
    assert passing is not None
    exact = 512 * (1 + 2**-8) ** 2
    error = exact - 512.0  # both factors become 1
    assert exact <= passing.largest.item() <= exact + 1.5 * error


def test_few_scores_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    dots = screen._dots
    monkeypatch.setattr(screen, "_dots", lambda *args: computed.append(len(args[2])) or dots(*args))
    inputs = drawn("plain", 0, batch=256, d_in=512, d_sae=4096)
    scores = all_scores(**inputs, norms=None)
    computed.clear()
    n_keep = 256 * 16
    cut = scores.flatten().topk(n_keep).values[-1].item()
    assert select_screened(**inputs, norms=None, n_keep=n_keep, floor=0.9 * cut) is not None
    assert sum(computed) < 1.3 * n_keep


@pytest.mark.parametrize("kind", ["plain", "worst rounding", "uneven rows and latents"])
def test_a_floor_below_the_cut_settles_the_set(kind: str) -> None:
    inputs = drawn(kind, 0, batch=64, d_in=48, d_sae=512)
    cut = all_scores(**inputs, norms=None).flatten().topk(256).values[-1].item()
    assert select_screened(**inputs, norms=None, n_keep=256, floor=0.95 * cut) is not None
    assert select_screened(**inputs, norms=None, n_keep=256, floor=1.01 * cut) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("x", "W_enc", "b_enc") for value in (math.nan, -math.inf)),
        *((name, value) for name in ("x", "W_enc") for value in (math.inf, 3.4e38, 2.0**121)),
        ("norms", math.nan),
        ("norms", math.inf),
    ],
)
def test_what_is_not_finite_or_could_overflow_is_not_screened(name: str, value: float) -> None:
    inputs = drawn("plain", 0, batch=8, d_in=16, d_sae=64)
    inputs["norms"] = torch.ones(64)
    assert select_screened(**inputs, n_keep=16, floor=4.0) is not None
    inputs[name][5] = value
    assert select_screened(**inputs, n_keep=16, floor=4.0) is None


def test_a_dictionary_with_wider_activations_is_not_screened() -> None:
    x, W_enc = torch.ones(1, screen.MAX_D_IN + 1), torch.ones(screen.MAX_D_IN + 1, 2)
    assert not selection._is_screened(x, W_enc, "screen")
    assert selection._is_screened(x[:, 1:], W_enc[1:], "screen")


def test_another_default_dtype_changes_nothing() -> None:
    inputs = drawn("plain", 0, batch=8, d_in=16, d_sae=64)
    expected = select_screened(**inputs, norms=None, n_keep=16, floor=4.0)
    torch.set_default_dtype(torch.float64)
    try:
        actual = select_screened(**inputs, norms=None, n_keep=16, floor=4.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected is not None
    assert actual is not None
    assert torch.equal(actual.scores, expected.scores)


def test_nan_reaches_the_codes() -> None:
    inputs = drawn("plain", 0, batch=8, d_in=16, d_sae=64)
    inputs["x"][3, 2] = math.nan
    codes = select(**inputs, norms=None, n_keep=64, last_cut=3.0, selection="screen")
    assert codes.scores.isnan().any()


@pytest.mark.parametrize("selection", ["screen", "product"])
def test_the_first_batch_and_a_wrong_cut_are_ranked_in_full(selection: str) -> None:
    inputs = drawn("plain", 1, batch=32, d_in=32, d_sae=256)
    expected = all_scores(**inputs, norms=None).flatten().topk(96).values.sort().values
    for last_cut in (None, 1e9, 1e-9):
        codes = select(
            **inputs,
            norms=None,
            n_keep=96,
            last_cut=last_cut,
            selection=selection,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(codes.scores.sort().values, expected)


def test_a_processor_that_is_slow_in_bfloat16_uses_the_product(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(
        screen, "_seconds", lambda x, weights: 2.0 if x.dtype == torch.bfloat16 else 1.0
    )
    screen.pays_off.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG, logger=screen.__name__):
            assert not screen.pays_off()
        assert "claims bfloat16" in caplog.text
    finally:
        screen.pays_off.cache_clear()
