"""The one place that chooses who computes the sparse arithmetic of a step.

A step needs five functions: `select` the codes, `order` them, the `residuals` of every level, the
`gradients` of the codes, and `sum_by_latent` for those of the weights. Each is there twice: in
PyTorch (`selection.select`, and the others in `kernels.eager`) and as Triton kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch

from sae_lens_matryoshka.kernels import sums as eager
from sae_lens_matryoshka.kernels.layout import Layout
from sae_lens_matryoshka.kernels.selection import Codes, select
from sae_lens_matryoshka.kernels.triton_support import (
    TRITON_DTYPES,
    interprets_triton,
    why_no_triton,
)
from sae_lens_matryoshka.training.options import Implementation


class Kernels(NamedTuple):
    """Who computes what; each function is described where PyTorch computes it."""

    implementation: Implementation
    select: Callable[..., Codes]
    order: Callable[..., tuple[Codes, Layout]]
    residuals: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    gradients: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    sum_by_latent: Callable[..., tuple[torch.Tensor, torch.Tensor]]


EAGER = Kernels(
    "sparse", select, eager.order, eager.residuals, eager.gradients, eager.sum_by_latent
)


def kernels_for(
    implementation: Implementation, device: torch.device, dtype: torch.dtype
) -> Kernels | None:
    """Who computes a step, or None where the dense reference does.

    Args:
        implementation: See `options.NestedOptions`.
        device: Of the activations.
        dtype: Of the parameters.

    Raises:
        ValueError: `implementation` is "triton", and the activations are where it can't be.
    """
    if implementation == "sparse":
        return EAGER
    if implementation == "triton":
        if device.type != "cuda" and not (device.type == "cpu" and interprets_triton()):
            raise ValueError(
                f"implementation='triton' is not accepted for an SAE on {device}: give 'auto', "
                "'sparse' or 'reference', or a CUDA device."
            )
        if dtype not in TRITON_DTYPES:
            raise ValueError(
                f"implementation='triton' is not accepted for an SAE of {dtype}: give 'auto', "
                "'sparse' or 'reference', or one of "
                f"{', '.join(map(str, TRITON_DTYPES))}."
            )
        return _triton()
    if implementation == "reference" or device.type not in ("cpu", "cuda"):
        return None
    if device.type == "cpu" or dtype not in TRITON_DTYPES:
        return EAGER
    lack = why_no_triton()
    if lack is not None:
        _warn_that_it_is_slower(lack)
        return EAGER
    return _triton()


@cache
def _warn_that_it_is_slower(lack: str) -> None:
    warnings.warn(
        f"implementation='auto' computes in PyTorch, not in Triton kernels, because {lack}.",
        stacklevel=2,
    )


@cache
def _triton() -> Kernels:
    from sae_lens_matryoshka.kernels import layout_triton, selection_triton, sums_triton

    functions = (
        selection_triton.select,
        layout_triton.order,
        sums_triton.residuals,
        sums_triton.gradients,
        sums_triton.sum_by_latent,
    )
    return Kernels("triton", *map(_on_its_device, functions))


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whichever one the tensors are on."""

    @wraps(function)
    def call(first: torch.Tensor | Codes, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first.rows if isinstance(first, Codes) else first):
            return function(first, *args, **kwargs)

    return call
