"""What the page may ask for, checked."""

import json
from collections.abc import Callable
from typing import Any

from sae_lens import SAE
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sae_lens_matryoshka.steering.changes import MODES, Latents, checked_changes, latents_of_level
from sae_lens_matryoshka.tree.tree import Tree
from sae_lens_matryoshka.util.checks import checked_count, invalid_option

BODY_BYTES, TEXT_LENGTH, NEW_TOKENS, LABEL_LENGTH = 2**16, 2000, 100, 200


async def json_of(request: Request) -> dict[str, Any]:
    """The JSON object that a request brings.

    Raises:
        HTTPException: it brings something else, or more than `BODY_BYTES`.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            raise HTTPException(413, f"a request may have {BODY_BYTES} bytes.")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise HTTPException(400, "the request is not a JSON object.")
    return values


def text_in(values: dict[str, Any], name: str, most: int = TEXT_LENGTH) -> str:
    """A text of a request; ValueError if it is none or too long."""
    text = values.get(name)
    if not isinstance(text, str) or len(text) > most:
        raise ValueError(f"{name} must be a text of at most {most} characters.")
    return text.encode("utf-8", "replace").decode()  # JSON may bring half a surrogate pair


def count_in(values: dict[str, Any], name: str, least: int, most: int) -> int:
    """A number of a request; ValueError if it is none or out of range."""
    number = checked_count(name, values.get(name), least)
    if number > most:
        raise invalid_option(name, number, f"{least} to {most}")
    return number


def latents_in(values: dict[str, Any], sae: SAE[Any], tree: Tree) -> tuple[Latents, str]:
    """The latents to change, as `steer` takes them, and the mode.

    A change is {"what": "latent", "family" or "level", "latent": 23, "value": 2.0}: of the latent,
    of it and its children, or of all latents of its level. Where changes overlap the last holds.

    Raises:
        ValueError: a change is not accepted.
    """
    mode, changes = values.get("mode"), values.get("changes")
    if mode not in MODES:
        raise invalid_option("mode", mode, ", ".join(map(repr, MODES)))
    if not isinstance(changes, list) or not changes:
        raise ValueError("changes must be a list with at least one change.")
    chosen: dict[int, Any] = {}
    of: dict[str, Callable[[int], Any]] = {
        "latent": lambda latent: [latent],
        "family": lambda latent: [latent, *tree.children(latent)],
        "level": lambda latent: _level_of(sae, tree, latent),
    }
    for change in changes:
        if not isinstance(change, dict) or change.get("what") not in list(of):
            raise ValueError("a change must say what: 'latent', 'family' or 'level'.")
        latent = count_in(change, "latent", 0, sae.cfg.d_sae - 1)
        chosen.update(dict.fromkeys(of[change["what"]](latent), change.get("value")))
    latents: Latents = list(chosen) if mode == "ablate" else chosen
    checked_changes(sae, latents, mode)
    return latents, mode


def _level_of(sae: SAE[Any], tree: Tree, latent: int) -> range:
    if not tree.settings["rules"]["parents_by_level"]:
        return range(sae.cfg.d_sae)  # all are of one
    return latents_of_level(sae, tree.latents["level"].tolist()[latent])
