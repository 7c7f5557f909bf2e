"""The step-time benchmark's presets, on small shapes, and what they say of a GPU."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from matplotlib import image

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
SAELENS, SAELENS_FLAT = "SAELens matryoshka_batchtopk", "SAELens batchtopk"
OURS = ["ours, sparse", "ours, reference", "ours, sparse, one level"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of benchmarks/, as the script itself imports them."""
    level = logging.getLogger("sae_lens").level
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ceilings
    import contestants
    import growth
    import measuring
    import precisions
    import presets

    yield SimpleNamespace(
        ceilings=ceilings,
        contestants=contestants,
        growth=growth,
        measuring=measuring,
        precisions=precisions,
        presets=presets,
    )
    logging.getLogger("sae_lens").setLevel(level)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "step_time.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def job(benchmark: SimpleNamespace, out: Path) -> Any:
    return benchmark.presets.Job(
        device="cpu", n_dead=0, shrink=64, rounds=1, threads=1, command="command", out=str(out)
    )


def cells(markdown: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("|")]


def test_preset_writes_every_contestant_and_the_floor(tmp_path: Path) -> None:
    out = tmp_path / "results" / "gemma"
    done = command("--preset", "gemma", "--shrink", "64", "--rounds", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["gemma.json", "gemma.md"]
    record = json.loads(out.with_suffix(".json").read_text())

    assert record["command"] == (
        "python benchmarks/step_time.py --rounds 2 --preset gemma --shrink 64"
    )
    conditions = record["conditions"]
    assert [conditions[name] for name in ("d_in", "d_sae", "batch_size", "k", "rounds")] == [
        *(36, 1024, 32, 40, 2)
    ]
    assert conditions["widths"] == [32, 96, 224, 480, 1024]
    assert conditions["torch"] == torch.__version__
    assert list(record["precisions"]) == ["float32", "bfloat16 autocast"]
    text = out.with_suffix(".md").read_text()
    for precision, section in record["precisions"].items():
        floor, results = section["floor"], section["results"]
        assert floor["flops"] == 2 * 32 * 36 * 1024
        assert floor["optimizer_bytes"] == 7 * 4 * (2 * 36 * 1024 + 1024 + 36)
        assert floor["seconds"] == pytest.approx(
            floor["flops"] / floor["flops_per_second"]
            + floor["optimizer_bytes"] / floor["bytes_per_second"]
        )
        peers = [name for name in results if name.startswith("dictionary_learning")]
        assert precision == "float32" or not peers
        contestants = [*OURS, SAELENS, SAELENS_FLAT, *peers]
        assert list(results) == [*contestants, "encode product alone"]

        table = text.split(f"**{precision}**")[1].split("Floor:")[0]
        shown = {row[0]: row[1:] for row in cells(table)}
        base = results[SAELENS]
        for name in contestants:
            row = results[name]
            for time in (row["forward_backward"], row["step"]):
                assert 0 < time["p10"] <= time["median"] <= time["p90"]
            assert row["step_over_floor"] == pytest.approx(row["step"]["median"] / floor["seconds"])
            assert "memory_bytes" not in row  # of a process' memory the CPU table has figures
            times, ratios, over_floor = shown[name][:4:2], shown[name][1:4:2], shown[name][4]
            for cell, ratio, kind in zip(times, ratios, ("forward_backward", "step"), strict=True):
                assert float(cell.removesuffix(" ms")) == pytest.approx(
                    row[kind]["median"] * 1e3, rel=0.006
                )
                assert float(ratio.removesuffix("×")) == pytest.approx(
                    base[kind]["median"] / row[kind]["median"], abs=0.0501
                )
            assert float(over_floor) == pytest.approx(row["step_over_floor"], abs=0.00501)
        assert float(shown["floor: encode product + Adam"][2].removesuffix(" ms")) == pytest.approx(
            floor["seconds"] * 1e3, rel=0.006
        )
    assert done.stdout.count("full step / floor") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda", "--preset", "gemma"], r"--device cuda: .*no CUDA.*accepted.*: cpu$"),
        (["--preset", "gpt2", "--d_in", "3"], r"--preset gpt2 leaves no choice of --d_in$"),
        (["--preset", "pythia"], r"--preset pythia: accepted are gemma, gpt2 and sweep$"),
        (["--preset", "gpt2", "--shrink", "65"], r"--shrink 65: accepted are 1 to 64$"),
    ],
)
def test_refused(
    arguments: list[str],
    said: str,
    benchmark: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import step_time

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        step_time.main()
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err.strip())


