"""Whether PyTorch can compute on a device."""

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
