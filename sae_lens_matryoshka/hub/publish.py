"""Publishing an SAE and its levels on the Hugging Face Hub, with a model card."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any

from huggingface_hub import HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] of the library it is built on
)
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE, TopKSAE, upload_saes_to_huggingface
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_matryoshka.hub.load import hub_error, load_sae
from sae_lens_matryoshka.levels.report import level_note, level_table
from sae_lens_matryoshka.levels.slicing import levels, set_widths, widths_of
from sae_lens_matryoshka.levels.stats import LevelStats, stats_from_weights
from sae_lens_matryoshka.util.files import atomic_folder

CARD = "README.md"
# Where a run kept its files and its logs says nothing of the SAE, and something of its owner.
_PRIVATE_FIELDS = {
    "logger",
    "output_path",
    "checkpoint_path",
    "resume_from_checkpoint",
    "from_pretrained_path",
    "cached_activations_path",
}


def publish(
    folder: Path | str,
    repo_id: str,
    sae_id: str | None = None,
    *,
    sae: SAE[Any] | None = None,
    matryoshka_widths: Sequence[int] | None = None,
    stats: Sequence[LevelStats] | None = None,
    measured_on: str = "its data",
    with_levels: bool = False,
    private: bool = False,
) -> str:
    """Upload an SAE to the Hub with SAELens' uploader, and a model card beside it.

    A card that the repository has already is kept, unless it is of this SAE; the new one is then
    put beside the weights.

    Args:
        folder: An SAE as `load_sae` takes it.
        repo_id: `owner/name`; made if it does not exist.
        sae_id: The SAE's folder in the repository; the hook's name where left out.
        sae: The SAE that `load_sae` loaded from `folder`, if you have it already.
        matryoshka_widths: As `load_sae` takes them.
        stats: What the card says of the levels; what the weights tell, where left out.
        measured_on: What `stats` were measured on, for the card.
        with_levels: Upload each inner level as well, as an SAE of its own: `SAE_ID/level_W`.
        private: Make a new repository private.

    Returns:
        Where the card is in the repository.

    Raises:
        ValueError: `folder`, `repo_id` or `sae_id` is not accepted.
        PermissionError: the Hub wants a token that may write to `repo_id`.
        ConnectionError: the Hub can't be reached, or failed; run again, what is up stays.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "publication"
        sae_ids = write_publication(
            folder,
            out,
            repo_id,
            sae_id,
            sae=sae,
            matryoshka_widths=matryoshka_widths,
            stats=stats,
            measured_on=measured_on,
            with_levels=with_levels,
        )
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            upload_saes_to_huggingface(
                {sae_id: out / sae_id for sae_id in sae_ids}, repo_id, add_default_readme=False
            )
            is_foreign = api.file_exists(repo_id, CARD) and _loading(repo_id, sae_ids[0]) not in (
                Path(hf_hub_download(repo_id, CARD)).read_text(encoding="utf-8")
            )
            card = f"{sae_ids[0]}/{CARD}" if is_foreign else CARD
            api.upload_file(
                path_or_fileobj=out / CARD,
                path_in_repo=card,
                repo_id=repo_id,
                commit_message=f"Model card of {sae_ids[0]}",
            )
        except (HTTPError, RuntimeError) as error:  # the second one where a large file fails
            raise hub_error(repo_id, error) from error
    return card


def write_publication(
    folder: Path | str,
    out: Path,
    repo_id: str,
    sae_id: str | None = None,
    *,
    sae: SAE[Any] | None = None,
    matryoshka_widths: Sequence[int] | None = None,
    stats: Sequence[LevelStats] | None = None,
    measured_on: str = "its data",
    with_levels: bool = False,
) -> list[str]:
    """Write what `publish` uploads: the card, and one folder per SAE as SAELens saves it.

    Args:
        out: Folder that appears when it is whole; must not exist, or be empty.

    Returns:
        The ids of the SAEs, which are their folders in `out`; the whole SAE first.

    Raises:
        ValueError: `folder`, `out`, `repo_id` or `sae_id` is not accepted.
    """
    check_names(repo_id, sae_id, out)
    if sae is None:
        sae = load_sae(folder, matryoshka_widths=matryoshka_widths)
    else:
        sae = copy.copy(sae)  # with the same weights, and metadata of its own
        sae.cfg = copy.deepcopy(sae.cfg)
        if matryoshka_widths is not None:
            set_widths(sae, matryoshka_widths)
    metadata = sae.cfg.metadata
    metadata.model_name = _without_folders(metadata.model_name)
    metadata.dataset_path = _without_folders(metadata.dataset_path)
    whole: str = sae_id or metadata.hook_name or Path(folder).resolve().name
    stats = stats_from_weights(sae) if stats is None else stats
    saes = {whole: sae}
    if with_levels:
        inner = levels(sae)[:-1]
        saes |= {f"{whole}/level_{level.cfg.d_sae}": level for level in inner}
    with atomic_folder(out) as unfinished:
        try:
            for name, published in saes.items():
                published.save_model(unfinished / name)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{out} can't be written: {error}") from error
        if (Path(folder) / SPARSITY_FILENAME).is_file():
            shutil.copy(Path(folder) / SPARSITY_FILENAME, unfinished / whole)
        training = _training(sae, Path(folder))
        (unfinished / whole / RUNNER_CFG_FILENAME).write_text(json.dumps(training, indent=2))
        note = level_note(stats, measured_on)
        card = _card(sae, repo_id, list(saes), f"{level_table(stats)}\n\n{note}", training)
        (unfinished / CARD).write_text(card, encoding="utf-8")
    return list(saes)


