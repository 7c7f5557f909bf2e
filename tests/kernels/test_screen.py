"""The screen keeps what ranking all float32 scores keeps, however bfloat16 rounds the factors.

Both on a CPU and in Triton, which also settles ties, and pads where few scores are positive.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import (
    cut_triton,
    screen,
    screen_triton,
    selection,
    selection_triton,
)
from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.cut import skip_limits
from tests.devices import DEVICE

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


def drawn(
    kind: str, seed: int, batch: int, d_in: int, d_sae: int, device: str = "cpu"
) -> dict[str, torch.Tensor]:
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
    return {"x": x.to(device), "W_enc": W.to(device).T, "b_enc": b.to(device)}


def scores_on_cpu(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, norms: torch.Tensor | None
) -> torch.Tensor:
    (n_rows, _), (_, d_sae) = x.shape, W_enc.shape
    rows = torch.arange(n_rows, dtype=torch.int32).repeat(d_sae)
    latents = torch.arange(d_sae, dtype=torch.int32).repeat_interleave(n_rows)
    pre_acts = screen._dots(x, W_enc, rows, latents).view(d_sae, n_rows).T + b_enc
    return (pre_acts if norms is None else pre_acts * norms).relu()


def scores_in_triton(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, norms: torch.Tensor | None
) -> torch.Tensor:
    scores = x.new_zeros(len(x), len(b_enc))
    codes = screen_triton.select_screened(x, W_enc, b_enc, norms, scores.numel(), -(2.0**100))
    assert codes is not None
    codes = without_padding(codes)
    scores[codes.rows, codes.latents] = codes.scores
    return scores


def without_padding(codes: Codes) -> Codes:
    if codes.n_valid is None:
        return codes
    return Codes(*(tensor[: int(codes.n_valid)] for tensor in codes[:4]), codes.cut)


def largest_on_cpu(x: torch.Tensor, W_enc: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    passing = screen._screen(x, W_enc, limits, most=len(x) * len(limits))
    assert passing is not None
    largest = torch.full((len(x), len(limits)), -torch.inf)
    largest[passing.rows.long(), passing.latents.long()] = passing.largest
    return largest


def largest_in_triton(x: torch.Tensor, W_enc: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    n, no_bias = len(x) * len(limits), torch.zeros_like(limits)
    passing, keys, is_bounded = screen_triton._screen(x, W_enc.T, no_bias, None, limits, n)
    assert is_bounded
    n_found = int(passing.n_found)
    largest = x.new_full((n,), -torch.inf)
    largest[passing.flat_index[:n_found]] = keys[:n_found].view(torch.float32)
    return largest.view(len(x), -1)


class Path(NamedTuple):
    select: Callable[..., Codes]
    select_screened: Callable[..., Codes | None]
    # (B, d_sae) every positive score, its dot product summed as the screen's candidates are
    all_scores: Callable[..., torch.Tensor]
    # (B, d_sae) what each product is at most, or 0 if that is negative; −∞ where ruled out
    largest: Callable[..., torch.Tensor]
    device: str


CPU = Path(selection.select, screen.select_screened, scores_on_cpu, largest_on_cpu, "cpu")
TRITON = Path(
    selection_triton.select,
    screen_triton.select_screened,
    scores_in_triton,
    largest_in_triton,
    DEVICE,
)
on_both = pytest.mark.parametrize(
    "path", [pytest.param(CPU, id="cpu"), pytest.param(TRITON, id="triton", marks=pytest.mark.gpu)]
)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program."""
    if DEVICE != "cpu":
        return
    for module, sizes in {
        cut_triton: {"_CANDIDATES": 4096},
        screen_triton: {"_ROWS": 128, "_BOUNDS": 4096, "_DOTS": 1024},
    }.items():
        monkeypatch.setattr(module, "n_programs", lambda device: 3)
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


SELECTIONS: dict[str, Any] = {
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 2**16),
    "batch": st.integers(1, 24),
    "d_in": st.integers(1, 80),
    "d_sae": st.integers(1, 300),
    "k": st.floats(0.1, 8),
    "floor": st.sampled_from([0.0, 0.3, 0.8, 0.9, 0.99, 1.0, 1.1]),
    "ranks_by_norm": st.booleans(),
}


def check_selection(
    path: Path,
    kind: str,
    seed: int,
    batch: int,
    d_in: int,
    d_sae: int,
    k: float,
    floor: float,
    ranks_by_norm: bool,
) -> None:
    inputs = drawn(kind, seed, batch, d_in, d_sae, path.device)
    norms = torch.rand(d_sae).to(path.device) + 0.1 if ranks_by_norm else None
    if norms is not None:
        norms[seed % d_sae] = 0
    n_keep = max(1, int(min(k, d_sae) * batch))
    scores = path.all_scores(**inputs, norms=norms)
    top = scores.flatten().sort(descending=True, stable=True)
    cut = top.values[n_keep - 1].item()
    codes = path.select_screened(**inputs, norms=norms, n_keep=n_keep, floor=floor * cut)
    if codes is None:
        return  # the slower way decides; see the tests below for when it must not
    if path is CPU:
        assert (scores >= cut).sum() == n_keep or cut == 0
    codes = without_padding(codes)
    kept = top.indices[:n_keep][top.values[:n_keep] > 0].sort().values
    assert torch.equal(codes.rows * d_sae + codes.latents, kept)
    assert torch.equal(codes.scores, scores.flatten()[kept])
    assert codes.cut == cut


@given(**SELECTIONS)
@settings(max_examples=400)
def test_keeps_what_ranking_every_float32_score_keeps(**case: Any) -> None:
    check_selection(CPU, **case)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@given(case=st.fixed_dictionaries({**SELECTIONS, "batch": st.integers(1, 9)}))
