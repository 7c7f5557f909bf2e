"""The process that runs one evaluation of SAEBench: `python -m …saebench.worker JOB.json`.

What SAEBench needs beyond its own code is in `workarounds`.
"""

import inspect
import json
import logging
import os
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sae_lens_matryoshka.saebench import workarounds
from sae_lens_matryoshka.saebench.candidates import load_candidates
from sae_lens_matryoshka.saebench.evaluations import config_class, read_result, saebench_module
from sae_lens_matryoshka.saebench.records import Job
from sae_lens_matryoshka.saebench.workarounds import Named, SeededSAEs
from sae_lens_matryoshka.util.devices import multiplies_bfloat16

# What SAEBench's own scripts set, beside its configs' defaults.
_SCRIPT_SETTINGS: dict[str, dict[str, Any]] = {
    "core": {
        "n_eval_reconstruction_batches": 200,
        "n_eval_sparsity_variance_batches": 2000,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": True,
    },
    "scr": {"perform_scr": True},
    "tpp": {"perform_scr": False},
}
_BATCH_DIVISORS = {"ravel": 4, "unlearning": 8}


def make_config(job: Job) -> Any:
    """SAEBench's config of an evaluation: the job's settings, else what SAEBench's scripts set."""
    from sae_bench.sae_bench_utils.activation_collection import (
        LLM_NAME_TO_BATCH_SIZE,
        LLM_NAME_TO_DTYPE,
    )

    cls = config_class(job.evaluation)
    batch_size = LLM_NAME_TO_BATCH_SIZE.get(job.model_name, 32)
    common = {
        "model_name": job.model_name,
        "random_seed": job.seed,
        "llm_dtype": LLM_NAME_TO_DTYPE.get(job.model_name, "float32"),
        "llm_batch_size": batch_size // _BATCH_DIVISORS.get(job.evaluation, 1),
        # Only meta-SAEs have it. Without bfloat16 instructions they would take hours.
        "autocast": torch.device(job.device).type != "cpu" or multiplies_bfloat16(),
        # Activations depend on the model alone, so seeds share them.
        "model_cache_path": str(job.shared / "activations"),
    }
    names = {field.name for field in fields(cls)}
    common = {name: value for name, value in common.items() if name in names}
    settings = {name: value for name, value in job.settings.items() if name in names}
    return cls(**{**common, **_SCRIPT_SETTINGS.get(job.evaluation, {}), **settings})


def evaluate(job: Job, config: Any, saes: SeededSAEs) -> None:
    """Call SAEBench."""
    workarounds.patch_saebench(job, config, saes)
    main = saebench_module(job.evaluation, "main")
    if job.evaluation == "core":  # takes arguments instead of its config
        names = inspect.signature(main.multiple_evals).parameters
        main.multiple_evals(
            selected_saes=saes,
            eval_batch_size_prompts=config.batch_size_prompts,
            dtype=config.llm_dtype,
            device=job.device,
            output_folder=str(job.out),
            **{f.name: getattr(config, f.name) for f in fields(config) if f.name in names},
        )
        return
    key = [os.environ["OPENAI_API_KEY"]] if job.evaluation == "autointerp" else []
    main.run_eval(config, saes, job.device, *key, str(job.out))


def run(job: Job, saes: list[Named]) -> dict[str, str]:
    """Evaluate each SAE; one that fails does not stop the others.

    Returns:
        Name → reason, of the SAEs that have no result.
    """
    errors = workarounds.LastError()
    logging.getLogger().addHandler(errors)
    failures: dict[str, str] = {}
    remaining = saes
    while remaining:
        batch = SeededSAEs(remaining, job.seed)
        try:
            evaluate(job, make_config(job), batch)
            break
        except Exception as error:
            logging.exception("%s failed", job.evaluation)
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, KeyError):
                reason += ", a name that SAEBench does not know"
            if batch.current is None:  # before the first SAE, so for all
                return {name: reason for name, _ in remaining}
            failures[remaining[batch.current][0]] = reason
            remaining = remaining[batch.current + 1 :]
    names = [name for name, _ in saes]
    for name, _ in remaining:
        if read_result(job.result(name)) is None:
            obstacle = workarounds.absorption_obstacle(job, make_config(job), names)
            failures[name] = obstacle or errors.message or "SAEBench gave no result and no error"
    return failures


def main(path: str) -> None:
    warnings.filterwarnings("ignore", message="Decoder weights are not normalized")
    logging.basicConfig()
    workarounds.sort_vocabularies()
    job = Job.model_validate_json(Path(path).read_bytes())
    saes = load_candidates(job.candidates, job.device)
    named = [(candidate.key, sae) for candidate, sae in zip(job.candidates, saes, strict=True)]
    failures: dict[str, str] = {}
    for group in workarounds.separate_runs(job, named):
        failures |= run(job, group)
    job.failures_file.write_text(json.dumps(failures, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
