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


def take_share(store: ActivationsStore, processes: Processes, batch_size: int) -> bool:
    """Let a store that has not read a text read this process's share: every n-th text.

    A stream of files whose number the processes divide is split by files instead.

    Args:
        store: SAELens' activation store.
        processes: The processes of the run.
        batch_size: Rows of the joined batch.

    Returns:
        Whether the files are split.

    Raises:
        ValueError: there are fewer texts than processes, or the data set can't be split.
    """
    n, is_by_files = processes.n, False
    if isinstance(store.dataset, Dataset):
        if len(store.dataset) < n:
            raise ValueError(f"The dataset has {len(store.dataset)} texts for {n} processes.")
        store.dataset = store.dataset.shard(n, processes.rank, contiguous=False)
    elif isinstance(store.dataset, IterableDataset):
        is_by_files = store.dataset.n_shards % n == 0
        store.dataset = split_dataset_by_node(store.dataset, processes.rank, n)
    else:
        raise ValueError(
            f"The data set is a {type(store.dataset).__name__}, which several processes can't "
            "share: give a Dataset or IterableDataset of `datasets`."
        )
    store.train_batch_size_tokens = batch_size // n
    return is_by_files


def save_positions(folder: Path, processes: Processes, is_by_files: bool) -> None:
    """Write to a checkpoint the position of each process, and the one for a single process."""
    n_texts = torch.tensor(processes.n_texts)
    # SAELens counts a text when it asks for the next: the last of each process is not counted
    n_joined = (n_texts.max() + 1) * processes.n - 1
    state = {
        "n_dataset_processed": n_joined,
        "n_texts_of_ranks": n_texts,
        "is_by_files": torch.tensor(is_by_files),
    }
    save_file(state, folder / ACTIVATIONS_STORE_STATE_FILENAME)


def load_position(store: ActivationsStore, folder: Path, processes: Processes | None) -> None:
    """Read on after the texts that a checkpoint's run has read.

    On another number of processes all of them start after the text that the furthest one had read,
    which leaves out at most what the others were behind.

    Raises:
        ValueError: the files were split over another number of processes.
    """
    state = load_file(folder / ACTIVATIONS_STORE_STATE_FILENAME)
    by_rank = state.get("n_texts_of_ranks", torch.empty(1))
    rank, n = (0, 1) if processes is None else (processes.rank, processes.n)
    if len(by_rank) != n and state.get("is_by_files"):
        raise ValueError(
            f"{folder} is of a run whose {len(by_rank)} processes read files of their own: resume "
            "it on as many."
        )
    if processes is None:
        store.load_from_checkpoint(folder)
        return
    if len(by_rank) == n:
        position = by_rank[rank]
    else:
        n_read = state["n_dataset_processed"] + 1
        position = -(-n_read // n) - 1
    with TemporaryDirectory() as own:
        save_file({"n_dataset_processed": position}, f"{own}/state.safetensors")
        store.load(f"{own}/state.safetensors")
