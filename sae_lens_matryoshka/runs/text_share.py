"""Each process's share of the texts, and the position in it that a checkpoint holds."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens import ActivationsStore
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka.runs.processes import Processes


def take_share(store: ActivationsStore, processes: Processes, batch_size: int) -> None:
    """Let a store that has not read a text read this process's share: every n-th text.

    A stream of files whose number the processes divide is split by files instead.

    Args:
        store: SAELens' activation store.
        processes: The processes of the run.
        batch_size: Rows of the joined batch.

    Raises:
        ValueError: the batch can't be split evenly, or there are fewer texts than processes.
    """
    n = processes.n
    if isinstance(store.dataset, Dataset):
        if len(store.dataset) < n:
            raise ValueError(f"The dataset has {len(store.dataset)} texts for {n} processes.")
        store.dataset = store.dataset.shard(n, processes.rank, contiguous=False)
    elif isinstance(store.dataset, IterableDataset):
        store.dataset = split_dataset_by_node(store.dataset, processes.rank, n)
    store.train_batch_size_tokens = batch_size // n


def save_positions(folder: Path, processes: Processes) -> None:
    """Write the state of the store to a checkpoint: for each process, and as one process has it."""
    n_texts = torch.tensor(processes.n_texts)
    # SAELens counts a text when it asks for the next: the last of each process is not counted
    n_joined = (n_texts.max() + 1) * processes.n - 1
    state = {"n_dataset_processed": n_joined, "n_texts_of_ranks": n_texts}
    save_file(state, folder / ACTIVATIONS_STORE_STATE_FILENAME)


def load_position(store: ActivationsStore, folder: Path, processes: Processes) -> None:
    """Read on after the texts that a checkpoint's run has read.

    On another number of processes all of them start after the text that the furthest one had read,
    which leaves out at most what the others were behind.
    """
    state = load_file(folder / ACTIVATIONS_STORE_STATE_FILENAME)
    by_rank = state.get("n_texts_of_ranks", torch.empty(0))
    if len(by_rank) == processes.n:
        position = by_rank[processes.rank]
    else:
        n_read = state["n_dataset_processed"] + 1
        position = -(-n_read // processes.n) - 1
    with TemporaryDirectory() as own:
        save_file({"n_dataset_processed": position}, f"{own}/state.safetensors")
        store.load(f"{own}/state.safetensors")
