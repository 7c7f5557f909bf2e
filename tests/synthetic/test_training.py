"""Training in lockstep: results do not depend on the SAEs beside, and are not made twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, StandardTrainingSAE
from safetensors.torch import load_file

from sae_lens_matryoshka.synthetic import training
from sae_lens_matryoshka.synthetic.models import TOY
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.report import write_report
from sae_lens_matryoshka.synthetic.results import read_results, result_folder, untrained_variants
from sae_lens_matryoshka.synthetic.scores import score
from sae_lens_matryoshka.synthetic.training import train_together
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
def test_alone_and_beside_others_give_the_same_result(tmp_path):
    variants = plan_variants(SHORT, ALL)
    train_together(SHORT, variants, 3, tmp_path / "together")
    for variant in variants:
        torch.manual_seed(len(variant.name))  # of no effect
        train_together(SHORT, [variant], 3, tmp_path / "alone")
        together, alone = (
            result_folder(tmp_path / where, variant.name, 3) for where in ("together", "alone")
        )
        weights, others = (load_file(p / "sae_weights.safetensors") for p in (together, alone))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        scores, others = (json.loads((p / "scores.json").read_text()) for p in (together, alone))
        assert scores["scores"] == others["scores"]


def test_seeds_differ_in_samples_and_weights(tmp_path):
    (variant,) = plan_variants(SHORT, ["batchtopk"])
    seen = []

    class Recorded(RandomStream):
        def __init__(self, seed, purpose, device):
            seen.append((purpose, seed))
            super().__init__(seed, purpose, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RandomStream", Recorded)
        for seed in (0, 1):
            train_together(SHORT, [variant], seed, tmp_path)
    assert {purpose for purpose, _ in seen} == set(Purpose) - {
        Purpose.TREE
    }  # no tree was asked for
    first, second = (
        load_file(result_folder(tmp_path, "batchtopk", seed) / "sae_weights.safetensors")["W_enc"]
        for seed in (0, 1)
    )
    assert (first - second).abs().max() > 0.01


def test_a_stream_resumes_where_it_stopped():
    def draw(stream, n):
        with stream.active():
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
    train_together(SHORT, variants, 5, tmp_path, on_step=n_steps.append)
    assert n_steps == [2] * 20
    own = next(run for run in read_results(tmp_path) if run.variant == "matryoshka")
    assert (own.seed, own.settings["n_samples"]) == (5, 1280)
    assert own.settings["sae"]["matryoshka_widths"] == list(range(2, 21, 2))
    # In training BatchTopK keeps k latents per sample; the saved SAE has a threshold.
    assert own.scores["l0_training"] == pytest.approx(1.12, abs=0.02)
    folder = result_folder(tmp_path, "matryoshka", 5)
    assert sorted(p.name for p in folder.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "scores.json",
    ]
    sae = SAE.load_from_disk(folder)
    assert sae.cfg.architecture() == "jumprelu"
    model = TOY.build(5, "cpu")
    with RandomStream(5, Purpose.SCORING).active():
        x = model.sample(2000)
    l0 = (sae.encode(x) != 0).sum().item() / 2000
    assert own.scores["l0"] == pytest.approx(l0)


def test_finished_results_are_not_trained_again(tmp_path):
    l1, batchtopk = plan_variants(SHORT, ["l1", "batchtopk"])
    train_together(SHORT, [l1], 0, tmp_path)
    assert untrained_variants(SHORT, [l1], [0], tmp_path) == {}
    assert untrained_variants(SHORT, [l1, batchtopk], [0, 2], tmp_path) == {
        0: [batchtopk],
        2: [l1, batchtopk],
    }


def test_other_settings_are_refused(tmp_path):
    variants = plan_variants(SHORT, ["batchtopk"])
    train_together(SHORT, variants, 0, tmp_path)
    other = replace(SHORT, lr=0.5)
    with pytest.raises(ValueError, match=r"seed_0 was made with lr=0.003, not lr=0.5"):
        untrained_variants(other, plan_variants(other, ["l1"]), [1], tmp_path)
    # k belongs to one variant: a difference matters for it on any seed, and not for others.
    other = replace(SHORT, k=2.0)
    with pytest.raises(ValueError, match=r"made with sae.k=1.12, not sae.k=2.0"):
        untrained_variants(other, plan_variants(other, ["batchtopk"]), [1], tmp_path)
    assert untrained_variants(other, plan_variants(other, ["l1"]), [1], tmp_path).keys() == {1}
    with pytest.raises(ValueError, match=r"made with device='cpu', not device='cuda'"):
        untrained_variants(SHORT, variants, [1], tmp_path, "cuda")


def test_prefixes_are_sampled_with_the_runs_seed(tmp_path):
    variants = plan_variants(SHORT, ["matryoshka"], ["prefix_sampling=uniform"])
    for seed in (0, 5):
        train_together(SHORT, variants, seed, tmp_path)
    details = [
        json.loads((result_folder(tmp_path, variants[0].name, seed) / "cfg.json").read_text())[
            "metadata"
        ]["training_architecture_details"]
        for seed in (0, 5)
    ]
    assert [of_run["prefix_seed"] for of_run in details] == [0, 5]


def test_a_folder_written_by_version_0_1_is_complete(tmp_path):
    written = Path(__file__).parents[1] / "written_before" / "toy"
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    benchmark = replace(TOY, n_samples=20_000)
    names = ["batchtopk", "matryoshka"]
    assert untrained_variants(benchmark, plan_variants(benchmark, names), [0], tmp_path) == {}
    results = read_results(tmp_path)
    assert [(result.variant, result.seed) for result in results] == [(name, 0) for name in names]
    assert results[1].scores["f1"] == 0.7046608924865723
    files = write_report(results, tmp_path, names, benchmark)
    assert all((tmp_path / file).stat().st_size > 0 for file in files)
    matryoshka = json.loads((tmp_path / "summary.json").read_text())["variants"]["matryoshka"]
    assert matryoshka["scores"]["f1"]["mean"] == 0.7046608924865723
    with RandomStream(0, Purpose.SCORING).active():
        sae = SAE.load_from_disk(result_folder(tmp_path, "matryoshka", 0))
        (scores,) = score([sae], TOY.build(0, "cpu"), benchmark.n_scoring_samples)
    assert scores["f1"] == pytest.approx(results[1].scores["f1"], abs=1e-3)


def test_a_broken_file_of_scores_is_named(tmp_path):
    folder = result_folder(tmp_path, "l1", 0)
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match=r"l1/seed_0/scores.json is not a file of scores"):
        read_results(tmp_path)


def test_an_sae_that_diverges_is_named(tmp_path: Path):
    wild = replace(SHORT, lr=1e30)
    with pytest.raises(ValueError, match=r"^matryoshka: Training stopped at step"):
        train_together(wild, plan_variants(wild, ["matryoshka"]), 0, tmp_path)
    assert read_results(tmp_path) == []
