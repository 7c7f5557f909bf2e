"""The benchmark of whole runs: its medians and shares, and that all time is counted once."""

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONTESTANTS = ["ours", "SAELens matryoshka_batchtopk", "SAELens batchtopk"]
PARTS = ["language model", "activation store", "SAE step", "optimizer", "rest"]


def run_benchmark(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "runner_throughput.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def timed_runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("timed_runner")


def test_whole_runs_of_the_demo_model(tmp_path: Path) -> None:
    arguments = ["--model", "demo", "--d_sae", "64", "--k", "4", "--batch_size", "256"]
    arguments += ["--training_tokens", "2000", "--repeats", "2", "--out", "new/tiny.1"]
    result = run_benchmark(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Training SAE" not in result.stderr, "no progress bars of SAELens"
    record = json.loads((tmp_path / "new" / "tiny.1.json").read_text())

    assert [run["contestant"] for run in record["runs"]] == 4 * CONTESTANTS
    assert [run["parts"] is None for run in record["runs"]] == 2 * ([True] * 3 + [False] * 3)
    for run in record["runs"]:
        assert run["tokens"] == 2048, "2,000, rounded up to refills of half a buffer of 4,096"
        if run["parts"] is not None:
            assert run["language_model_tokens"] == 2048, "as many as the SAE was trained on"
            assert list(run["parts"]) == PARTS
            assert sum(run["parts"].values()) == pytest.approx(run["seconds"], rel=1e-9)

    assert list(record["results"]) == CONTESTANTS
    for name, row in record["results"].items():
        own = [run for run in record["runs"] if run["contestant"] == name]
        undisturbed = [run["seconds"] for run in own if run["parts"] is None]
        assert row["seconds"] == statistics.median(undisturbed)
        assert row["slowest"] * max(undisturbed) == pytest.approx(2048, rel=1e-9)
        assert row["fastest"] * min(undisturbed) == pytest.approx(2048, rel=1e-9)
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(2048, rel=1e-9)
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-6)
        assert all(row["shares"][part] > 0 for part in PARTS)
        medians = [
            statistics.median([run["parts"][p] for run in own if run["parts"]]) for p in PARTS
        ]
        assert row["seconds_by_parts"] == pytest.approx(sum(medians), rel=1e-9)
        shares = [value / sum(medians) for value in medians]
        assert list(row["shares"].values()) == pytest.approx(shares, rel=1e-9)

    command = "--model demo --d_sae 64 --k 4.0 --batch_size 256 --training_tokens 2000 --repeats 2"
    assert record["command"] == f"python benchmarks/runner_throughput.py {command}"
    assert (tmp_path / "new" / "tiny.1.md").read_text() in result.stdout
    conditions = record["conditions"]
    assert (conditions["d_in"], conditions["widths"]) == (128, [2, 6, 14, 30, 64])
    assert (conditions["device"], conditions["threads"]) == ("cpu", 1)
    assert conditions["tokens_in_buffer"] == 4096

    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "tiny.1.json",
        "tiny.1.md",
        "tiny.1.png",
    ]


def test_cuda_on_a_machine_without_it_is_refused(tmp_path: Path) -> None:
    result = run_benchmark("--device", "cuda", "--out", "new/gpu", cwd=tmp_path)
    assert result.returncode == 2
    assert "device='cuda' is not accepted: give cpu: PyTorch finds no GPU" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


class FakeClock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_time_belongs_to_the_innermost_part(timed_runner: Any) -> None:
    clock = FakeClock()
    timer = timed_runner.PartTimer("rest", clock=clock)
    inner = timer.timed("inner", clock.spend)

    def load(seconds: float) -> str:
        clock.spend(seconds)
        inner(10 * seconds)
        clock.spend(2 * seconds)
        return "loaded"

    outer = timer.timed("outer", load)
    assert outer(7.0) == "loaded", "before the start: not counted"
    timer.start()
    clock.spend(0.5)
    assert outer(1.0) == "loaded"
    clock.spend(0.25)
    inner(4.0)
    assert outer(2.0) == "loaded"
    timer.stop()
    clock.spend(1000.0)
    inner(1000.0)
    assert timer.seconds == {"rest": 0.75, "outer": 9.0, "inner": 34.0}
    assert timer.total == 43.75


def test_a_part_ends_when_it_raises(timed_runner: Any) -> None:
    clock = FakeClock()
    timer = timed_runner.PartTimer("rest", clock=clock)

    def fail() -> None:
        clock.spend(3.0)
        raise StopIteration

    timer.start()
    with pytest.raises(StopIteration):
        timer.timed("store", fail)()
    clock.spend(1.0)
    timer.stop()
    assert timer.seconds == {"store": 3.0, "rest": 1.0}


def test_parts_begin_and_end_with_a_wait_for_the_device(timed_runner: Any) -> None:
    clock, pending = FakeClock(), []

    def synchronize() -> None:
        clock.spend(sum(pending))
        pending.clear()

    timer = timed_runner.PartTimer("rest", synchronize, clock)
    launch = timer.timed("kernel", pending.append)
    pending.append(50.0)  # set-up still running
    timer.start()
    launch(5.0)
    pending.append(2.0)
    launch(6.0)
    pending.append(3.0)
    timer.stop()
    assert timer.seconds == {"rest": 5.0, "kernel": 11.0}
