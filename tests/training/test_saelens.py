"""Everything in SAELens that touches a training SAE, each on the real class."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    train_toy_sae,
)
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from tests.steps import assert_near, relative_error, run_step
from tests.tiny import D_MODEL, N_HEADS, SHORT_RUN, run, runner_config, tiny_model
from tests.wandb_file import history

OPTIONS: dict[str, Any] = {"d_in": D_MODEL, "d_sae": 64, "k": 4, "matryoshka_widths": [8, 24, 64]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_activations": "expected_average_only_in"},
        {"normalize_activations": "covariance_whitening"},
        {"use_matryoshka_aux_loss": True},
    ],
)
def test_whole_run_equals_saelens(tmp_path: Path, options: dict[str, Any]) -> None:
    """The same runner, data and seed: weights differ by rounding alone, the threshold is better."""
    saved = {}
    for config_class in (MatryoshkaBatchTopKTrainingSAEConfig, MatryoshkaTrainingSAEConfig):
        folder = tmp_path / config_class.architecture()
        # dead latents wake up through the auxiliary loss from the fifth step on
        run(
            runner_config(
                config_class(**OPTIONS, **options, dtype="float64"), folder, dtype="float64"
            )
        )
        saved[config_class.architecture()] = load_file(
            folder / "output" / "sae_weights.safetensors"
        )
    for weights in saved.values():
        del weights["threshold"]
    assert_near(saved["matryoshka"], saved["matryoshka_batchtopk"], 1e-9)


def test_runner_from_objects_and_from_dict(tmp_path: Path) -> None:
    cfg = runner_config(MatryoshkaTrainingSAEConfig(**OPTIONS), tmp_path)
    first = run(cfg)
    assert isinstance(first, MatryoshkaTrainingSAE)
    assert json.loads(json.dumps(cfg.to_dict()))["sae"]["matryoshka_widths"] == [8, 24, 64]

    again = LanguageModelSAERunnerConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    second = run(again)
    assert isinstance(second, MatryoshkaTrainingSAE)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_multi_sae_runner(tmp_path: Path) -> None:
    configs = {
        "narrow": MatryoshkaTrainingSAEConfig(**OPTIONS),
        "wide": MatryoshkaTrainingSAEConfig(d_in=D_MODEL, d_sae=96, k=2.5),
    }
    cfg = MultiSAETrainingRunnerConfig(
        **SHORT_RUN,
        saes=configs,
        hook_names="blocks.1.hook_resid_pre",
        training_tokens=64 * 10,
        logger=LoggingConfig(log_to_wandb=False),
        output_path=str(tmp_path / "output"),
        checkpoint_path=None,
    )
    saes = run(cfg, MultiSAETrainingRunner)
    for name, sae in saes.items():
        loaded = SAE.load_from_disk(tmp_path / "output" / name)
        assert loaded.cfg.architecture() == "jumprelu"
        details = loaded.cfg.metadata.training_architecture_details
        assert details["matryoshka_widths"] == configs[name].matryoshka_widths
        assert sae.cfg.metadata.l0 == pytest.approx(configs[name].k)


def test_train_toy_sae_recovers_orthogonal_features() -> None:
    torch.manual_seed(0)
    dictionary = FeatureDictionary(num_features=8, hidden_dim=16)
    generator = ActivationGenerator(num_features=8, firing_probabilities=0.15)
    sae = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(d_in=16, d_sae=8, k=1.2, matryoshka_widths=[8])
    )
    train_toy_sae(sae, dictionary, generator, training_samples=256 * 400, batch_size=256, lr=1e-2)
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    cosines = directions @ dictionary.feature_vectors.detach().T
    assert cosines.max(0).values.min() > 0.95


def test_synthetic_runner(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=32, hidden_dim=16, seed=0),
            sae=MatryoshkaTrainingSAEConfig(d_in=16, d_sae=32, k=2, matryoshka_widths=[8, 32]),
            training_samples=128 * 200,
            batch_size=128,
            eval_samples=2000,
            lr=1e-3,
            output_path=str(tmp_path / "output"),
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
    ).run()
    assert isinstance(result.sae, MatryoshkaTrainingSAE)
    assert result.final_eval is not None
    assert 0.3 < result.final_eval.explained_variance < 1
    assert SAE.load_from_disk(tmp_path / "output").cfg.architecture() == "jumprelu"


PLAIN_SAELENS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
batch = load_file(sys.argv[2])["batch"]
acts = sae.encode(batch)
save_file({"acts": acts.detach(), "out": sae(batch).detach()}, sys.argv[3])
details = sae.cfg.metadata.training_architecture_details
print(sae.cfg.architecture(), details["matryoshka_widths"], "sae_lens_matryoshka" in sys.modules)
"""


def in_plain_saelens(folder: Path, batch: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
    """What a process that never imports this package makes of the SAE saved in `folder`."""
    batch_file, result_file = folder / "batch.safetensors", folder / "result.safetensors"
    save_file({"batch": batch}, batch_file)
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_SAELENS, str(folder), str(batch_file), str(result_file)],
        capture_output=True,
        text=True,
        check=True,
    )
    return load_file(result_file), result.stdout.strip()