@settings(max_examples=8)
def test_triton_keeps_what_ranking_every_float32_score_keeps(kind: str, case: Any) -> None:
    check_selection(TRITON, **{**case, "kind": kind})


PRODUCTS: dict[str, Any] = {
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 2**16),
    "batch": st.integers(1, 16),
    "d_in": st.integers(1, 200),
    "d_sae": st.integers(1, 100),
    "floor": st.sampled_from([1e-24, 1e-3, 0.3, 3.0, 30.0]),
}


def check_screen(
    path: Path, kind: str, seed: int, batch: int, d_in: int, d_sae: int, floor: float
) -> None:
    inputs = drawn(kind, seed, batch, d_in, d_sae, path.device)
    limits, _ = skip_limits(floor, inputs["b_enc"], None)
    exact = inputs["x"].double() @ inputs["W_enc"].double()
    largest = path.largest(inputs["x"], inputs["W_enc"], limits)
    is_ruled_out = largest == -torch.inf
    assert (exact < limits.double())[is_ruled_out].all()
    assert (largest >= exact)[~is_ruled_out].all()


@given(**PRODUCTS)
@settings(max_examples=300)
def test_nothing_above_its_limit_is_screened_out(**case: Any) -> None:
    check_screen(CPU, **case)


@pytest.mark.gpu
@given(**PRODUCTS)
@settings(max_examples=150)
def test_nothing_above_its_limit_is_screened_out_in_triton(**case: Any) -> None:
    check_screen(TRITON, **case)


@on_both
def test_the_bound_is_reached_within_a_factor_of_two(path: Path) -> None:
    """Factors halfway between two bfloat16 numbers, all rounded down: errors add up."""
    x = torch.full((1, 512), 1 + 2**-8, device=path.device)
    largest = path.largest(x, x.T.contiguous(), torch.ones(1, device=path.device)).item()
    exact = 512 * (1 + 2**-8) ** 2
    error = exact - 512.0  # both factors become 1
    assert exact <= largest <= exact + 1.5 * error


def test_few_scores_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    dots = screen._dots
    monkeypatch.setattr(screen, "_dots", lambda *args: computed.append(len(args[2])) or dots(*args))
    inputs = drawn("plain", 0, batch=256, d_in=512, d_sae=4096)
    scores = scores_on_cpu(**inputs, norms=None)
    computed.clear()
    n_keep = 256 * 16
    cut = scores.flatten().topk(n_keep).values[-1].item()
    assert screen.select_screened(**inputs, norms=None, n_keep=n_keep, floor=0.9 * cut) is not None
    assert sum(computed) < 1.3 * n_keep


@on_both
@pytest.mark.parametrize("kind", ["plain", "worst rounding", "uneven rows and latents"])
def test_a_floor_below_the_cut_settles_the_set(path: Path, kind: str) -> None:
    inputs = drawn(kind, 0, batch=16, d_in=48, d_sae=256, device=path.device)
    cut = path.all_scores(**inputs, norms=None).flatten().topk(64).values[-1].item()
    assert path.select_screened(**inputs, norms=None, n_keep=64, floor=0.95 * cut) is not None
    assert path.select_screened(**inputs, norms=None, n_keep=64, floor=1.01 * cut) is None


@on_both
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("x", "W_enc", "b_enc") for value in (math.nan, -math.inf)),
        *((name, value) for name in ("x", "W_enc") for value in (math.inf, 3.4e38, 2.0**121)),
        ("norms", math.nan),
        ("norms", math.inf),
    ],
)
def test_what_is_not_finite_or_could_overflow_is_not_screened(
    path: Path, name: str, value: float
) -> None:
    inputs = drawn("plain", 0, batch=8, d_in=16, d_sae=64, device=path.device)
    inputs["norms"] = torch.ones(64, device=path.device)
    assert path.select_screened(**inputs, n_keep=16, floor=4.0) is not None
    inputs[name][5] = value
    assert path.select_screened(**inputs, n_keep=16, floor=4.0) is None


def test_a_dictionary_with_wider_activations_is_not_screened() -> None:
    x, W_enc = torch.ones(1, screen.MAX_D_IN + 1), torch.ones(screen.MAX_D_IN + 1, 2)
    assert not screen.can_screen(x, W_enc, "screen")
    assert screen.can_screen(x[:, 1:], W_enc[1:], "screen")


@on_both
def test_another_default_dtype_changes_nothing(path: Path) -> None:
    inputs = drawn("plain", 0, batch=8, d_in=16, d_sae=64, device=path.device)
    expected = path.select_screened(**inputs, norms=None, n_keep=16, floor=4.0)
    torch.set_default_dtype(torch.float64)
    try:
        actual = path.select_screened(**inputs, norms=None, n_keep=16, floor=4.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected is not None
    assert actual is not None
    assert torch.equal(actual.scores, expected.scores)


@on_both
def test_nan_reaches_the_codes(path: Path) -> None:
    inputs = drawn("plain", 0, batch=8, d_in=16, d_sae=64, device=path.device)
    inputs["x"][3, 2] = math.nan
    codes = path.select(**inputs, norms=None, n_keep=64, last_cut=3.0, selection="screen")
    assert codes.scores.isnan().any()


@on_both
@pytest.mark.parametrize("selection", ["screen", "product"])
def test_the_first_batch_and_a_wrong_cut_are_ranked_in_full(path: Path, selection: str) -> None:
    inputs = drawn("plain", 1, batch=16, d_in=32, d_sae=128, device=path.device)
    expected = path.all_scores(**inputs, norms=None).flatten().topk(48).values.sort().values
    for last_cut in (None, 1e9, 1e-9):
        codes = path.select(**inputs, norms=None, n_keep=48, last_cut=last_cut, selection=selection)
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
