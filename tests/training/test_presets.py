"""Training steps with the presets, under SAELens' trainer, equal those of the peers."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.presets import bussmann, dictionary_learning
from tests.hub.test_peers import run_peers
from tests.peers.make_steps import D_IN, GROUP_SIZES, N_STEPS, N_TOKENS
from tests.steps import relative_error

DOCS = Path(__file__).parents[2] / "docs" / "variants.md"
D_SAE, K = sum(GROUP_SIZES), 4
WIDTHS = [sum(GROUP_SIZES[:end]) for end in range(1, len(GROUP_SIZES) + 1)]

State = dict[str, torch.Tensor]


@pytest.fixture
def gradient_norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The norm of every gradient that SAELens' trainer clips, as it was before."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recorded(parameters: Any, max_norm: float) -> torch.Tensor:
        norm = clip(parameters, max_norm)
        norms.append(norm.item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    return norms


def train(
    cfg: MatryoshkaTrainingSAEConfig, start: State, batches: torch.Tensor, **trainer: Any
) -> list[State]:
    """Our weights and threshold after each step of SAELens' trainer, one step a batch."""
    sae = MatryoshkaTrainingSAE(cfg)
    sae.load_state_dict(start, strict=False)
    seen: list[State] = []

    def state() -> State:
        return {name: tensor.clone() for name, tensor in sae.state_dict().items()}

    def provider() -> Iterator[torch.Tensor]:
        for step, batch in enumerate(batches):
            if step:
                seen.append(state())
            yield batch

    trained = SAETrainer(
        SAETrainerConfig(
            total_training_samples=batches.shape[0] * batches.shape[1],
            train_batch_size_samples=batches.shape[1],
            lr_end=trainer["lr"],
            **trainer,
        ),
        sae,
        provider(),
    )
    trained.fit()
    assert not trained.dead_neurons.any()
    assert trained.n_training_steps == len(batches)
    return [*seen, state()]


def assert_equal(ours: State, theirs: State, step: int) -> None:
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) < 1e-5, (name, step)


@pytest.fixture(scope="module")
def peer_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_peers("make_steps.py", tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dictionary_learning(
    peer_steps: Path, gradient_norms: list[float], implementation: str, dtype: str
) -> None:
    peer = torch.load(peer_steps / f"{dtype}.pt", weights_only=True)
    cfg = dictionary_learning(
        D_IN,
        D_SAE,
        K,
        WIDTHS,
        dtype=dtype,
        topk_threshold_start_step=5,
        implementation=implementation,
    )
    seen = train(cfg, peer["start"], peer["batches"], lr=3e-3)
    for step, ours in enumerate(seen):
        theirs = {name: states[step] for name, states in peer["after"].items()}
        # they divide by the norms after a step, and we before the next one
        ours["W_dec"] = ours["W_dec"] / ours["W_dec"].norm(dim=-1, keepdim=True)
        threshold = theirs.pop("threshold")
        if threshold >= 0:
            theirs["topk_threshold"] = threshold
        assert (ours["topk_threshold"] == 0) == (step <= 5) == (threshold == -1)
        assert_equal(ours, theirs, step)
    assert relative_error(seen[-1]["W_dec"], peer["start"]["W_dec"]) > 0.05
    assert max(gradient_norms) > 1  # clipping acts in both


def papers_steps(start: State, batches: torch.Tensor, lr: float) -> Iterator[State]:
    """What bartbussmann/matryoshka_sae computes while no latent is dead, in formulas."""
    weights = {name: start[name].clone().requires_grad_() for name in ("W_enc", "W_dec", "b_dec")}
    W_enc, W_dec, b_dec = weights.values()
    optimizer = torch.optim.Adam(weights.values(), lr=lr, betas=(0.9, 0.99))
    threshold = torch.zeros((), dtype=b_dec.dtype)
    for x in batches:
        scores = ((x - b_dec) @ W_enc).relu()
        cut = scores.detach().flatten().topk(K * len(x)).values[-1]
        assert cut > 0
        acts = scores * (scores >= cut)
        threshold = 0.99 * threshold + 0.01 * cut
        errors = [acts[:, :width] @ W_dec[:width] + b_dec - x for width in (0, *WIDTHS)]
        torch.stack(errors).square().mean().backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            W_dec.grad -= W_dec * (W_dec * W_dec.grad).sum(1, keepdim=True)
        optimizer.step()
        optimizer.zero_grad()
        yield {
            **{name: tensor.detach().clone() for name, tensor in weights.items()},
            "b_enc": torch.zeros(D_SAE),
            "topk_threshold": threshold,
        }


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bussmann(gradient_norms: list[float], implementation: str, dtype: Any) -> None:
    torch.manual_seed(0)
    cfg = bussmann(D_IN, D_SAE, K, WIDTHS, dtype=dtype, implementation=implementation)
    start = MatryoshkaTrainingSAE(cfg).state_dict()
    start = {name: tensor.clone() for name, tensor in start.items() if name != "topk_threshold"}
    start["b_dec"] += 0.1
    start["W_enc"] += 0.05 * torch.randn_like(start["W_enc"])
    batches = torch.rand(N_STEPS, N_TOKENS, 24).pow(4) @ torch.randn(24, D_IN)
    batches = batches.to(getattr(torch, dtype))
    seen = train(cfg, start, batches, lr=3e-3, adam_beta2=0.99)
    for step, theirs in enumerate(papers_steps(start, batches, lr=3e-3)):
        assert_equal(seen[step], theirs, step)
    assert relative_error(seen[-1]["W_dec"], start["W_dec"]) > 0.05
    assert max(gradient_norms) < 1  # SAELens' clipping, which they lack, does not act


def test_weights_begin_as_theirs() -> None:
    torch.manual_seed(0)
    sae = MatryoshkaTrainingSAE(dictionary_learning(D_IN, D_SAE, K, WIDTHS))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)

    sae = MatryoshkaTrainingSAE(bussmann(256, 1024, K, [128, 1024]))
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(256, 1024))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(1024))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T * math.sqrt(0.5))
    assert sae.W_enc.norm().item() == pytest.approx(theirs.norm().item(), rel=0.01)


