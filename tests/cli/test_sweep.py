"""`sae-matryoshka train --vary`: the table, the exit codes, and mistakes before a model loads."""

import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.levels.stats import measure_levels
from sae_lens_matryoshka.runs import lockstep
from sae_lens_matryoshka.runs.sweep import SweepRunner
from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from tests.tiny import tiny_model, token_dataset

CONFIG = """
model_name: tiny
hook_name: blocks.1.hook_resid_pre
dataset_path: {folder}/corpus
output_path: {folder}/out
checkpoint_path: {folder}/checkpoints
streaming: false
prepend_bos: false
context_size: 16
store_batch_size_prompts: 4
n_batches_in_buffer: 4
train_batch_size_tokens: 64
training_tokens: 640
lr: 1e-2
sae: {{d_in: 16, d_sae: 64, k: 4, matryoshka_widths: [8, 64]}}
logger: {{log_to_wandb: false, wandb_id: id}}
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_dataset().to_parquet(tmp_path / "corpus" / "train.parquet")
    model = tiny_model()
    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", lambda *_, **__: model)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", pytest.fail)


@pytest.mark.usefixtures("model")
def test_table_of_all_saes_and_levels(config, tmp_path, monkeypatch, capsys):
    results = []
    run = SweepRunner.run

    def remember(self: SweepRunner, n_held_out: int):
        results.append(run(self, n_held_out))
        return results[-1]

    monkeypatch.setattr(SweepRunner, "run", remember)
    words = ["--vary", "architecture=matryoshka,batchtopk", "--lr", "1e-3", "--vary=k=2,4"]
    assert cli.main(["train", str(config), *words]) == 0
    names = [f"architecture={a}_k={k}" for a in ("matryoshka", "batchtopk") for k in (2, 4)]
    out = tmp_path / "out"
    report = json.loads((out / "sweep.json").read_text())
    assert (report["n_activations"], report["failed"]) == (640, {})
    assert list(report["saes"]) == names
    (result,) = results
    lines = []
    for name in names[:2]:
        rows = measure_levels(SAE.load_from_disk(out / name), result.held_out)
        assert report["saes"][name] == [row._asdict() for row in rows]
        lines += [
            f"| {name} | {r.width} | {r.l0:.2f} | {r.explained_variance:.3f} | {r.n_dead} |"
            for r in rows
        ]
    table = (out / "sweep.md").read_text()
    assert table.startswith(
        "| SAE | width | L0 | variance explained | dead latents |\n|---|---:|---:|---:|---:|\n"
        + "\n".join(lines)
    )
    assert [row["width"] for row in report["saes"][names[3]]] == [64]
    assert table.count("\n| architecture=batchtopk_k=") == 2
    assert table in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {*names, "sweep.md", "sweep.json"}


@pytest.mark.usefixtures("no_model")
def test_on_activations_without_a_model(config, tmp_path, capsys):
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "rows.npy", rows)
    words = ["--activations", str(tmp_path / "rows.npy"), "--vary", "k=2,4", "--vary", "seed=0,1"]
    assert cli.main(["train", str(config), *words]) == 0
    levels = json.loads((tmp_path / "out" / "sweep.json").read_text())["saes"]
    assert list(levels) == ["k=2_seed=0", "k=2_seed=1", "k=4_seed=0", "k=4_seed=1"]
    for name, (_, whole) in levels.items():
        assert whole["l0"] == pytest.approx(int(name[2]), rel=0.2)  # after ten steps
        assert SAE.load_from_disk(tmp_path / "out" / name).cfg.metadata.model_name is None


@pytest.mark.usefixtures("model")
def test_a_failed_sae_is_named_and_the_others_are_saved(config, tmp_path, monkeypatch, capsys):
    step = MatryoshkaTrainer.step

    def fail(self, batch):
        if self.sae.cfg.k == 4 and self.n_training_steps == 3:
            raise torch.OutOfMemoryError("no memory")
        return step(self, batch)

    monkeypatch.setattr(MatryoshkaTrainer, "step", fail)
    assert cli.main(["train", str(config), "--vary", "k=2,4"]) == 1
    assert "\nk=4 failed after step 3: no memory\n" in (tmp_path / "out" / "sweep.md").read_text()
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (list(report["saes"]), report["failed"]) == (["k=2"], {"k=4": "after step 3: no memory"})
    assert capsys.readouterr().err.endswith("error: k=4 failed\n")


@pytest.mark.usefixtures("model")
def test_the_printed_command_resumes_the_sweep(config, tmp_path, monkeypatch, capsys):
    words = ["train", str(config), "--vary", "k=2,4", "--vary", "seed=0,1", "--lr", "1e-3"]
    words += ["--activations_mixing_fraction", "0"]
    assert cli.main([*words, "--output_path", str(tmp_path / "whole")]) == 0
    step = lockstep.LockstepTrainer.step

    def stop(self, batch):
        if self.n_training_steps == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(lockstep.LockstepTrainer, "step", stop)
        assert cli.main(words) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    resumed = [*words, "--resume_from_checkpoint", str(tmp_path / "checkpoints" / "id" / "320")]
    assert last == f"Resume with: sae-matryoshka {' '.join(resumed)}"
    assert cli.main(resumed) == 0
    for k, seed in itertools.product((2, 4), (0, 1)):
        # the threshold is calibrated anew, on activations that the resumed run has seen
        one, other = (
            load_file(tmp_path / folder / f"k={k}_seed={seed}" / "sae_weights.safetensors")["W_dec"]
            for folder in ("whole", "out")
        )
        assert torch.equal(one, other)


@pytest.mark.usefixtures("no_model")
def test_dry_run_names_the_saes_and_their_size(tmp_path, monkeypatch, capsys: Capture):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "gemma-2-2b.yaml"
    words = ["--vary", "d_sae=65536,131072", "--vary", "seed=0,1"]
    assert cli.main(["train", str(config), "--dry-run", *words]) == 0
    # 2 × (2·2304·65536 + 2304 + 65536) + 2 × (2·2304·131072 + 2304 + 131072)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "this is the first of 4 SAEs from one pass: d_sae=65536_seed=0, d_sae=65536_seed=1, "
        "d_sae=131072_seed=0, d_sae=131072_seed=1",
        "together 1,812,341,760 parameters, 27.0 GiB with gradients and Adam's moments in float32",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_model")
def test_fields_of_one_of_the_architectures_are_accepted(config, monkeypatch, capsys):
    """Also where names are checked before SAELens is imported."""
    not_imported = SimpleNamespace(modules={})
    monkeypatch.setattr("sae_lens_matryoshka.runs.field_names.sys", not_imported)
    monkeypatch.setattr("sae_lens_matryoshka.runs.dry_run.check_hook_name", lambda *_: None)
    monkeypatch.setattr("sae_lens_matryoshka.runs.dry_run.short_model_name", lambda name: name)
    words = ["train", str(config), "--dry-run", "--dataset_path", "a", "--sae.l0_coefficient", "2"]
    assert cli.main([*words, "--vary", "k=2,4"]) == 2
    assert "sae.l0_coefficient is not a field" in capsys.readouterr().err
    assert cli.main([*words, "--vary", "architecture=matryoshka,matryoshka_jumprelu"]) == 0
    assert "first of 2 SAEs from one pass: architecture=matryoshka" in capsys.readouterr().out


@pytest.mark.usefixtures("no_model")
def test_several_processes_are_refused(config, refusal, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refusal("train", config, "--vary", "k=2,4")
    assert "--vary trains on one process: start it without torchrun" in said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "kk=1"], "kk is not a field of a training config; did you mean k?"),
        (["--vary"], "--vary lacks a value: give FIELD=value,value,…"),
        (["--vary", "k=1", "--vary", "k=2"], "--vary 'k=2' is not accepted: k is varied twice"),
        (["--vary", "k=4,65"], "k=65: k=65 is not accepted"),
        (["--vary", "k=4,8", "--output_path", "null"], "output_path=None is not accepted"),
        (["--vary", "k=4,8", "--resume_from_checkpoint", "no"], "'no/k=4' is not a folder"),
    ],
)
def test_mistakes(config, refusal, words, message):
    assert message in refusal("train", config, *words)
