"""One trained SAE seen as nested SAEs, one per level."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import SAEConfig, SAEMetadata

from sae_lens_matryoshka.training.latent_order import LATENT_DIM
from sae_lens_matryoshka.training.widths import resolve_widths
from sae_lens_matryoshka.util.checks import checked_count, invalid_option

# The latent dimension of each tensor of SAELens' SAEs, the gated one's included
_LATENT_DIM = {**LATENT_DIM, "b_dec": None, "b_gate": 0, "b_mag": 0, "r_mag": 0}


def widths_of(sae: SAE[Any]) -> list[int]:
    """The level widths of an SAE, smallest first; the last one is d_sae.

    Args:
        sae: A training SAE, one saved by SAELens 6.46 or later, or one that `load_sae` or
            `truncate` returned.

    Raises:
        ValueError: `sae` has no level widths.
    """
    details = sae.cfg.metadata.training_architecture_details or {}
    widths = getattr(sae.cfg, "matryoshka_widths", None) or details.get("matryoshka_widths")
    if not widths:
        raise ValueError(
            f"This {type(sae).__name__} of {sae.cfg.d_sae} latents has no level widths: "
            "cfg.metadata.training_architecture_details holds no `matryoshka_widths`. If it was "
            "trained with nested levels, load it with load_sae(…, matryoshka_widths=[…]), or give "
            "--matryoshka-widths on the command line."
        )
    return resolve_widths(widths, sae.cfg.d_sae)


def set_widths(sae: SAE[Any], widths: Sequence[int], **details: Any) -> None:
    """Write level widths into the metadata of an SAE.

    Args:
        sae: Any SAE of SAELens.
        widths: Strictly increasing, from 1 to d_sae.
        details: More entries for `metadata.training_architecture_details`, such as `k`.

    Raises:
        ValueError: `widths` are not accepted, or differ from the config of a training SAE.
    """
    resolved = resolve_widths(widths, sae.cfg.d_sae)
    if getattr(sae.cfg, "matryoshka_widths", resolved) != resolved:
        raise ValueError(
            f"widths={resolved} are not accepted: this {type(sae).__name__} trains with "
            f"cfg.matryoshka_widths={sae.cfg.matryoshka_widths}."
        )
    metadata = sae.cfg.metadata
    metadata.training_architecture_details = {
        **(metadata.training_architecture_details or {}),
        **details,
        "matryoshka_widths": resolved,
    }


def truncate(sae: SAE[Any], width: int) -> SAE[Any]:
    """The first `width` latents of `sae` as an SAE.

    Its class is that of `sae`, or the one that a training SAE is saved as. It shares the weights of
    an inference SAE and copies those of a training SAE. SAELens' `fold_…` methods write in place
    and so change every SAE that shares the weights: fold before truncating, or fold a
    `copy.deepcopy`.

    It encodes to the first `width` codes of `sae`, except that a TopK SAE selects anew: the k
    largest of its `width` pre-activations, or all of them if `width` is less than k.

    Its metadata is that of `sae`, with the level widths up to `width`. `matryoshka_level` records
    its origin: `width`, and `d_sae` and `matryoshka_widths` of the SAE that was truncated.

    Args:
        sae: A standard, JumpReLU, TopK or gated SAE of SAELens, or a training SAE saved as one.
        width: From 1 to d_sae, whether or not a level ends there.

    Raises:
        ValueError: `width` is not accepted.
        TypeError: `sae` has weights that can't be truncated.
    """
    d_sae = sae.cfg.d_sae
    width = checked_count("width", width)
    if width > d_sae:
        raise invalid_option("width", width, f"1 to d_sae={d_sae}")
    cfg: Any
    if isinstance(sae, TrainingSAE):
        cfg = SAEConfig.from_dict(copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict()))
        # SAELens rebuilds the details from the config, without what `set_widths` wrote.
        written, rebuilt = (c.metadata.training_architecture_details or {} for c in (sae.cfg, cfg))
        cfg.metadata.training_architecture_details = {**written, **rebuilt}
        state_dict = sae.state_dict()
        sae.process_state_dict_for_saving_inference(state_dict)
        state_dict = {name: t.to(sae.dtype, copy=True) for name, t in state_dict.items()}
    else:
        cfg = copy.deepcopy(sae.cfg)
        state_dict = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    unknown = state_dict.keys() - _LATENT_DIM.keys()
    if unknown or "W_enc" not in state_dict:
        raise TypeError(
            f"{type(sae).__name__} can't be truncated: it has the weights "
            f"{', '.join(sorted(state_dict))}."
        )
    cfg.d_sae = width
    if hasattr(cfg, "k"):
        cfg.k = min(cfg.k, width)
    _update_metadata(cfg.metadata, width, d_sae)

    cfg.device = "meta"  # no storage until the slices are assigned
    sae_class: Any = SAE.get_sae_class_for_architecture(cfg.architecture())
    truncated = sae_class(cfg)
    cfg.device, truncated.device = sae.cfg.device, sae.device
    truncated.load_state_dict(
        {
            name: tensor if (dim := _LATENT_DIM[name]) is None else tensor.narrow(dim, 0, width)
            for name, tensor in state_dict.items()
        },
        assign=True,
    )
    truncated.register_state_dict_post_hook(_make_contiguous)
    return truncated


def levels(sae: SAE[Any]) -> list[SAE[Any]]:
    """Every level of `sae` as an SAE, smallest first; see `truncate`.

    Raises:
        ValueError: `sae` has no level widths.
    """
    widths = widths_of(sae)
    if isinstance(sae, TrainingSAE):
        sae = truncate(sae, sae.cfg.d_sae)  # one copy of the weights for all levels
    return [truncate(sae, width) for width in widths]


def decode_levels(
    sae: SAE[Any], feature_acts: Float[torch.Tensor, "... d_sae"]
) -> Float[torch.Tensor, "levels ... d_in"]:
    """Every level's reconstruction, at the cost of decoding once.

    Equals `truncate(sae, w).decode(feature_acts[..., :w])` for each width w; for a training SAE
    with `latent_order="frequency"`, the w latents are the first of `sae.level_order()`. As in
    `decode`, the reshaping and normalisation of the last `encode` are undone. No hook fires.

    Args:
        sae: An inference or training SAE with level widths.
        feature_acts: What `sae.encode` returned, dense or sparse.

    Returns:
        Smallest level first; (levels, …, n_heads, d_head) for hook_z.

    Raises:
        ValueError: `sae` has no level widths, or the last dimension is not d_sae.
    """
    widths = widths_of(sae)
    if feature_acts.shape[-1] != sae.cfg.d_sae:
        raise ValueError(
            f"feature_acts of shape {tuple(feature_acts.shape)} are not accepted: the last "
            f"dimension must be d_sae={sae.cfg.d_sae}."
        )
    acts, W_dec = feature_acts.to_dense(), sae.W_dec
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        acts = acts / W_dec.norm(dim=-1)
    # Options of this package's training SAEs
    if getattr(sae.cfg, "decoder_norm", None) == "unit":
        W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    level_order = getattr(sae, "level_order", None)
    if level_order is not None and (order := level_order()) is not None:
        acts, W_dec = acts[..., order], W_dec[order]
    increments = [acts[..., start:end] @ W_dec[start:end] for start, end in pairwise([0, *widths])]
    reconstructions = torch.stack(increments).cumsum(0) + sae.b_dec
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(reconstructions), sae.d_head)


def _update_metadata(metadata: SAEMetadata, width: int, d_sae: int) -> None:
    """Make the metadata of an SAE of `d_sae` latents fit its first `width` latents."""
    details = metadata.training_architecture_details or {}
    widths = details.get("matryoshka_widths")
    # An SAE truncated twice keeps the origin that the first truncation recorded.
    origin = metadata.matryoshka_level or {"d_sae": d_sae, "matryoshka_widths": widths}
    metadata.matryoshka_level = {**origin, "width": width}
    if widths:
        details["matryoshka_widths"] = [*(w for w in widths if w < width), width]
    if width < d_sae:  # SAELens measured these on the whole SAE
        for name in ("l0", "num_dead_features"):
            vars(metadata).pop(name, None)


def _make_contiguous(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """A state dict hook: safetensors can't save W_enc of a level, which is a slice of columns."""
    state_dict[f"{prefix}W_enc"] = state_dict[f"{prefix}W_enc"].contiguous()
