"""Loading SAEs, published or local, with their level widths."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] of the HTTP library below
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from sae_lens import SAE
from sae_lens.constants import TRAINER_STATE_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_LOADERS,
    get_conversion_loader_name,
)
from sae_lens.loading.pretrained_saes_directory import (
    get_config_overrides,
    get_pretrained_saes_directory,
    get_repo_id_and_folder_name,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.hub.formats import (
    FORMATS,
    SAELENS,
    Config,
    Format,
    OnlyFromHubError,
    StateDict,
    read_checkpoint,
    read_json,
    read_pickle,
)
from sae_lens_matryoshka.levels.slicing import set_widths
from sae_lens_matryoshka.util.suggest import did_you_mean

_CHANIND_WIDTHS = [128, 512, 2048, 8192, 32768]
# Widths and k that only the README of each repository gives.
_FROM_READMES = {
    "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40": (_CHANIND_WIDTHS, 40),
    "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60": (_CHANIND_WIDTHS, 60),
    "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40": (_CHANIND_WIDTHS, 40),
}
SHIPPED = "smollm2-135m-matryoshka"  # the SAE that comes with the package
_SHIPPED_FOLDER = Path(__file__).parents[1] / "demo" / "smollm2_sae"


def load_sae(
    release_or_dir: str | Path,
    sae_id: str | None = None,
    *,
    matryoshka_widths: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
) -> SAE[Any]:
    """Load an SAE as SAELens does, keeping its level widths.

    Reads the formats of SAELens (any version), dictionary_learning (`ae.pt`), the paper's own code
    (bartbussmann/matryoshka_sae, `sae.pt`) and Gemma Scope 2 (`params.safetensors`), from the Hub
    or a folder, and every other release of SAELens as SAELens does. A pickle is loaded with
    `weights_only=True`, so it never runs code.

    Args:
        release_or_dir: A folder; with `sae_id`, a release of SAELens or a repository on the Hub.
            "smollm2-135m-matryoshka" is the SAE that comes with this package.
        sae_id: The SAE's id in the release, or its folder in the repository.
        matryoshka_widths: Level widths, for an SAE that has none or to replace them.
        device: Device of the weights.
        dtype: As SAELens names it; by default float32 from the Hub, and as saved from a folder.

    Returns:
        An SAE of SAELens' class for the checkpoint, its widths in
        `cfg.metadata.training_architecture_details["matryoshka_widths"]`; see `levels.widths_of`.

    Raises:
        ValueError: there is no such release, repository, id or folder (similar names are given),
            the files are broken or hold no SAE, or the widths do not fit.
        PermissionError: the Hub needs a token, or another one.
        ConnectionError: the Hub can't be reached, or fails.
    """
    options: dict[str, Any] = {"device": str(device)}
    if dtype is not None:
        options["dtype"] = dtype
    if sae_id is None:
        folder = Path(release_or_dir)
        is_shipped = str(folder) == SHIPPED and not folder.is_dir()
        repo_id, sae = None, _from_folder(_SHIPPED_FOLDER if is_shipped else folder, options)
    else:
        release, sae_id = str(release_or_dir), sae_id.strip("/")
        repo_id, in_repo = repo_and_folder(release, sae_id)
        with _built_in_errors(repo_id, sae_id):
            sae = _from_hub(release, sae_id, repo_id, in_repo, options)
    if matryoshka_widths is not None:
        set_widths(sae, matryoshka_widths)
    elif repo_id in _FROM_READMES:
        widths, k = _FROM_READMES[repo_id]
        set_widths(sae, widths, k=k)
    elif repo_id is not None and repo_id.startswith("google/gemma-scope-2-"):
        warnings.warn(
            f"The level widths of {repo_id} were never published. To use its levels, give them as "
            "load_sae(…, matryoshka_widths=[…]).",
            stacklevel=2,
        )
    return sae


def _from_folder(folder: Path, options: dict[str, Any]) -> SAE[Any]:
    if not folder.is_dir():
        raise ValueError(_missing_folder_message(folder))
    with _built_in_errors(str(folder)):
        _check_not_in_training(folder)
    for layout in FORMATS:
        config, weights = folder / layout.config, folder / layout.weights
        if config.is_file() and weights.is_file():
            with _built_in_errors(str(folder)):
                if layout is SAELENS:
                    return SAE.load_from_disk(folder, **options)
                return _read(layout, config, weights, options)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder} holds no SAE ({_LAYOUTS}); found {found}.")


def _missing_folder_message(path: Path) -> str:
    if path.exists():
        return f"{path} is a file: give its folder."
    known = get_pretrained_saes_directory().get(str(path))
    if known is not None:
        return f"The release {str(path)!r} needs an SAE's id as well{_near('', known.saes_map)}"
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, [*beside, SHIPPED, *_known_releases()], cutoff=0.7)
    return f"There is no folder {str(path)!r}; to load from the Hub, give an SAE's id as well{hint}"


def _check_not_in_training(folder: Path) -> None:
    config = folder / SAELENS.config
    architecture = read_json(config).get("architecture") if config.is_file() else None
    only_trains = SAE_TRAINING_CLASS_REGISTRY.keys() - SAE_CLASS_REGISTRY.keys()
    if (folder / TRAINER_STATE_FILENAME).exists() or architecture in only_trains:
        raise ValueError(
            "this is a training checkpoint, not an SAE saved for inference. Load it with "
            "sae_lens.TrainingSAE.load_from_disk; `levels.truncate` takes that too."
        )


def _read(
    layout: Format, config: Path, weights: Path, options: dict[str, Any], **overrides: Any
) -> SAE[Any]:
    """The SAE in two files of a format that SAELens does not read from disk."""

    def converter(path: Any, device: str, cfg_overrides: Config | None) -> tuple[Config, StateDict]:
        fields = {**overrides, "device": device, **(cfg_overrides or {})}
        return read_checkpoint(layout, config, weights, fields)

    return SAE.load_from_disk(config.parent, **options, converter=converter)


def _from_hub(
    release: str, sae_id: str, repo_id: str, folder: str, options: dict[str, Any]
) -> SAE[Any]:
    def download(name: str) -> Path:
        return Path(hf_hub_download(repo_id, f"{folder}/{name}"))

    if release in get_pretrained_saes_directory():
        loader = get_conversion_loader_name(release)
        layout = next((layout for layout in FORMATS if layout.loader == loader), None)
        if layout is None:
            return SAE.from_pretrained(release, sae_id, **options)
    else:
        layout = _layout_of(repo_id, folder)
    try:
        config = download(layout.config)
    except EntryNotFoundError as error:
        # SAELens infers some configurations that are not in the repository.
        if layout.loader is None or isinstance(error, LocalEntryNotFoundError):
            raise
    else:
        if layout is SAELENS:
            read_json(config)  # SAELens' error would not name the file
        else:
            options = {"dtype": "float32", **options}
            overrides = get_config_overrides(release, sae_id)
            with suppress(OnlyFromHubError):
                return _read(layout, config, download(layout.weights), options, **overrides)
    assert layout.loader is not None
    if layout.weights.endswith(".pt"):
        # SAELens leaves the choice of weights_only to PyTorch, so the pickle is checked before.
        read_pickle(download(layout.weights))
    converter = NAMED_PRETRAINED_SAE_LOADERS[layout.loader]
    with warnings.catch_warnings():
        # SAELens recommends its names of releases; here a repository gives the same.
        warnings.filterwarnings("ignore", message="You are loading an SAE using the HuggingFace")
        return SAE.from_pretrained(release, sae_id, **options, converter=converter)


def _layout_of(repo_id: str, folder: str) -> Format:
    """The format of an SAE in a repository that SAELens has no entry for, by its weights."""
    failure: EntryNotFoundError | None = None
    for layout in FORMATS:
        is_offline = isinstance(failure, LocalEntryNotFoundError)
        try:
            # Once the Hub fails to answer, only the cache is searched.
            hf_hub_download(repo_id, f"{folder}/{layout.weights}", local_files_only=is_offline)
            return layout
        except EntryNotFoundError as error:
            failure = failure if is_offline else error
    assert failure is not None
    raise failure


_LAYOUTS = "accepted: " + ", or ".join(
    f"{layout.config} with {layout.weights} ({layout.name})" for layout in FORMATS
)


def repo_and_folder(release: str, sae_id: str) -> tuple[str, str]:
    """Repository and folder of an SAE; ValueError if SAELens' table of releases has none such."""
    known = get_pretrained_saes_directory().get(release)
    if known is None and "/" not in release:
        raise ValueError(
            f"{release!r} is neither a release of SAELens nor a repository "
            f"(owner/name){_near(release, _known_releases())}"
        )
    if known is not None and sae_id not in known.saes_map:
        raise ValueError(
            f"The release {release!r} has no SAE {sae_id!r}{_near(sae_id, known.saes_map)}"
        )
    return get_repo_id_and_folder_name(release, sae_id)


