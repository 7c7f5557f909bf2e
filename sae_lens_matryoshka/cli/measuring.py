"""Measuring the levels of an SAE with the options of `options.add_measuring`."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from sae_lens import SAE, ActivationsStore
from sae_lens.load_model import load_model

from sae_lens_matryoshka.activations.batches import rows_per_buffer
from sae_lens_matryoshka.activations.index import BLOCK_ROWS
from sae_lens_matryoshka.activations.shards import Activations, open_activations
from sae_lens_matryoshka.hub.formats import read_pickle
from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.levels.stats import (
    LevelStats,
    measure_levels,
    measure_levels_in_model,
    stats_from_weights,
)
from sae_lens_matryoshka.training.code_stats import CodeStats
from sae_lens_matryoshka.tree.sources import ModelOnTexts
from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.devices import check_device
from sae_lens_matryoshka.util.hook_names import short_model_name

# of every SAE: half precision is 60 times as slow on a CPU without instructions for it
MEASURED_DTYPE = "float32"
_SUFFIXES = (".npy", ".pt", ".safetensors")
_N_BATCHES = 16


def check_measuring(args: argparse.Namespace) -> None:
    """Check the options before anything loads.

    Raises:
        ValueError: one is not accepted, or two contradict each other.
    """
    path = args.activations
    if path and args.dataset:
        raise ValueError("--activations and --dataset are two ways to measure: give one.")
    if args.model and not args.dataset and not getattr(args, "serve", False):
        raise ValueError("--model needs --dataset: the texts to run it on.")
    if getattr(args, "no_ce_loss", False) and not args.dataset:
        raise ValueError("--no-ce-loss is for --dataset: give that as well.")
    if path and not (path.is_dir() or (path.is_file() and path.suffix in _SUFFIXES)):
        accepted = f"an existing folder, or an existing file of {', '.join(_SUFFIXES)}"
        raise invalid_option("--activations", str(path), accepted)
    check_device("--device", args.device)


def load_given(args: argparse.Namespace) -> SAE[Any]:
    """The SAE that a command is about, in float32; as `load_sae`."""
    return load_sae(
        args.release_or_dir,
        args.sae_id,
        matryoshka_widths=args.matryoshka_widths,
        device=args.device,
        dtype=MEASURED_DTYPE,
    )


def measure(
    sae: SAE[Any], args: argparse.Namespace, codes: CodeStats | None = None
) -> list[LevelStats]:
    """Measure the levels of `sae` on --activations, on --dataset in its model, or from its weights.

    Raises:
        ValueError: `sae` has no level widths, or the activations, the dataset or the model can't be
            read or do not fit it.
        OSError: the model can't be downloaded.
    """
    widths_of(sae)  # raises before anything long begins
    if args.activations:
        return measure_levels(sae, _read_activations(args.activations, sae), codes=codes)
    if not args.dataset:
        return stats_from_weights(sae)
    metadata = sae.cfg.metadata
    for name in ("hook_name", "context_size", "prepend_bos"):
        if metadata[name] is None:
            raise ValueError(
                f"the metadata of this SAE has no {name}, so its model can't be run: measure it "
                "with --activations."
            )
    model = load_model_of(sae, args)
    try:
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=args.dataset,
            streaming=not Path(args.dataset).exists(),
            store_batch_size_prompts=args.batch_size_prompts,
            total_tokens=args.n_batches * args.batch_size_prompts * metadata.context_size,
            device=args.device,
        )
    except (DatasetsError, FileNotFoundError) as error:
        raise ValueError(f"--dataset={args.dataset!r} can't be read: {error}") from error
    if args.no_ce_loss:
        batches = ModelOnTexts(sae, model, store, args.dataset).batches(0)
        seen = (batch.x for batch in islice(batches, args.n_batches))
        return measure_levels(sae, seen, args.n_batches, codes)
    return measure_levels_in_model(sae, model, store, args.n_batches, codes)


def measured_on(args: argparse.Namespace) -> str:
    """What the levels were measured on, without the folders of this machine."""
    return args.activations.name if args.activations else args.dataset or "nothing"


def load_model_of(sae: SAE[Any], args: argparse.Namespace) -> Any:
    """The model of an SAE, or --model, as SAELens loads it.

    Raises:
        ValueError: no model is named, it is not known, or it lacks the SAE's hook.
        OSError: it can't be loaded.
    """
    metadata = sae.cfg.metadata
    name = args.model or metadata.model_name
    if name is None:
        raise ValueError("the metadata of this SAE has no model_name: give --model.")
    class_name = metadata.model_class_name or "HookedTransformer"
    if class_name == "HookedTransformer":
        short_model_name(name)  # suggests names for one that is not known
    try:
        with redirect_stdout(sys.stderr):  # TransformerLens prints; stdout is for the table
            model = load_model(
                class_name,
                name,
                device=args.device,
                model_from_pretrained_kwargs=metadata.model_from_pretrained_kwargs,
                hook_names=[metadata.hook_name],
            )
    except OSError as error:
        missing = "" if Path(name).is_dir() else f"; {Path.cwd()} has no folder of that name"
        raise OSError(f"the model {name!r} can't be loaded{missing}: {error}") from error
    if metadata.hook_name not in model.hook_dict:
        raise ValueError(f"the model {name!r} has no hook {metadata.hook_name!r}.")
    return model


def open_given(path: Path, sae: SAE[Any]) -> Activations:
    """Open --activations for an SAE; ValueError if they can't be read."""
    source: Any = path
    if path.suffix == ".pt" and not path.is_dir():
        source = list(read_pickle(path).values())
        if len(source) != 1:
            raise ValueError(f"{path} holds {len(source)} tensors: give one of activations.")
    return open_activations(source, sae.cfg.metadata.hook_name)


def _read_activations(path: Path, sae: SAE[Any]) -> Iterator[torch.Tensor]:
    activations = open_given(path, sae)
    # as many batches as a standard error of L0 needs, or more where they would not fit in memory
    n_rows = min(activations.n_rows // _N_BATCHES, rows_per_buffer(activations.d_in))
    return activations.chunks(max(1, n_rows // BLOCK_ROWS))
