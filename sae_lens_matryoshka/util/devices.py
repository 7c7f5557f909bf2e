"""Whether PyTorch can compute on a device."""

import torch

from sae_lens_matryoshka.util.checks import invalid_option


def check_device(name: str, device: str) -> None:
    """Check that PyTorch can create tensors on `device`.

    Raises:
        ValueError: it can't; the error calls the option `name`.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        accepted = (
            "cpu, cuda or cuda:N" if torch.cuda.is_available() else "cpu: PyTorch finds no GPU"
        )
        raise invalid_option(name, device, accepted) from error
