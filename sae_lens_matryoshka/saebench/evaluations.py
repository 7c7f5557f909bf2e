"""SAEBench's evaluations, and how one of them is run: a process, a seed, a folder of its own.

SAEBench 0.6 keeps probes and activations by the model's name, those of absorption inside its own
installation, and reuses them whatever model has that name now. So it is imported from a folder that
links to the installation, and runs in it: levels of one model share what is kept there, two output
folders never do.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens_matryoshka.saebench.candidates import Candidate

PACKAGE = "sae_bench"
_WORKER = "sae_lens_matryoshka.saebench.worker"
_POLL = 0.2  # seconds between looks for finished results


class Metric(NamedTuple):
    """One number of SAEBench's results.

    Attributes:
        key: Where it is in `eval_result_metrics`.
        label: What tables and plots call it.
        lower_is_better: Or higher.
    """

    key: str
    label: str
    lower_is_better: bool = False


class Evaluation(NamedTuple):
    """One of SAEBench's evaluations.

    Attributes:
        module: Its package in `sae_bench.evals`.
        config: The class of its settings.
        metrics: What is shown of it, the headline first.
        is_random: Whether the seed changes anything.
        is_ranked: Whether SAEs are ranked by it where their intervals are apart.
        note: What is known of how far it can be trusted.
        needs: An account or a key that it cannot do without.
    """

    module: str
    config: str
    metrics: tuple[Metric, ...]
    is_random: bool = True
    is_ranked: bool = True
    note: str | None = None
    needs: str | None = None


_UNRELIABLE = (
    "varies too much from seed to seed to rank SAEs by (arXiv 2605.18229): read it as a range."
)
EVALUATIONS: dict[str, Evaluation] = {
    "absorption": Evaluation(
        "absorption",
        "AbsorptionEvalConfig",
        (
            Metric("mean.mean_absorption_fraction_score", "absorption, fraction", True),
            Metric("mean.mean_full_absorption_score", "absorption, full", True),
            Metric("mean.mean_num_split_features", "latents per first letter", True),
        ),
    ),
    "sparse_probing": Evaluation(
        "sparse_probing",
        "SparseProbingEvalConfig",
        (
            Metric("sae.sae_top_1_test_accuracy", "sparse probing, top 1"),
            Metric("sae.sae_top_5_test_accuracy", "sparse probing, top 5"),
        ),
    ),
    "sparse_probing_sae_probes": Evaluation(
        "sparse_probing_sae_probes",
        "SparseProbingSaeProbesEvalConfig",
        (
            Metric("sae.sae_top_1_test_auc", "sae-probes, top 1 AUC"),
            Metric("sae.sae_top_5_test_auc", "sae-probes, top 5 AUC"),
        ),
        note="is the most reliable of SAEBench's evaluations (arXiv 2605.18229).",
    ),
    "scr": Evaluation(
        "scr_and_tpp",
        "ScrAndTppEvalConfig",
        (
            Metric("scr_metrics.scr_metric_threshold_20", "SCR, 20 latents"),
            Metric("scr_metrics.scr_metric_threshold_5", "SCR, 5 latents"),
        ),
        is_ranked=False,
        note=_UNRELIABLE,
    ),
    "tpp": Evaluation(
        "scr_and_tpp",
        "ScrAndTppEvalConfig",
        (
            Metric("tpp_metrics.tpp_threshold_20_total_metric", "TPP, 20 latents"),
            Metric("tpp_metrics.tpp_threshold_5_total_metric", "TPP, 5 latents"),
        ),
        is_ranked=False,
        note=_UNRELIABLE,
    ),
    "core": Evaluation(
        "core",
        "CoreEvalConfig",
        (
            Metric("reconstruction_quality.explained_variance", "variance explained"),
            Metric("model_performance_preservation.ce_loss_score", "CE loss score"),
            Metric("sparsity.l0", "L0", True),
        ),
        is_random=False,
        note="reads the same texts whatever the seed, so it has no spread.",
    ),
    "ravel": Evaluation(
        "ravel",
        "RAVELEvalConfig",
        (
            Metric("ravel.disentanglement_score", "RAVEL, disentanglement"),
            Metric("ravel.cause_score", "RAVEL, cause"),
            Metric("ravel.isolation_score", "RAVEL, isolation"),
        ),
    ),
    "meta_structure": Evaluation(
        "meta_structure",
        "MetaStructureEvalConfig",
        (Metric("meta_structure.decoder_fraction_variance_explained", "meta-SAE variance", True),),
    ),
    "unlearning": Evaluation(
        "unlearning",
        "UnlearningEvalConfig",
        (Metric("unlearning.unlearning_score", "unlearning"),),
        needs=(
            "an instruction-tuned model (gemma-2-2b-it) and WMDP's bio-forget-corpus.jsonl, which "
            "its authors send on request (see the data set cais/wmdp-corpora), in the folder "
            "evals/unlearning/data of the installed sae_bench"
        ),
    ),
    "autointerp": Evaluation(
        "autointerp",
        "AutoInterpEvalConfig",
        (Metric("autointerp.autointerp_score", "automatic interpretation"),),
        needs="an OpenAI account that pays for the judge: set OPENAI_API_KEY",
    ),
}
L0 = "sparsity.l0"  # key of core's metric


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def installed() -> Path:
    """The folder of the installed SAEBench.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "SAEBench is not installed: pip install 'sae-lens-matryoshka[eval]' (in a clone "
            "'.[eval]'), best in an environment of its own, since it asks for numpy 1."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def config_class(evaluation: str) -> Any:
    """The class of SAEBench that holds an evaluation's settings."""
    description = EVALUATIONS[evaluation]
    module = importlib.import_module(f"{PACKAGE}.evals.{description.module}.eval_config")
    return getattr(module, description.config)


