"""The SAEs and levels that an evaluation compares."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import truncate


class Candidate(NamedTuple):
    """One SAE, or one level of one.

    Attributes:
        label: What the SAE is called in tables and plots.
        source: What `load_sae` takes: a folder, or a release and an SAE's id.
        width: Latents of the level; d_sae for the whole.
        d_sae: Latents of the SAE that the level is of.
        is_baseline: Whether others are compared against it.
        matryoshka_widths: Level widths, for an SAE that does not say its own.
        model_name: The model, for an SAE that does not say it.
    """

    label: str
    source: Sequence[str]
    width: int
    d_sae: int
    is_baseline: bool = False
    matryoshka_widths: Sequence[int] | None = None
    model_name: str | None = None

    @property
    def title(self) -> str:
        return self.label if self.width == self.d_sae else f"{self.label}, first {self.width}"

    @property
    def key(self) -> str:
        """Its name in SAEBench's files."""
        return re.sub(r"[^\w.-]+", "_", f"{self.label}_width_{self.width}")


def load_candidates(candidates: Sequence[Candidate], device: str) -> list[SAE[Any]]:
    """Every candidate as an SAE of its own; the levels of one SAE share its weights.

    Decoder rows are folded to norm 1, as SAEBench folds the SAEs that it loads itself: sparse
    probing compares the activations of latents with each other.
    """
    whole: dict[tuple[str, ...], SAE[Any]] = {}
    for candidate in candidates:
        source = tuple(candidate.source)
        if source not in whole:
            whole[source] = load_whole(
                source, candidate.matryoshka_widths, candidate.model_name, device
            )
    return [truncate(whole[tuple(c.source)], c.width) for c in candidates]


def load_whole(
    source: Sequence[str],
    matryoshka_widths: Sequence[int] | None,
    model_name: str | None,
    device: str = "cpu",
) -> SAE[Any]:
    """The SAE that a candidate is, or is a level of, with what SAEBench reads of it."""
    with warnings.catch_warnings():
        # On how to load the model, which SAEBench does.
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty")
        sae = load_sae(*source, matryoshka_widths=matryoshka_widths, device=device)
    metadata = sae.cfg.metadata
    if metadata.model_name is None:
        metadata.model_name = model_name
    if metadata.prepend_bos is None:
        metadata.prepend_bos = True  # as SAEBench's other evaluations prompt the model
    norms = sae.W_dec.norm(dim=-1)
    if norms.all() and not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        with suppress(NotImplementedError):  # TopK, whose choice of latents would change
            sae.fold_W_dec_norm()
    return sae


def fingerprint(sae: SAE[Any]) -> str:
    """SHA-256 of what an SAE computes and where: weights, config and place."""
    config = sae.cfg.to_dict()
    metadata = config.pop("metadata", {})
    config.pop("device", None)
    place = {name: metadata.get(name) for name in ("model_name", "hook_name", "prepend_bos")}
    described = json.dumps([config, place], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def labels(sources: Sequence[Sequence[str]], taken: Collection[str] = ()) -> list[str]:
    """A label of each source that no other has: the end of a folder's path, or release:id."""
    parts = [Path(source[0]).resolve().parts if len(source) == 1 else () for source in sources]
    result: list[str] = []
    for source, own in zip(sources, parts, strict=True):
        n = 1
        while n < len(own) and (
            sum(other[-n:] == own[-n:] for other in parts) > 1 or "/".join(own[-n:]) in taken
        ):
            n += 1
        result.append("/".join(own[-n:]) if own else ":".join(source))
    return result
