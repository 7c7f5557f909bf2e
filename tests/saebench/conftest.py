"""A Hub with the demo's model and small data sets, three SAEs, and a run of every evaluation."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.demo import corpus, run
from sae_lens_matryoshka.saebench.evaluations import installed
from tests.conftest import HUB
from tests.saebench.data_sets import data_sets
from tests.saebench.saes import REPOSITORY, write_saes

MODEL = Path(corpus.__file__).with_name("model")
_ERASURE = {
    "dataset_names": ["LabHC/bias_in_bios_class_set1"],
    "train_set_size": 400,
    "test_set_size": 200,
    "probe_epochs": 5,
    "n_values": [2, 5, 20],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "absorption": {"k_sparse_probe_num_epochs": 20},
    "sparse_probing": {
        "dataset_names": ["fancyzhx/ag_news"],
        "probe_train_set_size": 400,
        "probe_test_set_size": 200,
    },
    "sparse_probing_sae_probes": {"dataset_names": ["117_us_state_FL"]},
    "scr": {
        **_ERASURE,
        "column1_vals_lookup": {"LabHC/bias_in_bios_class_set1": [["accountant", "architect"]]},
    },
    "tpp": _ERASURE,
    "core": {"n_eval_reconstruction_batches": 4, "n_eval_sparsity_variance_batches": 4},
    "ravel": {
        "entity_attribute_selection": {"city": ["Country", "Continent"]},
        "num_pairs_per_attribute": 100,
        "llm_batch_size": 16,
        "top_n_entities": 200,
        "n_generated_tokens": 2,
        "learning_rate": 0.1,
        "num_epochs": 4,
    },
    "meta_structure": {"train_steps": 100},
}


def flags(*evaluations: str, **more: Any) -> list[str]:
    """The options that choose evaluations, with the settings of the tests."""
    settings = [
        f"--{evaluation}.{name}={json.dumps(value)}"
        for evaluation in evaluations
        for name, value in {**SETTINGS.get(evaluation, {}), **more}.items()
    ]
    return ["--evals", ",".join(evaluations), *settings]


class Output(NamedTuple):
    """What one command left behind."""

    code: int
    text: str
    out: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text())

    def score(self, sae: str, label: str) -> float:
        found = [
            score
            for score in self.summary["scores"]
            if score["sae"] == sae and score["label"] == label
        ]
        assert len(found) == 1, self.text
        return found[0]["mean"]


def run_eval(out: Path, *words: str) -> Output:
    """`sae-matryoshka eval … --out out`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = cli.main(["eval", *words, "--out", str(out)])
    return Output(code, printed.getvalue(), out)


@pytest.fixture(scope="session", autouse=True)
def saes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the SAEs `trained`, `random` and `identity`, which tests run in."""
    HUB.reset()
    for repo_id, files in data_sets().items():
        HUB.add(repo_id, files)
    HUB.add(REPOSITORY, {path.name: path.read_bytes() for path in MODEL.iterdir()})
    folder = tmp_path_factory.mktemp("saes")
    write_saes(folder)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def artifacts(folder: Path) -> dict[Path, int]:
    """The files that SAEBench cached in a folder, and when."""
    return {path: path.stat().st_mtime_ns for path in (folder / "artifacts").rglob("*")}


@pytest.fixture(scope="session")
def installed_artifacts() -> dict[Path, int]:
    """What the installed SAEBench had cached before the tests ran."""
    return artifacts(installed())


@pytest.fixture(scope="session")
def everything(
    saes: Path, installed_artifacts: dict[Path, int], tmp_path_factory: pytest.TempPathFactory
) -> Output:
    """Every evaluation on the trained SAE, its second level and the two that bracket it."""
    return run_eval(
        tmp_path_factory.mktemp("runs") / "everything",
        *("trained", "--levels", "2,5", "--against", "random", "identity", "--seeds", "1"),
        *flags(*SETTINGS, "unlearning", "autointerp"),
    )


SHORT_DEMO = """
from sae_lens_matryoshka.demo import compare, run

run.N_TEXTS, run.N_HELD_OUT, run.N_LABELLED = 2000, 400, 1200
run_config = compare.run_config

def short_run_config(sae, seed=0):
    cfg = run_config(sae, seed)
    cfg.training_tokens, cfg.lr_decay_steps = 1024 * 120, 20
    return cfg

compare.run_config, compare.N_EVAL_BATCHES = short_run_config, 4
compare.EVALUATIONS["sparse_probing"].update(probe_train_set_size=200, probe_test_set_size=100)
compare.EVALUATIONS["core"].update(
    n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2
)
compare.N_PAGE_TOKENS = 5000
compare.show_shipped_sae = lambda *_: None  # it downloads: tests/demo/test_real_text.py
compare.main(0)
"""


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo: the one that DEMO_RUN names, or else of a short one."""
    if finished := os.environ.get("DEMO_RUN"):
        return Path(finished)
    out = tmp_path_factory.mktemp("demo") / "out"
    run_command = subprocess.run

    def run_short(command: list[str], **options):
        assert command == [sys.executable, "-m", "sae_lens_matryoshka.demo.compare", "0"]
        return run_command([sys.executable, "-c", SHORT_DEMO], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(subprocess, "run", run_short)
        assert run.run_demo(out) == 0
    return out
