"""Loading SAEs, published or local, with their level widths."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] of the library it is built on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from sae_lens import SAE
from sae_lens.constants import TRAINER_STATE_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_LOADERS,
    PretrainedSaeDiskLoader,
    PretrainedSaeHuggingfaceLoader,
    get_conversion_loader_name,
)
from sae_lens.loading.pretrained_saes_directory import (
    get_pretrained_saes_directory,
    get_repo_id_and_folder_name,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.hub.formats import (
    FORMATS,
    SAELENS,
    Config,
    Format,
    StateDict,
    read_json,
    read_pickle,
    with_overrides,
)
from sae_lens_matryoshka.levels.slicing import set_widths

_CHANIND_WIDTHS = [128, 512, 2048, 8192, 32768]
# Widths and k that only the README of a repository tells; each is its own source.
_FROM_READMES = {
    "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40": (_CHANIND_WIDTHS, 40),
    "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60": (_CHANIND_WIDTHS, 60),
    "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40": (_CHANIND_WIDTHS, 40),
}
_GEMMA_SCOPE_2 = "google/gemma-scope-2-"


def load_sae(
    release_or_dir: str | Path,
    sae_id: str | None = None,
    *,
    matryoshka_widths: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
) -> SAE[Any]:
    """Load an SAE as SAELens does, keeping its level widths.

    Reads what SAELens (any version), dictionary_learning (`ae.pt`), the paper's own code
    (bartbussmann/matryoshka_sae, `sae.pt`) and Gemma Scope 2 (`params.safetensors`) have written,
    from the Hub or a folder, and every other release of SAELens as SAELens does. A pickle is read
    with `weights_only=True`, so it never runs code.

    Args:
        release_or_dir: With `sae_id`, a release of SAELens or a repository of the Hub; without, a
            folder.
        sae_id: The SAE's id in the release, or its folder in the repository.
        matryoshka_widths: Level widths for an SAE that does not say its own, or instead of them.
        device: Where to put the weights.
        dtype: As SAELens names it; left out, float32 from the Hub and as saved from a folder.

    Returns:
        SAELens' SAE of the class that the checkpoint asks for, its widths in
        `cfg.metadata.training_architecture_details["matryoshka_widths"]`; see `levels.widths_of`.

    Raises:
        ValueError: there is no such release, repository, id or folder (near names are given), the
            files are broken or hold no SAE, or the widths don't fit.
        PermissionError: the Hub wants a token, or another one.
        ConnectionError: the Hub can't be reached, or failed.
    """
    options = {"device": str(device)} | ({"dtype": dtype} if dtype is not None else {})
    if sae_id is None:
        repo_id = None
        sae = _from_folder(Path(release_or_dir), options)
    else:
        release, sae_id = str(release_or_dir), sae_id.strip("/")
        repo_id, _ = repo_and_folder(release, sae_id)
        with _errors_naming_source(repo_id, sae_id):
            sae = _from_hub(release, sae_id, options)
    if matryoshka_widths is not None:
        set_widths(sae, matryoshka_widths)
    elif repo_id in _FROM_READMES:
        widths, k = _FROM_READMES[repo_id]
        set_widths(sae, widths, k=k)
    elif repo_id is not None and repo_id.startswith(_GEMMA_SCOPE_2):
        warnings.warn(
            f"The level widths of {repo_id} were never published. To use its levels, give them as "
            "load_sae(…, matryoshka_widths=[…]).",
            stacklevel=2,
        )
    return sae


def _from_folder(folder: Path, options: dict[str, str]) -> SAE[Any]:
    if not folder.is_dir():
        raise ValueError(_missing_folder_message(folder))
    if _is_in_training(folder):
        raise ValueError(
            f"{folder} is a checkpoint of a training, not a finished SAE. Load it with "
            "sae_lens.TrainingSAE.load_from_disk; `levels.truncate` takes that too."
        )
    for layout in FORMATS:
        if (folder / layout.config).is_file() and (folder / layout.weights).is_file():
            converter = {} if layout.read is None else {"converter": _disk_loader(layout)}
            with _errors_naming_source(str(folder)):
                read_json(folder / layout.config)
                return SAE.load_from_disk(folder, **options, **converter)  # type: ignore[arg-type]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder} holds no SAE: {_LAYOUTS}; found {found}.")


def _missing_folder_message(path: Path) -> str:
    if path.exists():
        return f"{path} is a file: give its folder."
    known = get_pretrained_saes_directory().get(str(path))
    if known is not None:
        return f"The release {str(path)!r} needs an SAE's id as well{_near('', known.saes_map)}"
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*beside, *_known_releases()], n=3, cutoff=0.7)
    return f"There is no folder {str(path)!r}; to load from the Hub, give an SAE's id as well" + (
        _near(path.name, near) if near else "."
    )


def _is_in_training(folder: Path) -> bool:
    if (folder / TRAINER_STATE_FILENAME).exists():
        return True
    if not (folder / SAELENS.config).is_file():
        return False
    with _errors_naming_source(str(folder)):
        architecture = read_json(folder / SAELENS.config).get("architecture")
    return architecture in SAE_TRAINING_CLASS_REGISTRY and architecture not in SAE_CLASS_REGISTRY


def _from_hub(release: str, sae_id: str, options: dict[str, str]) -> SAE[Any]:
    repo_id, folder = repo_and_folder(release, sae_id)
    if release in get_pretrained_saes_directory():
        loader = get_conversion_loader_name(release)
        layout = next((layout for layout in FORMATS if layout.loader == loader), None)
    else:
        layout = _layout_of(repo_id, folder)
    if layout is not None and layout.read is None:  # SAELens' error would not name the file
        read_json(Path(hf_hub_download(repo_id, f"{folder}/{layout.config}")))
    converter = None if layout is None or layout.read is None else _hub_loader(layout)
    with warnings.catch_warnings():
        # SAELens recommends its own names for a repository; ours finds the same either way.
        warnings.filterwarnings("ignore", message="You are loading an SAE using the HuggingFace")
        return SAE.from_pretrained(release, sae_id, **options, converter=converter)  # type: ignore


def _layout_of(repo_id: str, folder: str) -> Format:
    """The format of an SAE in a repository that SAELens has no entry for, by its weights."""
    failure: EntryNotFoundError | None = None
    for layout in FORMATS:
        unanswered = isinstance(failure, LocalEntryNotFoundError)
        try:
            # Where the Hub is down, the rest is asked of the cache alone.
            hf_hub_download(repo_id, f"{folder}/{layout.weights}", local_files_only=unanswered)
        except EntryNotFoundError as error:
            failure = failure if unanswered else error
        else:
            return layout
    assert failure is not None
    raise failure


def _disk_loader(layout: Format) -> PretrainedSaeDiskLoader:
    def load(
        path: str | Path, device: str, cfg_overrides: Config | None
    ) -> tuple[Config, StateDict]:
        assert layout.read is not None
        cfg, state_dict = layout.read(Path(path) / layout.config, Path(path) / layout.weights)
        return with_overrides(cfg, {"device": device, **(cfg_overrides or {})}), state_dict

    return load


def _hub_loader(layout: Format) -> PretrainedSaeHuggingfaceLoader:
    def load(
        repo_id: str,
        folder_name: str,
        device: str,
        force_download: bool,
        cfg_overrides: Config | None,
    ) -> tuple[Config, StateDict, torch.Tensor | None]:
        def download(name: str) -> Path:
            path = f"{folder_name}/{name}"
            return Path(hf_hub_download(repo_id, path, force_download=force_download))

        try:
            config = download(layout.config)
        except EntryNotFoundError as error:
            # SAELens infers some configurations that are not there.
            if layout.loader is None or isinstance(error, LocalEntryNotFoundError):
                raise
            config = None
        if config is not None and layout.reads(read_json(config)):
            assert layout.read is not None
            cfg, state_dict = layout.read(config, download(layout.weights))
            return (
                with_overrides(cfg, {"device": device, **(cfg_overrides or {})}),
                state_dict,
                None,
            )
        assert layout.loader is not None
        if layout.weights.endswith(".pt"):
            # SAELens leaves the choice of weights_only to PyTorch, so the pickle is checked before.
            read_pickle(download(layout.weights))
        loader = NAMED_PRETRAINED_SAE_LOADERS[layout.loader]
        return loader(repo_id, folder_name, device, force_download, cfg_overrides)

    return load


_LAYOUTS = "accepted: " + ", or ".join(
    f"{layout.config} with {layout.weights} ({layout.name})" for layout in FORMATS
)


def repo_and_folder(release: str, sae_id: str) -> tuple[str, str]:
    """Repository and folder of an SAE, its names checked as far as SAELens' table goes."""
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
    names = [known for known in names if known != name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(map(repr, near)) + "?"
    others = " and others" if len(names) > 3 else ""
    return f"; there is {', '.join(map(repr, names[:3]))}{others}." if names else "."


@contextmanager
def _errors_naming_source(source: str, sae_id: str | None = None) -> Iterator[None]:
    """What the Hub's client, SAELens and the readers raise, as one of three built-in errors."""
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
    except (LocalEntryNotFoundError, requests.RequestException) as error:
        raise hub_error(where, error) from error
    except EntryNotFoundError as error:
        there = _ids_in(source)
        if sae_id in there:
            url = str(getattr(getattr(error, "response", None), "url", ""))
            raise ValueError(
                f"{where} lacks {url.rpartition('/')[2]}, so there is no SAE ({_LAYOUTS})."
            ) from error
        raise ValueError(
            f"The repository {source!r} has no SAE {sae_id!r}{_near(str(sae_id), there)} "
            f"({_LAYOUTS})"
        ) from error
    except (HfHubHTTPError, HTTPError) as error:
        raise hub_error(where, error) from error
    except OSError:
        raise  # the disk, not the SAE
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # from the bytes of a file, through any of SAELens' loaders
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"{where} can't be read: {reason or type(error).__name__}.") from error


def hub_error(where: str, error: BaseException) -> OSError | ValueError:
    """The built-in error for a request to the Hub that failed: `PermissionError` where a token
    would help, `ValueError` where the Hub takes no such request, else `ConnectionError`."""
    status = None
    cause: BaseException | None = error
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
        return ValueError(f"The Hub does not accept this for {where} (status {status}): {reason}")
    return ConnectionError(f"The Hub failed for {where} (status {status}): {reason}")


def _ids_in(repo_id: str) -> list[str]:
    """Folders of a repository that hold an SAE; none where the Hub doesn't say."""
    try:
        files = HfApi().list_repo_files(repo_id)
    except (HTTPError, OSError):
        return []
    weights = {layout.weights for layout in FORMATS}
    paths = [Path(file) for file in files]
    return [path.parent.as_posix() for path in paths if path.name in weights]
