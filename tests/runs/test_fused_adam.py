"""Adam is fused within the context, with the same numbers and checkpoints as without."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from sae_lens_matryoshka.runs.fused_adam import fused_adam


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """A matrix by rows, one by columns as W_enc is, and a vector."""
    torch.manual_seed(0)
    tensors = [torch.randn(5, 7), torch.randn(7, 5).T, torch.randn(7)]
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def take_steps(optimizer: Adam, n: int, seed: int = 1) -> None:
    """Steps with gradients that lie by rows in memory, whatever their parameter does."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for parameter in optimizer.param_groups[0]["params"]:
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.to(parameter.dtype)
        optimizer.step()


def assert_near(actual: list[torch.nn.Parameter], expected: list[torch.nn.Parameter]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_numbers(dtype: torch.dtype) -> None:
    fused, plain = parameters(dtype), parameters(dtype)
    optimizer = Adam(fused, lr=0.1, betas=(0.5, 0.99))
    with fused_adam():
        take_steps(optimizer, 50)
    take_steps(Adam(plain, lr=0.1, betas=(0.5, 0.99)), 50)
    assert optimizer.param_groups[0]["fused"]
    assert_near(fused, plain)


@pytest.mark.parametrize(
    ("first", "second"), [(fused_adam, nullcontext), (nullcontext, fused_adam)]
)
def test_checkpoints_go_both_ways(first: Any, second: Any) -> None:
    """Also those whose moments lie otherwise in memory, as after a change of layout."""
    resumed, plain = parameters(), parameters()
    optimizer = Adam(resumed, lr=0.1)
    with first():
        take_steps(optimizer, 5)
        saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    assert group["fused"] is None
    assert group["foreach"] is None
    for state in saved["state"].values():
        assert state["step"] == 5
        assert state["step"].device.type == "cpu"
        state["exp_avg"] = state["exp_avg"].contiguous()
    optimizer = Adam(resumed, lr=0.1)
    optimizer.load_state_dict(saved)
    with second():
        take_steps(optimizer, 5, seed=2)

    expected = Adam(plain, lr=0.1)
    take_steps(expected, 5)
    take_steps(expected, 5, seed=2)
    assert_near(resumed, plain)


def test_parameters_with_gaps_in_memory_are_left_alone() -> None:
    memory = torch.zeros(4, 6)
    parameter = torch.nn.Parameter(memory[:, ::2])
    with fused_adam():
        take_steps(Adam([parameter], lr=0.1), 1)
    assert (memory[:, 1::2] == 0).all()
    assert (memory[:, ::2] != 0).all()


def test_what_it_leaves_alone() -> None:
    with fused_adam():
        half = Adam(parameters(torch.bfloat16), lr=0.1)
        others = [half, AdamW(parameters(), lr=0.1), SGD(parameters(), lr=0.1)]
        for optimizer in others:
            take_steps(optimizer, 2)  # type: ignore[arg-type]
            assert not optimizer.param_groups[0].get("fused")
    after = Adam(parameters(), lr=0.1)
    take_steps(after, 1)
    assert not after.param_groups[0]["fused"]
