"""Tokens per second of whole training runs through SAELens' runner, and where the time goes.

    python benchmarks/runner_throughput.py --device cuda                # GPT-2 small's shape
    python benchmarks/runner_throughput.py --device cpu --model demo    # minutes on one thread

Every run is SAELens' own: its runner, activation store and trainer, with the shape and the buffer
of `configs/`. gpt2 has random weights and random tokens, on which speed does not depend.
Contestants take turns, each with two runs: an undisturbed one for tokens per second, and one whose
calls are timed, for the shares of its parts. On CUDA the latter waits for the device where a part
begins and ends, which slows it. Set-up, warm-up steps and saving are not counted. Steps start at
2,001, from where the monitor of our SAEs observes every 16th.
"""

import contextlib
import functools
import gc
import itertools
import math
import os
import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import; the demo's model is not on the Hub

import numpy as np
import records
import torch
from contestants import OURS, SAELENS, SAELENS_FLAT, sae_config
from datasets import Dataset
from matplotlib.figure import Figure
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.load_model import load_model
from simple_parsing import ArgumentParser
from timed_runner import N_WARM_UP_STEPS, PARTS, REST, MeasuringRunner, PartTimer, Run
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_matryoshka.demo import run as demo
from sae_lens_matryoshka.demo.corpus import texts
from sae_lens_matryoshka.runs.config import load_run_config
from sae_lens_matryoshka.training.widths import paper_widths
from sae_lens_matryoshka.util.checks import checked_number
from sae_lens_matryoshka.util.devices import check_device
from sae_lens_matryoshka.util.files import check_writable
from sae_lens_matryoshka.util.markdown import markdown_table

CONTESTANTS = (OURS, SAELENS, SAELENS_FLAT)
CONFIGS = {"gpt2": "gpt2-small.yaml", "demo": "demo.yaml"}
N_TOKEN_SEQUENCES = 2048  # of gpt2's random tokens; the store starts over after the last


@dataclass
class Options:
    """What is measured, and where."""

    model: Literal["gpt2", "demo"] = "gpt2"  # GPT-2 small's architecture, or the package's own
    device: str = "cpu"
    d_sae: int | None = None  # width of the dictionary; as in the model's config if left out
    k: float | None = None  # mean number of active latents per activation; likewise
    batch_size: int | None = None  # activations in a training batch; likewise
    training_tokens: int = 1_000_000  # counted in each run; rounded up to whole buffer refills
    autocast: bool = False  # bfloat16 autocast of the SAE and the language model, as SAELens does
    repeats: int = 3  # turns of each contestant
    out: str | None = None  # write OUT.md, OUT.json and OUT.png: table, runs and picture


def run_config(name: str, options: Options) -> LanguageModelSAERunnerConfig[Any]:
    """The run of a contestant."""
    folder = Path(__file__).parent.parent / "configs"
    cfg = load_run_config(folder / CONFIGS[options.model])
    batch_size = options.batch_size or cfg.train_batch_size_tokens
    # over whole refills of the buffer the model reads as many tokens as the SAE is trained on
    n_kept = int(cfg.n_batches_in_buffer * cfg.context_size * cfg.activations_mixing_fraction)
    refill = max(1, n_kept // batch_size)
    n_steps = math.ceil(options.training_tokens / batch_size / refill) * refill
    d_sae = options.d_sae or cfg.sae.d_sae
    return replace(
        cfg,
        sae=sae_config(
            name,
            paper_widths(d_sae),
            d_in=cfg.sae.d_in,
            d_sae=d_sae,
            k=options.k or cfg.sae.k,
            normalize_activations="expected_average_only_in",
            device=options.device,
        ),
        is_dataset_tokenized=options.model == "gpt2",
        train_batch_size_tokens=batch_size,
        training_tokens=(N_WARM_UP_STEPS + n_steps) * batch_size,
        device=options.device,
        llm_device=options.device,
        act_store_device=options.device,
        autocast=options.autocast,
        autocast_lm=options.autocast,
        lr=1e-4,
        lr_end=1e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        n_batches_for_norm_estimate=8,
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def model_and_data(options: Options, context_size: int) -> tuple[HookedTransformer, Dataset]:
    """The language model and its texts, made offline."""
    if options.model == "demo":
        return demo_model(options.device), Dataset.from_dict({"text": texts(demo.N_TEXTS, seed=0)})
    cfg = HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_heads=12,
        d_head=64,
        d_mlp=3072,
        n_ctx=1024,
        d_vocab=50257,
        act_fn="gelu_new",
        normalization_type="LN",
        device=options.device,
        seed=0,
    )
    shape = (N_TOKEN_SEQUENCES, context_size)
    tokens = np.random.default_rng(0).integers(cfg.d_vocab, size=shape)
    return HookedTransformer(cfg), Dataset.from_dict({"input_ids": tokens})


def demo_model(device: str) -> HookedTransformer:
    """The language model that comes with the package."""
    started_in = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(demo.__file__).with_name("model"), Path(folder) / demo.MODEL_NAME)
        os.chdir(folder)  # transformers takes a relative folder of that name
        try:
            model = load_model("HookedTransformer", demo.MODEL_NAME, device)
        finally:
            os.chdir(started_in)
    assert isinstance(model, HookedTransformer)
    return model


