"""When the screen is used on CUDA, and that its product isn't summed in bfloat16."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sae_lens_matryoshka.kernels import screen_triton

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "ieee"


def pays_off(batch_size: int = 2048, device: str = "cuda") -> bool:
    with FakeTensorMode():
        x = torch.empty(batch_size, 2304, device=device)
        return screen_triton.pays_off(x, torch.empty(2304, 65536, device=device))


def test_it_pays_off_where_float32_products_are_slow_and_large() -> None:
    assert pays_off()
    assert not pays_off(batch_size=64)
    assert not pays_off(device="cpu")


def test_it_does_not_pay_off_where_products_are_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    assert not pays_off()
    torch.set_float32_matmul_precision("highest")
    assert pays_off()
    MATMUL.allow_tf32 = True
    assert not pays_off()


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="this PyTorch is older")
def test_it_does_not_pay_off_where_products_are_tf32_by_the_newer_setting() -> None:
    MATMUL.fp32_precision = "tf32"
    assert not pays_off()
    MATMUL.fp32_precision = "ieee"
    assert pays_off()


def test_it_does_not_pay_off_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not pays_off()


@pytest.mark.parametrize(("is_allowed", "may_split"), [(True, True), (False, True), (False, False)])
def test_the_product_is_summed_in_float32(is_allowed: bool, may_split: bool) -> None:
    name = "allow_bf16_reduced_precision_reduction"
    knows_split = hasattr(MATMUL, f"{name}_split_k")
    before = (is_allowed, may_split) if knows_split else is_allowed
    try:
        setattr(MATMUL, name, before)
        with screen_triton._sums_in_float32():
            assert getattr(MATMUL, name) is False
            assert not knows_split or getattr(MATMUL, f"{name}_split_k") is may_split
        assert getattr(MATMUL, name) is is_allowed
        assert not knows_split or getattr(MATMUL, f"{name}_split_k") is may_split
    finally:
        setattr(MATMUL, name, True)
