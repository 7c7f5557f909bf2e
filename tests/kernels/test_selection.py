"""The fast selection returns what ranking the dense scores does, whatever cut it is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.batchtopk_sae import BatchTopK

from sae_lens_matryoshka.kernels import selection
from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.selection import select, select_above, select_full


def drawn_inputs(
    seed: int, batch: int, d_in: int, d_sae: int, dtype: torch.dtype, kind: str
) -> dict:
    torch.manual_seed(seed)
    x = torch.randn(batch, d_in, dtype=dtype)
    W_enc = torch.randn(d_in, d_sae, dtype=dtype)
    b_enc = torch.randn(d_sae, dtype=dtype)
    if kind == "ties":
        x, W_enc, b_enc = x.sign(), W_enc.sign(), b_enc.sign()
    elif kind == "few positive":
        b_enc = b_enc - 3 * d_in**0.5
    elif kind == "none positive":
        x, b_enc = x * 0, -b_enc.abs()
    elif kind == "huge bias":
        b_enc = b_enc * 1e6
    return {"x": x, "W_enc": W_enc.T.contiguous().T, "b_enc": b_enc}


def assert_same(actual: Codes, expected: Codes) -> None:
    for field in ("rows", "latents", "scores", "pre_acts"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 24),
    d_in=st.integers(1, 12),
    d_sae=st.integers(1, 700),
    k=st.floats(0.01, 8),
    last_cut=st.floats(0, 1.5),
    kind=st.sampled_from(["plain", "ties", "few positive", "none positive", "huge bias"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    ranks_by_norm=st.booleans(),
)
@settings(max_examples=300)
def test_any_last_cut_gives_the_full_ranking(
    seed: int,
    batch: int,
    d_in: int,
    d_sae: int,
    k: float,
    last_cut: float,
    kind: str,
    dtype: torch.dtype,
    ranks_by_norm: bool,
) -> None:
    inputs = drawn_inputs(seed, batch, d_in, d_sae, dtype, kind)
    norms = torch.rand(d_sae, dtype=dtype) + 0.1 if ranks_by_norm else None
    n_keep = int(min(k, d_sae) * batch)
    expected = select_full(**inputs, norms=norms, n_keep=n_keep)
    largest = expected.scores.max().item() if len(expected.scores) else 1.0
    assert_same(
        select(
            **inputs, norms=norms, n_keep=n_keep, last_cut=last_cut * largest, selection="product"
        ),
        expected,
    )


@given(seed=st.integers(0, 2**16), k=st.floats(0.1, 5), kind=st.sampled_from(["plain", "ties"]))
def test_full_ranking_is_saelens_batchtopk(seed: int, k: float, kind: str) -> None:
    inputs = drawn_inputs(seed, 12, 6, 40, torch.float32, kind)
    norms = torch.rand(40) + 0.5
    codes = select_full(**inputs, norms=norms, n_keep=int(k * 12))
    expected = BatchTopK(k)((inputs["x"] @ inputs["W_enc"] + inputs["b_enc"]) * norms)
    actual = torch.zeros(12, 40)
    actual[codes.rows, codes.latents] = codes.scores
    assert torch.equal(actual, expected)
    assert torch.equal(codes.rows * 40 + codes.latents, expected.flatten().nonzero().flatten())


@pytest.mark.parametrize("ranks_by_norm", [False, True])
def test_a_good_floor_settles_it_without_a_full_ranking(ranks_by_norm: bool) -> None:
    inputs = drawn_inputs(0, 64, 16, 512, torch.float32, "plain")
    norms = torch.rand(512) + 0.5 if ranks_by_norm else None
    if norms is not None:
        norms[7] = 0  # a latent without a decoder does not stop the fast way
    expected = select_full(**inputs, norms=norms, n_keep=256)
    codes = select_above(**inputs, norms=norms, n_keep=256, floor=0.8 * expected.cut)
    assert codes is not None
    assert_same(codes, expected)
    assert codes.cut == expected.cut == expected.scores.min().item()
    assert select_above(**inputs, norms=norms, n_keep=256, floor=1.01 * expected.cut) is None


def test_scores_that_tie_at_the_cut_are_left_to_the_full_ranking() -> None:
    x = torch.ones(4, 1)
    W_enc = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    inputs = {"x": x, "W_enc": W_enc, "b_enc": torch.zeros(4), "norms": None}
    assert select_above(**inputs, n_keep=8, floor=0.5) is None  # four 3s, then four of eight 2s
    settled = select_above(**inputs, n_keep=12, floor=0.5)
    assert settled is not None
    assert settled.latents.tolist() == [0, 1, 2] * 4


def test_a_floor_far_too_low_is_given_up_before_it_fills_memory() -> None:
    inputs = drawn_inputs(0, 64, 16, 512, torch.float32, "plain")
    assert select_above(**inputs, norms=None, n_keep=64, floor=0.0) is None


def test_blocks_cover_every_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selection._BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(selection, "_MIN_BLOCK_WIDTH", 7)
    inputs = drawn_inputs(5, 10, 8, 50, torch.float64, "plain")
    expected = select_full(**inputs, norms=None, n_keep=60)
    actual = select(**inputs, norms=None, n_keep=60, last_cut=0.6 * expected.cut)
    assert torch.equal(actual.rows, expected.rows)
    assert torch.equal(actual.latents, expected.latents)
    torch.testing.assert_close(actual.scores, expected.scores)  # a narrower product rounds anew
