"""The SAEs that the experiment on SmolLM2 compares, the most telling first."""

from typing import Any, NamedTuple

from sae_lens_matryoshka.training.config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.widths import paper_widths

D_IN = 576
BATCH_SIZE = 1024
N_STEPS = 4400
MAX_ROWS = 8_192_000  # of the activations of a layer: 9 GB
LR = 6e-4
_RECIPE = ("latent_order", "stop_gradient", "k_start", "k_anneal_steps")  # of `recommended`


class Arm(NamedTuple):
    """One SAE of the experiment.

    Attributes:
        recipe: How it is trained: a key of `options`.
        k: Mean number of active latents.
        seed: Of the initial weights and the order of the data.
        d_sae: Number of latents.
        layer: The layer whose output it reads.
        n_steps: Training steps.
        lr: Learning rate.
    """

    recipe: str
    k: int
    seed: int
    d_sae: int = 4096
    layer: int = 7
    n_steps: int = N_STEPS
    lr: float = LR

    @property
    def name(self) -> str:
        """What its files are called: the recipe, k, the seed, and what differs from the default."""
        defaults = self._field_defaults
        changed = [
            f"{field}_{getattr(self, field):g}"
            for field in ("d_sae", "layer", "n_steps", "lr")
            if getattr(self, field) != defaults[field]
        ]
        return "-".join([self.recipe, f"k_{self.k}", *changed, f"seed_{self.seed}"])

    @property
    def n_rows(self) -> int:
        """How many activations are cached to train it: each is seen once, up to `MAX_ROWS`."""
        return min(self.n_steps * BATCH_SIZE, MAX_ROWS)

    def options(self) -> dict[str, Any]:
        """The fields of the SAE's training config."""
        widths = paper_widths(self.d_sae)
        sizes = {"d_sae": self.d_sae, "k": self.k}
        if self.recipe == "batchtopk":  # of one level: SAELens' BatchTopK, computed faster
            return {"architecture": "matryoshka", **sizes, "matryoshka_widths": [self.d_sae]}
        nested = {"architecture": "matryoshka", **sizes, "matryoshka_widths": widths}
        recommended = MatryoshkaTrainingSAEConfig.recommended(
            d_in=D_IN, **sizes, matryoshka_widths=widths, n_steps=self.n_steps
        )
        recipe = {field: getattr(recommended, field) for field in _RECIPE}
        return (
            nested
            | {
                "matryoshka": {},
                "recommended": recipe,
                "frequency": {"latent_order": "frequency"},  # the first of its three changes alone
                "ordered": {**recipe, "stop_gradient": "none"},  # all but the stopped gradient
                # a first level of 512 latents, in case 128 are too few for 26 letters
                "wide": {"matryoshka_widths": [self.d_sae // n for n in (8, 4, 2, 1)]},
                "drawn": {"prefix_sampling": "log_uniform", "min_prefix": widths[0]},
                "faded": {
                    "inner_weight_end": 0.1,
                    "inner_fade_start": self.n_steps // 2,
                    "inner_fade_steps": self.n_steps // 2,
                },
            }[self.recipe]
        )


def all_arms() -> list[Arm]:
    """Every SAE of the experiment, in the order in which it is trained."""
    seeds = range(3)
    main = ("batchtopk", "matryoshka", "recommended")
    return [
        *(Arm(recipe, k, seed) for k in (24, 12, 48, 6) for seed in seeds for recipe in main),
        *(Arm(recipe, 24, seed, d_sae=16384) for seed in seeds for recipe in main[:2]),
        *(
            Arm(recipe, 24, seed)
            for seed in seeds
            for recipe in ("frequency", "ordered", "drawn", "faded")
        ),
        *(Arm(recipe, 6, seed) for seed in seeds for recipe in ("frequency", "ordered")),
        *(Arm("wide", 12, seed) for seed in seeds),
        *(
            Arm(recipe, 24, 0, n_steps=n_steps)
            for n_steps in (1100, 2200, 8800)
            for recipe in main[:2]
        ),
        *(Arm(recipe, 24, seed, lr=1.2e-3) for seed in seeds for recipe in main[:2]),
        *(Arm(recipe, 24, seed, layer=14) for seed in seeds for recipe in main[:2]),
    ]


def tuning_arms() -> list[Arm]:
    """The SAEs that the learning rate was chosen on: their layer and seed are not reported."""
    return [
        Arm(recipe, 24, seed=100, layer=10, n_steps=2200, lr=lr)
        for lr in (3e-4, 6e-4, 1.2e-3)
        for recipe in ("batchtopk", "matryoshka")
    ]


def evaluated_widths(arm: Arm, evaluation: str) -> list[int]:
    """The widths of the levels that SAEBench runs on: mostly the whole SAE alone."""
    has_levels = arm.recipe in ("matryoshka", "recommended") and evaluation == "absorption"
    is_default = arm == Arm(arm.recipe, 24, arm.seed)
    return paper_widths(arm.d_sae) if has_levels and is_default else [arm.d_sae]
