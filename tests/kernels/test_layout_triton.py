"""Counting gives the very order that stable sorting gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import layout_triton
from sae_lens_matryoshka.kernels import sums as eager
from sae_lens_matryoshka.kernels.selection import Codes
from sae_lens_matryoshka.training.prefixes import level_of
from tests.devices import DEVICE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_triton, "_CODES", 8)
    monkeypatch.setattr(layout_triton, "_RIVALS", 2)
    monkeypatch.setattr(layout_triton, "_ROWS_PER_BIN", 3)


def assert_same_order(codes: Codes, batch: int, levels: torch.Tensor, *rest: Any) -> None:
    actual_codes, actual = layout_triton.order(codes, batch, levels, *rest)
    expected_codes, expected = eager.order(codes, batch, levels, *rest)
    for field in Codes._fields[:4]:
        assert torch.equal(getattr(actual_codes, field), getattr(expected_codes, field)), field
    for field, tensor in expected._asdict().items():
        assert torch.equal(getattr(actual, field), tensor), field
        assert getattr(actual, field).dtype == tensor.dtype == torch.int32, field


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 9),
    ends=st.sets(st.integers(0, 29), max_size=4),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    are_levels_ascending=st.booleans(),
)
@settings(max_examples=40)
def test_as_sorting(
    seed: int, batch: int, ends: set[int], share: float, are_levels_ascending: bool
) -> None:
    torch.manual_seed(seed)
    prefixes = [*sorted(ends), 30]
    rows, latents = (torch.rand(batch, 30) < share).nonzero(as_tuple=True)
    values = torch.rand(len(rows))
    codes = Codes(rows.to(DEVICE), latents.to(DEVICE), values.to(DEVICE), values.to(DEVICE), 0.0)
    places = torch.arange(30) if are_levels_ascending else torch.randperm(30)
    levels = level_of(places, prefixes).to(DEVICE)
    assert_same_order(codes, batch, levels, len(prefixes), are_levels_ascending)


@pytest.mark.parametrize("n_used", [0, 2, 5])
@pytest.mark.parametrize("are_levels_ascending", [True, False])
def test_codes_that_fill_up_are_in_no_bag(n_used: int, are_levels_ascending: bool) -> None:
    rows, latents = torch.tensor([0, 1, 1, 2, 2, 2, 2]), torch.tensor([4, 0, 3, 1, 5, 5, 5])
    rows[n_used:], latents[n_used:] = 2, 5
    values = torch.arange(7.0).flip(0)
    tensors = [tensor.to(DEVICE) for tensor in (rows, latents, values, values)]
    levels = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.int32)
    if not are_levels_ascending:
        levels = levels.flip(0)
    rest = (3, levels.to(DEVICE), 2, are_levels_ascending)
    _, expected = eager.order(Codes(*(tensor[:n_used] for tensor in tensors), 0.0), *rest)
    count = torch.tensor(n_used, device=DEVICE)
    codes, actual = layout_triton.order(Codes(*tensors, 0.0, count), *rest)
    assert torch.equal(actual.bag_starts, expected.bag_starts)
    assert torch.equal(actual.latent_starts, expected.latent_starts)
    for field in ("latents", "bags", "by_latent"):
        assert torch.equal(getattr(actual, field)[:n_used], getattr(expected, field)), field
    assert torch.equal(codes.rows, rows.to(DEVICE))
    assert torch.equal(codes.scores[n_used:], values[n_used:].to(DEVICE))