def test_saved_sae_is_plain_saelens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**OPTIONS, topk_threshold_lr=0.5))
    for step in range(20):
        run_step(sae, torch.randn(128, D_MODEL), None, step)
    sae.save_inference_model(tmp_path)
    batch = torch.randn(3, 5, D_MODEL)
    result, said = in_plain_saelens(tmp_path, batch)
    assert said == "jumprelu [8, 24, 64] False"

    threshold = load_file(tmp_path / "sae_weights.safetensors")["threshold"]
    norms = sae.W_dec.norm(dim=-1)
    scores = ((batch - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
    expected = torch.where(scores > threshold, scores, 0.0)
    assert relative_error(result["acts"], expected) < 1e-5
    assert relative_error(result["out"], (expected / norms) @ sae.W_dec + sae.b_dec) < 1e-5
    assert (result["acts"] > 0).float().sum(-1).mean().item() == pytest.approx(4, rel=0.5)


def test_hook_z(tmp_path: Path) -> None:
    """Trained on heads laid side by side, saved for activations of shape (…, n_heads, d_head)."""
    cfg = MatryoshkaTrainingSAEConfig(**OPTIONS, reshape_activations="hook_z")
    sae = run(runner_config(cfg, tmp_path, hook_name="blocks.0.attn.hook_z"))
    batch = torch.randn(2, 5, N_HEADS, D_MODEL // N_HEADS)
    result, _ = in_plain_saelens(tmp_path / "output", batch)
    assert result["out"].shape == batch.shape

    threshold = load_file(tmp_path / "output" / "sae_weights.safetensors")["threshold"]
    norms = sae.W_dec.norm(dim=-1)
    scores = ((batch.flatten(-2) - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
    acts = torch.where(scores > threshold, scores, 0.0)
    assert relative_error(result["acts"], acts) < 1e-5
    expected = (acts / norms) @ sae.W_dec + sae.b_dec
    assert relative_error(result["out"].flatten(-2), expected) < 1e-5

    model = HookedSAETransformer(tiny_model().cfg)
    saved = SAE.load_from_disk(tmp_path / "output")
    logits = model.run_with_saes(torch.zeros(1, 4, dtype=torch.long), saes=[saved])
    assert logits.shape == (1, 4, model.cfg.d_vocab)


def test_runner_compiles_or_falls_back(tmp_path: Path) -> None:
    plain = run(runner_config(MatryoshkaTrainingSAEConfig(**OPTIONS), tmp_path / "plain"))
    sae_cfg = MatryoshkaTrainingSAEConfig(**OPTIONS)
    compiled = run(runner_config(sae_cfg, tmp_path / "other", compile_sae=True))
    assert torch.equal(compiled.W_dec, plain.W_dec)
    assert torch.equal(compiled.topk_threshold, plain.topk_threshold)


def test_runner_under_autocast_equals_saelens(tmp_path: Path) -> None:
    """Four steps, before Adam's normalised steps make much of bfloat16's rounding."""
    peer, ours = (
        run(
            runner_config(
                config_class(**OPTIONS),
                tmp_path / config_class.architecture(),
                autocast=True,
                training_tokens=64 * 4,
            )
        )
        for config_class in (MatryoshkaBatchTopKTrainingSAEConfig, MatryoshkaTrainingSAEConfig)
    )
    assert relative_error(ours.W_dec, peer.W_dec) < 2e-2
    assert relative_error(ours.topk_threshold, peer.topk_threshold) < 2e-2


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_dtypes_in_the_runner(tmp_path: Path, dtype: str) -> None:
    sae = run(
        runner_config(MatryoshkaTrainingSAEConfig(**OPTIONS, dtype=dtype), tmp_path, dtype=dtype)
    )
    assert str(sae.W_dec.dtype) == f"torch.{dtype}"
    loaded = SAE.load_from_disk(tmp_path / "output")
    assert str(loaded.W_dec.dtype) == f"torch.{dtype}"
    assert sae.cfg.metadata.l0 == pytest.approx(4, rel=0.01)


def test_wandb_offline_holds_the_level_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    cfg = runner_config(
        MatryoshkaTrainingSAEConfig(**OPTIONS),
        tmp_path,
        logger=LoggingConfig(
            log_to_wandb=True,
            wandb_project="test",
            wandb_log_frequency=5,
            eval_every_n_wandb_logs=2,
        ),
    )
    run(cfg)
    rows = [row for row in history(tmp_path) if "losses/overall_loss" in row]
    assert [row["_step"] for row in rows] == [4, 9, 14, 19]
    for row in rows:
        losses = [row[f"losses/inner_mse_loss_{width}"] for width in (8, 24)]
        losses += [row["losses/mse_loss"], row["losses/auxiliary_reconstruction_loss"]]
        assert row["losses/overall_loss"] == pytest.approx(sum(losses), rel=1e-5)
        assert row["metrics/l0_level_64"] == row["metrics/l0"] == pytest.approx(4)
        assert row["metrics/l0_level_8"] <= row["metrics/l0_level_24"] <= row["metrics/l0_level_64"]
        assert row["metrics/explained_variance_level_64"] == pytest.approx(
            row["metrics/explained_variance"], abs=1e-5
        )
        assert row["metrics/dead_latents_level_8"] <= row["metrics/dead_latents_level_64"]
    assert any(row["metrics/dead_latents_level_64"] > 0 for row in rows)
