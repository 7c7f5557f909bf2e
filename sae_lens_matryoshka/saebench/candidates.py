"""Loading, naming and fingerprinting the SAEs and levels that an evaluation compares."""

import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import truncate
from sae_lens_matryoshka.saebench.records import Candidate
from sae_lens_matryoshka.util.hook_names import transformer_lens_hook_name


def load_candidates(candidates: Sequence[Candidate], device: str) -> list[SAE[Any]]:
    """Every candidate as an SAE of its own; the levels of one SAE share its weights."""
    whole: dict[tuple[str, ...], SAE[Any]] = {}
    for c in candidates:
        if c.source not in whole:
            whole[c.source] = load_whole(c.source, c.matryoshka_widths, c.model_name, device)
    return [truncate(whole[c.source], c.width) for c in candidates]


def load_whole(
    source: Sequence[str],
    matryoshka_widths: Sequence[int] | None,
    model_name: str | None,
    device: str = "cpu",
) -> SAE[Any]:
    """The whole SAE of a candidate, with the metadata that SAEBench reads.

    Decoder rows are folded to norm 1, as SAEBench does with the SAEs that it loads itself: sparse
    probing compares the activations of latents with each other.
    """
    with warnings.catch_warnings():
        # About arguments for loading the model, which SAEBench chooses.
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty")
        sae = load_sae(*source, matryoshka_widths=matryoshka_widths, device=device)
    metadata = sae.cfg.metadata
    if metadata.model_class_name == "AutoModelForCausalLM":
        # SAEBench loads the model as a HookedTransformer, which other arguments load
        metadata.model_class_name = "HookedTransformer"
        metadata.hook_name = transformer_lens_hook_name(metadata.hook_name)
        metadata.model_from_pretrained_kwargs = {}
    if metadata.model_name is None:
        metadata.model_name = model_name
    if metadata.prepend_bos is None:
        metadata.prepend_bos = True  # as in SAEBench's other evaluations
    norms = sae.W_dec.norm(dim=-1)
    if norms.all() and not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        with suppress(NotImplementedError):  # TopK SAEs, which would choose other latents
            sae.fold_W_dec_norm()
    return sae


def labels(sources: Sequence[Sequence[str]], taken: Collection[str] = ()) -> list[str]:
    """A unique label of each source: the end of a folder's path, or release:id."""
    paths = [Path(source[0]).resolve().parts if len(source) == 1 else () for source in sources]
    result: list[str] = []
    for source, parts in zip(sources, paths, strict=True):
        n = 1
        while n < len(parts) and (
            sum(other[-n:] == parts[-n:] for other in paths) > 1 or "/".join(parts[-n:]) in taken
        ):
            n += 1
        result.append("/".join(parts[-n:]) if parts else ":".join(source))
    return result
