"""What the step-time benchmark computes, on small shapes, and what it would compute on a GPU."""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SAELENS, SAELENS_FLAT = "SAELens matryoshka_batchtopk", "SAELens batchtopk"
ALONE = ("encode product alone", "our selection alone")
OURS = ["ours, sparse", "ours, reference", "ours, sparse, one level"]
MODULES = (
    *("ceilings", "contestants", "growth", "measuring", "options", "presets"),
    "step_time",
)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/, as the script itself imports them."""
    level = logging.getLogger("sae_lens").level
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    logging.getLogger("sae_lens").setLevel(level)


@pytest.fixture
def small(benchmark: SimpleNamespace) -> Any:
    """The setup of a small SAE."""
    return benchmark.contestants.Setup(d_in=8, d_sae=32, widths=[8, 32], batch_size=16, k=4)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "step_time.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_preset_measures_every_contestant_and_the_floor(tmp_path: Path) -> None:
    out = tmp_path / "results" / "gemma"
    done = command("--preset", "gemma", "--shrink", "64", "--rounds", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["gemma.json", "gemma.md"]
    record = json.loads(out.with_suffix(".json").read_text())

    assert record["command"] == (
        "python benchmarks/step_time.py --preset gemma --shrink 64 --rounds 2"
    )
    conditions = record["conditions"]
    assert [conditions[name] for name in ("d_in", "d_sae", "batch_size", "k", "rounds")] == [
        *(36, 1024, 32, 40, 2)
    ]
    assert conditions["widths"] == [32, 96, 224, 480, 1024]
    assert conditions["torch"] == torch.__version__
    assert list(record["precisions"]) == ["float32", "bfloat16 autocast"]
    for precision, section in record["precisions"].items():
        floor, results = section["floor"], section["results"]
        assert floor["flops"] == 2 * 32 * 36 * 1024
        assert floor["optimizer_bytes"] == 7 * 4 * (2 * 36 * 1024 + 1024 + 36)
        floor_seconds = floor["encode_seconds"] + floor["optimizer_seconds"]
        peers = [name for name in results if name.startswith("dictionary_learning")]
        assert precision == "float32" or not peers
        contestants = [*OURS, SAELENS, f"{SAELENS}, fused Adam", SAELENS_FLAT, *peers]
        assert list(results) == [*contestants, ALONE[0]]
        for row in (results[name] for name in contestants):
            for time in (row["forward_backward"], row["step"]):
                assert 0 < time["p10"] <= time["median"] <= time["p90"]
            assert row["over_floor"]["step"] == pytest.approx(row["step"]["median"] / floor_seconds)
            assert "memory_bytes" not in row  # measured on GPUs
        assert [name for name in results if "monitor" in results[name]] == [OURS[0]]
        assert results[OURS[0]]["monitor"]["observed_step"] > 0


def test_default_table_has_memory_and_ratios(
    tmp_path: Path,
    benchmark: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Threads instead of processes, which would import everything anew.
    in_thread = lambda n, context: ThreadPoolExecutor(n)  # noqa: E731
    monkeypatch.setattr(benchmark.step_time, "ProcessPoolExecutor", in_thread)
    sizes = {"d_in": 16, "d_sae": 64, "batch_size": 32, "k": 4, "rounds": 1}
    benchmark.step_time.run_table(benchmark.options.Options(**sizes, out=str(tmp_path / "out")))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {"ours", "ours, one level", "ours, reference", SAELENS, SAELENS_FLAT} <= set(results)
    for name, row in results.items():
        assert ("memory_bytes" in row) == (name not in ALONE and not name.endswith("dead"))
    ratio = results[SAELENS]["step"]["median"] / results["ours"]["step"]["median"]
    assert f"- full step, SAELens / ours: {ratio:.2f}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--preset", "gemma"], r"--device='cuda' is not accepted: give cpu"),
        (["--preset", "gpt2", "--d_in", "3"], r"--preset gpt2 leaves no choice of --d_in$"),
        (
            ["--preset", "pythia"],
            r"--preset: invalid .*'gemma', 'gemma_4096', 'gpt2', 'sweep'.* 'pythia'",
        ),
        (["--preset", "gpt2", "--shrink", "65"], r"--shrink=65 is not accepted: give 1 to 64\.$"),
        (["--rounds", "0"], r"--rounds=0 is not accepted: give a positive integer\.$"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    benchmark: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.step_time.main()
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip())


def test_monitor_cost_is_the_median_difference_of_pairs(
    benchmark: SimpleNamespace, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contestant = benchmark.contestants.make_contestant("ours, sparse", small)
    times = {("ours", "monitored_step"): [9.0, 2.0, 1.0], ("ours", "step"): [1.0, 1.2, 0.8]}
    monkeypatch.setattr(benchmark.measuring, "measure_times", lambda *_: times)
    cost = benchmark.measuring.monitor_cost("ours", contestant, 1)
    assert cost == {"observed_step": 2.0, "share": pytest.approx(0.8 / 16)}


@pytest.mark.parametrize("name", ["ours, sparse", "ours, reference"])
def test_a_measured_step_is_a_whole_training_step(
    benchmark: SimpleNamespace, small: Any, name: str
) -> None:
    contestant = benchmark.contestants.make_contestant(name, small)
    sae, trainer = contestant.sae, contestant.trainer
    assert trainer.n_training_steps == 2000
    contestant.step()
    assert trainer.n_training_steps == 2001
    assert sae.topk_threshold > 0, "SAELens' moving average"
    assert len(sae._sample.rows) > 0, "the sample of activations"
    assert trainer.act_freq_scores.sum() == 16 * 4, "firing statistics"
    assert trainer.optimizer.state[sae.W_dec]["step"] == 1

    n_observed = []
    observe = sae._monitor.observe
    sae._monitor.observe = lambda *args, **kwargs: (
        n_observed.append(trainer.n_training_steps),
        observe(*args, **kwargs),
    )
    for _ in range(31):
        contestant.step()
    assert trainer.n_training_steps == 2032
    assert n_observed == [2015, 2031], "every 16th step"
    contestant.monitored_step()
    assert n_observed == [2015, 2031, 2047]
    assert trainer.n_training_steps == 2048


def test_sweep_measures_one_size_at_a_time(
    tmp_path: Path, benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_contestant = benchmark.measuring.make_contestant

    def make_or_refuse(name: str, setup: Any) -> Any:
        if name == SAELENS and setup.d_sae == 4096:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_contestant(name, setup)

    monkeypatch.setattr(benchmark.measuring, "make_contestant", make_or_refuse)
    monkeypatch.setitem(benchmark.measuring.WARM_UP, "cpu", 0)
    options = benchmark.options.Options(
        preset="sweep", shrink=64, rounds=1, out=str(tmp_path / "sweep")
    )
    benchmark.growth.run(options)

    record = json.loads((tmp_path / "sweep.json").read_text())
    assert {axis: [p["size"] for p in points] for axis, points in record["axes"].items()} == {
        "d_sae": [64, 128, 256, 512, 1024, 2048, 4096],
        "levels": [1, 2, 3, 5, 7, 10],
        "k": [10, 20, 40, 80, 160, 320],
        "batch_size": [16, 32, 64, 128, 256],
    }
    not_measured = []
    for axis, points in record["axes"].items():
        for point in points:
            base = {"d_in": 12, "d_sae": 512, "k": 40, "batch_size": 64, "levels": 5}
            point["levels"] = len(point["widths"])
            assert {name: point[name] for name in base} == {**base, axis: point["size"]}
            widths = [point["d_sae"] >> n for n in range(len(point["widths"]))][::-1]
            assert point["widths"] == widths
            assert list(point["steps"]) == ["ours, sparse", SAELENS, SAELENS_FLAT]
            for name, step in point["steps"].items():
                if step is None:
                    not_measured.append((axis, point["size"], name))
    assert not_measured == [("d_sae", 4096, SAELENS)]
    assert (tmp_path / "sweep.md").read_text().count("time of a full step") == 4
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_a_contestant_that_does_not_fit_beside_others_is_measured_alone(
    benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(names: list[str], *_: Any) -> dict[str, dict[str, float]]:
        measured.append(list(names))
        for name, most in (("never", 0), ("alone", 1)):
            if name in names and len(names) > most:
                raise benchmark.measuring.DoesNotFit(name)
        return {name: {"median": float(len(names))} for name in names}

    monkeypatch.setattr(benchmark.growth, "_measure", measure)
    names = ["first", "alone", "never", "last"]
    assert benchmark.growth._steps(names, None, 1) == {
        "first": {"median": 2.0},
        "alone": {"median": 1.0},
        "never": None,
        "last": {"median": 2.0},
    }
    assert measured == [
        names,
        ["first", "alone", "last"],
        ["first", "last"],
        ["never"],
        ["alone"],
    ]


def test_out_of_memory_is_one_line_and_keeps_what_was_measured(
    tmp_path: Path, benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_contestant = benchmark.measuring.make_contestant

    def make_or_refuse(name: str, setup: Any) -> Any:
        if setup.autocast and name == SAELENS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_contestant(name, setup)

    monkeypatch.setattr(benchmark.measuring, "make_contestant", make_or_refuse)
    out = tmp_path / "gpt2"
    arguments = ["--preset", "gpt2", "--shrink", "64", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments])
    with pytest.raises(SystemExit, match=rf"^{SAELENS} does not fit into memory beside .*--shrink"):
        benchmark.step_time.main()
    assert list(json.loads((tmp_path / "gpt2.json").read_text())["precisions"]) == ["float32"]


def test_floor_by_hand(benchmark: SimpleNamespace) -> None:
    floor = benchmark.ceilings.floor(
        d_in=3, d_sae=5, batch_size=7, flops_per_second=100.0, bytes_per_second=1000.0
    )
    assert floor["encode_seconds"] == pytest.approx(2.1)  # 2 · 7 · 3 · 5 = 210 operations
    assert floor["optimizer_seconds"] == pytest.approx(1.064)  # 38 parameters of 4 bytes, 7 times
    setup = benchmark.contestants.Setup(d_in=3, d_sae=5, widths=[5], batch_size=7, k=1)
    ours = benchmark.contestants.make_contestant("ours, sparse", setup)
    assert sum(parameter.numel() for parameter in ours.parameters) == 38


def test_gpu_time_is_that_between_its_events(
    benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait for the end")

        def elapsed_time(self, end: "Event") -> float:
            return 12.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    assert benchmark.measuring.seconds(lambda: calls.append("run"), "cuda") == 0.0125
    assert calls == ["wait", "record", "run", "record", "wait for the end"]


def test_gpu_memory_is_beyond_parameters_gradients_and_moments(
    benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([5000, 5300, 5200])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    contestant = SimpleNamespace(
        parameters=[torch.zeros(10, 20, requires_grad=True), torch.zeros(7)],
        batches=[None] * 3,
        step=lambda: None,
    )
    # The second batch adds 2300 bytes, of which 4 · 200 are gradients.
    assert benchmark.measuring.peak_memory(contestant, "step") == 1500


def test_contestants_and_precisions_of_a_gpu(
    benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    contestants, precisions = benchmark.contestants, benchmark.ceilings.precisions
    monkeypatch.setattr(contestants, "why_no_triton", lambda: None)
    assert contestants.our_implementations("cuda:1") == ["triton", "sparse", "reference"]
    assert contestants.our_implementations("cpu") == ["sparse", "reference"]
    names = [precision.name for precision in precisions("cuda")]
    assert names == ["float32", "float32 with TF32", "bfloat16 autocast"]
    monkeypatch.setattr(benchmark.presets, "has_peer", lambda: True)
    for precision in precisions("cuda"):
        with precision.applied():
            assert torch.backends.cuda.matmul.allow_tf32 == (precision.name == names[1])
        chosen = benchmark.presets._names("cuda", precision)
        ours = [f"ours, {name}" for name in ("triton", "sparse", "reference", "triton, one level")]
        assert chosen[:4] == ours
        assert ("dictionary_learning matryoshka" in chosen) == (not precision.autocast)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_skewed_batches_have_frequent_directions_and_one_long_row(
    benchmark: SimpleNamespace, small: Any
) -> None:
    torch.manual_seed(0)
    setup = replace(small, d_in=64, batch_size=256)
    plain = benchmark.contestants._batches(setup)
    skewed = benchmark.contestants._batches(replace(setup, skewed=True))
    for batch, even in zip(skewed, plain, strict=True):
        assert batch[0].norm() > 10 * batch[1:].norm(dim=1).max()
        # what is in most sums is in their mean
        assert batch[1:].mean(0).norm() > 1.5 * even[1:].mean(0).norm()
