"""One trained SAE seen as nested SAEs: its levels."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import SAEConfig

from sae_lens_matryoshka.training.base import NestedTrainingSAE
from sae_lens_matryoshka.training.latent_order import LATENT_DIM
from sae_lens_matryoshka.training.widths import resolve_widths

# The dimension of each tensor of a SAELens SAE that counts latents; None where none does.
_LATENT_DIM = {
    **LATENT_DIM,
    "b_dec": None,
    "b_gate": 0,  # gated
    "b_mag": 0,
    "r_mag": 0,
}
# What SAELens measured of the whole SAE in training, which is not so of a part of it.
_OF_THE_WHOLE = ("l0", "num_dead_features")


def widths_of(sae: SAE[Any]) -> list[int]:
    """The level widths of an SAE, smallest first; the last one is d_sae.

    Args:
        sae: Any SAE of SAELens: one in training, or one saved by SAELens 6.46 or later, loaded by
            `load_sae` or made by `truncate`.

    Raises:
        ValueError: nothing is known of its widths.
    """
    widths = getattr(sae.cfg, "matryoshka_widths", None)
    if widths is None:
        details = sae.cfg.metadata.training_architecture_details or {}
        widths = details.get("matryoshka_widths")
    if not widths:
        raise ValueError(
            f"This {type(sae).__name__} of {sae.cfg.d_sae} latents has no level widths: "
            "cfg.metadata.training_architecture_details holds no `matryoshka_widths`. If it was "
            "trained with nested levels, load it with load_sae(…, matryoshka_widths=[…]), or give "
            "--matryoshka-widths on the command line."
        )
    return resolve_widths(widths, sae.cfg.d_sae)


def set_widths(sae: SAE[Any], widths: Sequence[int], **details: Any) -> None:
    """Write level widths, and other `details` of the training, into the metadata of an SAE.

    Raises:
        ValueError: the widths are not strictly increasing integers from 1 to d_sae, or `sae` is in
            training with others.
    """
    resolved = resolve_widths(widths, sae.cfg.d_sae)
    if getattr(sae.cfg, "matryoshka_widths", resolved) != resolved:
        raise ValueError(
            f"widths={resolved} are not accepted: {type(sae).__name__} is in training with "
            f"cfg.matryoshka_widths={sae.cfg.matryoshka_widths}."
        )
    metadata = sae.cfg.metadata
    metadata.training_architecture_details = {
        **(metadata.training_architecture_details or {}),
        **details,
        "matryoshka_widths": resolved,
    }


def truncate(sae: SAE[Any], width: int) -> SAE[Any]:
    """The SAE made of the first `width` latents of `sae`.

    Its class is that of `sae`, or of what `sae` is saved as if it is in training. It shares the
    storage of its weights with an inference SAE, and copies those of a training SAE. SAELens'
    `fold_…` functions write in place, so to all that share: use them before, or on a
    `copy.deepcopy`.
    Its codes are the first `width` of those of `sae`, except of a TopK SAE: that one keeps the k
    largest of the `width` that are left, or all if `width` is less than k.

    Its metadata is that of `sae`, with the widths up to `width`, and says where it came from in
    `matryoshka_level`: `width`, and `d_sae` and `matryoshka_widths` of the SAE that was cut.

    Args:
        sae: A standard, JumpReLU, TopK or gated SAE of SAELens, or a training SAE saved as one.
        width: From 1 to d_sae; any, not only a level's.

    Raises:
        ValueError: `width` is outside that range.
        TypeError: `sae` has weights that can't be cut by latents.
    """
    d_sae = sae.cfg.d_sae
    if (
        isinstance(width, bool)
        or not isinstance(width, numbers.Integral)
        or not 1 <= width <= d_sae
    ):
        raise ValueError(f"width={width!r} is not accepted: give 1 to d_sae={d_sae}.")
    cfg: Any
    if isinstance(sae, TrainingSAE):
        cfg = SAEConfig.from_dict(copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict()))
        # SAELens rebuilds the details from the config, without what `set_widths` wrote.
        known, saved = (c.metadata.training_architecture_details or {} for c in (sae.cfg, cfg))
        cfg.metadata.training_architecture_details = {**known, **saved}
        state_dict = sae.state_dict()
        sae.process_state_dict_for_saving_inference(state_dict)
        state_dict = {name: t.to(sae.dtype, copy=True) for name, t in state_dict.items()}
    else:
        cfg = copy.deepcopy(sae.cfg)
        state_dict = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    unknown = state_dict.keys() - _LATENT_DIM.keys()
    if unknown or "W_enc" not in state_dict:
        raise TypeError(
            f"{type(sae).__name__} can't be cut by latents: it has the weights "
            f"{', '.join(sorted(state_dict))}."
        )
    cfg.d_sae = int(width)
    if hasattr(cfg, "k"):
        cfg.k = min(cfg.k, cfg.d_sae)
    _describe(cfg, d_sae)

    cfg.device = "meta"  # no storage until the slices are assigned
    sae_class: Any = SAE.get_sae_class_for_architecture(cfg.architecture())
    truncated = sae_class(cfg)
    cfg.device, truncated.device = sae.cfg.device, sae.device
    truncated.load_state_dict(
        {
            name: tensor if (dim := _LATENT_DIM[name]) is None else tensor.narrow(dim, 0, cfg.d_sae)
            for name, tensor in state_dict.items()
        },
        assign=True,
    )
    truncated.register_state_dict_post_hook(_make_contiguous)
    return truncated


def levels(sae: SAE[Any]) -> list[SAE[Any]]:
    """Every level of `sae` as an SAE of its own, smallest first; see `truncate`.

    Raises:
        ValueError: the widths of `sae` are not known.
    """
    widths = widths_of(sae)
    if isinstance(sae, TrainingSAE):
        sae = truncate(sae, sae.cfg.d_sae)  # folded once, for the levels to share
    return [truncate(sae, width) for width in widths]


def decode_levels(sae: SAE[Any], feature_acts: torch.Tensor) -> torch.Tensor:
    """Every level's reconstruction, at the cost of decoding once.

    Equals `truncate(sae, w).decode(feature_acts[..., :w])` for each width w; for an SAE in training
    with `latent_order="frequency"`, the w latents are the first of `sae.level_order()`. As with
    `decode`, an SAE that reshapes or normalises its input takes what its last `encode` saw. Hooks
    don't fire.

    Args:
        sae: An SAE whose widths are known, in training or not.
        feature_acts: (…, d_sae), dense or sparse, as `sae.encode` returns them.

    Returns:
        (P, …, d_in), and (P, …, n_heads, d_head) for hook_z; smallest level first.

    Raises:
        ValueError: the widths of `sae` are not known, or `feature_acts` has another last dimension.
    """
    widths = widths_of(sae)
    if feature_acts.shape[-1] != sae.cfg.d_sae:
        raise ValueError(
            f"feature_acts of shape {tuple(feature_acts.shape)} are not accepted: the last "
            f"dimension is to be d_sae={sae.cfg.d_sae}."
        )
    acts = feature_acts.to_dense()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        acts = acts / sae.W_dec.norm(dim=-1)
    W_dec = sae.W_dec
    if isinstance(sae, NestedTrainingSAE):
        if sae.cfg.decoder_norm == "unit":
            W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
        order = sae.level_order()
        if order is not None:
            acts, W_dec = acts[..., order], W_dec[order]
    increments = [acts[..., start:end] @ W_dec[start:end] for start, end in pairwise([0, *widths])]
    reconstructions = torch.stack(increments).cumsum(0) + sae.b_dec
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(reconstructions), sae.d_head)


def _describe(cfg: SAEConfig, d_sae: int) -> None:
    """Bring the metadata of a truncated SAE in line with what it is."""
    metadata = cfg.metadata
    details = metadata.training_architecture_details or {}
    widths = details.get("matryoshka_widths")
    # An SAE cut twice comes from the one that was cut first.
    cut_from = metadata.matryoshka_level or {"d_sae": d_sae, "matryoshka_widths": widths}
    metadata.matryoshka_level = {**cut_from, "width": cfg.d_sae}
    if widths:
        details["matryoshka_widths"] = [*(w for w in widths if w < cfg.d_sae), cfg.d_sae]
    if cfg.d_sae < d_sae:
        for name in _OF_THE_WHOLE:
            metadata.__dict__.pop(name, None)


def _make_contiguous(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """A state dict hook: safetensors saves no slice of columns, which W_enc of a level is."""
    state_dict[f"{prefix}W_enc"] = state_dict[f"{prefix}W_enc"].contiguous()
