"""One evaluation of SAEBench on some SAEs, in a process of its own: see `evals.saebench`.

    python -m sae_lens_matryoshka.saebench.worker JOB.json

What SAEBench 0.6 needs besides its own files, to give what it promises with today's libraries, is
here and in `evals.saebench`. Its files are used as they are.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_matryoshka.saebench.candidates import Candidate, load_candidates
from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, Job, config_class, is_whole

Named = tuple[str, SAE[Any]]
_MAX_CODES = 2**30  # bytes


class Seeded(list[Named]):
    """SAEs of which each is evaluated from the same seed, whichever come before it.

    SAEBench's evaluations loop over the SAEs that they are given and draw from the global
    generators; absorption and the meta-SAE never read their config's seed.

    Attributes:
        current: Index of the SAE that is being evaluated, None before the first.
        before: Called with each SAE before it is evaluated.
    """

    def __init__(self, saes: list[Named], seed: int):
        super().__init__(saes)
        self.current: int | None = None
        self.before: Callable[[SAE[Any]], None] = lambda sae: None
        self._seed = seed

    def __iter__(self) -> Iterator[Named]:
        for index, (name, sae) in enumerate(super().__iter__()):
            self.current = index
            self.before(sae)
            seed_everything(self._seed)
            yield name, sae


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator that SAEBench draws from)
    torch.manual_seed(seed)


def order_vocabularies() -> None:
    """Let tokenizers list their tokens by id: they do so in another order in every process, and
    absorption draws its words from that list.
    """
    from transformers import PreTrainedTokenizerFast

    unordered = PreTrainedTokenizerFast.get_vocab

    def get_vocab(self: PreTrainedTokenizerFast) -> dict[str, int]:
        return dict(sorted(unordered(self).items(), key=lambda token: token[1]))

    PreTrainedTokenizerFast.get_vocab = get_vocab


def make_config(job: Job, **defaults: Any) -> Any:
    """SAEBench's config: `defaults` where the job sets nothing."""
    from sae_bench.sae_bench_utils.activation_collection import (
        LLM_NAME_TO_BATCH_SIZE,
        LLM_NAME_TO_DTYPE,
    )

    cls = config_class(job.evaluation)
    common = {
        "model_name": job.model_name,
        "random_seed": job.seed,
        "llm_dtype": LLM_NAME_TO_DTYPE.get(job.model_name, "float32"),
        "llm_batch_size": LLM_NAME_TO_BATCH_SIZE.get(job.model_name, 32),
    }
    names = {field.name for field in fields(cls)}
    common = {name: value for name, value in common.items() if name in names}
    return cls(**{**common, **defaults, **job.settings})