def test_sweep_writes_tables_and_plot(
    tmp_path: Path, benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    contestant = benchmark.measuring.Contestant

    def build(name: str, setup: Any) -> Any:
        if name == SAELENS and setup.d_sae == 4096:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return contestant(name, setup)

    monkeypatch.setattr(benchmark.measuring, "Contestant", build)
    monkeypatch.setattr(benchmark.growth, "WARM_UP", 0)
    out = tmp_path / "sweep"
    benchmark.growth.run(job(benchmark, out))

    record = json.loads((tmp_path / "sweep.json").read_text())
    assert {axis: [p["size"] for p in points] for axis, points in record["axes"].items()} == {
        "d_sae": [64, 128, 256, 512, 1024, 2048, 4096],
        "levels": [1, 2, 3, 5, 7, 10],
        "k": [10, 20, 40, 80, 160, 320],
        "batch_size": [16, 32, 64, 128, 256],
    }
    names = ["ours, sparse", SAELENS, SAELENS_FLAT]
    tables = re.split(r"\*\*\w+\*\*: time of a full step", (tmp_path / "sweep.md").read_text())[1:]
    for (axis, points), table in zip(record["axes"].items(), tables, strict=True):
        rows = cells(table)[2:]
        assert len(rows) == len(points)
        for point, row in zip(points, rows, strict=True):
            assert (
                point["widths"] == [point["d_sae"] >> n for n in range(len(point["widths"]))][::-1]
            )
            assert [point[name] for name in ("d_in", "d_sae", "k", "batch_size")] == [
                12,
                point["size"] if axis == "d_sae" else 512,
                point["size"] if axis == "k" else 40,
                point["size"] if axis == "batch_size" else 64,
            ]
            assert len(point["widths"]) == (point["size"] if axis == "levels" else 5)
            assert row[:4] == [
                f"12 × {point['d_sae']}",
                *map(str, (len(point["widths"]), point["k"], point["batch_size"])),
            ]
            assert list(point["steps"]) == names
            for cell, step in zip(row[4:], point["steps"].values(), strict=True):
                if step is None:
                    assert cell == ""
                else:
                    assert float(cell.removesuffix(" ms")) == pytest.approx(
                        step["median"] * 1e3, rel=0.006
                    )
    absent = [
        (axis, point["size"], name)
        for axis, points in record["axes"].items()
        for point in points
        for name, step in point["steps"].items()
        if step is None
    ]
    assert absent == [("d_sae", 4096, SAELENS)]
    picture = image.imread(tmp_path / "sweep.png")
    assert picture.shape[:2] == (1040, 1430)
    assert len(benchmark.growth.plot(record).axes) == 4


def test_who_does_not_fit_beside_others_is_measured_alone(
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
    steps = benchmark.growth._steps(names, None, 1)
    assert steps == {
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


def test_what_does_not_fit_is_said_and_what_was_measured_is_kept(
    tmp_path: Path,
    benchmark: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import step_time

    class TooLarge:
        def __init__(self, name: str, setup: Any):
            if setup.autocast and name == SAELENS:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.forward_backward = self.step = lambda: None

    monkeypatch.setattr(benchmark.measuring, "Contestant", TooLarge)
    out = tmp_path / "gpt2"
    arguments = ["--preset", "gpt2", "--shrink", "64", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        step_time.main()
    assert ended.value.code == (
        f"{SAELENS} does not fit into memory beside the other contestants; take a larger GPU or "
        "smaller sizes (--shrink 2 halves a preset's)"
    )
    assert list(json.loads((tmp_path / "gpt2.json").read_text())["precisions"]) == ["float32"]


def test_floor_by_hand(benchmark: SimpleNamespace) -> None:
    floor = benchmark.ceilings.floor(
        d_in=3, d_sae=5, batch_size=7, flops_per_second=100.0, bytes_per_second=1000.0
    )
    assert floor.encode_seconds == pytest.approx(2.1)  # 2 · 7 · 3 · 5 = 210 operations
    assert floor.optimizer_seconds == pytest.approx(1.064)  # 38 parameters of 4 bytes, 7 times
    assert floor.seconds == pytest.approx(3.164)
    ours = benchmark.contestants.Contestant(
        "ours, sparse", benchmark.contestants.Setup(d_in=3, d_sae=5, widths=[5], batch_size=7, k=1)
    )
    assert sum(parameter.numel() for parameter in ours.parameters) == 38


def test_gpu_time_is_that_of_its_events(
    benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait for the end")

        def elapsed_time(self, end: Event) -> float:
            return 12.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    assert benchmark.measuring.seconds(lambda: happened.append("run"), "cuda") == 0.0125
    assert happened == ["wait", "record", "run", "record", "wait for the end"]


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


def test_table_of_a_gpu_has_the_memory(benchmark: SimpleNamespace) -> None:
    def row(seconds: float, mib: int) -> dict[str, Any]:
        time = {"median": seconds}
        memory = {"forward_backward": mib * 2**20, "step": 2 * mib * 2**20}
        return {
            "forward_backward": time,
            "step": time,
            "step_over_floor": seconds / 0.002,
            "memory_bytes": memory,
        }

    section = {
        "floor": {
            "flops": 10**9,
            "flops_per_second": 1e12,
            "optimizer_bytes": 10**9,
            "bytes_per_second": 1e12,
            "seconds": 0.002,
        },
        "results": {"ours, triton": row(0.004, 5), SAELENS: row(0.2, 800)},
    }
    text = benchmark.presets.table("float32 with TF32", section)
    beyond = "memory beyond parameters, gradients and moments"
    header, _, ours, saelens, floor = cells(text)
    assert header[5:] == [
        "full step / floor",
        *(f"forward-backward: {beyond}", "", f"full step: {beyond}", ""),
    ]
    assert ours == [
        *("ours, triton", "4.00 ms", "50.0×", "4.00 ms", "50.0×", "2.00"),
        *("5 MiB", "160.0×", "10 MiB", "160.0×"),
    ]
    assert saelens[1:6] == ["200 ms", "1.0×", "200 ms", "1.0×", "100.00"]
    assert floor[3:6] == ["2.00 ms", "100.0×", "1.00"]
    assert "1 GFLOP of the encode product at 1 TFLOP/s, 1.00 ms" in text
    assert "Adam's 1 GB at 1000 GB/s, 1.00 ms" in text


def test_what_runs_on_a_gpu(benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    contestants, precisions = benchmark.contestants, benchmark.precisions
    monkeypatch.setattr(
        contestants, "Implementation", Literal["auto", "reference", "sparse", "triton"]
    )
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: ModuleType(name))
    assert contestants.our_implementations("cuda:1") == ["triton", "sparse", "reference"]
    assert contestants.our_implementations("cpu") == ["sparse", "reference"]
    names = [precision.name for precision in precisions.precisions("cuda")]
    assert names == ["float32", "float32 with TF32", "bfloat16 autocast"]
    monkeypatch.setattr(benchmark.presets, "has_peer", lambda: True)
    for precision in precisions.precisions("cuda"):
        with precision.applied():
            assert torch.backends.cuda.matmul.allow_tf32 == (precision.name == names[1])
        chosen = benchmark.presets._names("cuda", precision)
        assert chosen[:4] == [*(f"ours, {i}" for i in ("triton", "sparse", "reference")), chosen[3]]
        assert chosen[3] == "ours, triton, one level"
        assert ("dictionary_learning matryoshka" in chosen) == (not precision.autocast)
    assert not torch.backends.cuda.matmul.allow_tf32
