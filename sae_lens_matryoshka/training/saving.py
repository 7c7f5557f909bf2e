"""What a checkpoint and a saved SAE contain.

Each is a folder in SAELens' format: `cfg.json` and `sae_weights.safetensors`. A checkpoint adds the
states of the trainer, the activation scaler and the activation store; a finished run adds
`runner_cfg.json` and `sparsity.safetensors`.

The weights of a checkpoint are the parameters `W_enc` (d_in, d_sae), `b_enc` (d_sae,), `W_dec`
(d_sae, d_in), `b_dec` (d_in,); what the architecture adds (`topk_threshold`, or JumpReLU's
`threshold`); and `firing_rates` (d_sae,) if levels are ordered by frequency.

An SAE saved for inference is SAELens' JumpReLU or TopK SAE, which SAELens loads without this
package. Its latents are in level order and its decoder rows have the norm that training gave them.
A BatchTopK SAE's `threshold` (d_sae,) is calibrated when it is saved (see `batchtopk`). The options
of training, the level widths among them, are in `metadata.training_architecture_details`.
"""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from typing_extensions import override

from sae_lens_matryoshka.training.decoder_norm import set_norms_to_1
from sae_lens_matryoshka.training.latent_order import level_order, reordered


class SavedTrainingSAE(TrainingSAE[Any]):
    """How the training SAEs of this package are written to files and read back."""

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = rows_contiguous(state_dict["W_enc"])

    @override
    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        rates = state_dict.pop("firing_rates", None)
        if self.cfg.decoder_norm == "unit":
            state_dict["W_dec"] = state_dict["W_dec"].clone()
            set_norms_to_1(state_dict["W_dec"])
        super().process_state_dict_for_saving_inference(state_dict)
        if rates is not None:
            in_level_order = reordered(state_dict, level_order(rates))
            state_dict.update({name: t.contiguous() for name, t in in_level_order.items()})


def rows_contiguous(W_enc: Float[torch.Tensor, "d_in d_sae"]) -> Float[torch.Tensor, "d_in d_sae"]:
    """W_enc with each latent's encoder row contiguous, as its gradient is written."""
    return W_enc.T.contiguous().T
