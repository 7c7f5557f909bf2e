"""Counting gives the very order that stable sorting gives."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import layout, layout_triton
from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.training.prefixes import level_of_latent
from tests.devices import DEVICE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_triton, "_CODES", 8)
    monkeypatch.setattr(layout_triton, "_CODES_OF_ROW", 4)
    monkeypatch.setattr(layout_triton, "_RIVALS", 2)
    monkeypatch.setattr(layout_triton, "_ROWS_PER_BIN", 3)


def assert_same_order(codes: Codes, batch: int, levels: torch.Tensor, *rest: Any) -> None:
    actual_codes, actual = layout_triton.lay_out(codes, batch, levels, *rest)
    expected_codes, expected = layout.lay_out(codes, batch, levels, *rest)
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
    is_sorted=st.booleans(),
)
@settings(max_examples=40)
def test_as_sorting(seed: int, batch: int, ends: set[int], share: float, is_sorted: bool) -> None:
    torch.manual_seed(seed)
    prefixes = [*sorted(ends), 30]
    rows, latents = (torch.rand(batch, 30) < share).nonzero(as_tuple=True)
    values = torch.rand(len(rows))
    codes = Codes(rows.to(DEVICE), latents.to(DEVICE), values.to(DEVICE), values.to(DEVICE), 0.0)
    rank = torch.arange(30) if is_sorted else torch.randperm(30)
    levels = level_of_latent(tuple(prefixes), "cpu")[rank].to(DEVICE)
    assert_same_order(codes, batch, levels, len(prefixes), is_sorted)


@pytest.mark.parametrize("n_valid", [0, 2, 5])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_padding_is_in_no_bag(n_valid: int, is_sorted: bool) -> None:
    rows, latents = torch.tensor([0, 1, 1, 2, 2, 2, 2]), torch.tensor([4, 0, 3, 1, 5, 5, 5])
    rows[n_valid:], latents[n_valid:] = 2, 5
    values = torch.arange(7.0).flip(0)
    tensors = [tensor.to(DEVICE) for tensor in (rows, latents, values, values)]
    levels = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.int32)
    if not is_sorted:
        levels = levels.flip(0)
    rest = (3, levels.to(DEVICE), 2, is_sorted)
    _, expected = layout.lay_out(Codes(*(tensor[:n_valid] for tensor in tensors), 0.0), *rest)
    count = torch.tensor(n_valid, device=DEVICE)
    codes, actual = layout_triton.lay_out(Codes(*tensors, 0.0, count), *rest)
    assert torch.equal(actual.bag_starts, expected.bag_starts)
    assert torch.equal(actual.latent_starts, expected.latent_starts)
    for field in ("latents", "bags", "by_latent"):
        assert torch.equal(getattr(actual, field)[:n_valid], getattr(expected, field)), field
    assert torch.equal(codes.rows, rows.to(DEVICE))
    assert torch.equal(codes.scores[n_valid:], values[n_valid:].to(DEVICE))
