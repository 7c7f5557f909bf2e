"""`sae-matryoshka synth`: its mistakes, its files, and what a second call does."""

import csv
import json
from dataclasses import replace

import pytest

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.cli.synth import seeds
from sae_lens_matryoshka.synthetic import models, training
from sae_lens_matryoshka.synthetic.models import TOY
from sae_lens_matryoshka.synthetic.report import summarize, table
from sae_lens_matryoshka.synthetic.results import Result

SHORT = replace(TOY, n_samples=20 * 64, batch_size=64, n_scoring_samples=2000)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "TOY", SHORT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toys"], "invalid choice: 'toys'"),
        (["toy", "--scale", "full"], "--scale full is not accepted: toy has one size"),
        (["toy", "--seeds", "0"], "'0' is not accepted: give how many"),
        (["toy", "--seeds", "1,1"], "'1,1' is not accepted"),
        (["toy", "--seeds", "a"], "'a' is not accepted"),
        (["toy", "--seeds", "5000000000,"], "seed=5000000000 is not accepted"),
        (["toy", "--samples", "10"], "samples=10 is not accepted: give at least a batch"),
        (["toy", "--lr", "nan"], "argument --lr: 'nan' is not accepted"),
        (["toy", "--k", "-1"], "argument --k: '-1' is not accepted"),
        (["toy", "--k", "21"], "at most d_sae=20"),
        (["toy", "--jobs", "0"], "argument --jobs: '0' is not accepted"),
        (["toy", "--device", "abacus"], "device='abacus' is not accepted"),
        (["toy", "--variants", "l2"], "variant 'l2' is not accepted"),
        (["toy", "--vary", "kk=1"], "kk is not a field"),
        (["toy", "--out", f"{__file__}/x"], "can't be written to"),
    ],
)
def test_mistakes(words, message, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(training, "train_all", pytest.fail)
    assert message in refusal("synth", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_seeds():
    assert seeds("3") == [0, 1, 2]
    assert seeds("0,3,7") == [0, 3, 7]
    assert seeds("7,") == [7]


@pytest.mark.usefixtures("short")
def test_from_nothing_to_files(tmp_path, capsys, monkeypatch):
    words = ["synth", "toy", "--out", str(tmp_path), "--variants", "batchtopk,matryoshka"]
    words += ["--vary", "k=1,1.25"]
    assert cli.main([*words, "--seeds", "2", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().strip() in out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "decoder_cosines.png",
        "runs",
        "scores.csv",
        "scores.png",
        "summary.json",
        "table.md",
    ]
    names = ["batchtopk,k=1", "batchtopk,k=1.25", "matryoshka,k=1", "matryoshka,k=1.25"]
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (name, seed) for name in names for seed in "01"
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    mccs = [float(row["mcc"]) for row in rows[:2]]
    first = summary["variants"]["batchtopk,k=1"]
    assert first["scores"]["mcc"]["mean"] == pytest.approx(sum(mccs) / 2)
    assert first["scores"]["mcc"]["std"] == pytest.approx(abs(mccs[0] - mccs[1]) / 2**0.5)
    assert first["seeds"] == [0, 1]
    assert first["settings"]["sae"]["k"] == 1

    # Again with another variant: only that one is trained, and the table has all.
    def train_here(benchmark, untrained, out, *, n_jobs, device):
        assert {seed: [v.name for v in vs] for seed, vs in untrained.items()} == {0: ["l1"]}
        training.train_together(benchmark, untrained[0], 0, out, device)

    monkeypatch.setattr(training, "train_all", train_here)
    words = ["synth", "toy", "--out", str(tmp_path), "--variants", "l1", "--seeds", "1"]
    assert cli.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| variant",
        "| l1",
        *(f"| {name}" for name in names),
    ]


def test_the_processes_say_which_sae_diverged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "TOY", replace(SHORT, lr=1e30))
    words = ["synth", "toy", "--out", str(tmp_path), "--variants", "matryoshka", "--seeds", "1"]
    assert cli.main(words) == 2
    assert "error: matryoshka: Training stopped at step" in capsys.readouterr().err


def test_a_score_that_some_seeds_lack():
    runs = [
        Result("a", seed, {}, {"mcc": mcc, **extra}, 1.0, "cpu")
        for seed, (mcc, extra) in enumerate([(0.5, {"absorption": 0.25}), (0.7, {})])
    ]
    spreads = summarize(runs)
    assert spreads["absorption"] == (0.25, None, 1)
    shown = table({"a": spreads})
    assert "| 0.600 ± 0.141 |" in shown
    assert "| 0.250 (1 of 2) |" in shown
