"""SAEBench's evaluations: what each measures, needs and writes."""

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "sae_bench"
DEFAULT_EVALUATIONS = ("absorption", "sparse_probing", "scr", "tpp", "core")
L0 = "sparsity.l0"  # key of core's metric


class Metric(NamedTuple):
    """One number of SAEBench's results."""

    key: str  # in `eval_result_metrics`
    label: str  # in tables and plots
    lower_is_better: bool = False


class Evaluation(NamedTuple):
    """One of SAEBench's evaluations."""

    metrics: list[Metric]  # shown in tables, the headline first
    module: str | None = None  # its package in `sae_bench.evals`, if it has another name
    latents: str | None = None  # the setting that says how many latents to probe or ablate
    is_random: bool = True  # whether the seed changes anything
    is_ranked: bool = True  # whether SAEs are ranked by it where their intervals are apart
    note: str | None = None  # how far it can be trusted
    needs: str | None = None  # an account or file that it can't run without


_UNRELIABLE = (
    "varies too much from seed to seed to rank SAEs by (arXiv 2605.18229): read it as a range."
)
EVALUATIONS: dict[str, Evaluation] = {
    "absorption": Evaluation(
        [
            Metric("mean.mean_absorption_fraction_score", "absorption, fraction", True),
            Metric("mean.mean_full_absorption_score", "absorption, full", True),
            Metric("mean.mean_num_split_features", "latents per first letter", True),
        ],
        latents="max_k_value",
    ),
    "sparse_probing": Evaluation(
        [
            Metric("sae.sae_top_1_test_accuracy", "sparse probing, top 1"),
            Metric("sae.sae_top_5_test_accuracy", "sparse probing, top 5"),
        ],
        latents="k_values",
    ),
    "sparse_probing_sae_probes": Evaluation(
        [
            Metric("sae.sae_top_1_test_auc", "sae-probes, top 1 AUC"),
            Metric("sae.sae_top_5_test_auc", "sae-probes, top 5 AUC"),
        ],
        latents="ks",
        note="is the most reliable of SAEBench's evaluations (arXiv 2605.18229).",
    ),
    "scr": Evaluation(
        [
            Metric("scr_metrics.scr_metric_threshold_20", "SCR, 20 latents"),
            Metric("scr_metrics.scr_metric_threshold_5", "SCR, 5 latents"),
        ],
        module="scr_and_tpp",
        latents="n_values",
        is_ranked=False,
        note=_UNRELIABLE,
    ),
    "tpp": Evaluation(
        [
            Metric("tpp_metrics.tpp_threshold_20_total_metric", "TPP, 20 latents"),
            Metric("tpp_metrics.tpp_threshold_5_total_metric", "TPP, 5 latents"),
        ],
        module="scr_and_tpp",
        latents="n_values",
        is_ranked=False,
        note=_UNRELIABLE,
    ),
    "core": Evaluation(
        [
            Metric("reconstruction_quality.explained_variance", "variance explained"),
            Metric("model_performance_preservation.ce_loss_score", "CE loss score"),
            Metric(L0, "L0", True),
        ],
        is_random=False,
        note="reads the same texts whatever the seed, so it has no spread.",
    ),
    "ravel": Evaluation(
        [
            Metric("ravel.disentanglement_score", "RAVEL, disentanglement"),
            Metric("ravel.cause_score", "RAVEL, cause"),
            Metric("ravel.isolation_score", "RAVEL, isolation"),
        ]
    ),
    "meta_structure": Evaluation(
        [Metric("meta_structure.decoder_fraction_variance_explained", "meta-SAE variance", True)]
    ),
    "unlearning": Evaluation(
        [Metric("unlearning.unlearning_score", "unlearning")],
        needs=(
            "an instruction-tuned model (gemma-2-2b-it) and WMDP's bio-forget-corpus.jsonl, which "
            "its authors send on request (see the data set cais/wmdp-corpora), in the folder "
            "evals/unlearning/data of the installed sae_bench"
        ),
    ),
    "autointerp": Evaluation(
        [Metric("autointerp.autointerp_score", "automatic interpretation")],
        needs="an OpenAI account that pays for the judge: set OPENAI_API_KEY",
    ),
}


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


def saebench_module(evaluation: str, name: str) -> Any:
    """The module `name` of an evaluation in SAEBench."""
    folder = EVALUATIONS[evaluation].module or evaluation
    return importlib.import_module(f"{PACKAGE}.evals.{folder}.{name}")


def config_class(evaluation: str) -> Any:
    """SAEBench's config class of an evaluation."""
    module = saebench_module(evaluation, "eval_config")
    names = (name for name in vars(module) if name.endswith("EvalConfig"))
    return getattr(module, next(name for name in names if name != "BaseEvalConfig"))


def unmet_need(evaluation: str) -> str | None:
    """The account or file that an evaluation needs and that is missing here."""
    corpus = installed() / "evals" / "unlearning" / "data" / "bio-forget-corpus.jsonl"
    has_need = {"autointerp": bool(os.environ.get("OPENAI_API_KEY")), "unlearning": corpus.exists()}
    return None if has_need.get(evaluation, True) else f"needs {EVALUATIONS[evaluation].needs}"


def obstacle(
    evaluation: str, width: int, hook_name: str, settings: Mapping[str, Any]
) -> str | None:
    """Why SAEBench can't evaluate an SAE or level of `width` latents; None if nothing is known."""
    if (need := unmet_need(evaluation)) is not None:
        return need
    if evaluation in ("absorption", "ravel") and not hook_name.endswith(".hook_resid_post"):
        layer = hook_name.split(".")[1]
        return f"reads blocks.{layer}.hook_resid_post, and this SAE reads {hook_name}"
    if (name := EVALUATIONS[evaluation].latents) is not None:
        asked = settings.get(name, getattr(config_class(evaluation)(), name))
        fewest = asked if isinstance(asked, int) else min(asked)
        if width < fewest:
            return f"needs at least {fewest} latents, and this level has {width}"
    return None


def result_file(folder: Path, evaluation: str, key: str) -> Path:
    """SAEBench's file on a candidate, in the folder of an evaluation and a seed."""
    if evaluation in ("scr", "tpp"):  # which add a folder of their own
        folder = folder / evaluation
    return folder / f"{key}_custom_sae_eval_results.json"


def read_result(file: Path) -> dict[str, dict[str, Any]] | None:
    """All metrics of a result file; None if it is missing or cut off."""
    try:
        return json.loads(file.read_text())["eval_result_metrics"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def read_metrics(file: Path, evaluation: str) -> dict[Metric, float]:
    """The finite numbers of a result file that tables show."""
    result = read_result(file) or {}
    values = {}
    for metric in EVALUATIONS[evaluation].metrics:
        category, name = metric.key.split(".")
        value = result.get(category, {}).get(name)
        if value is not None and math.isfinite(value):
            values[metric] = float(value)
    return values
