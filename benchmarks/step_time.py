"""Time and memory of one training step: this package against its peers, interleaved in one process.

    python benchmarks/step_time.py                       # the shape of docs/benchmarks/step_time.md
    python benchmarks/step_time.py --d_in 768 --d_sae 24576 --k 40 --threads 2 --n_dead 500
    python benchmarks/step_time.py --variants            # the objective's options, against default

A step is SAELens' own: forward, statistics, backward, gradient clipping and Adam, as
`SAETrainer.step` runs it. Forward-backward is the SAE's part of it alone. Peers that are not
installed are left out. Times are medians over rounds in which every contestant takes one turn;
ratios within a run hold where absolute times drift. Memory is what a step adds at its peak to
parameters and moments, in a process that runs this contestant alone.
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import str_to_dtype
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.prefixes import paper_widths

OURS, OURS_FLAT, REFERENCE = "ours", "ours, one level", "ours, reference"
SAELENS, SAELENS_FLAT = "SAELens matryoshka_batchtopk", "SAELens batchtopk"
PEER = "dictionary_learning matryoshka"
ENCODE = "encode product alone"
VARIANTS: dict[str, dict[str, Any]] = {
    "level_weights=0.5": {"level_weights": 0.5},
    'stop_gradient="inner"': {"stop_gradient": "inner"},
    'stop_gradient="all"': {"stop_gradient": "all"},
    "bias_level=True": {"bias_level": True},
    'prefix_sampling="log_uniform", n_prefixes=5': {
        "prefix_sampling": "log_uniform",
        "n_prefixes": 5,
    },
    'prefix_sampling="log_uniform", n_prefixes=10': {
        "prefix_sampling": "log_uniform",
        "n_prefixes": 10,
    },
    'latent_order="frequency"': {"latent_order": "frequency"},
    'decoder_norm="unit"': {"decoder_norm": "unit"},
}


@dataclass
class Options:
    """What is measured, and where."""

    d_in: int = 512  # width of the activations
    d_sae: int = 16384  # width of the dictionary; levels are the paper's five
    batch_size: int = 1024  # activations in a batch
    k: float = 32  # mean number of active latents per activation
    n_dead: int = 0  # latents that count as dead in every step
    threads: int = 1  # CPU threads
    device: str = "cpu"
    dtype: str = "float32"
    autocast: bool = False  # bfloat16 autocast, as SAELens' trainer does it
    variants: bool = False  # this package's options instead of the peers
    rounds: int = 9  # turns of each contestant, after two to warm up
    out: str | None = None  # write OUT.md and OUT.json: the table, its command and conditions
    memory_of: str | None = None  # measure the memory of this contestant alone, and print it


class Contestant:
    """One SAE in its trainer, with its batches."""

    def __init__(self, name: str, options: Options):
        self.options = options
        torch.manual_seed(0)
        self.batches = _batches(options)
        self.dead = torch.zeros(options.d_sae, dtype=torch.bool, device=options.device)
        self.dead[torch.randperm(options.d_sae)[: options.n_dead]] = True
        self.turn = 0
        if name == PEER:
            self._forward_backward, self._step = _dictionary_learning(self)
        else:
            self._forward_backward, self._step = _saelens(name, self)

    def forward_backward(self) -> None:
        self._forward_backward(self._next_batch())

    def step(self) -> None:
        self._step(self._next_batch())

    def _next_batch(self) -> torch.Tensor:
        self.turn += 1
        return self.batches[self.turn % len(self.batches)]


def _batches(options: Options) -> list[torch.Tensor]:
    """Sparse sums of random directions: activations whose codes differ from row to row."""
    n_features = 4 * options.d_in
    directions = torch.randn(n_features, options.d_in) / options.d_in**0.5
    batches = []
    for _ in range(4):
        active = torch.rand(options.batch_size, n_features) < 20 / n_features
        batches.append((active * (torch.rand(active.shape) + 0.5)) @ directions)
    dtype = str_to_dtype(options.dtype)
    return [batch.to(options.device, dtype) for batch in batches]


def _make_sae(name: str, options: Options) -> TrainingSAE[Any]:
    shape: dict[str, Any] = {
        "d_in": options.d_in,
        "d_sae": options.d_sae,
        "k": options.k,
        "dtype": options.dtype,
        "device": options.device,
    }
    widths = paper_widths(options.d_sae)
    if name == SAELENS_FLAT:
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
    if name == SAELENS:
        cfg = MatryoshkaBatchTopKTrainingSAEConfig(**shape, matryoshka_widths=widths)
        return MatryoshkaBatchTopKTrainingSAE(cfg)
    return MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(
            **shape,
            matryoshka_widths=[options.d_sae] if name == OURS_FLAT else widths,
            implementation="reference" if name == REFERENCE else "auto",
            **VARIANTS.get(name, {}),
        )
    )


def _saelens(
    name: str, contestant: Contestant
) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
    options = contestant.options
    sae = _make_sae(name, options)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=10**9,
            device=options.device,
            autocast=options.autocast,
            lr=3e-4,
            lr_end=3e-4,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=options.batch_size,
            dead_feature_window=10**6,
            feature_sampling_window=10**6,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=1,
        ),
        sae=sae,
        data_provider=iter(()),
    )

    def forward_backward(batch: torch.Tensor) -> None:
        with trainer.autocast_if_enabled:
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=batch,
                    coefficients={},
                    dead_neuron_mask=contestant.dead,
                    n_training_steps=contestant.turn,
                    is_logging_step=False,
                )
            )
        output.loss.backward()
        sae.zero_grad()

    def step(batch: torch.Tensor) -> None:
        trainer.n_forward_passes_since_fired[contestant.dead] = 10**7
        trainer.step(batch)

    return forward_backward, step


def _dictionary_learning(
    contestant: Contestant,
) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
    from dictionary_learning.trainers.matryoshka_batch_top_k import (  # type: ignore[import-not-found]
        MatryoshkaBatchTopKTrainer,
    )

    options = contestant.options
    ends = [0, *paper_widths(options.d_sae)]
    trainer = MatryoshkaBatchTopKTrainer(
        steps=10**6,
        activation_dim=options.d_in,
        dict_size=options.d_sae,
        k=int(options.k),
        layer=0,
        lm_name="none",
        group_fractions=[(b - a) / options.d_sae for a, b in itertools.pairwise(ends)],
        device=options.device,
    )
    trainer.ae.to(dtype=str_to_dtype(options.dtype))

    def mark_dead() -> None:
        trainer.num_tokens_since_fired[contestant.dead] = 10**9

    def forward_backward(batch: torch.Tensor) -> None:
        mark_dead()
        trainer.loss(batch, step=contestant.turn).backward()
        trainer.ae.zero_grad()

    def step(batch: torch.Tensor) -> None:
        mark_dead()
        trainer.update(contestant.turn, batch)

    return forward_backward, step


def _has_peer() -> bool:
    try:
        import dictionary_learning.trainers.matryoshka_batch_top_k  # type: ignore  # noqa: F401
    except ImportError:
        return False
    return True


def measure_times(options: Options, names: list[str]) -> dict[str, dict[str, float]]:
    """Median seconds of each contestant's forward-backward and step."""
    contestants = {name: Contestant(name, options) for name in names}
    times: dict[str, dict[str, list[float]]] = {
        name: {"forward_backward": [], "step": []} for name in [*names, ENCODE]
    }
    batch = _batches(options)[0]
    encoder = torch.randn(options.d_in, options.d_sae, device=options.device).to(batch.dtype)
    device_type = torch.device(options.device).type
    for _ in tqdm(range(options.rounds + 2), desc="Rounds", disable=None):
        for kind in ("forward_backward", "step"):
            for name, contestant in contestants.items():
                times[name][kind].append(_seconds(getattr(contestant, kind), options.device))
        with torch.autocast(device_type, torch.bfloat16, enabled=options.autocast):
            encode = _seconds(lambda: batch @ encoder, options.device)
        times[ENCODE]["forward_backward"].append(encode)
    return {
        name: {kind: statistics.median(values[2:]) for kind, values in kinds.items() if values}
        for name, kinds in times.items()
    }


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_memory(options: Options, name: str) -> float:
    """MiB that a step of `name` adds at its peak, in this process."""
    contestant = Contestant(name, options)
    for _ in range(3):
        contestant.step()
    if options.device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _resident_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    for _ in range(3):
        contestant.step()
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str = "VmRSS") -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def _memory_in_own_process(options: Options, name: str) -> float:
    arguments = [
        f"--{field}={value}"
        for field, value in asdict(replace(options, out=None, memory_of=name)).items()
        if value is not None
    ]
    result = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    return float(result.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown, every ratio against SAELens, or against the default options."""
    base = results.get(SAELENS, results[OURS])
    lines = [
        "| | forward-backward | | full step | | memory of a step | |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        cells = []
        for kind, unit, scale in (
            ("forward_backward", "ms", 1e3),
            ("step", "ms", 1e3),
            ("memory_mib", "MiB", 1),
        ):
            if kind not in row:
                cells += ["", ""]
                continue
            value = row[kind] * scale
            if unit == "MiB" and min(value, base[kind]) < 1:  # within what the process holds anyway
                cells += ["< 1 MiB" if value < 1 else f"{value:.0f} MiB", ""]
                continue
            cells.append(f"{value:.0f} {unit}" if value >= 10 else f"{value:.2f} {unit}")
            cells.append(f"{base[kind] / row[kind]:.{1 if SAELENS in results else 2}f}×")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def conditions(options: Options) -> dict[str, Any]:
    import sae_lens

    return {
        **{k: v for k, v in asdict(options).items() if k not in ("out", "memory_of")},
        "widths": paper_widths(options.d_sae),
        "processor": torch.cuda.get_device_name()
        if options.device != "cpu"
        else _cpu_name() or platform.machine(),
        "torch": torch.__version__,
        "sae_lens": sae_lens.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), None)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_arguments(Options, dest="options")
    options: Options = parser.parse_args().options
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print(measure_memory(options, options.memory_of))
        return

    peers = [SAELENS, SAELENS_FLAT, *([PEER] if _has_peer() else [])]
    names = [OURS, *VARIANTS] if options.variants else [OURS, OURS_FLAT, REFERENCE, *peers]
    results = measure_times(options, names)
    for name in tqdm(names, desc="Memory", disable=None):
        results[name]["memory_mib"] = _memory_in_own_process(options, name)

    text = report(options, results)
    print(text)
    if options.out is not None:
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text)
        record = {"conditions": conditions(options), "results": results}
        out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


def report(options: Options, results: dict[str, dict[str, float]]) -> str:
    """The command, its table, the ratios that sum it up, and the conditions, as Markdown."""
    ours, encode = results[OURS], results[ENCODE]["forward_backward"]
    flat, peer = results.get(OURS_FLAT), results.get(SAELENS)
    ratios = (
        {}
        if flat is None or peer is None
        else {
            "forward-backward, SAELens / ours": peer["forward_backward"] / ours["forward_backward"],
            "full step, SAELens / ours": peer["step"] / ours["step"],
            "forward-backward, ours / encode product": ours["forward_backward"] / encode,
            "forward-backward, five levels / one level": ours["forward_backward"]
            / flat["forward_backward"],
        }
    )
    return "\n".join(
        [
            f"`{_command(options)}`",
            "",
            table(results),
            "",
            *(f"- {name}: {value:.2f}" for name, value in ratios.items()),
            "",
            ", ".join(f"{name} {value}" for name, value in conditions(options).items()),
            "",
        ]
    )


def _command(options: Options) -> str:
    """The command line that repeats this run."""
    defaults = asdict(Options())
    flags = [
        f"--{name} {value}"
        for name, value in asdict(options).items()
        if value != defaults[name] and name != "out"
    ]
    return " ".join(["python benchmarks/step_time.py", *flags])


if __name__ == "__main__":
    main()
