"""How `eval` resumes after a crash, continues past failures, and reproduces its numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae_lens_matryoshka.hub.load import load_sae
from tests.saebench.conftest import Output, flags, run_eval

META = flags("meta_structure")
LEVELS = ["trained", "--levels", "2,5"]


def result(out: Path, key: str, seed: int = 0, evaluation: str = "meta_structure") -> Path:
    return out / evaluation / f"seed_{seed}" / f"{key}_custom_sae_eval_results.json"


def variance(file: Path) -> float:
    metrics = json.loads(file.read_text())["eval_result_metrics"]
    return metrics["meta_structure"]["decoder_fraction_variance_explained"]


def started(out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sae_lens_matryoshka", "eval", *words, "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running_in(folder: Path) -> list[str]:
    """Processes whose command names the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_what_is_finished_is_not_run_again_and_what_is_cut_off_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_eval(out, *LEVELS, "--seeds", "2", *META)
    assert first.code == 0, first.text
    files = [result(out, f"trained_width_{w}", seed) for w in (24, 256) for seed in (0, 1)]
    values = [variance(file) for file in files]
    assert len(set(values)) == 4, "seeds differ, and levels do"
    times = [file.stat().st_mtime_ns for file in files]
    assert run_eval(out, *LEVELS, "--seeds", "2", *META).code == 0
    assert [file.stat().st_mtime_ns for file in files] == times

    files[1].write_text(files[1].read_text()[:300])  # as a full disk leaves it
    again = run_eval(out, *LEVELS, "--seeds", "2", *META)
    assert again.code == 0, again.text
    assert [variance(file) for file in files] == values, "the seed holds, alone and beside others"
    assert [file.stat().st_mtime_ns == t for file, t in zip(files, times, strict=True)] == [
        True,
        False,
        True,
        True,
    ]
    (spread,) = (s for s in again.summary["scores"] if s["sae"] == "trained")
    assert spread["values"] == {"0": values[2], "1": values[3]}
    assert spread["std"] == pytest.approx(abs(values[2] - values[3]) / 2**0.5)


def test_absorption_of_a_level_alone_is_what_it_is_beside_others(
    everything: Output, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    alone = run_eval(out, "trained", "--levels", "2", "--seeds", "1", *flags("absorption"))
    assert alone.code == 0, alone.text
    for label in ("absorption, fraction", "absorption, full", "latents per first letter"):
        level = "trained, first 24"
        assert alone.score(level, label) == everything.score(level, label)


def test_an_sae_that_trains_the_probes_scores_as_one_that_finds_them(
    everything: Output, tmp_path: Path
) -> None:
    alone = run_eval(tmp_path / "out", "identity", "--seeds", "1", *flags("sparse_probing", "tpp"))
    assert alone.code == 0, alone.text
    for label in ("sparse probing, top 1", "sparse probing, top 5", "TPP, 5 latents"):
        assert alone.score("identity", label) == everything.score("identity", label)


def test_a_killed_run_loses_only_what_was_in_progress(tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = flags("meta_structure", train_steps=600)
    words = ["trained", "--seeds", "1", *slow]
    process = started(out, *words)
    finished = result(out, "trained_width_8")
    wait_for(finished)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished.stat().st_mtime_ns
    kept = out / ".saebench" / "meta_structure" / "seed_0"
    assert (kept / "unfinished").exists()
    (kept / "artifacts").mkdir(exist_ok=True)
    (kept / "artifacts" / "half a file").touch()

    process = started(out, *words)
    wait_for(result(out, "trained_width_24"))
    assert not (kept / "artifacts").exists(), "what a killed process kept is not trusted"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert running_in(out) == []
    assert finished.stat().st_mtime_ns == before
    table = (out / "table.md").read_text()
    assert "| trained | 8 | 0." in table, "there is a report on what is finished"
    assert "Stopped before everything was run: run the same command to resume." in table


def test_what_saebench_can_not_do_is_reported_and_the_rest_runs(tmp_path: Path) -> None:
    sae = load_sae("identity")
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    sae.save_model(tmp_path / "before")
    out = run_eval(
        tmp_path / "out",
        *("trained", "--levels", "1,2", "--against", str(tmp_path / "before"), "--seeds", "2"),
        *("--evals", "absorption,meta_structure", "--meta_structure.train_steps=50"),
        "--absorption.min_feats_for_eval=27",
        "--absorption.k_sparse_probe_num_epochs=2",
    )
    assert out.code == 1
    reasons = {row["sae"]: row["reason"] for row in out.summary["not_run"]}
    assert reasons == {
        "trained, first 8": "needs at least 10 latents, and this level has 8",
        "trained, first 24": "linear probes find 26 of 26 first letters in this model (F1 above "
        "0.6), and SAEBench asks for 27",
        "before": "reads blocks.1.hook_resid_post, and this SAE reads blocks.1.hook_resid_pre",
    }
    assert {row["evaluation"] for row in out.summary["not_run"]} == {"absorption"}
    assert [s["evaluation"] for s in out.summary["scores"]] == ["meta_structure"] * 3
    assert not (out.out / "absorption" / "seed_1").exists(), "no SAE has a chance with another seed"
    assert "Not run: absorption of before: reads blocks.1" in out.text


def test_an_error_of_saebench_is_one_line_and_the_log_has_the_rest(tmp_path: Path) -> None:
    out = run_eval(
        tmp_path / "out",
        *("trained", "--levels", "5", "--seeds", "1", "--evals", "sparse_probing,core"),
        *("--sparse_probing.dataset_names=[fancyzhx/no_news]", "--core.dataset=no/where"),
    )
    assert out.code == 1
    reasons = {row["evaluation"]: row["reason"] for row in out.summary["not_run"]}
    assert "fancyzhx/no_news" in reasons["sparse_probing"]
    assert "no/where" in reasons["core"], "core logs its errors and returns nothing"
    log = (out.out / "sparse_probing" / "seed_0" / "log.txt").read_text()
    assert "Traceback" in log
