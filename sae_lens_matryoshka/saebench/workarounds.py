"""Patches of SAEBench 0.6 at run time, for what it gets wrong; docs/evaluation.md lists them.

None of SAEBench's files is changed. It runs from a directory of links to its installation, because
some evaluations cache probes and activations inside the installation or the working directory, by
the model's name alone, and reuse them for any model of that name. In the worker process, functions
of SAEBench and transformers are wrapped, and the SAEs are handed over in a list that seeds the
generators before each of them.
"""

import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import SAE
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformers import PreTrainedTokenizerFast, set_seed

from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, PACKAGE, installed
from sae_lens_matryoshka.saebench.records import Job
from sae_lens_matryoshka.saebench.settings import WORDS_PER_LETTER

Named = tuple[str, SAE[Any]]
_MAX_CODES = 2**30  # bytes


def isolated_environment(workdir: Path) -> dict[str, str]:
    """Make `workdir` a directory to run SAEBench in, and return the environment variables for it.

    It links to SAEBench's files without its cache, `artifacts`, and to the folders of the current
    directory: transformers and datasets prefer a folder of a model's or data set's name to the Hub.
    """
    package = workdir / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    here = [path for path in Path.cwd().iterdir() if path.is_dir() and path.name != PACKAGE]
    for folder, entries in ((package, list(installed().iterdir())), (workdir, here)):
        for entry in entries:
            link = folder / entry.name
            if link.is_symlink():
                link.unlink()  # of a run that began in another directory
            if entry.name != "artifacts" and not link.exists():
                link.symlink_to(entry.resolve())
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [workdir, *map(Path, inherited)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths),
        "PYTHONHASHSEED": "0",
        "JAXTYPING_DISABLE": "1",  # beartype 0.20 rejects annotations of sparse probing
        "TOKENIZERS_PARALLELISM": "false",
    }


class SeededSAEs(list[Named]):
    """SAEs that are all evaluated from the same seed, whichever come before them.

    SAEBench's evaluations loop over the SAEs and draw from the global generators; absorption and
    the meta-SAE never read their config's seed.
    """

    def __init__(self, saes: list[Named], seed: int):
        super().__init__(saes)
        self.current: int | None = None  # index of the SAE that is being evaluated
        self.before_each: Callable[[SAE[Any]], None] | None = None
        self._seed = seed

    def __iter__(self) -> Iterator[Named]:
        for index, (name, sae) in enumerate(super().__iter__()):
            self.current = index
            if self.before_each is not None:
                self.before_each(sae)
            set_seed(self._seed)
            yield name, sae


