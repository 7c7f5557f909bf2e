"""Several processes train the SAE that one process would, and end together whatever happens."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from sae_lens_matryoshka.runs.processes import Processes
from sae_lens_matryoshka.runs.text_share import take_share
from tests.runs import faulty_worker
from tests.runs.variants import VARIANTS
from tests.tiny import D_MODEL
from tests.wandb_file import history


def torchrun(n: int, module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), "-m", f"tests.runs.{module}", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module", params=[2, 3])
def errors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """Of each tensor after 30 steps, against one process with the joined batch."""
    out = tmp_path_factory.mktemp("joined") / "errors.json"
    finished = torchrun(request.param, "joined_worker", out)
    assert finished.returncode == 0, finished.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_one_process_with_the_joined_batch(
    errors: dict[str, dict[str, float]], variant: str, dtype: str, tolerance: float
) -> None:
    if variant == "jumprelu":
        tolerance = max(tolerance, 1e-6)  # SAELens' thresholds are float32
    too_far = {k: e for k, e in errors[f"{variant} {dtype}"].items() if not e <= tolerance}
    assert not too_far


@pytest.mark.parametrize(
    "scores",
    [
        "plain",
        "float64",
        "bfloat16",
        "uneven",
        "fewer positive than are kept",
        "none positive",
        "all equal",
        "ties",
        "tiny and huge",
        "NaN",
        "infinite",
    ],
)
def test_the_largest_scores_of_the_joined_batch(
    errors: dict[str, dict[str, float]], scores: str
) -> None:
    assert errors[scores] == {"misplaced": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ends")


def ends_on(folder: Path, n: int, *faults: str) -> tuple[dict[int, dict[str, Any]], str]:
    """How each run ended, by rank, and what was logged."""
    finished = torchrun(n, "faulty_worker", folder, *faults)
    files = {rank: folder / f"rank_{rank}.json" for rank in range(n)}
    ends = {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}
    for file in files.values():
        file.unlink(missing_ok=True)
    return ends, finished.stderr


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[int, tuple[dict[int, dict[str, Any]], str]]:
    """Runs of three processes of which one is killed."""
    return {rank: ends_on(folder / str(rank), 3, f"killed@{rank}") for rank in (0, 1)}


@pytest.fixture(scope="module")
def ends(folder: Path, killed: Any) -> dict[int, dict[str, Any]]:
    """Runs of two processes, one after the other."""
    (folder / "killed").symlink_to(folder / "0" / "killed")
    faults = ["other config", "nan", "end", "unreadable", "sigterm", "resume sigterm"]
    faults += ["sharded sigterm", "resume sharded_sigterm", "sharded nan"]
    rows = torch.randn(1000, D_MODEL, generator=torch.Generator().manual_seed(0))
    np.save(folder / "rows.npy", rows.numpy())
    return ends_on(folder, 2, *faults, "none", "resume killed", "arrays", "logged")[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_and_the_last_step_saved(
    killed: dict[int, tuple[dict[int, dict[str, Any]], str]], folder: Path, rank: int
) -> None:
    ends, log = killed[rank]
    assert ends.keys() == {0, 1, 2} - {rank}
    for end in ends.values():
        assert end[f"killed@{rank}"]["error"] == "ProcessFailed"
        assert end[f"killed@{rank}"]["message"] == f"rank {rank} ended, or did not answer"
    checkpoint = faulty_worker.checkpoint_of(folder / str(rank) / "killed")
    assert log.count(f"is saved in {checkpoint}") == 1
    state = torch.load(checkpoint / "trainer_state.pt")
    assert state["n_training_steps"] == 5
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {5}
    assert state["n_frac_active_samples"] == 5 * faulty_worker.BATCH


@pytest.mark.parametrize(
    ("fault", "rank", "error", "message"),
    [
        ("other config", 0, "ValueError", "sae.k is 4 on rank 0 and 5 on rank 1"),
        ("other config", 1, "ValueError", "sae.k is 4 on rank 0 and 5 on rank 1"),
        ("nan", 0, "ValueError", "step 5: the loss of rank 1 is not finite"),
        ("nan", 1, "ValueError", "holds 768 NaN and 0 infinite values on rank 1"),
        ("end", 0, "ProcessFailed", "rank 1 has no more activations"),
        ("end", 1, "ProcessFailed", "rank 1 has no more activations"),
        ("unreadable", 0, "ProcessFailed", "rank 1 failed with OSError: the disk is gone"),
        ("unreadable", 1, "OSError", "the disk is gone"),
        ("sigterm", 0, "TrainingInterrupted", "SIGTERM: rank 1 was told to stop; step 5 (480 "),
        ("sigterm", 1, "TrainingInterrupted", "SIGTERM: rank 1 was told to stop; step 5 (480 "),
    ],
)
def test_all_processes_end_with_one_message(
    ends: dict[int, dict[str, Any]], folder: Path, fault: str, rank: int, error: str, message: str
) -> None:
    end = ends[rank][fault]
    assert end["error"] == error
    assert message in end["message"]
    if fault == "sigterm":
        assert end["checkpoint"] == str(faulty_worker.checkpoint_of(folder / fault))
    elif fault != "other config":
        state = torch.load(faulty_worker.checkpoint_of(folder / fault) / "trainer_state.pt")
        assert (state["n_training_steps"], state["n_training_samples"]) == (5, 480)


def test_any_number_of_processes_trains_and_resumes_the_same_sae(
    ends: dict[int, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    """Two at once, two stopped and resumed (with sharded moments too), three and then two, two and
    then one.
    """
    assert "error" not in faulty_worker.run(tmp_path / "one")
    for name, source in (("resumed", "sigterm"), ("unsharded", "sharded_sigterm")):
        checkpoint = str(faulty_worker.checkpoint_of(folder / source))
        assert "error" not in faulty_worker.run(tmp_path / name, resume_from_checkpoint=checkpoint)
    expected = load_file(tmp_path / "one" / "output" / "sae_weights.safetensors")
    names = "resume_sigterm", "resume_sharded_sigterm", "resume_killed"
    resumed = [tmp_path / "resumed", tmp_path / "unsharded", *(folder / name for name in names)]
    for output in (folder / "none", *resumed):
        weights = load_file(output / "output" / "sae_weights.safetensors")
        if output in resumed:  # a resumed run calibrates it on a new sample
            threshold = weights.pop("threshold")
            torch.testing.assert_close(threshold, expected["threshold"], rtol=0.1, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_processes_share_the_rows_of_an_array(
    ends: dict[int, dict[str, Any]], folder: Path
) -> None:
    assert "error" not in ends[1]["arrays"]
    weights = load_file(folder / "arrays" / "output" / "sae_weights.safetensors")
    assert "error" not in faulty_worker.run(folder / "one", "arrays")
    expected = load_file(folder / "one" / "output" / "sae_weights.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_the_first_process_logs_means_and_evaluates(
    ends: dict[int, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    assert "error" not in ends[0]["logged"] | ends[1]["logged"]
    assert "error" not in ends_on(tmp_path, 1, "logged")[0][0]["logged"]
    rows, expected = history(folder / "logged"), history(tmp_path / "logged")
    losses = [[row.get("losses/overall_loss") for row in run] for run in (rows, expected)]
    first = [[loss for loss in run if loss is not None][:2] for run in losses]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # evaluations draw texts after the second
    assert [row["metrics/l0"] for row in rows if "metrics/l0" in row] == pytest.approx([4.0] * 3)
    evaluated = [row for row in rows if "model_performance_preservation/ce_loss_score" in row]
    assert [row["details/n_training_samples"] for row in evaluated] == [768]


def test_a_process_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    ends, _ = ends_on(tmp_path, 2, "stuck")
    assert ends[0]["stuck"]["message"] == "rank 1 ended, or did not answer"
    assert ends[1]["stuck"]["message"] == "the others gave up waiting for this one"
    state = torch.load(faulty_worker.checkpoint_of(tmp_path / "stuck") / "trainer_state.pt")
    assert state["n_training_steps"] == 5


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "soon"])
def test_bad_timeout(timeout: Any) -> None:
    with pytest.raises(ValueError, match=r"process_timeout=.* give a positive number of seconds"):
        Processes.start("cpu", timeout)


@pytest.mark.parametrize(
    ("is_in_use", "message"),
    [(True, "address already in use"), (False, "1/2 clients joined")],
    ids=["port in use", "a process has not started"],
)
def test_processes_that_do_not_meet(
    monkeypatch: pytest.MonkeyPatch, is_in_use: bool, message: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        if is_in_use:
            taken.listen()
        else:
            taken.close()
        for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}: .*{message}.*torchrun"):
            Processes.start("cpu", 1)


def dataset_of_texts(kind: str) -> Dataset | IterableDataset:
    dataset = Dataset.from_dict({"text": [f"text {i}" for i in range(12)]})
    n_files = {"stream": 1, "stream of files": 3}.get(kind)
    return dataset if n_files is None else dataset.to_iterable_dataset(num_shards=n_files)


@pytest.mark.parametrize("kind", ["rows", "stream", "stream of files"])
def test_no_text_is_read_twice_or_left_out(kind: str) -> None:
    shares = []
    for rank in range(3):
        store: Any = SimpleNamespace(dataset=dataset_of_texts(kind))
        processes: Any = SimpleNamespace(n=3, rank=rank)
        take_share(store, processes, batch_size=96)
        shares.append([row["text"] for row in store.dataset])
        assert store.train_batch_size_tokens == 32
    assert [len(share) for share in shares] == [4, 4, 4]
    assert sorted(itertools.chain(*shares)) == sorted(row["text"] for row in dataset_of_texts(kind))


def test_fewer_texts_than_processes() -> None:
    store: Any = SimpleNamespace(dataset=dataset_of_texts("rows"))
    processes: Any = SimpleNamespace(n=13, rank=0)
    with pytest.raises(ValueError, match="12 texts for 13 processes"):
        take_share(store, processes, batch_size=26)
