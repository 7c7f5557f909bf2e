"""Counting gives the very order that stable sorting gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import eager, triton_layout
from sae_lens_matryoshka.prefixes import level_of
from sae_lens_matryoshka.selection import Codes
from tests.devices import DEVICE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_layout, "_CODES", 8)
    monkeypatch.setattr(triton_layout, "_RIVALS", 2)
    monkeypatch.setattr(triton_layout, "_ROWS_PER_BIN", 3)


def assert_same_order(codes: Codes, batch: int, levels: torch.Tensor, *rest: Any) -> None:
    actual_codes, actual = triton_layout.order(codes, batch, levels, *rest)
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


def test_codes_that_fill_up_are_placed_like_any_other() -> None:
    rows, latents = torch.tensor([0, 1, 2, 2, 2]), torch.tensor([4, 0, 5, 5, 5])
    values = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0])
    codes = Codes(*(tensor.to(DEVICE) for tensor in (rows, latents, values, values)), 0.0)
    levels = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.int32, device=DEVICE)
    assert_same_order(codes, 3, levels, 2, True)
