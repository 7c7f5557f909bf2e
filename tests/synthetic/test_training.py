"""Lockstep training: nobody notices who else is there, and what is finished stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, StandardTrainingSAE
from safetensors.torch import load_file

from sae_lens_matryoshka.synthetic import training
from sae_lens_matryoshka.synthetic.models import TOY
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.runs import missing, read_runs, run_folder
from sae_lens_matryoshka.synthetic.training import train_pass
from sae_lens_matryoshka.synthetic.variants import plan_variants

SHORT = replace(TOY, n_samples=20 * 64, batch_size=64, n_scoring_samples=2000)
ALL = ["l1", "batchtopk", "matryoshka_batchtopk", "matryoshka"]


@pytest.fixture
def noisy_l1(monkeypatch: pytest.MonkeyPatch) -> None:
    """L1 SAEs that draw random numbers in every step."""
    step = StandardTrainingSAE.training_forward_pass

    def with_noise(self, step_input):
        step_input.sae_in = step_input.sae_in + 0.1 * torch.randn_like(step_input.sae_in)
        return step(self, step_input)

    monkeypatch.setattr(StandardTrainingSAE, "training_forward_pass", with_noise)


@pytest.mark.usefixtures("noisy_l1")
def test_alone_as_beside_others(tmp_path):
    variants = plan_variants(SHORT, ALL)
    train_pass(SHORT, variants, 3, tmp_path / "together")
    for variant in variants:
        torch.manual_seed(len(variant.name))  # what was drawn before changes nothing
        train_pass(SHORT, [variant], 3, tmp_path / "alone")
        together, alone = (
            run_folder(tmp_path / where, variant.name, 3) for where in ("together", "alone")
        )
        weights, others = (load_file(p / "sae_weights.safetensors") for p in (together, alone))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        scores, others = (json.loads((p / "scores.json").read_text()) for p in (together, alone))
        assert scores["scores"] == others["scores"]


def test_seeds_differ_in_samples_and_weights(tmp_path):
    (variant,) = plan_variants(SHORT, ["batchtopk"])
    seen = []

    class Kept(RandomStream):
        def __init__(self, seed, purpose, device):
            seen.append((purpose, seed))
            super().__init__(seed, purpose, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RandomStream", Kept)
        for seed in (0, 1):
            train_pass(SHORT, [variant], seed, tmp_path)
    assert {purpose for purpose, _ in seen} == set(Purpose)
    first, second = (
        load_file(run_folder(tmp_path, "batchtopk", seed) / "sae_weights.safetensors")["W_enc"]
        for seed in (0, 1)
    )
    assert (first - second).abs().max() > 0.01


def test_a_stream_goes_on_where_it_stopped():
    def draw(stream, n):
        with stream.drawn():
            return torch.rand(n)

    stream, whole = (RandomStream(4, Purpose.SAMPLES) for _ in range(2))
    torch.manual_seed(9)
    expected = torch.rand(5)
    torch.manual_seed(9)
    parts = [draw(stream, 3), torch.rand(2), draw(stream, 3), torch.rand(3)]
    assert torch.equal(torch.cat([parts[0], parts[2]]), draw(whole, 6))
    assert torch.equal(torch.cat([parts[1], parts[3]]), expected)
    assert not torch.equal(parts[0], draw(RandomStream(4, Purpose.SCORING), 3))
    assert not torch.equal(parts[0], draw(RandomStream(5, Purpose.SAMPLES), 3))


def test_what_is_written(tmp_path):
    n_steps = []
    variants = plan_variants(SHORT, ["batchtopk", "matryoshka"])
    train_pass(SHORT, variants, 5, tmp_path, on_step=n_steps.append)
    assert n_steps == [2] * 20
    own = next(run for run in read_runs(tmp_path) if run.variant == "matryoshka")
    assert (own.seed, own.settings["n_samples"]) == (5, 1280)
    assert own.settings["sae"]["matryoshka_widths"] == list(range(2, 21, 2))
    # BatchTopK keeps k per sample, of those of the last steps; saved, it is a threshold.
    assert own.scores["l0_training"] == pytest.approx(1.12, abs=0.02)
    folder = run_folder(tmp_path, "matryoshka", 5)
    assert sorted(p.name for p in folder.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "scores.json",
    ]
    sae = SAE.load_from_disk(folder)
    assert sae.cfg.architecture() == "jumprelu"
    model = TOY.build(5, "cpu")
    with RandomStream(5, Purpose.SCORING).drawn():
        x = model.sample(2000)
    l0 = (sae.encode(x) != 0).sum().item() / 2000
    assert own.scores["l0"] == pytest.approx(l0)


def test_what_is_there_is_not_trained_again(tmp_path):
    l1, batchtopk = plan_variants(SHORT, ["l1", "batchtopk"])
    train_pass(SHORT, [l1], 0, tmp_path)
    assert missing(SHORT, [l1], [0], tmp_path) == {}
    assert missing(SHORT, [l1, batchtopk], [0, 2], tmp_path) == {
        0: [batchtopk],
        2: [l1, batchtopk],
    }


def test_other_settings_are_refused(tmp_path):
    variants = plan_variants(SHORT, ["batchtopk"])
    train_pass(SHORT, variants, 0, tmp_path)
    other = replace(SHORT, lr=0.5)
    with pytest.raises(ValueError, match=r"seed_0 was made with lr=0.003, and lr=0.5 is asked for"):
        missing(other, plan_variants(other, ["l1"]), [1], tmp_path)
    # k is one variant's own: refused for it on any seed, and no matter to others.
    other = replace(SHORT, k=2.0)
    with pytest.raises(ValueError, match=r"made with sae.k=1.12, and sae.k=2.0 is asked for"):
        missing(other, plan_variants(other, ["batchtopk"]), [1], tmp_path)
    assert missing(other, plan_variants(other, ["l1"]), [1], tmp_path).keys() == {1}


def test_devices_are_not_mixed(tmp_path):
    variants = plan_variants(SHORT, ["l1"])
    train_pass(SHORT, variants, 0, tmp_path)
    with pytest.raises(ValueError, match=r"made with device='cpu', and device='cuda', which draws"):
        missing(SHORT, variants, [1], tmp_path, "cuda")


def test_sampled_prefixes_are_of_the_runs_seed(tmp_path):
    variants = plan_variants(SHORT, ["matryoshka"], ["prefix_sampling=uniform"])
    for seed in (0, 5):
        train_pass(SHORT, variants, seed, tmp_path)
    details = [
        json.loads((run_folder(tmp_path, variants[0].name, seed) / "cfg.json").read_text())[
            "metadata"
        ]["training_architecture_details"]
        for seed in (0, 5)
    ]
    assert [of_run["prefix_seed"] for of_run in details] == [0, 5]


def test_a_broken_file_of_scores_is_named(tmp_path):
    folder = run_folder(tmp_path, "l1", 0)
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match=r"l1/seed_0/scores.json is not a file of scores"):
        read_runs(tmp_path)


def test_an_sae_that_diverges_is_named(tmp_path: Path):
    wild = replace(SHORT, lr=1e30)
    with pytest.raises(ValueError, match=r"^matryoshka: Training stopped at step"):
        train_pass(wild, plan_variants(wild, ["matryoshka"]), 0, tmp_path)
    assert read_runs(tmp_path) == []
