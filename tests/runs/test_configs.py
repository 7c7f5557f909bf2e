"""The configs of the repository: the numbers that their comments and sources state."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_lens.synthetic import SyntheticSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.activations.index import METADATA_FIELDS
from sae_lens_matryoshka.runs.config import load_run_config, read_config
from sae_lens_matryoshka.synthetic.models import SYNTHSAEBENCH, synthsaebench_config
from sae_lens_matryoshka.synthetic.variants import plan_variants
from sae_lens_matryoshka.training.widths import paper_widths

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
CONFIGS = Path(__file__).parents[2] / "configs"
SYNTHETIC = "synthsaebench-best"  # in the shape of SAELens' SyntheticSAERunnerConfig
FROM_ACTIVATIONS = "from-activations"  # of a width that the activations tell
NAMES = sorted(
    path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in (SYNTHETIC, FROM_ACTIVATIONS)
)
# model, hook, d_in, widths, k, tokens, batch, learning rate
DOCUMENTED = {
    "demo": (
        ("sae-lens-matryoshka/tiny-gpt-neox", "blocks.1.hook_resid_post"),
        (128, [32, 96, 224, 480, 1024], 8),
        (1_536_000, 1024, 1e-3),
    ),
    "gpt2-small": (
        ("gpt2", "blocks.8.hook_resid_pre"),
        (768, [768, 2304, 5376, 11520, 24576], 40),
        (300_000_000, 4096, 3e-4),
    ),
    "pythia-160m": (
        ("pythia-160m-deduped", "blocks.8.hook_resid_post"),
        (768, [512, 1536, 3584, 7680, 2**14], 40),
        (500_000_000, 2048, 3e-4),
    ),
    "tinystories": (
        ("tiny-stories-33M", "blocks.2.hook_resid_post"),
        (768, [768, 2304, 5376, 11520, 24576], 32),
        (200_000_000, 2048, 3e-4),
    ),
    "smollm2": (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "model.layers.7"),
        (576, [128, 384, 896, 1920, 4096], 24),
        (4_505_600, 1024, 6e-4),
    ),
    "gemma-2-2b": (
        ("gemma-2-2b", "blocks.12.hook_resid_post"),
        (2304, [2048, 6144, 14336, 30720, 65536], 40),
        (500_000_000, 2048, 3e-4),
    ),
}


def test_every_config_is_listed_here():
    assert sorted(DOCUMENTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_documented_numbers(name: str):
    cfg = load_run_config(CONFIGS / f"{name}.yaml")
    place, sae, run = DOCUMENTED[name]
    assert (cfg.model_name, cfg.hook_name) == place
    assert (cfg.sae.d_in, cfg.sae.matryoshka_widths, cfg.sae.k) == sae
    assert (cfg.training_tokens, cfg.train_batch_size_tokens, cfg.lr) == run

    assert cfg.sae.architecture() == "matryoshka"
    assert cfg.sae.matryoshka_widths == paper_widths(cfg.sae.d_sae)
    is_demo = name == "demo"  # its activations need no scaling
    assert cfg.sae.normalize_activations == ("none" if is_demo else "expected_average_only_in")
    assert cfg.logger.log_to_wandb is False
    assert cfg.n_batches_in_buffer * cfg.context_size >= cfg.train_batch_size_tokens


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_warms_up_and_decays_to_0_over_the_last_fifth(name: str):
    cfg = load_run_config(CONFIGS / f"{name}.yaml", {"device": "cpu", "verbose": False})
    assert cfg.lr_warm_up_steps == {"demo": 50, "smollm2": 200}.get(name, 1000)
    assert cfg.lr_decay_steps == cfg.total_training_steps // 5

    # The schedule knows the numbers of steps alone, so an SAE of any size shows it.
    cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.k = 2, 4, 1
    cfg.sae.matryoshka_widths = [2, 4]
    trainer = SAETrainer(
        cfg=cfg.to_sae_trainer_config(), sae=MatryoshkaTrainingSAE(cfg.sae), data_provider=iter(())
    )
    assert trainer.cfg.total_training_steps == cfg.total_training_steps
    schedule = trainer.lr_scheduler.state_dict()
    assert schedule["_milestones"][-1] == cfg.total_training_steps - cfg.lr_decay_steps
    decay = schedule["_schedulers"][-1]
    assert (decay["start_factor"], decay["end_factor"]) == (1, 0)
    assert decay["total_iters"] == cfg.lr_decay_steps
    assert schedule["_last_lr"] == [pytest.approx(cfg.lr / cfg.lr_warm_up_steps)]


def test_config_for_activations_names_no_model_and_decays_over_the_last_fifth() -> None:
    path = CONFIGS / f"{FROM_ACTIVATIONS}.yaml"
    assert read_config(path).keys().isdisjoint({*METADATA_FIELDS, "sae.d_in"})
    cfg = load_run_config(path, {"sae": {"d_in": 768}})
    assert cfg.lr_decay_steps == cfg.total_training_steps // 5
    assert cfg.sae.matryoshka_widths == paper_widths(cfg.sae.d_sae)


def test_example_of_smollm2_is_its_config_in_two_steps() -> None:
    values = read_config(CONFIGS / "smollm2.yaml")
    cached, trained = (read_config(EXAMPLE / f"{n}.yaml") for n in ("cache", "matryoshka"))
    unneeded = {"n_batches_in_buffer"}  # of SAELens' store, which only mixes what it reads
    assert values == cached | trained | {name: values[name] for name in unneeded}
    assert trained.keys().isdisjoint({*METADATA_FIELDS, "sae.d_in"})


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_its_own_dictionary(name: str, tmp_path: Path):
    cfg = load_run_config(CONFIGS / f"{name}.yaml")
    written: dict[str, Any] = cfg.to_dict()
    written["seqpos_slice"] = list(cfg.seqpos_slice)  # YAML has no tuples
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(written))
    again = load_run_config(tmp_path / "again.yaml").to_dict()
    # SAELens appends an id of its own to every checkpoint path.
    assert again.pop("checkpoint_path").startswith(written.pop("checkpoint_path"))
    written["seqpos_slice"] = tuple(written["seqpos_slice"])
    assert again == written


def test_recommended_recipe_in_full_size() -> None:
    """The file is the published benchmark with the recommended SAE, which `synth` trains alike."""
    cfg = SyntheticSAERunnerConfig.from_dict(
        yaml.safe_load((CONFIGS / f"{SYNTHETIC}.yaml").read_text())
    )
    benchmark = SYNTHSAEBENCH["full"]
    [variant] = plan_variants(benchmark, ["recommended"])
    options = cfg.sae.to_dict()
    assert options == variant.cfg.to_dict()
    assert (
        options
        == MatryoshkaTrainingSAEConfig.recommended(
            d_in=768,
            d_sae=4096,
            k=25,
            n_steps=200_000_000 // 1024,
            matryoshka_widths=[128, 512, 2048, 4096],
        ).to_dict()
    )
    assert (cfg.training_samples, cfg.batch_size, cfg.lr, cfg.lr_end) == (
        benchmark.n_samples,
        benchmark.batch_size,
        benchmark.lr,
        benchmark.lr,
    )
    assert cfg.synthetic_model == synthsaebench_config(n_features=16384, d_in=768, n_roots=128)
