"""The recipe of examples/smollm2 on the real model, with few texts, steps and words."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import ship
from examples.smollm2.arms import Arm
from sae_lens_matryoshka import load_sae
from sae_lens_matryoshka.demo.smollm2 import MODEL, prepare_model
from sae_lens_matryoshka.levels import levels
from sae_lens_matryoshka.util.devices import multiplies_bfloat16

ROOT = Path(__file__).parents[2]
ARM = Arm("matryoshka", k=16, seed=0, d_sae=512, n_steps=150, lr=3e-3)
WIDTHS = [16, 48, 112, 240, 512]
N_HELD_OUT = 8_000
SMALL = """
import sys
from examples.smollm2 import arms, run
from tests.saebench.test_smollm2 import ARM, N_HELD_OUT

run.all_arms, run.tuning_arms = lambda: [ARM], lambda: []
arms.MAX_ROWS, run.N_HELD_OUT = 80_000, N_HELD_OUT
run.evaluated_widths = lambda arm, evaluation: [arm.d_sae]
run.SETTINGS = {
    "absorption": {"n_words": 520, "min_feats_for_eval": 2, "k_sparse_probe_num_epochs": 10},
}
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make smollm2`, with the help texts of Python instead of Debian's packages."""
    folder = tmp_path_factory.mktemp("smollm2")
    if (shared := Path(os.environ.get("DEMO_RUN", ""), MODEL)).is_dir():  # the demo's
        (folder / MODEL).parent.mkdir()
        (folder / MODEL).symlink_to(shared.resolve())
    prepare_model(folder)
    texts = list(topics.values())
    for name, rows in {"train": texts[8:], "held_out": texts[:8]}.items():
        (folder / "texts" / name).mkdir(parents=True)
        Dataset.from_dict({"text": rows}).to_parquet(folder / "texts" / name / "documents.parquet")
    return folder


@pytest.fixture(scope="module")
def result(data: Path) -> dict[str, Any]:
    """What the experiment says of one SAE, whose training was killed and resumed."""
    experiment = start(data)
    checkpoints = data / "experiment" / "checkpoints" / ARM.name
    deadline = time.monotonic() + 300
    while not (finished := list(checkpoints.glob("*/[!.]*/trainer_state.pt"))):
        assert experiment.poll() is None, output(data)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(experiment.pid, signal.SIGKILL)
    experiment.wait()
    half_written = finished[0].parents[1] / ".99999.unfinished"
    half_written.mkdir()
    (half_written / "trainer_state.pt").touch()  # newer than the checkpoint
    assert start(data).wait(timeout=600) == 0, output(data)
    assert "--resume_from_checkpoint" in (data / "log").read_text()
    assert not checkpoints.exists()
    return json.loads((data / "results" / f"{ARM.name}.json").read_text())


def start(data: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SMALL, "--data", data, "--results", data / "results"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (data / "log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def output(data: Path) -> str:
    return (data / "log").read_text()[-3000:]


def test_levels_and_l0(result: dict[str, Any]) -> None:
    assert [level["width"] for level in result["levels"]] == WIDTHS
    explained = [level["explained_variance"] for level in result["levels"]]
    assert explained == sorted(explained)
    assert 0.2 < explained[-1] < 1
    l0s = [level["l0"] for level in result["levels"]]
    assert l0s == sorted(l0s)
    assert l0s[-1] == pytest.approx(ARM.k, rel=0.25)  # of other texts, after few steps


def test_edges_of_the_tree_are_counted(result: dict[str, Any]) -> None:
    by_frequency, by_level = result["tree"]["frequency"], result["tree"]["level"]
    assert by_level["n_looked_at"] < by_frequency["n_looked_at"]  # some pairs are of one level
    for counts in (by_frequency, by_level):
        assert counts["n_latents"] == 512
        assert 0 < counts["n_tested"] <= counts["n_looked_at"]
        assert counts["n_families"] <= counts["n_parents"] <= counts["n_passed"]
        assert counts["n_children"] <= counts["n_passed"] <= counts["n_tested"]


def test_absorption(result: dict[str, Any]) -> None:
    [(width, scores)] = result["saebench"]["absorption"]["widths"].items()
    assert width == "512"
    letters = scores["letters"].values()
    assert len(letters) >= 2
    for name, of_letter in (
        ("mean_full_absorption_score", "full_absorption_rate"),
        ("mean_num_split_features", "num_split_features"),
    ):
        mean = sum(letter[of_letter] for letter in letters) / len(letters)
        assert scores["mean"][name] == pytest.approx(mean)
    assert all(0 <= letter["recall"] <= 1 for letter in letters)
    assert [len(letter["absorbing"]) for letter in letters] == [
        letter["num_full_absorption"] for letter in letters
    ]


def test_what_it_was_trained_on(result: dict[str, Any]) -> None:
    assert result["activations"]["n_rows"] >= 80_000
    assert result["activations"]["autocast_lm"] == multiplies_bfloat16()


def test_what_is_done_is_not_computed_again(data: Path, result: dict[str, Any]) -> None:
    file = data / "results" / f"{ARM.name}.json"
    before = file.stat().st_mtime_ns
    assert start(data).wait(timeout=60) == 0, output(data)
    assert file.stat().st_mtime_ns == before
    assert output(data).startswith(f"{data / 'results'} has what was found;")


def test_it_loads_with_plain_saelens(data: Path, result: dict[str, Any]) -> None:
    folder = data / "experiment" / "saes" / ARM.name
    plain, ours = SAE.load_from_disk(folder), load_sae(str(folder))
    x = torch.randn(20, 576) * 5
    torch.testing.assert_close(plain(x), ours(x), rtol=0, atol=0)
    assert [level.cfg.d_sae for level in levels(ours)] == WIDTHS
    assert plain.cfg.metadata.hook_name == "model.layers.7"


def test_the_shipped_file_is_halved_and_measured(
    data: Path,
    result: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(ship, "SAE_FOLDER", shipped)
    monkeypatch.setattr(ship, "N_HELD_OUT", N_HELD_OUT)
    assert ship.main([ARM.name, "--experiment", str(data / "experiment")]) == 0
    trained = SAE.load_from_disk(data / "experiment" / "saes" / ARM.name)
    plain = SAE.load_from_disk(shipped)
    assert plain.W_dec.dtype == torch.float16
    torch.testing.assert_close(plain.W_dec, trained.W_dec.half(), rtol=0, atol=0)
    card = (shipped / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    header = next(row for row in rows if row[0] == "width")
    in_card = {row[0]: dict(zip(header, row, strict=True)) for row in rows if len(row) > 2}
    for level in result["levels"]:
        row = in_card[str(level["width"])]
        assert float(row["L0"]) == pytest.approx(level["l0"], abs=0.05)  # float16 moves few
        assert float(row["variance explained"]) == pytest.approx(
            level["explained_variance"], abs=0.002
        )
    assert "SAE.load_from_disk(SAE_FOLDER)" in card
    assert "texts/train" not in card
    assert "held_out_layer" not in card
    assert ship.main(["nothing", "--experiment", str(data / "experiment")]) == 2
    assert "nothing is not a folder." in capsys.readouterr().err


def test_residuals_are_those_of_transformers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    tokens = AutoTokenizer.from_pretrained(MODEL)(next(iter(topics.values())), return_tensors="pt")
    tokens = tokens["input_ids"][:, :128]
    reference = AutoModelForCausalLM.from_pretrained(MODEL)
    tested = HookedTransformer.from_pretrained_no_processing(MODEL, device="cpu")
    with torch.no_grad():
        states = reference(tokens, output_hidden_states=True).hidden_states
        _, cache = tested.run_with_cache(tokens, prepend_bos=False)
    for layer in (3, 7, 14, 20):
        expected, found = states[layer + 1], cache[f"blocks.{layer}.hook_resid_post"]
        # residuals hold numbers near 1,000, so equal to 1e-4 of a position's norm
        assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-4
