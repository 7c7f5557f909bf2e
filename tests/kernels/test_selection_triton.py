"""The selection kernels keep what a stable sort of all scores keeps, whatever floor they get."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import cut_triton
from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.selection_triton import select
from tests.devices import DEVICE
from tests.kernels.test_selection import drawn_inputs

pytestmark = pytest.mark.gpu


def by_sorting(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    n_keep: int,
) -> Codes:
    """The codes as `selection_triton.select` promises them, from a stable sort of the scores."""
    pre_acts = x @ W_enc + b_enc
    scores = (pre_acts if norms is None else pre_acts * norms).relu().flatten()
    top = scores.sort(descending=True, stable=True).indices[:n_keep]
    cut = scores[top[-1]].float() if n_keep else torch.zeros(())
    kept = top[~(scores[top] <= 0)].sort().values
    filled = torch.cat([kept, kept.new_full((n_keep - len(kept),), scores.numel() - 1)])
    is_code = torch.arange(n_keep, device=x.device) < len(kept)
    return Codes(
        filled // W_enc.shape[1],
        filled % W_enc.shape[1],
        scores[filled].masked_fill(~is_code, 0),
        pre_acts.flatten()[filled].masked_fill(~is_code, 0),
        cut,
    )


def assert_same(actual: Codes, expected: Codes) -> None:
    for field in ("rows", "latents", "scores", "pre_acts"):
        ours, theirs = getattr(actual, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype, field
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=field)
    assert float(actual.cut) == float(expected.cut)


@pytest.fixture(autouse=True)
def _several_blocks_a_row_and_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_triton, "_SCORES", 16)
    monkeypatch.setattr(cut_triton, "_CANDIDATES", 8)
    monkeypatch.setattr(cut_triton, "n_programs", lambda device: 5)


def drawn(kind: str, **shape: int) -> dict[str, torch.Tensor]:
    known = kind if kind in ("ties", "few positive", "none positive", "huge bias") else "plain"
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    inputs = drawn_inputs(**shape, dtype=dtype, kind=known)
    if kind == "all equal":
        inputs["x"], inputs["b_enc"] = inputs["x"] * 0, torch.full_like(inputs["b_enc"], 0.5)
    elif kind == "infinities":
        inputs["b_enc"][::3] = math.inf
        inputs["b_enc"][1::3] = -math.inf
    elif kind == "denormals":
        inputs["x"], inputs["b_enc"] = inputs["x"] * 0, inputs["b_enc"] * 1e-40
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


KINDS = (
    "plain",
    "ties",
    "few positive",
    "none positive",
    "huge bias",
    "bfloat16",
    "all equal",
    "infinities",
    "denormals",
)


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 6),
    d_in=st.integers(1, 12),
    d_sae=st.integers(1, 50),
    k=st.floats(0.2, 6),
    share_of_largest=st.sampled_from([None, 0.0, 0.4, 0.6, 1.2, 2.5]),
    ranks_by_norm=st.booleans(),
)
@settings(max_examples=12)
def test_any_last_cut_gives_what_sorting_gives(
    kind: str,
    seed: int,
    batch: int,
    d_in: int,
    d_sae: int,
    k: float,
    share_of_largest: float | None,
    ranks_by_norm: bool,
) -> None:
    inputs = drawn(kind, seed=seed, batch=batch, d_in=d_in, d_sae=d_sae)
    norms = torch.rand(d_sae).to(inputs["b_enc"]) + 0.1 if ranks_by_norm else None
    n_keep = int(min(k, d_sae) * batch)
    expected = by_sorting(**inputs, norms=norms, n_keep=n_keep)
    last_cut = None
    if share_of_largest is not None and n_keep:
        last_cut = share_of_largest * expected.scores.max().float().nan_to_num(0, 1e30)
    assert_same(select(**inputs, norms=norms, n_keep=n_keep, last_cut=last_cut), expected)


def test_nan_comes_before_every_score() -> None:
    inputs = drawn("plain", seed=0, batch=4, d_in=6, d_sae=40)
    inputs["x"][2] = math.nan
    codes = select(**inputs, norms=None, n_keep=12, last_cut=torch.tensor(0.6, device=DEVICE))
    assert codes.rows.tolist() == [2] * 12
    assert codes.latents.tolist() == list(range(12))
    assert codes.scores.isnan().all()
    assert codes.pre_acts.isnan().all()


@pytest.mark.parametrize("last_cut", [0.05, 0.6, 50.0])
def test_counts_of_64_bits_and_a_cut_on_the_host(
    last_cut: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_triton, "_INT32_SCORES", 0)
    inputs = drawn("plain", seed=0, batch=5, d_in=6, d_sae=40)
    expected = by_sorting(**inputs, norms=None, n_keep=12)
    assert_same(select(**inputs, norms=None, n_keep=12, last_cut=last_cut), expected)


def test_half_precision_products_are_rounded_as_dense_code_rounds_them() -> None:
    """Under autocast the product is bfloat16 and the bias float32: scores hardly ever tie."""
    inputs = drawn("plain", seed=3, batch=6, d_in=8, d_sae=48)
    norms = torch.rand(48, device=DEVICE) + 0.5
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = by_sorting(**inputs, norms=norms, n_keep=30)
        actual = select(**inputs, norms=norms, n_keep=30, last_cut=None)
    assert expected.scores.dtype == torch.float32
    assert_same(actual, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="only CUDA tells what waits for it")
def test_waits_for_nothing() -> None:
    inputs = drawn("plain", seed=0, batch=64, d_in=16, d_sae=512)
    last_cut = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            last_cut = select(**inputs, norms=None, n_keep=256, last_cut=last_cut).cut
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cpu", reason="the order of CUDA's own torch.topk is meant")
@pytest.mark.parametrize("kind", KINDS)
def test_ties_fall_as_saelens_lets_them_fall(kind: str) -> None:
    inputs = drawn(kind, seed=1, batch=256, d_in=16, d_sae=2048)
    codes = select(**inputs, norms=None, n_keep=4096, last_cut=None)
    scores = (inputs["x"] @ inputs["W_enc"] + inputs["b_enc"]).relu().flatten()
    top = scores.topk(4096)
    expected = torch.zeros_like(scores).scatter_(0, top.indices, top.values)
    actual = torch.zeros_like(scores)
    actual[codes.rows * 2048 + codes.latents] = codes.scores
    assert torch.equal(actual, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 20 GB of a GPU")
def test_more_scores_than_32_bits_count() -> None:
    batch, d_sae = 2**14 + 8, 2**17
    x = torch.randn(batch, 8, device=DEVICE, dtype=torch.bfloat16)
    W_enc = torch.zeros(8, d_sae, device=DEVICE, dtype=torch.bfloat16)
    b_enc = torch.zeros(d_sae, device=DEVICE, dtype=torch.bfloat16)
    b_enc[-3:] = 1
    codes = select(x, W_enc, b_enc, None, 3 * batch, None)
    assert torch.equal(codes.rows.cpu(), torch.arange(batch).repeat_interleave(3))
    assert torch.equal(codes.latents.cpu(), d_sae - 3 + torch.arange(3).repeat(batch))