def measure(
    name: str, by_parts: bool, options: Options, model: HookedTransformer, data: Dataset
) -> Run:
    """One run of one contestant.

    Raises:
        FloatingPointError: weights are not finite at the end.
    """
    cfg = run_config(name, options)
    torch.manual_seed(cfg.seed)
    runner = MeasuringRunner(cfg, override_dataset=data, override_model=model)
    is_cuda = torch.device(cfg.device).type == "cuda"
    wait = functools.partial(torch.cuda.synchronize, cfg.device) if is_cuda else lambda: None
    runner.timer, runner.by_parts = PartTimer(REST, wait), by_parts
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # SAELens' bars
        sae = runner.run()
    if not all(parameter.isfinite().all() for parameter in sae.parameters()):
        raise FloatingPointError(f"{name}: weights are not finite after {runner.tokens} tokens.")
    run = Run(name, runner.tokens, runner.timer.total)
    if by_parts:
        run.parts = {part: runner.timer.seconds[part] for part in PARTS}
        run.language_model_tokens = runner.language_model_tokens
    return run


def summarise(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Each contestant's speed in its undisturbed runs, and the shares in those by parts."""
    results: dict[str, dict[str, Any]] = {}
    for name in CONTESTANTS:
        own = [run for run in runs if run.contestant == name]
        undisturbed = [run.seconds for run in own if run.parts is None]
        seconds = statistics.median(undisturbed)
        by_parts = [run.parts for run in own if run.parts is not None]
        medians = {part: statistics.median(parts[part] for parts in by_parts) for part in PARTS}
        total = sum(medians.values())
        results[name] = {
            "tokens": own[0].tokens,
            "seconds": seconds,
            "tokens_per_second": own[0].tokens / seconds,
            "slowest": own[0].tokens / max(undisturbed),
            "fastest": own[0].tokens / min(undisturbed),
            "shares": {part: value / total for part, value in medians.items()},
            "seconds_by_parts": total,
        }
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, every ratio against SAELens' Matryoshka SAE."""
    base = results[SAELENS]["tokens_per_second"]
    titles = ["", "tokens / s", "slowest–fastest", "", *PARTS, "by parts / undisturbed"]
    rows = [
        [
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['slowest']:,.0f}–{row['fastest']:,.0f}",
            f"{row['tokens_per_second'] / base:.2f}×",
            *(f"{100 * row['shares'][part]:.1f} %" for part in PARTS),
            f"{row['seconds_by_parts'] / row['seconds']:.2f}",
        ]
        for name, row in results.items()
    ]
    return markdown_table(titles, rows)


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Bars of seconds per million tokens: undisturbed time, split by the parts' shares."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(results.values()):
        start, whole = 0.0, 1e6 / row["tokens_per_second"]
        for index, part in enumerate(PARTS):
            width = whole * row["shares"][part]
            axis.barh(y, width, left=start, color=f"C{index}", label=part)
            start += width
        axis.text(start, y, f" {row['tokens_per_second']:,.0f} tokens / s", va="center")
    axis.set_yticks(range(len(results)), list(results))
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel("seconds per million tokens")
    axis.spines[["top", "right"]].set_visible(False)
    handles, _ = axis.get_legend_handles_labels()
    figure.legend(handles=handles[: len(PARTS)], loc="outside upper center", ncols=len(PARTS))
    figure.savefig(path, dpi=130)


def conditions(options: Options, cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    return {
        "model": options.model,
        "hook_name": cfg.hook_name,
        "context_size": cfg.context_size,
        "d_in": cfg.sae.d_in,
        "d_sae": cfg.sae.d_sae,
        "k": cfg.sae.k,
        "widths": cfg.sae.matryoshka_widths,
        "batch_size": cfg.train_batch_size_tokens,
        "tokens_in_buffer": cfg.n_batches_in_buffer * cfg.context_size,
        "tokens_per_forward": cfg.store_batch_size_prompts * cfg.context_size,
        "warm_up_tokens": N_WARM_UP_STEPS * cfg.train_batch_size_tokens,
        "autocast": options.autocast,
        "repeats": options.repeats,
        "device": options.device,
        "threads": torch.get_num_threads(),
    }


def _check(options: Options) -> None:
    check_device("device", options.device)
    for name in ("d_sae", "k", "batch_size", "training_tokens", "repeats"):
        if getattr(options, name) is not None:
            checked_number(name, getattr(options, name), "more than 0", above=0)
    if options.out is not None:
        check_writable("out", Path(options.out).parent)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_arguments(Options, dest="options")
    options: Options = parser.parse_args().options
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    records.silence_libraries()

    cfg = run_config(OURS, options)
    facts = conditions(options, cfg)
    record = records.start("runner_throughput.py", options, options.device, facts)
    record["runs"] = []
    model, data = model_and_data(options, cfg.context_size)
    runs: list[Run] = []
    turns = list(itertools.product(range(options.repeats), (False, True), CONTESTANTS))
    for _, by_parts, name in tqdm(turns, desc="Runs", disable=None):
        runs.append(measure(name, by_parts, options, model, data))
        record["runs"].append(asdict(runs[-1]))
        records.save(options.out, record)  # no run is lost if one fails
        gc.collect()  # the SAE and its moments, before the next one's

    record["results"] = results = summarise(runs)
    print(records.save(options.out, record, table(results)))
    if options.out is not None:
        draw(Path(f"{options.out}.png"), results)


if __name__ == "__main__":
    main()
