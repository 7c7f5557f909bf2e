"""Every option of the objective that depends on more than a row of the batch, small."""

from typing import Any

from sae_lens import TrainingSAEConfig

import sae_lens_matryoshka  # noqa: F401  registers the architectures

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "frequency": {
        "latent_order": "frequency",
        "stop_gradient": "inner",
        "k_start": 8,
        "k_anneal_steps": 20,
    },
    "sampled": {"prefix_sampling": "uniform", "n_prefixes": 3, "use_matryoshka_aux_loss": True},
    "weights": {"level_weights": 0.5, "bias_level": True, "stop_gradient": "all"},
    "fading": {"inner_weight_end": 0.1, "inner_fade_start": 5, "inner_fade_steps": 20},
    "unit": {"decoder_norm": "unit", "rescale_acts_by_decoder_norm": False},
    "unit_at_update": {"decoder_norm": "unit_at_update", "encoder_bias": False},
    "threshold": {"topk_threshold_start_step": 10, "apply_b_dec_to_input": False},
    "reference": {"implementation": "reference"},
    "layer_norm": {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0.0},
    "scaled": {"normalize_activations": "expected_average_only_in"},
    "whitened": {"normalize_activations": "covariance_whitening"},
    "topk": {"architecture": "matryoshka_topk", "k": 4},
    "topk_frequency": {"architecture": "matryoshka_topk", "k": 4, "latent_order": "frequency"},
    "jumprelu": {
        "architecture": "matryoshka_jumprelu",
        "jumprelu_sparsity_loss_mode": "quadratic",
        "target_l0": 4.3,
        "jumprelu_init_threshold": 0.1,
    },
}

SHARDED = ("frequency", "unit_at_update", "jumprelu")  # with moments split over processes


def variant_config(name: str, d_in: int, d_sae: int, dtype: str) -> TrainingSAEConfig:
    options = {"architecture": "matryoshka", **VARIANTS[name]}
    if options["architecture"] == "matryoshka":
        options.setdefault("k", 3.5)
    widths = [d_sae // 6, d_sae // 2, d_sae]
    return TrainingSAEConfig.from_dict(
        {"d_in": d_in, "d_sae": d_sae, "dtype": dtype, "matryoshka_widths": widths, **options}
    )
