"""Run by torchrun: runs of several processes that end in every way there is."""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import LoggingConfig

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from tests.tiny import D_MODEL, N_CTX, runner_config, tiny_model, token_dataset

RANK, N = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
BATCH, N_STEPS, BROKEN_BATCH = 96, 12, 6
Batches = Iterator[torch.Tensor]


def nan(batches: Batches) -> torch.Tensor:
    return next(batches) * torch.nan


def end(batches: Batches) -> torch.Tensor:
    raise StopIteration


def unreadable(batches: Batches) -> torch.Tensor:
    raise OSError("the disk is gone")


def sigterm(batches: Batches) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return next(batches)


def killed(batches: Batches) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return next(batches)


def stuck(batches: Batches) -> torch.Tensor:
    time.sleep(12)
    return next(batches)


FAULTS: dict[str, Callable[[Batches], torch.Tensor]] = {
    function.__name__: function for function in (nan, end, unreadable, sigterm, killed, stuck)
}


class FaultyStore:
    """A store of which one batch is a fault, on one rank."""

    def __init__(self, store: Any, fault: str, rank: int) -> None:
        self._store, self._fault, self._n = store, FAULTS[fault], 0
        self._is_faulty = rank == RANK

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __next__(self) -> torch.Tensor:
        self._n += 1
        # a signal lets the step of the batch that is drawn finish
        n = BROKEN_BATCH - (self._fault is sigterm)
        return self._fault(self._store) if self._is_faulty and self._n == n else next(self._store)

    def __iter__(self) -> "FaultyStore":
        return self


def run(
    folder: Path, fault: str | None = None, rank: int = 1, timeout: float = 60, **options: Any
) -> dict[str, Any]:
    """How a run ended on this rank.

    Each batch is one pass of the model, so none waits in a buffer, and any number of processes
    draws the same joined batches, in another order of their rows.
    """
    torch.manual_seed(0)
    k = 5 if fault == "other config" and rank == RANK else 4
    sae = MatryoshkaTrainingSAEConfig(
        d_in=D_MODEL, d_sae=64, k=k, matryoshka_widths=[8, 64], latent_order="frequency"
    )
    n_prompts = BATCH // N_CTX // N
    settings = {
        "train_batch_size_tokens": BATCH,
        "training_tokens": BATCH * N_STEPS,
        "store_batch_size_prompts": n_prompts,
        "n_batches_in_buffer": n_prompts,
        "activations_mixing_fraction": 0,
        "feature_sampling_window": BROKEN_BATCH - 1,
        **options,
    }
    cfg = runner_config(sae, folder, **settings)
    try:
        if fault == "arrays":
            source: dict[str, Any] = {"activations": folder.parent / "rows.npy"}
        else:
            source = {"override_model": tiny_model(), "override_dataset": token_dataset()}
        runner = MatryoshkaTrainingRunner(
            cfg, **source, process_timeout=timeout, shard_moments="sharded" in folder.name
        )
        if fault in FAULTS:
            runner.activations_store = FaultyStore(runner.activations_store, fault, rank)  # type: ignore[assignment]
        runner.run()
    except BaseException as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "checkpoint": str(getattr(error, "checkpoint", None)),
        }
    return {"n_training_samples": cfg.training_tokens}


def checkpoint_of(folder: Path) -> Path:
    """What a run saved that its batch 6 ended."""
    return next((folder / "checkpoints").glob(f"*/{BATCH * (BROKEN_BATCH - 1)}"))


def logged(folder: Path) -> dict[str, Any]:
    """How a run ended that logs to W&B, evaluates and fetches batches ahead."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    logger = LoggingConfig(wandb_log_frequency=4, eval_every_n_wandb_logs=2)
    return run(folder, logger=logger, prefetch_llm_batches=True)


def main(out: Path, faults: list[str]) -> None:
    ends = {}
    for fault in faults:
        name, _, rank = fault.partition("@")
        folder = out / name.replace(" ", "_")
        if name.startswith("resume"):
            checkpoint = checkpoint_of(out / name.removeprefix("resume "))
            ends[fault] = run(folder, resume_from_checkpoint=str(checkpoint))
        elif name == "logged":
            ends[fault] = logged(folder)
        else:
            name = name.removeprefix("sharded ")
            timeout = 5 if name == "stuck" else 60
            ends[fault] = run(folder, name, int(rank or 1), timeout)
        (out / f"rank_{RANK}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2:])
