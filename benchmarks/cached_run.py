"""A whole training run of the demo's shape: with its language model, and from cached activations.

    python benchmarks/cached_run.py

Both are `MatryoshkaTrainingRunner`'s, on the demo's model, one after the other in each round.
Set-up is not counted; the activations are written in float16 before the first round.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from contestants import OURS
from measuring import spread
from runner_throughput import Options as ThroughputOptions
from runner_throughput import model_and_data, run_config
from sae_lens import ActivationsStore
from simple_parsing import ArgumentParser

from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.util.markdown import markdown_table


@dataclass
class Options:
    """What is measured."""

    training_tokens: int = 300_000
    threads: int = 1
    rounds: int = 3
    out: str | None = None  # write OUT.md and OUT.json


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_arguments(Options, dest="options")
    options: Options = parser.parse_args().options
    records.silence_libraries()
    torch.set_num_threads(options.threads)
    shape = ThroughputOptions(model="demo", training_tokens=options.training_tokens)
    cfg = run_config(OURS, shape)
    model, texts = model_and_data(shape, cfg.context_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.npy"
        store = ActivationsStore.from_config(model, cfg, override_dataset=texts)
        n_batches = cfg.training_tokens // cfg.train_batch_size_tokens
        np.save(path, torch.cat([next(store) for _ in range(n_batches)]).half().cpu().numpy())
        sources: dict[str, dict[str, Any]] = {
            "language model": {"override_model": model, "override_dataset": texts},
            "cached activations": {"activations": path},
        }
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(options.rounds):
            for name, source in sources.items():
                torch.manual_seed(0)
                runner = MatryoshkaTrainingRunner(replace(cfg), **source)
                began = time.perf_counter()
                runner.run()
                rates[name].append(cfg.training_tokens / (time.perf_counter() - began))
    median = {name: float(np.median(values)) for name, values in rates.items()}
    table = markdown_table(
        ["activations from", "tokens/s"], [[name, f"{rate:,.0f}"] for name, rate in median.items()]
    )
    ratio = (
        f"From cached activations: {median['cached activations'] / median['language model']:.1f} ×."
    )
    conditions = {"threads": options.threads, "rounds": options.rounds}
    record = {
        **records.start("cached_run.py", options, "cpu", conditions),
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
    }
    print(records.save(options.out, record, table, ratio))


if __name__ == "__main__":
    main()
