"""One saved SAE seen as nested SAEs."""

from __future__ import annotations

import copy

from sae_lens import JumpReLUSAE


def truncate(sae: JumpReLUSAE, width: int) -> JumpReLUSAE:
    """The SAE made of the first `width` latents of `sae`, sharing its storage.

    Args:
        sae: An inference SAE, as SAELens loads what this package saved.
        width: From 1 to d_sae.

    Raises:
        ValueError: `width` is outside that range.
    """
    if not 1 <= width <= sae.cfg.d_sae:
        raise ValueError(f"width={width} is not accepted: give 1 to d_sae={sae.cfg.d_sae}.")
    cfg = copy.deepcopy(sae.cfg)
    cfg.d_sae = width
    cfg.device = "meta"  # no storage until the slices are assigned
    truncated = JumpReLUSAE(cfg)
    cfg.device = sae.cfg.device
    truncated.device = sae.device
    truncated.load_state_dict(
        {
            "W_enc": sae.W_enc[:, :width],
            "b_enc": sae.b_enc[:width],
            "threshold": sae.threshold[:width],
            "W_dec": sae.W_dec[:width],
            "b_dec": sae.b_dec,
        },
        assign=True,
    )
    return truncated