def _known_releases() -> list[str]:
    directory = get_pretrained_saes_directory()
    return [*directory, *{entry.repo_id: None for entry in directory.values()}]


def _near(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about `name`: the nearest of `names`, or the first of them."""
    quoted = [repr(known) for known in names if known != name]
    hint = did_you_mean(repr(name), quoted, cutoff=0.5)
    if hint != "." or not quoted:
        return hint
    return f"; there is {', '.join(quoted[:3])}{' and others' if len(quoted) > 3 else ''}."


@contextmanager
def _built_in_errors(source: str, sae_id: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub's client, SAELens and the readers into those that `load_sae` names."""
    where = source if sae_id is None else f"{source} {sae_id}"
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{source} is gated: ask for access on its page, then log in with `hf auth login` or "
            "set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"There is no repository {source!r} on the Hub, or it is private and HF_TOKEN or "
            f"`hf auth login` gives no access to it{_near(source, _known_releases())}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise hub_error(where, error) from error
    except EntryNotFoundError as error:
        sae_ids = _sae_ids_in(source)
        if sae_id not in sae_ids:
            near = _near(str(sae_id), sae_ids)
            message = f"The repository {source!r} has no SAE {sae_id!r}{near} ({_LAYOUTS})"
        else:
            file = str(getattr(getattr(error, "response", None), "url", "")).rpartition("/")[2]
            message = f"{where} lacks {file}, so there is no SAE ({_LAYOUTS})."
        raise ValueError(message) from error
    except (HTTPError, requests.RequestException) as error:
        raise hub_error(where, error) from error
    except OSError:
        raise  # such as a full disk
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # SAELens' loaders can raise anything for a broken file
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join(line.strip() for line in lines[:2]).removesuffix(".")
        raise ValueError(f"{where} can't be read: {reason}.") from error


def hub_error(where: str, error: BaseException) -> OSError | ValueError:
    """The built-in error for a failed request to the Hub.

    `PermissionError` where a token would help, `ValueError` where the Hub rejects the request, else
    `ConnectionError`.
    """
    status, cause = None, error
    while cause is not None and status is None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if status in (401, 403):
        return PermissionError(
            f"The Hub refused {where} (status {status}): log in with `hf auth login`, or set "
            "HF_TOKEN to a token that has access."
        )
    if status is None:
        return ConnectionError(f"The Hub can't be reached for {where}: {reason}")
    if status in (400, 409, 413, 422):
        return ValueError(f"The Hub rejected the request for {where} (status {status}): {reason}")
    return ConnectionError(f"The Hub failed for {where} (status {status}): {reason}")


def _sae_ids_in(repo_id: str) -> list[str]:
    """Folders of a repository that hold an SAE; none where the Hub does not answer."""
    try:
        files = HfApi().list_repo_files(repo_id)
    except (HTTPError, OSError):
        return []
    weights = {layout.weights for layout in FORMATS}
    paths = [Path(file) for file in files]
    return [path.parent.as_posix() for path in paths if path.name in weights]
