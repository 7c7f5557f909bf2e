"""The commands `levels` and `publish`, which take a trained SAE."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from datasets.exceptions import DatasetsError
from sae_lens import SAE, ActivationsStore
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from sae_lens_matryoshka.hub.formats import read_pickle
from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.hub.publish import check_names, publish, write_publication
from sae_lens_matryoshka.levels.report import draw_level_stats, level_note, level_table
from sae_lens_matryoshka.levels.slicing import set_widths, widths_of
from sae_lens_matryoshka.levels.stats import (
    LevelStats,
    measure_levels,
    measure_levels_in_model,
    measured_of,
    stats_from_weights,
)
from sae_lens_matryoshka.training.code_stats import CodeStats
from sae_lens_matryoshka.training.diagnosis import Finding, check_baseline, diagnose
from sae_lens_matryoshka.util.files import atomic_file

_ACTIVATION_SUFFIXES = (".npy", ".pt", ".safetensors")


def plan_levels(parser: argparse.ArgumentParser, words: list[str]) -> Callable[[], int]:
    """`levels RELEASE_OR_DIR [SAE_ID]`: what the levels of an SAE are like."""
    parser.description = (
        "Show the levels of an SAE: from its weights alone, or measured with --activations or "
        "--dataset."
    )
    parser.add_argument("release_or_dir", help="a folder, or a release or repository and SAE_ID")
    parser.add_argument("sae_id", nargs="?", help="its id in the release or repository")
    _add_measuring(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw L0 and variance explained")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON as well")
    parser.add_argument(
        "--diagnose", action="store_true", help="say what looks wrong with the SAE, and what to try"
    )
    parser.add_argument(
        "--baseline-explained-variance",
        type=float,
        metavar="SHARE",
        help="of a BatchTopK SAE of this width and k, to compare with, such as 0.78",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="the folder of such an SAE, to measure as well"
    )
    parsed = parser.parse_args(words)
    _check_measuring(parsed)
    _check_diagnosing(parsed)
    if parsed.plot and not (parsed.activations or parsed.dataset):
        raise ValueError(
            "--plot draws L0 and variance explained, which are measured: give --activations or "
            "--dataset as well."
        )
    if parsed.plot and parsed.plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot={str(parsed.plot)!r} is not accepted: give a .png, .pdf or .svg.")
    for file in filter(None, (parsed.plot, parsed.json)):
        if not file.parent.is_dir():
            raise ValueError(f"{file.parent} is not a folder to write {file.name} to.")
    return partial(_levels, parsed)


def _levels(parsed: argparse.Namespace) -> int:
    sae = load_sae(
        parsed.release_or_dir,
        parsed.sae_id,
        matryoshka_widths=parsed.matryoshka_widths,
        device=parsed.device,
    )
    codes = CodeStats()
    baseline = _baseline(parsed)  # first, since it may be no SAE
    rows = _stats(sae, parsed, codes)
    print(f"{level_table(rows)}\n\n{level_note(rows, _measured_on(parsed))}")
    findings: list[Finding] = []
    if parsed.diagnose:
        findings = diagnose(measured_of(sae, rows, codes, baseline))
        print(
            "\n"
            + ("\n".join(f"- {f.kind}: {f.message}" for f in findings) or "Nothing stands out.")
        )
    name = " ".join(filter(None, (parsed.release_or_dir, parsed.sae_id)))
    if parsed.json:
        report = {
            "sae": name,
            "measured_on": _measured_on(parsed),
            "levels": [row._asdict() for row in rows],
        }
        if parsed.diagnose:
            report["findings"] = [finding._asdict() for finding in findings]
        with atomic_file(parsed.json) as unfinished:
            unfinished.write_text(json.dumps(report, indent=2) + "\n")
    if parsed.plot:
        draw_level_stats(parsed.plot, rows, title=name)
    return 0


def _baseline(parsed: argparse.Namespace) -> float | None:
    """The variance that the baseline explains, given or measured."""
    if parsed.baseline is None:
        return parsed.baseline_explained_variance
    sae = load_sae(str(parsed.baseline), device=parsed.device)
    set_widths(sae, [sae.cfg.d_sae])  # it is measured whole
    return _stats(sae, parsed)[-1].explained_variance


def _check_diagnosing(parsed: argparse.Namespace) -> None:
    if parsed.diagnose and not (parsed.activations or parsed.dataset):
        raise ValueError(
            "--diagnose goes by what is measured: give --activations or --dataset as well."
        )
    share, folder = parsed.baseline_explained_variance, parsed.baseline
    if not parsed.diagnose and (share is not None or folder):
        raise ValueError("a baseline is for --diagnose: give that as well.")
    if share is not None and folder:
        raise ValueError("--baseline and --baseline-explained-variance say the same: give one.")
    if share is not None:
        check_baseline("--baseline-explained-variance", share)
    if folder and not folder.is_dir():
        raise ValueError(f"--baseline={str(folder)!r} is no folder.")


def plan_publish(parser: argparse.ArgumentParser, words: list[str]) -> Callable[[], int]:
    """`publish DIR REPO_ID`: an SAE, its levels and a model card on the Hub."""
    parser.description = (
        "Upload an SAE with a model card to the Hugging Face Hub, as the user that `hf auth login` "
        "or HF_TOKEN names."
    )
    parser.add_argument("release_or_dir", metavar="DIR", help="the folder of a trained SAE")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; made if it does not exist")
    parser.add_argument("--sae-id", help="its folder in the repository; default: the hook's name")
    parser.add_argument(
        "--with-levels", action="store_true", help="each inner level as an SAE id of its own, too"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--dry-run", action="store_true", help="only write the folder that would be uploaded"
    )
    parser.add_argument(
        "--out", type=Path, help="that folder; default: published/REPO_ID (with --dry-run)"
    )
    _add_measuring(parser)
    parsed = parser.parse_args(words)
    _check_measuring(parsed)
    if parsed.out and not parsed.dry_run:
        raise ValueError("--out goes with --dry-run: without it nothing is kept on disk.")
    if parsed.dry_run:
        parsed.out = parsed.out or Path("published") / parsed.repo_id
    check_names(parsed.repo_id, parsed.sae_id, parsed.out)
    return partial(_publish, parsed)


def _publish(parsed: argparse.Namespace) -> int:
    sae = load_sae(
        parsed.release_or_dir, matryoshka_widths=parsed.matryoshka_widths, device=parsed.device
    )
    options: dict[str, Any] = {
        "matryoshka_widths": parsed.matryoshka_widths,
        "stats": _stats(sae, parsed),
        "measured_on": _measured_on(parsed),
        "with_levels": parsed.with_levels,
    }
    names = parsed.repo_id, parsed.sae_id
    if parsed.dry_run:
        write_publication(parsed.release_or_dir, parsed.out, *names, **options)
        print(f"{parsed.out} holds what would be uploaded to {parsed.repo_id}.")
        return 0
    card = publish(parsed.release_or_dir, *names, private=parsed.private, **options)
    print(f"{parsed.repo_id} is published; its card is {card}.")
    return 0


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """The options that say how to load an SAE and what to measure its levels on."""
    parser.add_argument(
        "--matryoshka-widths",
        type=widths_argument,
        metavar="W,W,…",
        help="level widths, for an SAE that does not say its own",
    )
    parser.add_argument(
        "--activations",
        type=Path,
        metavar="PATH",
        help="a .npy, .pt or .safetensors file of activations (…, d_in), or a folder that SAELens' "
        "CacheActivationsRunner wrote",
    )
    parser.add_argument(
        "--dataset", help="a data set of texts or tokens, run through the model of the SAE"
    )
    parser.add_argument("--model", help="the model's name, where the SAE does not say it")
    parser.add_argument(
        "--n-batches", type=int, default=10, help="batches of prompts to run (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size-prompts", type=int, default=16, help="prompts in each (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")


def widths_argument(text: str) -> list[int]:
    """Level widths as they are given on the command line."""
    return [int(width) for width in text.split(",")]


def _check_measuring(parsed: argparse.Namespace) -> None:
    if parsed.activations and parsed.dataset:
        raise ValueError("--activations and --dataset are two ways to measure: give one.")
    if parsed.model and not parsed.dataset:
        raise ValueError("--model needs --dataset: the texts to run it on.")
    if parsed.activations and not parsed.activations.exists():
        raise ValueError(f"--activations={str(parsed.activations)!r} does not exist.")
    if parsed.activations and not (
        parsed.activations.is_dir() or parsed.activations.suffix in _ACTIVATION_SUFFIXES
    ):
        raise ValueError(
            f"--activations={str(parsed.activations)!r} is not accepted: give a folder or one of "
            f"{', '.join(_ACTIVATION_SUFFIXES)}."
        )
    if parsed.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device={parsed.device!r} is not accepted: PyTorch sees no CUDA here.")
    for name in ("n_batches", "batch_size_prompts"):
        if getattr(parsed, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}={getattr(parsed, name)} is not accepted: give 1 or more.")


def _stats(
    sae: SAE[Any], parsed: argparse.Namespace, codes: CodeStats | None = None
) -> list[LevelStats]:
    widths_of(sae)  # before anything long begins
    if parsed.activations:
        return measure_levels(sae, _read_activations(parsed.activations, sae), codes=codes)
    if not parsed.dataset:
        return stats_from_weights(sae)
    metadata = sae.cfg.metadata
    for name in ("hook_name", "context_size", "prepend_bos"):
        if metadata[name] is None:
            raise ValueError(
                f"the metadata of this SAE has no {name}, so its model can't be run: measure it "
                "with --activations."
            )
    model_name = parsed.model or metadata.model_name
    if model_name is None:
        raise ValueError("the metadata of this SAE has no model_name: give --model.")
    model = _model(model_name, metadata.hook_name, metadata, parsed.device)
    try:
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=parsed.dataset,
            streaming=not Path(parsed.dataset).exists(),
            store_batch_size_prompts=parsed.batch_size_prompts,
            total_tokens=parsed.n_batches * parsed.batch_size_prompts * metadata.context_size,
            device=parsed.device,
        )
    except (DatasetsError, FileNotFoundError) as error:
        raise ValueError(f"--dataset={parsed.dataset!r} can't be read: {error}") from error
    return measure_levels_in_model(sae, model, store, parsed.n_batches, codes)


def _measured_on(parsed: argparse.Namespace) -> str:
    """What the table is of, without the folders of this machine."""
    return Path(parsed.activations).name if parsed.activations else parsed.dataset or "nothing"


def _model(name: str, hook_name: str, metadata: SAEMetadata, device: str) -> Any:
    try:
        with redirect_stdout(sys.stderr):  # TransformerLens prints; the table is to stand alone
            model = load_model(
                metadata.model_class_name or "HookedTransformer",
                name,
                device=device,
                model_from_pretrained_kwargs=metadata.model_from_pretrained_kwargs,
                hook_names=[hook_name],
            )
    except ValueError as error:
        near = difflib.get_close_matches(name, OFFICIAL_MODEL_NAMES, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        reason = str(error).partition(". Valid official")[0]
        raise ValueError(f"the model {name!r} can't be loaded: {reason}{hint}") from error
    except OSError as error:
        raise OSError(f"the model {name!r} can't be loaded: {error}") from error
    if hook_name not in model.hook_dict:
        raise ValueError(f"the model {name!r} has no hook {hook_name!r}.")
    return model


def _read_activations(path: Path, sae: SAE[Any]) -> Any:
    if path.is_dir():
        try:
            data = load_from_disk(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is no folder of activations: {error}") from error
        hook_name = sae.cfg.metadata.hook_name
        if not isinstance(data, Dataset) or hook_name not in data.column_names:
            raise ValueError(f"{path} holds no activations of {hook_name}.")
        batches = data.with_format("torch").iter(batch_size=32)
        return (batch[hook_name] for batch in batches)  # type: ignore[index]
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        tensors = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    except Exception as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if len(tensors) != 1:
        raise ValueError(f"{path} holds {len(tensors)} tensors: give one of activations.")
    return next(iter(tensors.values()))