def check_names(repo_id: str, sae_id: str | None = None, out: Path | None = None) -> None:
    """Check what `write_publication` is told, before anything is loaded.

    Raises:
        ValueError: `repo_id`, `sae_id` or `out` is not accepted.
    """
    if not _is_repo_id(repo_id):
        raise ValueError(
            f"repo_id={repo_id!r} is not accepted: give owner/name, of letters, digits, '-', '_' "
            "and '.'."
        )
    if sae_id is not None:
        path = PurePosixPath(sae_id)
        plain = sae_id == path.as_posix() and not path.is_absolute()
        if not plain or ".." in path.parts or sae_id in (".", CARD):
            raise ValueError(f"sae_id={sae_id!r} is not accepted: give a folder in the repository.")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: give a new or an empty folder (--out).")


def _card(
    sae: SAE[Any],
    repo_id: str,
    sae_ids: list[str],
    table: str,
    training: dict[str, Any],
) -> str:
    metadata = sae.cfg.metadata
    model, dataset = metadata.model_name, metadata.dataset_path
    is_published = dataset and _is_repo_id(dataset) and not Path(dataset).exists()
    front_matter = ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", "sae", "matryoshka", "mechanistic-interpretability"],
        base_model=_hub_name(model),
        datasets=[dataset] if is_published else None,
    )
    cut = metadata.matryoshka_level
    of = f" (the first of {cut['d_sae']} latents)" if cut and cut["d_sae"] > cut["width"] else ""
    level_ids = "".join(f"- `{_loading(repo_id, name)}`\n" for name in sae_ids[1:])
    # The levels of a TopK SAE choose anew among their latents.
    prefixes = ", where the first `w` latents are the level of width `w`"
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        front_matter=front_matter.to_yaml(),
        model=_hub_name(model) or model or "an unnamed model",
        hook_name=metadata.hook_name or "unknown",
        d_in=sae.cfg.d_in,
        d_sae=f"{sae.cfg.d_sae}{of}",
        dataset=dataset or "unknown",
        context_size=metadata.context_size or "unknown",
        table=table,
        prefixes="" if isinstance(sae, TopKSAE) else prefixes,
        loading=_loading(repo_id, sae_ids[0]),
        repo_id=repo_id,
        sae_id=sae_ids[0],
        second=min(1, len(widths_of(sae)) - 1),
        level_ids=f"\nEach inner level is also an SAE of its own:\n\n{level_ids}"
        if level_ids
        else "",
        training=json.dumps(training, indent=2),
    )


def _hub_name(model: str | None) -> str | None:
    """The model's name on the Hub, where TransformerLens knows it or it looks like one."""
    if model is None:
        return None
    try:
        return get_official_model_name(model)
    except ValueError:
        return model if _is_repo_id(model) else None


def _is_repo_id(name: str) -> bool:
    """Whether `name` may be `owner/name` on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _without_folders(name: str | None) -> str | None:
    """A path's last part; a name, or `owner/name`, as it is."""
    if name is None or "/" not in name or _is_repo_id(name):
        return name
    return Path(name).name


def _loading(repo_id: str, sae_id: str) -> str:
    """How plain SAELens loads it."""
    return f'SAE.from_pretrained("{repo_id}", "{sae_id}")'


def _training(sae: SAE[Any], folder: Path) -> dict[str, Any]:
    """The run's config as SAELens saved it, or else what the metadata keeps of it."""
    metadata = sae.cfg.metadata
    if (folder / RUNNER_CFG_FILENAME).is_file():
        run = json.loads((folder / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))
        run = {name: value for name, value in run.items() if name not in _PRIVATE_FIELDS}
        return {**run, "model_name": metadata.model_name, "dataset_path": metadata.dataset_path}
    return {
        "training_architecture": metadata.training_architecture,
        **(metadata.training_architecture_details or {}),
    }