def run_absorption(saes: Seeded, job: Job) -> None:
    from sae_bench.evals.absorption.common import load_or_train_probe
    from sae_bench.evals.absorption.main import run_eval
    from sae_bench.evals.absorption.vocab import get_alpha_tokens
    from transformer_lens import HookedTransformer

    config = make_config(job)
    dtype = getattr(torch, config.llm_dtype)
    model = HookedTransformer.from_pretrained_no_processing(
        config.model_name, device=job.device, dtype=dtype
    )
    n_words = len(get_alpha_tokens(model.tokenizer))  # type: ignore[arg-type]
    if "k_sparse_probe_batch_size" not in job.settings:
        # With few words SAEBench's 4,096 is one step an epoch, and no probe is ever trained.
        config.k_sparse_probe_batch_size = min(config.k_sparse_probe_batch_size, n_words // 5)
    if "precalc_k_sparse_probe_sae_acts" not in job.settings:
        saes.before = partial(_encode_words_once, config, n_words)
    # Trained now, or else the first SAE would start from where this leaves the generators.
    seed_everything(job.seed)
    for layer in {_layer(sae) for _, sae in list.__iter__(saes)}:
        load_or_train_probe(
            model,
            base_template=config.prompt_template,
            pos_idx=config.prompt_token_pos,
            layer=layer,
            dtype=dtype,
            device=job.device,
        )
    run_eval(config, saes, job.device, str(job.out))


def _encode_words_once(config: Any, n_words: int, sae: SAE[Any]) -> None:
    """Let absorption keep the codes of all words where they fit: the same scores, sooner."""
    size = n_words * sae.cfg.d_sae * torch.finfo(sae.dtype).bits // 8
    config.precalc_k_sparse_probe_sae_acts = size <= _MAX_CODES


def run_sparse_probing(saes: Seeded, job: Job) -> None:
    from sae_bench.evals.sparse_probing import main as probing

    _reseed_in(probing, "get_dataset_activations", job.seed)
    _reseed_in(probing.activation_collection, "get_sae_meaned_activations", job.seed)
    config = make_config(job)
    _at_most_d_sae(saes, config, "k_values")
    probing.run_eval(config, saes, job.device, str(job.out), artifacts_path="artifacts")


def run_sae_probes(saes: Seeded, job: Job) -> None:
    from sae_bench.evals.sparse_probing_sae_probes.main import run_eval

    # Activations depend on the model alone, so seeds share them.
    config = make_config(job, model_cache_path=str(job.shared / "activations"))
    _at_most_d_sae(saes, config, "ks")
    run_eval(config, saes, job.device, str(job.out))


def run_scr(saes: Seeded, job: Job) -> None:
    _scr_or_tpp(saes, job, perform_scr=True)


def run_tpp(saes: Seeded, job: Job) -> None:
    _scr_or_tpp(saes, job, perform_scr=False)


def _scr_or_tpp(saes: Seeded, job: Job, perform_scr: bool) -> None:
    from sae_bench.evals.scr_and_tpp import main as erasure

    _reseed_in(erasure, "get_dataset_activations", job.seed)
    _reseed_in(erasure, "get_all_node_effects_for_one_sae", job.seed)
    config = make_config(job, perform_scr=perform_scr)
    _at_most_d_sae(saes, config, "n_values")
    erasure.run_eval(config, saes, job.device, str(job.out), artifacts_path="artifacts")


def run_core(saes: Seeded, job: Job) -> None:
    from sae_bench.evals.core.main import multiple_evals

    # What SAEBench's own script asks for; the defaults of its config are those of a quick look.
    config = make_config(
        job,
        n_eval_reconstruction_batches=200,
        n_eval_sparsity_variance_batches=2000,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    multiple_evals(
        saes,
        n_eval_reconstruction_batches=config.n_eval_reconstruction_batches,
        n_eval_sparsity_variance_batches=config.n_eval_sparsity_variance_batches,
        eval_batch_size_prompts=config.batch_size_prompts,
        compute_featurewise_density_statistics=config.compute_featurewise_density_statistics,
        compute_featurewise_weight_based_metrics=config.compute_featurewise_weight_based_metrics,
        exclude_special_tokens_from_reconstruction=config.exclude_special_tokens_from_reconstruction,
        dataset=config.dataset,
        context_size=config.context_size,
        output_folder=str(job.out),
        dtype=config.llm_dtype,
        device=job.device,
        verbose=config.verbose,
    )


def run_ravel(saes: Seeded, job: Job) -> None:
    from huggingface_hub import snapshot_download
    from sae_bench.evals.ravel import main as ravel
    from sae_bench.sae_bench_utils import activation_collection

    ravel.LLM_NAME_MAP.setdefault(job.model_name, get_official_model_name(job.model_name))
    get_module = activation_collection.get_module
    activation_collection.get_module = lambda model, layer: _with_tuples(get_module(model, layer))
    config = make_config(job)
    config.llm_batch_size = job.settings.get("llm_batch_size", config.llm_batch_size // 4)
    prompts = Path(config.artifact_dir, "base")
    if not (prompts / ".complete").exists():
        # SAEBench downloads them with an argument that the Hub's client no longer takes.
        snapshot_download(
            "adamkarvonen/ravel_prompts",
            repo_type="dataset",
            local_dir=prompts,
            allow_patterns="*.json",
        )
        (prompts / ".complete").touch()
    ravel.run_eval(config, saes, job.device, str(job.out), artifacts_path="artifacts")


def _with_tuples(module: torch.nn.Module) -> Any:
    """A layer whose hooks see its output in a tuple, as those of transformers 4 did."""

    def register_forward_hook(hook: Callable[..., Any]) -> Any:
        def wrapped(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            result = hook(module, inputs, output if is_tuple else (output,))
            return result if is_tuple or result is None else result[0]

        return module.register_forward_hook(wrapped)

    return SimpleNamespace(register_forward_hook=register_forward_hook)


def run_meta_structure(saes: Seeded, job: Job) -> None:
    from sae_bench.evals.meta_structure.main import run_eval

    run_eval(make_config(job), saes, job.device, str(job.out))  # type: ignore[arg-type]


def run_unlearning(saes: Seeded, job: Job) -> None:
    from sae_bench.evals.unlearning.main import run_eval

    config = make_config(job)
    config.llm_batch_size = job.settings.get("llm_batch_size", config.llm_batch_size // 8)
    run_eval(config, saes, job.device, str(job.out), artifacts_path="artifacts")


def run_autointerp(saes: Seeded, job: Job) -> None:
    from sae_bench.evals.autointerp.main import run_eval

    key = os.environ["OPENAI_API_KEY"]
    run_eval(make_config(job), saes, job.device, key, str(job.out), artifacts_path="artifacts")


RUNNERS: dict[str, Callable[[Seeded, Job], None]] = {
    "absorption": run_absorption,
    "sparse_probing": run_sparse_probing,
    "sparse_probing_sae_probes": run_sae_probes,
    "scr": run_scr,
    "tpp": run_tpp,
    "core": run_core,
    "ravel": run_ravel,
    "meta_structure": run_meta_structure,
    "unlearning": run_unlearning,
    "autointerp": run_autointerp,
}
assert RUNNERS.keys() == EVALUATIONS.keys()


def _reseed_in(module: Any, name: str, seed: int) -> None:
    """Let a function begin from the seed: one that is called before the probes of the model are
    trained, and one after. Whether they were trained by an SAE before then changes nothing."""
    function = getattr(module, name)

    def seeded(*args: Any, **kwargs: Any) -> Any:
        seed_everything(seed)
        return function(*args, **kwargs)

    setattr(module, name, seeded)


def _at_most_d_sae(saes: Seeded, config: Any, name: str) -> None:
    """Let each SAE be asked for numbers of latents that it has."""
    values = getattr(config, name)
    saes.before = lambda sae: setattr(config, name, [n for n in values if n <= sae.cfg.d_sae])


def _layer(sae: SAE[Any]) -> int:
    return int(sae.cfg.metadata.hook_name.split(".")[1])


class _Errors(logging.Handler):
    """The last error that was logged; core logs its exceptions instead of raising them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def run(job: Job, saes: list[Named]) -> dict[str, str]:
    """Evaluate each SAE; one that fails stops no other.

    Returns:
        Name → reason, of the SAEs that have no result.
    """
    if job.evaluation != "absorption":
        return _run(job, saes)
    failures: dict[str, str] = {}
    # Its guard ends a run at a layer in which the letters can't be told, for all SAEs.
    for layer in sorted({_layer(sae) for _, sae in saes}):
        failures |= _run(job, [(name, sae) for name, sae in saes if _layer(sae) == layer])
    return failures


def _run(job: Job, saes: list[Named]) -> dict[str, str]:
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    failures: dict[str, str] = {}
    names = [name for name, _ in saes]
    while saes:
        batch = Seeded(saes, job.seed)
        try:
            RUNNERS[job.evaluation](batch, job)
            break
        except Exception as error:
            logging.exception("%s failed", job.evaluation)
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, KeyError):
                reason += ", a name that SAEBench does not know"
            if batch.current is None:  # before the first SAE, so for all
                return {name: reason for name, _ in saes}
            failures[saes[batch.current][0]] = reason
            saes = saes[batch.current + 1 :]
    for name, _ in saes:
        if not is_whole(job.result(name)):
            guard = _absorption_guard(job, names)
            failures[name] = guard or errors.last or "SAEBench gave no result and no error"
    return failures


def _absorption_guard(job: Job, names: list[str]) -> str | None:
    """Why absorption, which stops without an error, gave no result on SAEs of one layer."""
    folder = Path("artifacts", "absorption")
    files = [folder / f"{name}_custom_sae_k_sparse_probing.json" for name in names]
    probed = next((file for file in files if file.exists()), None)
    if job.evaluation != "absorption" or probed is None:
        return None
    config = make_config(job)
    # The probes read the model, so they are the same for every SAE of the layer.
    f1 = [row["f1_probe"] for row in json.loads(probed.read_text())]
    found = sum(score > config.min_GT_probe_f1 for score in f1)
    if found >= config.min_feats_for_eval:
        return None
    return (
        f"linear probes find {found} of 26 first letters in this model (F1 above "
        f"{config.min_GT_probe_f1}), and SAEBench asks for {config.min_feats_for_eval}"
    )


def main(path: str) -> None:
    warnings.filterwarnings("ignore", message="Decoder weights are not normalized")
    logging.basicConfig()
    order_vocabularies()
    job = Job.read(Path(path))
    candidates = [Candidate(**candidate) for candidate in job.candidates]
    saes = [
        (candidate.key, sae)
        for candidate, sae in zip(candidates, load_candidates(candidates, job.device), strict=True)
    ]
    failures = run(job, saes)
    job.failures_file.write_text(json.dumps(failures, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