class LastError(logging.Handler):
    """The last error that was logged: core logs its exceptions instead of raising them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.message: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()


def sort_vocabularies() -> None:
    """List a tokenizer's tokens by id: absorption draws words from this list, whose order changes
    from process to process.
    """
    unsorted = PreTrainedTokenizerFast.get_vocab

    def get_vocab(self: PreTrainedTokenizerFast) -> dict[str, int]:
        return dict(sorted(unsorted(self).items(), key=lambda token: token[1]))

    PreTrainedTokenizerFast.get_vocab = get_vocab


def separate_runs(job: Job, saes: list[Named]) -> Iterator[list[Named]]:
    """SAEs that SAEBench evaluates together: for absorption, those of one layer.

    Absorption ends for all SAEs at the first layer in which probes don't find the letters.
    """
    if job.evaluation != "absorption":
        yield saes
        return
    for layer in sorted({_layer(sae) for _, sae in saes}):
        yield [(name, sae) for name, sae in saes if _layer(sae) == layer]


def patch_saebench(job: Job, config: Any, saes: SeededSAEs) -> None:
    """Patch what one evaluation needs, before it runs with this config on these SAEs."""
    if job.evaluation == "absorption":
        _prepare_absorption(job, config, saes)
    elif job.evaluation == "ravel":
        _patch_ravel(job, config)
    elif job.evaluation == "sparse_probing":
        from sae_bench.evals.sparse_probing import main as probing

        _reseed_in(probing, "get_dataset_activations", job.seed)
        _reseed_in(probing.activation_collection, "get_sae_meaned_activations", job.seed)
    elif job.evaluation in ("scr", "tpp"):
        from sae_bench.evals.scr_and_tpp import main as erasure

        _reseed_in(erasure, "get_dataset_activations", job.seed)
        _reseed_in(erasure, "get_all_node_effects_for_one_sae", job.seed)
    name = EVALUATIONS[job.evaluation].latents
    if name is not None and isinstance(asked := getattr(config, name), list):

        def ask_for_at_most_d_sae(sae: SAE[Any]) -> None:
            setattr(config, name, [n for n in asked if n <= sae.cfg.d_sae])

        saes.before_each = ask_for_at_most_d_sae


def _prepare_absorption(job: Job, config: Any, saes: SeededSAEs) -> None:
    from sae_bench.evals.absorption import common
    from transformer_lens import HookedTransformer

    if "n_words" in job.settings:
        _draw_words(job.settings["n_words"], job.seed)
    _stop_after_hook()
    dtype = getattr(torch, config.llm_dtype)
    model = HookedTransformer.from_pretrained_no_processing(
        config.model_name, device=job.device, dtype=dtype
    )
    n_words = len(common.get_alpha_tokens(model.tokenizer))  # type: ignore[arg-type]
    if "k_sparse_probe_batch_size" not in job.settings:
        # With few words, SAEBench's 4,096 make one step per epoch, which trains no probe.
        config.k_sparse_probe_batch_size = min(config.k_sparse_probe_batch_size, n_words // 5)

    def cache_codes_if_they_fit(sae: SAE[Any]) -> None:
        # Otherwise absorption encodes all words again for each probe.
        size = n_words * sae.cfg.d_sae * torch.finfo(sae.dtype).bits // 8
        config.precalc_k_sparse_probe_sae_acts = size <= _MAX_CODES

    if "precalc_k_sparse_probe_sae_acts" not in job.settings:
        saes.before_each = cache_codes_if_they_fit
    # Trained before the first SAE, whose scores would otherwise depend on the random numbers drawn.
    set_seed(job.seed)
    for layer in {_layer(sae) for _, sae in list.__iter__(saes)}:
        common.load_or_train_probe(
            model,
            base_template=config.prompt_template,
            pos_idx=config.prompt_token_pos,
            layer=layer,
            dtype=dtype,
            device=job.device,
        )
    _remember_activations(config.prompt_token_pos)


def _draw_words(n_words: int, seed: int) -> None:
    """Let absorption use as many random words of the vocabulary, the same for every SAE.

    Some words of each letter are among them: absorption fails where a letter has none.
    """
    from sae_bench.evals.absorption import common, feature_absorption, vocab

    def get_alpha_tokens(tokenizer: Any) -> list[str]:
        words = vocab.get_alpha_tokens(tokenizer)
        random.Random(seed).shuffle(words)
        of_letter: dict[str, list[str]] = {}
        for word in words:
            of_letter.setdefault(word.strip()[0].lower(), []).append(word)
        needed = {word for same in of_letter.values() for word in same[:WORDS_PER_LETTER]}
        others = [word for word in words if word not in needed]
        return [*sorted(needed), *others[: n_words - len(needed)]]

    common.get_alpha_tokens = feature_absorption.get_alpha_tokens = get_alpha_tokens


@cache
def _stop_after_hook() -> None:
    """Run the model up to the layer whose activations are asked for, and not to its logits."""
    from transformer_lens import HookedTransformer

    run = HookedTransformer.run_with_cache

    def run_with_cache(model: Any, prompts: list[str], *, names_filter: list[str]) -> Any:
        n_layers = int(names_filter[0].split(".")[1]) + 1
        return run(model, prompts, names_filter=names_filter, stop_at_layer=n_layers)

    HookedTransformer.run_with_cache = run_with_cache  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _remember_activations(position: int) -> None:
    """Run the model once on prompts that absorption gives it again for every SAE.

    Of the activations it reads those at one position.
    """
    from transformer_lens import HookedTransformer

    run = HookedTransformer.run_with_cache
    known: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    n_positions = max(position + 1, -position)  # so that `position` is one of them

    def run_with_cache(model: Any, prompts: list[str], *, names_filter: list[str]) -> Any:
        key = (*names_filter, *prompts)
        if key not in known:
            acts = run(model, prompts, names_filter=names_filter)[1]
            known[key] = {
                name: acts[name][:, [position]].expand(-1, n_positions, -1) for name in names_filter
            }
        return None, known[key]

    HookedTransformer.run_with_cache = run_with_cache  # pyright: ignore[reportAttributeAccessIssue]


def absorption_obstacle(job: Job, config: Any, names: list[str]) -> str | None:
    """Why absorption, which stops without an error, gave no result on SAEs of one layer."""
    folder = Path("artifacts", "absorption")
    files = [folder / f"{name}_custom_sae_k_sparse_probing.json" for name in names]
    probed = next((file for file in files if file.exists()), None)
    if job.evaluation != "absorption" or probed is None:
        return None
    # The probes read the model, so they are the same for every SAE of the layer.
    f1 = [row["f1_probe"] for row in json.loads(probed.read_text())]
    n_found = sum(score > config.min_GT_probe_f1 for score in f1)
    if n_found >= config.min_feats_for_eval:
        return None
    return (
        f"linear probes find {n_found} of 26 first letters in this model (F1 above "
        f"{config.min_GT_probe_f1}), and SAEBench asks for {config.min_feats_for_eval}"
    )


def _layer(sae: SAE[Any]) -> int:
    return int(sae.cfg.metadata.hook_name.split(".")[1])


def _reseed_in(module: Any, name: str, seed: int) -> None:
    """Seed the generators whenever a function is called.

    The first SAE trains the model's probes and the others load them. Reseeding before and after
    that makes their scores independent of which SAE comes first.
    """
    function = getattr(module, name)

    def seeded(*args: Any, **kwargs: Any) -> Any:
        set_seed(seed)
        return function(*args, **kwargs)

    setattr(module, name, seeded)


def _patch_ravel(job: Job, config: Any) -> None:
    from huggingface_hub import snapshot_download
    from sae_bench.evals.ravel import main
    from sae_bench.sae_bench_utils import activation_collection

    main.LLM_NAME_MAP.setdefault(job.model_name, get_official_model_name(job.model_name))
    get_module = activation_collection.get_module
    activation_collection.get_module = lambda model, layer: _with_tuples(get_module(model, layer))
    prompts = Path(config.artifact_dir, "base")
    if not (prompts / ".complete").exists():
        # SAEBench's own download passes an argument that the Hub's client no longer accepts.
        snapshot_download(
            "adamkarvonen/ravel_prompts",
            repo_type="dataset",
            local_dir=prompts,
            allow_patterns="*.json",
        )
        (prompts / ".complete").touch()


def _with_tuples(module: torch.nn.Module) -> Any:
    """A layer whose hooks get its output in a tuple, as in transformers 4."""

    def register_forward_hook(hook: Callable[..., Any]) -> Any:
        def wrapped(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            result = hook(module, inputs, output if is_tuple else (output,))
            return result if is_tuple or result is None else result[0]

        return module.register_forward_hook(wrapped)

    return SimpleNamespace(register_forward_hook=register_forward_hook)
