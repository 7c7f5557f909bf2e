"""Which backend computes a step.

A step needs five operations: `select` the codes, `lay_out` them, the `level_residuals`, the
`level_gradients`, and `sum_by_latent` for the gradients of the weights. Each exists twice, side by
side: in PyTorch (`selection`, `layout`, `sums`) and in Triton (`selection_triton`, …). The PyTorch
twin describes the operation.
"""

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from sae_lens_matryoshka.kernels import layout, selection, sums
from sae_lens_matryoshka.kernels.codes import Codes, Layout
from sae_lens_matryoshka.kernels.selection import Selection
from sae_lens_matryoshka.kernels.sums import StopGradient
from sae_lens_matryoshka.kernels.triton_support import (
    TRITON_DTYPES,
    interprets_triton,
    why_no_triton,
)

Implementation = Literal["auto", "reference", "sparse", "triton"]

_Operation = TypeVar("_Operation", bound=Callable[..., Any])


class Backend(Protocol):
    """Computes a step from its codes; for each operation see its PyTorch twin."""

    implementation: Implementation

    def select(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        norms: Tensor | None,
        n_keep: int,
        last_cut: float | Tensor | None,
        selection: Selection = "auto",
    ) -> Codes: ...

    def lay_out(
        self,
        codes: Codes,
        batch_size: int,
        level_of_latent: Tensor,
        n_levels: int,
        is_sorted: bool,
    ) -> tuple[Codes, Layout]: ...

    def level_residuals(
        self,
        acts: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        target: Tensor,
        layout: Layout,
        n_levels: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def level_gradients(
        self,
        residuals: Tensor,
        scales: Tensor,
        grad_sae_out: Tensor | None,
        stop_gradient: StopGradient,
        W_dec: Tensor,
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def sum_by_latent(
        self,
        matrix: Tensor,
        rows: Tensor,
        weights: Tensor,
        layout: Layout,
        with_totals: bool = True,
    ) -> tuple[Tensor, Tensor | None]: ...


class _Eager:
    implementation: Implementation = "sparse"
    select = staticmethod(selection.select)
    lay_out = staticmethod(layout.lay_out)
    level_residuals = staticmethod(sums.level_residuals)
    level_gradients = staticmethod(sums.level_gradients)
    sum_by_latent = staticmethod(sums.sum_by_latent)


EAGER: Backend = _Eager()


def backend_for(
    implementation: Implementation, device: torch.device, dtype: torch.dtype
) -> Backend | None:
    """The backend that computes a step, or None where the dense reference computes it.

    Args:
        implementation: See `training.options.NestedOptions`.
        device: Device of the activations.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `implementation` is "triton", which can't run on this device or in this dtype.
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
    reason = why_no_triton()
    if reason is not None:
        _warn_of_slower_backend(reason)
        return EAGER
    return _triton()


@cache
def _warn_of_slower_backend(reason: str) -> None:
    warnings.warn(
        f"implementation='auto' computes in PyTorch, not in Triton kernels, because {reason}.",
        stacklevel=2,
    )


@cache
def _triton() -> Backend:
    # importing the kernels needs Triton, which not every machine has
    from sae_lens_matryoshka.kernels import layout_triton, selection_triton, sums_triton

    class Triton:
        implementation: Implementation = "triton"
        select = staticmethod(_on_its_device(selection_triton.select))
        lay_out = staticmethod(_on_its_device(layout_triton.lay_out))
        level_residuals = staticmethod(_on_its_device(sums_triton.level_residuals))
        level_gradients = staticmethod(_on_its_device(sums_triton.level_gradients))
        sum_by_latent = staticmethod(_on_its_device(sums_triton.sum_by_latent))

    return Triton()


def _on_its_device(operation: _Operation) -> _Operation:
    """`operation` on the device of its first argument; Triton launches on the current one."""

    @wraps(operation)
    def launch(first: Tensor | Codes, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first.rows if isinstance(first, Codes) else first):
            return operation(first, *args, **kwargs)

    return launch  # type: ignore[return-value]
