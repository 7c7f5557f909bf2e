"""Publishing an SAE and its levels on the Hugging Face Hub, with a model card."""

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] of the HTTP library below
)
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE, TopKSAE, upload_saes_to_huggingface
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_matryoshka.hub.load import hub_error, load_sae
from sae_lens_matryoshka.levels.report import level_note, level_table
from sae_lens_matryoshka.levels.slicing import levels, widths_of
from sae_lens_matryoshka.levels.stats import LevelStats, stats_from_weights
from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.files import atomic_folder

CARD = "README.md"


def publish(
    folder: Path | str,
    repo_id: str,
    sae_id: str | None = None,
    *,
    private: bool = False,
    **options: Any,
) -> str:
    """Upload an SAE to the Hub with SAELens' uploader, and a model card beside it.

    The repository keeps the card that it has, unless that is of this SAE; the new card then goes
    beside the weights.

    Args:
        folder: An SAE as `load_sae` takes it.
        repo_id: `owner/name`; created if it does not exist.
        sae_id: The SAE's folder in the repository; by default the hook's name.
        private: Make a new repository private.
        options: Further arguments of `write_publication`.

    Returns:
        Path of the card in the repository.

    Raises:
        ValueError: `folder`, `repo_id` or `sae_id` is not accepted.
        PermissionError: the Hub needs a token with write access to `repo_id`.
        ConnectionError: the Hub can't be reached, or fails; what is uploaded by then stays, and
            publishing again completes it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "publication"
        sae_ids = write_publication(folder, out, repo_id, sae_id, **options)
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
        except (HTTPError, RuntimeError) as error:  # RuntimeError: the upload of a large file
            raise hub_error(repo_id, error) from error
    return card


def write_publication(
    folder: Path | str,
    out: Path,
    repo_id: str,
    sae_id: str | None = None,
    *,
    sae: SAE[Any] | None = None,
    stats: Sequence[LevelStats] | None = None,
    measured_on: str = "its data",
    with_levels: bool = False,
) -> list[str]:
    """Write what `publish` uploads: the card, and one folder per SAE as SAELens saves it.

    Args:
        folder: An SAE as `load_sae` takes it.
        out: The folder to write; must not exist, or be empty.
        repo_id: As in `publish`.
        sae_id: As in `publish`.
        sae: What `load_sae` returned for `folder`, if it is loaded already.
        stats: Measures of the levels, for the card; by default from the weights alone.
        measured_on: What `stats` were measured on, for the card.
        with_levels: Include each inner level as an SAE of its own, with the id `SAE_ID/level_W`.

    Returns:
        The ids of the SAEs, which are their folders in `out`; the whole SAE first.

    Raises:
        ValueError: `folder`, `out`, `repo_id` or `sae_id` is not accepted.
    """
    check_names(repo_id, sae_id, out)
    sae = copy.copy(load_sae(folder) if sae is None else sae)
    sae.cfg = copy.deepcopy(sae.cfg)  # so that the caller's metadata stays as it is
    metadata = sae.cfg.metadata
    metadata.model_name = _without_folders(metadata.model_name)
    metadata.dataset_path = _without_folders(metadata.dataset_path)
    whole: str = sae_id or metadata.hook_name or Path(folder).resolve().name
    saes = {whole: sae}
    if with_levels:
        saes |= {f"{whole}/level_{level.cfg.d_sae}": level for level in levels(sae)[:-1]}
    training = _training(sae, Path(folder))
    stats = stats_from_weights(sae) if stats is None else stats
    card = _card(sae, repo_id, list(saes), training, stats, measured_on)
    with atomic_folder(out) as unfinished:
        try:
            for name, published in saes.items():
                published.save_model(unfinished / name)
        except SafetensorError as error:  # raised for a full disk
            raise OSError(f"{out} can't be written: {error}") from error
        if (Path(folder) / SPARSITY_FILENAME).is_file():
            shutil.copy(Path(folder) / SPARSITY_FILENAME, unfinished / whole)
        (unfinished / whole / RUNNER_CFG_FILENAME).write_text(training)
        (unfinished / CARD).write_text(card, encoding="utf-8")
    return list(saes)


def check_names(repo_id: str, sae_id: str | None = None, out: Path | None = None) -> None:
    """Check arguments of `write_publication` before anything is loaded.

    Raises:
        ValueError: `repo_id`, `sae_id` or `out` is not accepted.
    """
    if not _is_repo_id(repo_id):
        accepted = "owner/name, of letters, digits, '-', '_' and '.'"
        raise invalid_option("repo_id", repo_id, accepted)
    if sae_id is not None:
        path = PurePosixPath(sae_id)
        plain = sae_id == path.as_posix() and not path.is_absolute()
        if not plain or ".." in path.parts or sae_id in (".", CARD):
            raise invalid_option("sae_id", sae_id, "a folder in the repository")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: give a new or an empty folder (--out).")


def _card(
    sae: SAE[Any],
    repo_id: str,
    sae_ids: list[str],
    training: str,
    stats: Sequence[LevelStats],
    measured_on: str,
) -> str:
    metadata = sae.cfg.metadata
    dataset, base_model = metadata.dataset_path, _hub_name(metadata.model_name)
    is_published = dataset and _is_repo_id(dataset) and not Path(dataset).exists()
    data = ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", "sae", "matryoshka", "mechanistic-interpretability"],
        base_model=base_model,
        datasets=[dataset] if is_published else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        cfg=sae.cfg,
        model=base_model or metadata.model_name,
        table=level_table(stats),
        note=level_note(stats, measured_on),
        levels_are_prefixes=not isinstance(sae, TopKSAE),  # whose levels choose among their latents
        repo_id=repo_id,
        sae_ids=sae_ids,
        loading=[_loading(repo_id, sae_id) for sae_id in sae_ids],
        second=min(1, len(widths_of(sae)) - 1),
        training=training,
    )
    return f"{card}\n"


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
    """The last part of a path; a name, or `owner/name`, as it is."""
    if name is None or "/" not in name or _is_repo_id(name):
        return name
    return Path(name).name


def _loading(repo_id: str, sae_id: str) -> str:
    """The code that loads an SAE with SAELens alone."""
    return f'SAE.from_pretrained("{repo_id}", "{sae_id}")'


def _training(sae: SAE[Any], folder: Path) -> str:
    """JSON of the run's config as SAELens saved it, or else of what the metadata has of it."""
    metadata = sae.cfg.metadata
    if (folder / RUNNER_CFG_FILENAME).is_file():
        run = json.loads((folder / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))
        # Paths and logs describe the owner's machine, not the SAE.
        private = {"logger", "resume_from_checkpoint", *(n for n in run if n.endswith("_path"))}
        kept = {name: value for name, value in run.items() if name not in private}
        kept |= {"model_name": metadata.model_name, "dataset_path": metadata.dataset_path}
    else:
        details = metadata.training_architecture_details or {}
        kept = {"training_architecture": metadata.training_architecture, **details}
    return json.dumps(kept, indent=2)