@dataclass
class Job:
    """What one process is to do.

    Attributes:
        evaluation: A key of `EVALUATIONS`.
        candidates: The fields of each `Candidate`, all of one model.
        model_name: As TransformerLens knows it.
        seed: Of everything random, the same for each SAE.
        device: Where to compute.
        settings: Fields of SAEBench's config that differ from what its own scripts set.
        out: Where results go.
        shared: A folder that processes of other seeds use as well.
    """

    evaluation: str
    candidates: list[dict[str, Any]]
    model_name: str
    seed: int
    device: str
    out: Path
    shared: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def failures_file(self) -> Path:
        return self.out / "failures.json"

    def result(self, key: str) -> Path:
        return result_file(self.out, self.evaluation, key)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2, default=str))

    @classmethod
    def read(cls, path: Path) -> Job:
        content = json.loads(path.read_text())
        paths = {name: Path(content[name]) for name in ("out", "shared")}
        return cls(**{**content, **paths})


def result_file(folder: Path, evaluation: str, key: str) -> Path:
    """SAEBench's file on a candidate, in the folder of an evaluation and a seed."""
    if evaluation in ("scr", "tpp"):  # which add a folder of their own
        folder = folder / evaluation
    return folder / f"{key}_custom_sae_eval_results.json"


def shown(result: Path, evaluation: str) -> dict[Metric, float]:
    """The numbers of a result that are shown; none of a file that is not there or cut off."""
    try:
        content = json.loads(result.read_text())["eval_result_metrics"]
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    values = {
        metric: content.get((parts := metric.key.split("."))[0], {}).get(parts[1])
        for metric in EVALUATIONS[evaluation].metrics
    }
    return {
        metric: float(value)
        for metric, value in values.items()
        if value is not None and math.isfinite(value)
    }


def is_whole(result: Path) -> bool:
    """Whether a result is there, and not cut off by the end of a process."""
    try:
        return "eval_result_metrics" in json.loads(result.read_text())
    except (FileNotFoundError, ValueError):
        return False


