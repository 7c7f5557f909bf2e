"""What a training run would do, checked before anything loads and without a network."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAEConfig
from sae_lens.constants import DTYPE_MAP

from sae_lens_matryoshka.activations.shards import Activations
from sae_lens_matryoshka.kernels.dispatch import backend_for
from sae_lens_matryoshka.runs.config import warn_of_slow_products
from sae_lens_matryoshka.runs.varying import Sweep
from sae_lens_matryoshka.util.files import check_writable
from sae_lens_matryoshka.util.hook_names import check_hook_name, short_model_name

_NOT_OPTIONS = ("d_in", "d_sae", "device", "metadata")
_BYTES = 16  # of a float32 parameter with its gradient and Adam's two moments


def go_offline() -> None:
    """Make the Hub's client answer from its cache alone, in this process from now on."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def describe_run(
    cfg: LanguageModelSAERunnerConfig[Any], activations: Activations | None = None
) -> str:
    """Check names, widths and paths of a training run.

    Args:
        cfg: Its config.
        activations: What it trains on instead of a model's activations.

    Returns:
        What would run, and what could not be checked without a network.

    Raises:
        ValueError: a name is wrong, a width does not fit, or a path can't be written to.
    """
    go_offline()
    warn_of_slow_products(cfg, from_activations=activations is not None)
    sae = cfg.sae
    lines = _describe_model(cfg) if activations is None else [_describe(activations, cfg)]
    for name in ("output_path", "checkpoint_path"):
        if getattr(cfg, name) is not None:
            check_writable(name, Path(getattr(cfg, name)))
    options = [
        f"{f.name}={getattr(sae, f.name)!r}"
        for f in fields(sae)
        if f.name not in _NOT_OPTIONS and f.default not in (MISSING, getattr(sae, f.name))
    ]
    lines.append(", ".join([sae.architecture(), *options]))
    if widths := getattr(sae, "matryoshka_widths", None):
        lines.append(f"levels of {', '.join(map(str, widths))} latents")
    if hasattr(sae, "implementation"):
        lines.append(_describe_implementation(sae, torch.device(cfg.device)))
    n_steps = cfg.training_tokens // cfg.train_batch_size_tokens
    lines.append(f"{n_steps:,} steps of {cfg.train_batch_size_tokens:,} tokens; {_size([sae])}")
    return "\n".join(lines)


def describe_sweep(sweep: Sweep, activations: Activations | None = None) -> str:
    """As `describe_run`, of the first SAE of a sweep, and how much all of them are."""
    saes = [cfg.sae for cfg in sweep.cfgs.values()]
    return (
        f"{describe_run(sweep.cfg, activations)}\nthis is the first of {len(saes)} SAEs from one "
        f"pass: {', '.join(sweep.cfgs)}\ntogether {_size(saes)}"
    )


def _describe_model(cfg: LanguageModelSAERunnerConfig[Any]) -> list[str]:
    lines = []
    if cfg.model_class_name == "HookedTransformer":
        model_name = short_model_name(cfg.model_name)
        try:
            check_hook_name(cfg.hook_name, cfg.sae.d_in, model_name, "sae")
            lines.append(f"{cfg.hook_name} of {model_name}: width {cfg.sae.d_in}, as sae.d_in")
        except OSError:
            lines.append(f"{model_name}: not checked, its config is not on this machine")
    if not Path(cfg.dataset_path).exists():
        try:
            validate_repo_id(cfg.dataset_path)
        except HFValidationError as error:
            raise ValueError(
                f"dataset_path={cfg.dataset_path!r} is neither a folder nor a name on the Hub: "
                f"{error}"
            ) from error
        lines.append(f"{cfg.dataset_path}: not checked, it is on the Hub")
    return lines


def _describe(activations: Activations, cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    n_epochs = cfg.training_tokens / activations.n_rows
    return (
        f"{activations.name}: {activations.n_rows:,} rows of width {activations.d_in} in "
        f"{len(activations.shards):,} {'shard' if len(activations.shards) == 1 else 'shards'}, "
        f"{str(activations.dtype).removeprefix('torch.')}; "
        f"{n_epochs:.2f} epochs"
    )


def _size(saes: Iterable[TrainingSAEConfig]) -> str:
    n_parameters = sum(2 * sae.d_in * sae.d_sae + sae.d_in + sae.d_sae for sae in saes)
    return (
        f"{n_parameters:,} parameters, {n_parameters * _BYTES / 2**30:.1f} GiB with gradients and "
        "Adam's moments in float32"
    )


def _describe_implementation(sae: Any, device: torch.device) -> str:
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"{device}: not on this machine, where PyTorch finds no CUDA device"
    backend = None
    if not sae.normalizes_per_row:
        backend = backend_for(sae.implementation, device, DTYPE_MAP[sae.dtype])
    implementation = "reference" if backend is None else backend.implementation
    return f"implementation {implementation!r} on {device}"
