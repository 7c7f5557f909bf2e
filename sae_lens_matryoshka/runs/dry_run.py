"""What a training run would do, told without a network and before anything loads."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import DTYPE_MAP

from sae_lens_matryoshka.kernels.dispatch import backend_for
from sae_lens_matryoshka.util.files import check_writable
from sae_lens_matryoshka.util.hook_names import check_hook_name, short_model_name

_TOLD = ("d_in", "d_sae", "device", "metadata")
_BYTES = 16  # of a float32 parameter with its gradient and Adam's two moments


def go_offline() -> None:
    """Let the Hub's client answer from its cache alone, in this process from now on."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def describe_run(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    """Check names, widths and paths of a training run.

    Returns:
        What would run, and what could not be checked without a network.

    Raises:
        ValueError: a name is wrong, a width does not fit, or a path can't be written to.
    """
    go_offline()
    lines = []
    if cfg.model_class_name == "HookedTransformer":
        model_name = short_model_name(cfg.model_name)
        try:
            check_hook_name(cfg.hook_name, cfg.sae.d_in, model_name, "sae")
            lines.append(f"{cfg.hook_name} of {model_name}: {cfg.sae.d_in} wide, as sae.d_in")
        except OSError:
            lines.append(f"{model_name}: its configuration is not on this machine, not checked")
    _check_dataset(cfg.dataset_path)
    if not Path(cfg.dataset_path).exists():
        lines.append(f"{cfg.dataset_path}: a name of the Hub, not looked up")
    for name in ("output_path", "checkpoint_path"):
        if getattr(cfg, name) is not None:
            check_writable(name, Path(getattr(cfg, name)))
    chosen = {
        f.name: getattr(cfg.sae, f.name)
        for f in fields(cfg.sae)
        if f.name not in _TOLD
        and f.default is not MISSING
        and getattr(cfg.sae, f.name) != f.default
    }
    options = "".join(f", {name}={value!r}" for name, value in chosen.items())
    lines.append(f"{cfg.sae.architecture()}{options}")
    widths = getattr(cfg.sae, "matryoshka_widths", None)
    if widths:
        lines.append(f"levels of {', '.join(map(str, widths))} latents")
    if hasattr(cfg.sae, "implementation"):
        lines.append(_describe_implementation(cfg.sae, torch.device(cfg.device)))
    d_in, d_sae = cfg.sae.d_in, cfg.sae.d_sae
    n_parameters = 2 * d_in * d_sae + d_in + d_sae
    steps = cfg.training_tokens // cfg.train_batch_size_tokens
    lines.append(
        f"{steps:,} steps of {cfg.train_batch_size_tokens:,} tokens; {n_parameters:,} parameters, "
        f"{n_parameters * _BYTES / 2**30:.1f} GiB with gradients and Adam's moments in float32"
    )
    return "\n".join(lines)


def _describe_implementation(sae: Any, device: torch.device) -> str:
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"{device}: not on this machine, where PyTorch finds no CUDA device"
    backend = None
    if not sae.normalizes_per_row:
        backend = backend_for(sae.implementation, device, DTYPE_MAP[sae.dtype])
    implementation = "reference" if backend is None else backend.implementation
    return f"implementation {implementation!r} on {device}"


def _check_dataset(name: str) -> None:
    if Path(name).exists():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"dataset_path={name!r} is neither a folder nor a name of the Hub: {error}"
        ) from error