def run_job(
    job: Job, workplace: Path, finished: Callable[[int], None]
) -> tuple[dict[str, str], float]:
    """Run one evaluation in a process of its own; candidates that have a result are left out.

    Args:
        job: What to do.
        workplace: Where SAEBench keeps what it may use again. The process runs there.
        finished: Called with the number of candidates that have a result, whenever it grows.

    Returns:
        Key → reason, of the candidates without a result; and the seconds it took, 0 where nothing
        was left to do.
    """
    start = time.perf_counter()
    candidates = [Candidate(**fields) for fields in job.candidates]
    todo = [c for c in candidates if not is_whole(job.result(c.key))]
    finished(len(candidates) - len(todo))
    if not todo:
        return {}, 0.0
    job.out.mkdir(parents=True, exist_ok=True)
    job.failures_file.unlink(missing_ok=True)
    for candidate in todo:
        job.result(candidate.key).unlink(missing_ok=True)
    unfinished = workplace / "unfinished"
    if unfinished.exists():  # the last process did not end by itself, so files may be cut off
        shutil.rmtree(workplace)
        shutil.rmtree(job.shared, ignore_errors=True)
    _link(workplace)
    unfinished.touch()
    job = Job(**{**vars(job), "candidates": [c._asdict() for c in todo]})
    description, log = job.out / "job.json", job.out / "log.txt"
    job.write(description)
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(description.resolve())],
            cwd=workplace,
            env=_environment(workplace),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL)
                todo = [c for c in todo if not is_whole(job.result(c.key))]
                finished(len(candidates) - len(todo))
        finally:
            process.kill()
            process.wait()
    todo = [c for c in todo if not is_whole(job.result(c.key))]
    finished(len(candidates) - len(todo))
    if not job.failures_file.exists():
        last_words = log.read_text(errors="replace").split("\n")[-2:][0].strip()
        reason = f"the process ended with {process.returncode} ({last_words}); see {log}"
        return {c.key: reason for c in todo}, time.perf_counter() - start
    unfinished.unlink()
    return json.loads(job.failures_file.read_text()), time.perf_counter() - start


def _link(workplace: Path) -> None:
    """A folder to run in: SAEBench without its artifacts, and the folders that are here.

    transformers and datasets take a folder of a model's or a data set's name before the Hub.
    """
    package = workplace / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    here = [path for path in Path.cwd().iterdir() if path.is_dir() and path.name != PACKAGE]
    for folder, entries in ((package, list(installed().iterdir())), (workplace, here)):
        for entry in entries:
            link = folder / entry.name
            if link.is_symlink():
                link.unlink()  # of a run that began elsewhere
            if entry.name != "artifacts" and not link.exists():
                link.symlink_to(entry.resolve())


def _environment(workplace: Path) -> dict[str, str]:
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [workplace.resolve(), *(Path(path).resolve() for path in inherited)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONHASHSEED": "0",
        "JAXTYPING_DISABLE": "1",  # sparse probing fails its own annotations with new beartype
        "TOKENIZERS_PARALLELISM": "false",
    }


def obstacle(
    evaluation: str, candidate: Candidate, hook_name: str, settings: Mapping[str, Any]
) -> str | None:
    """Why SAEBench could not do an evaluation on an SAE; None where nothing is known against it."""
    if (need := unmet_need(evaluation)) is not None:
        return need
    if evaluation in ("absorption", "ravel") and not hook_name.endswith(".hook_resid_post"):
        layer = hook_name.split(".")[1]
        return f"reads blocks.{layer}.hook_resid_post, and this SAE is of {hook_name}"
    asked = _latents_asked(evaluation, settings)
    if asked and candidate.width < asked[0]:
        return f"asks for {asked[0]} latents or more, and this level has {candidate.width}"
    return None


def unmet_need(evaluation: str) -> str | None:
    """The account or the key that is not here, of an evaluation that needs one."""
    corpus = ("evals", "unlearning", "data", "bio-forget-corpus.jsonl")
    is_met = {
        "autointerp": lambda: bool(os.environ.get("OPENAI_API_KEY")),
        "unlearning": lambda: installed().joinpath(*corpus).exists(),
    }.get(evaluation, lambda: True)
    return None if is_met() else f"needs {EVALUATIONS[evaluation].needs}"


def _latents_asked(evaluation: str, settings: Mapping[str, Any]) -> Sequence[int]:
    """The least that an evaluation asks of a dictionary, first."""
    name = {
        "absorption": "max_k_value",
        "sparse_probing": "k_values",
        "sparse_probing_sae_probes": "ks",
        "scr": "n_values",
        "tpp": "n_values",
    }.get(evaluation)
    if name is None:
        return []
    value = settings.get(name, getattr(config_class(evaluation)(), name))
    return [value] if isinstance(value, int) else sorted(value)
