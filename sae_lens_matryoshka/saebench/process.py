"""One evaluation with one seed in a process of its own, whose code is in `worker`."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sae_lens_matryoshka.saebench.records import Job
from sae_lens_matryoshka.saebench.workarounds import isolated_environment


def run_job(
    job: Job, workdir: Path, finished: Callable[[int], None]
) -> tuple[dict[str, str], float]:
    """Run one evaluation on the candidates that have no result yet.

    Args:
        job: What to run.
        workdir: The working directory of the process, where SAEBench caches probes and activations.
        finished: Called with the number of candidates that have a result, whenever it grows.

    Returns:
        Key → reason, of the candidates without a result; and the seconds it took, 0 if every
        candidate had a result.
    """
    start = time.perf_counter()
    job = job.model_copy()
    n_candidates = len(job.candidates)

    def drop_finished() -> None:
        job.candidates = job.unfinished()
        finished(n_candidates - len(job.candidates))

    drop_finished()
    if not job.candidates:
        return {}, 0.0
    job.out.mkdir(parents=True, exist_ok=True)
    for file in (job.failures_file, *(job.result(c.key) for c in job.candidates)):
        file.unlink(missing_ok=True)
    marker = workdir / "unfinished"
    if marker.exists():  # the last process was killed, so cached files may be incomplete
        shutil.rmtree(workdir)
        shutil.rmtree(job.shared, ignore_errors=True)
    environment = isolated_environment(workdir)
    marker.touch()
    job_file, log = job.out / "job.json", job.out / "log.txt"
    job_file.write_text(job.model_dump_json(indent=2), encoding="utf-8")
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sae_lens_matryoshka.saebench.worker", str(job_file.resolve())],
            cwd=workdir,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                drop_finished()
        finally:
            process.kill()
            process.wait()
    drop_finished()
    seconds = time.perf_counter() - start
    if job.failures_file.exists():
        marker.unlink()
        return json.loads(job.failures_file.read_text()), seconds
    last_line = log.read_text(errors="replace").split("\n")[-2:][0].strip()
    reason = f"the process ended with exit code {process.returncode} ({last_line}); see {log}"
    return {candidate.key: reason for candidate in job.candidates}, seconds
