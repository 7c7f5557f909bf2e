"""Whether PyTorch can compute on a device, and in bfloat16 at a useful speed."""

import warnings
from typing import Any

import torch

from sae_lens_matryoshka.util.checks import invalid_option


def check_device(name: str, device: str) -> None:
    """Check that PyTorch can create tensors on `device`.

    Raises:
        ValueError: it can't; the error calls the option `name`.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accepted = "cpu, cuda or cuda:N" if n_gpus else "cpu: PyTorch finds no GPU"
    try:
        parsed = torch.device(device)
        if parsed.type != "cuda":  # a tensor on a GPU would hold memory there from now on
            torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError) as error:
        raise invalid_option(name, device, accepted) from error
    if parsed.type == "cuda" and (parsed.index or 0) >= n_gpus:
        raise invalid_option(name, device, accepted)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions that PyTorch's bfloat16 products need to be fast."""
    mkldnn = torch.backends.mkldnn.is_available()
    return mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_slow_autocast(device: Any, **fields: bool) -> None:
    """Warn of each field that asks for bfloat16 on a processor that is slow in it.

    Args:
        device: That the products run on.
        **fields: Name → value, of fields such as `autocast_lm`.
    """
    if torch.device(device).type != "cpu" or multiplies_bfloat16():
        return
    for name, value in fields.items():
        if value:
            warnings.warn(
                f"{name}=True: this processor has no instructions for bfloat16, in which a product "
                f"can take 50 times as long as in float32. Give {name}: false.",
                stacklevel=2,
            )
