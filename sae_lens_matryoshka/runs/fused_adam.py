"""Adam in one kernel for SAELens' trainers, which construct it without `fused`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_DTYPES = (torch.float32, torch.float64)  # 16-bit moments are rounded at other places when fused
_DEVICES = ("cpu", "cuda")


@contextmanager
def fused_adam() -> Iterator[None]:
    """Make every `torch.optim.Adam` that steps within this context use its fused implementation.

    The numbers are the same to rounding, in fewer passes over the parameters. State dicts are those
    of an Adam that is not fused, so checkpoints go both ways. Optimizers of other classes, or with
    a group of parameters that are neither float32 nor float64 on a CPU or CUDA, are left alone.

        with fused_adam():
            LanguageModelSAETrainingRunner(cfg).run()

    `MatryoshkaTrainingRunner` runs in this context.
    """
    handle = register_optimizer_step_pre_hook(_before_any_step)
    try:
        yield
    finally:
        handle.remove()


def fuse(optimizer: Optimizer) -> bool:
    """Whether `optimizer` is fused, after making it so if it is an Adam for which that can be."""
    if type(optimizer) is not Adam:
        return False
    if not all(group["fused"] for group in optimizer.param_groups):
        if not all(map(_can_be_fused, optimizer.param_groups)):
            return False
        _fuse(optimizer)
    return True


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    fuse(optimizer)


def _can_be_fused(group: dict[str, Any]) -> bool:
    return not group["differentiable"] and all(
        parameter.dtype in _DTYPES
        and parameter.device.type in _DEVICES
        and torch.empty_like(parameter).stride() == parameter.stride()  # no gaps in memory
        for parameter in group["params"]
    )


def _fuse(optimizer: Adam) -> None:
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if name == "step":
                    state[name] = value.to(parameter.device, torch.float32)
                else:
                    state[name] = laid_out_as(parameter, value)
    optimizer.register_step_pre_hook(_lay_out_gradients)
    optimizer.register_state_dict_post_hook(_as_not_fused)


def _lay_out_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = laid_out_as(parameter, parameter.grad)


def laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` in the parameter's strides: the fused kernel reads memory in order, unchecked."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter).copy_(value)


def _as_not_fused(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "fused": None, "foreach": None} for group in state_dict["param_groups"]]
    states = {
        index: {**state, "step": state["step"].cpu()}
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states, "param_groups": groups}