def test_the_values_of_the_presets() -> None:
    cfg = dictionary_learning(8, 16, 4, [4, 16])
    assert cfg.level_weights == [1 / 4, 1 / 4]
    assert (cfg.aux_loss_coefficient, cfg.encoder_bias) == (1 / 32, True)
    assert (cfg.topk_threshold_lr, cfg.topk_threshold_start_step) == (0.001, 1000)

    cfg = bussmann(8, 16, 4, [4, 16])
    assert cfg.level_weights == [1 / 24, 1 / 24, 1 / 24]
    assert (cfg.aux_loss_coefficient, cfg.encoder_bias) == (1 / 256, False)
    assert (cfg.topk_threshold_lr, cfg.topk_threshold_start_step) == (0.01, None)


@pytest.mark.parametrize("preset", [dictionary_learning, bussmann])
def test_options_replace_what_a_preset_sets(preset: Any) -> None:
    options = {"level_weights": 2.0, "aux_loss_coefficient": 0.5, "decoder_init_norm": 0.3}
    cfg = preset(8, 16, 4, [4, 16], **options, decoder_norm="free", k_start=8, k_anneal_steps=5)
    assert {name: getattr(cfg, name) for name in options} == options
    assert (cfg.decoder_norm, cfg.k_at(0)) == ("free", 8)
    details = cfg.metadata.training_architecture_details
    assert details == cfg.get_training_architecture_details()
    sampled = preset(8, 16, 4, [4, 16], prefix_sampling="uniform", n_prefixes=5)
    assert len(sampled.level_weights) == sampled.n_levels


@pytest.mark.parametrize("preset", [dictionary_learning, bussmann])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 0}, r"d_in=0 .*a positive integer"),
        ({"k": -1}, r"k=-1 .*above 0"),
        ({"matryoshka_widths": [8, 4]}, r"matryoshka_widths=\[8, 4\] does not strictly increase"),
        ({"level_weights": []}, r"level_weights=\[\] .*weights"),
        ({"decoder_norm": "two"}, r"decoder_norm='two'"),
    ],
)
def test_bad_options(preset: Any, options: dict[str, Any], message: str) -> None:
    good = {"d_in": 8, "d_sae": 16, "k": 4, "matryoshka_widths": [4, 16]}
    with pytest.raises(ValueError, match=message):
        preset(**{**good, **options})


def test_the_lines_of_config_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    lines = re.findall(r"^- \*\*.*?`(\w+=[^`]+)`$", text, re.S | re.M)
    assert len(lines) == text.count("- **") == 14
    for line in lines:
        options = eval(f"dict({line})")
        cfg = MatryoshkaTrainingSAEConfig(d_in=8, d_sae=4096, k=25, **options)
        assert {name: getattr(cfg, name) for name in options} == options

    architectures, presets = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(architectures, names)
    assert names["sae"].architecture() == "matryoshka_jumprelu"
    exec(presets, names)
    assert (names["sae"].latent_order, names["sae"].bias_level) == ("frequency", True)
