"""Levels of the most frequent latents: followed, saved in order, and moved with what is theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig, decode_levels
from sae_lens_matryoshka.levels.slicing import levels, truncate
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.training.joined_batch import JoinedBatch
from sae_lens_matryoshka.training.latent_order import (
    level_order,
    rank_of,
    reorder_latents,
    update_rates,
)
from tests.steps import dense, relative_error, spread
from tests.tiny import D_MODEL, run, runner_config
from tests.training.test_variants import ARCHITECTURES, BATCH, D_IN, D_SAE, make, step_of

FREQUENCY = {"latent_order": "frequency", "matryoshka_widths": [4, 10, D_SAE]}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_order_and_ranks_are_inverse_and_stable(counts: list[int]) -> None:
    rates = torch.tensor(counts, dtype=torch.float32)
    order = level_order(rates)
    assert order.tolist() == sorted(range(len(counts)), key=lambda j: (-counts[j], j))
    assert torch.equal(rank_of(order)[order], torch.arange(len(counts)))


def test_rates_by_hand() -> None:
    rates = torch.tensor([0.5, 0.0, 1.0])
    latents, is_firing = torch.tensor([1, 1, 2, 2]), torch.tensor([True, True, True, False])
    updated = update_rates(rates, latents, is_firing, 4, JoinedBatch())
    torch.testing.assert_close(updated, torch.tensor([0.495, 0.005, 0.9925]))


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_levels_are_made_of_the_most_frequent_latents(
    architecture: str, implementation: str
) -> None:
    torch.manual_seed(0)
    sae = make(architecture, implementation, FREQUENCY)
    rates = torch.zeros(D_SAE, dtype=torch.float64)
    for step in range(5):
        x = torch.randn(BATCH, D_IN, dtype=torch.float64)
        order = rates.argsort(descending=True, stable=True)
        output = step_of(sae, x, None, step)
        acts = dense(output.feature_acts)
        factors = acts / sae.W_dec.detach().norm(dim=-1) if "jump" not in architecture else acts
        for width in (4, 10):
            inner = order[:width]
            error = factors[:, inner] @ sae.W_dec.detach()[inner] + sae.b_dec.detach() - x
            torch.testing.assert_close(
                output.losses[f"inner_mse_loss_{width}"].detach(), error.pow(2).sum(-1).mean()
            )
            l0 = output.metrics[f"l0_level_{width}"]
            assert callable(l0)
            assert l0().item() == pytest.approx((acts[:, inner] != 0).sum().item() / BATCH)
        rates = rates * 0.99 + 0.01 * (acts != 0).double().mean(0)
        torch.testing.assert_close(sae.firing_rates, rates)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_latents_are_in_level_order(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sae = make(architecture, "sparse", FREQUENCY)
    spread(sae)
    for step in range(3):
        step_of(sae, torch.randn(BATCH, D_IN, dtype=torch.float64), None, step)
    order = level_order(sae.firing_rates)
    assert order.tolist() != sorted(order.tolist())
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    norms = sae.W_dec.detach().norm(dim=-1, keepdim=True) if "jump" not in architecture else 1
    torch.testing.assert_close(saved.W_dec.detach(), (sae.W_dec.detach() / norms)[order])
    x = torch.randn(BATCH, D_IN, dtype=torch.float64)
    if architecture == "matryoshka_topk":
        torch.testing.assert_close(saved.encode(x), sae.encode(x)[:, order])
    if architecture == "matryoshka_jumprelu":
        torch.testing.assert_close(saved.threshold.detach().float(), sae.threshold[order].detach())
    torch.testing.assert_close(truncate(sae, 4).W_dec, truncate(saved, 4).W_dec)
    acts = sae.encode(x)
    for level, decoded in zip(levels(sae), decode_levels(sae, acts), strict=True):
        width = level.cfg.d_sae
        torch.testing.assert_close(level.decode(acts[:, order[:width]]), decoded)


def make_trainer(architecture: str) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    sae = make(architecture, "sparse", FREQUENCY)
    spread(sae)
    cfg = SAETrainerConfig(
        total_training_samples=BATCH * 20,
        train_batch_size_samples=BATCH,
        lr=1e-2,
        lr_end=1e-2,
        device="cpu",
        dead_feature_window=2,
        feature_sampling_window=100,
    )
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reordering_moves_latents_with_all_that_belongs_to_them(architecture: str) -> None:
    """Two trainings on the same batches, one reordered now and then: the same SAE, renumbered."""
    plain, reordered = make_trainer(architecture), make_trainer(architecture)
    tolerance = 1e-6 if "jump" in architecture else 1e-9  # its threshold is float32
    number = torch.arange(D_SAE)  # in `plain`, of each latent of `reordered`
    torch.manual_seed(7)
    for step in range(12):
        x = torch.randn(BATCH, D_IN, dtype=torch.float64)
        for trainer in (plain, reordered):
            trainer.step(x)
            trainer.n_training_steps += 1
        if step % 3 == 2:
            number = number[level_order(reordered.sae.firing_rates)]
            reorder_latents(reordered)
            rates = reordered.sae.firing_rates
            assert torch.equal(rates, rates.sort(descending=True).values)
    assert number.tolist() != list(range(D_SAE))
    moments = {
        name: reordered.optimizer.state[parameter]
        for name, parameter in reordered.sae.named_parameters()
    }
    for name, parameter in plain.sae.named_parameters():
        dim = {"W_enc": 1, "b_dec": None}.get(name, 0)
        pairs = [(parameter.detach(), dict(reordered.sae.named_parameters())[name].detach())]
        pairs += [
            (plain.optimizer.state[parameter][moment], moments[name][moment])
            for moment in ("exp_avg", "exp_avg_sq")
        ]
        for expected, actual in pairs:
            if dim is not None:
                expected = expected.index_select(dim, number)
            assert relative_error(actual, expected) < tolerance, name
    assert torch.equal(reordered.act_freq_scores, plain.act_freq_scores[number])
    assert torch.equal(
        reordered.n_forward_passes_since_fired, plain.n_forward_passes_since_fired[number]
    )
    assert reordered.sae.W_enc.T.is_contiguous()


def test_a_run_saves_and_resumes_in_level_order(tmp_path: Path) -> None:
    def save(name: str, **options: Any) -> None:
        sae = MatryoshkaTrainingSAEConfig(
            d_in=D_MODEL,
            d_sae=48,
            k=4,
            matryoshka_widths=[6, 16, 48],
            latent_order="frequency",
            prefix_sampling="log_uniform",
            n_prefixes=4,
            prefix_seed=3,
        )
        cfg = runner_config(
            sae,
            tmp_path / name,
            n_checkpoints=1,
            activations_mixing_fraction=0,
            store_batch_size_prompts=4,
            feature_sampling_window=1000,
            **options,
        )
        run(cfg, MatryoshkaTrainingRunner)

    save("whole")
    [checkpoint] = (tmp_path / "whole" / "checkpoints").rglob("trainer_state.pt")
    state = torch.load(checkpoint, weights_only=True)
    weights = load_file(checkpoint.parent / "sae_weights.safetensors")
    rates = weights["firing_rates"]
    assert torch.equal(rates, rates.sort(descending=True).values)
    assert (rates[:6] > rates[-6:]).all()
    frequencies = state["act_freq_scores"]
    assert frequencies[:6].sum() > frequencies[16:22].sum() > frequencies[-6:].sum()

    sparsity = load_file(tmp_path / "whole" / "output" / "sparsity.safetensors")["sparsity"]
    assert sparsity[:6].mean() > sparsity[16:].mean()
    cfg = json.loads((tmp_path / "whole" / "output" / "cfg.json").read_text())
    details = cfg["metadata"]["training_architecture_details"]
    assert details["latent_order"] == "frequency"
    assert details["prefix_sampling"] == "log_uniform"

    save("resumed", resume_from_checkpoint=str(checkpoint.parent))
    whole, resumed = (
        load_file(tmp_path / name / "output" / "sae_weights.safetensors")
        for name in ("whole", "resumed")
    )
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert relative_error(resumed[name], whole[name]) < 1e-5, name
