"""A few texts: each token's latents by level, and what each level adds to the reconstruction."""

from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from sae_lens_matryoshka.levels.slicing import decode_levels
from sae_lens_matryoshka.tree.encoding import encode
from sae_lens_matryoshka.tree.page.corpus import Corpus
from sae_lens_matryoshka.tree.page.numbers import rounded
from sae_lens_matryoshka.tree.page.tokens import TokenTexts

N_TEXTS, N_TOKENS = 8, 160


@torch.no_grad()
def texts_for_page(
    sae: SAE[Any],
    model: Any,
    corpus: Corpus,
    mean: torch.Tensor,
    widths: list[int],
    text_of: TokenTexts,
) -> list[dict[str, Any]]:
    """The beginnings of a few contexts, evenly spaced over all, as the page reads them.

    Args:
        sae: The SAE.
        model: Its model.
        corpus: The texts.
        mean: Mean activation of all tokens, (d_in,), against which variance is explained.
        widths: Of the levels.
        text_of: The texts of token ids.

    Returns:
        For each text, `tokens`; `latents`, for each token a flat list of latent, activation, …,
        the largest first, or None where the SAE was not run; `explained`, for each of these
        tokens and each level p the share 1 − ‖x − x̂_p‖² / ‖x − mean‖²; and `total`, the same of
        all tokens together.
    """
    n, context = corpus.contexts.shape
    texts = []
    for i in np.unique(np.linspace(0, n - 1, min(n, N_TEXTS)).astype(int)).tolist():
        ids = corpus.contexts[i, :N_TOKENS]
        is_run = corpus.row_at_place[i * context : i * context + len(ids)] >= 0
        if is_run.any():
            texts.append(text_for_page(sae, model, ids, is_run, mean, widths, text_of))
    return texts


@torch.no_grad()
def text_for_page(
    sae: SAE[Any],
    model: Any,
    ids: np.ndarray,
    is_run: np.ndarray,
    mean: torch.Tensor,
    widths: list[int],
    text_of: TokenTexts,
) -> dict[str, Any]:
    """One text as `texts_for_page` describes it.

    Args:
        sae: The SAE.
        model: Its model.
        ids: Of the tokens, (n,).
        is_run: On which of them the SAE is run, (n,); at least one.
        mean: As for `texts_for_page`.
        widths: As for `texts_for_page`.
        text_of: As for `texts_for_page`.
    """
    x = _activations(sae, model, ids)[torch.from_numpy(is_run)]
    codes = encode(sae, x)
    acts = torch.from_numpy(codes.toarray()).to(sae.device, sae.dtype)
    levels = decode_levels(sae, acts) if len(widths) > 1 else sae.decode(acts)[None]
    error = (levels.float() - x).square().sum(-1).cpu().numpy()  # (levels, tokens)
    variance = (x - mean.to(x.device)).square().sum(-1).cpu().numpy()
    explained = 1 - error / np.maximum(variance, 1e-12)
    total = 1 - error.sum(1) / max(variance.sum(), 1e-12)
    latents: list[list[float | None] | None] = [None] * len(ids)
    shares: list[list[float | None] | None] = [None] * len(ids)
    for row, place in enumerate(is_run.nonzero()[0].tolist()):
        own = codes[[row]].tocoo()
        order = np.argsort(-own.data, kind="stable")
        pairs = zip(own.col[order].tolist(), map(rounded, own.data[order].tolist()), strict=True)
        latents[place] = [value for pair in pairs for value in pair]
        shares[place] = [rounded(share) for share in explained[:, row].tolist()]
    return {
        "tokens": text_of.of(ids.tolist()),
        "latents": latents,
        "explained": shares,
        "total": [rounded(share) for share in total.tolist()],
    }


def _activations(sae: SAE[Any], model: Any, ids: np.ndarray) -> torch.Tensor:
    """The model's activations at the SAE's hook on one text, (tokens, d_in)."""
    metadata = sae.cfg.metadata
    hook = metadata.hook_name
    tokens = torch.from_numpy(ids.astype(np.int64))[None].to(next(model.parameters()).device)
    x = model.run_with_cache(
        tokens,
        names_filter=[hook],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook),
        prepend_bos=False,
    )[1][hook][0]
    if metadata.hook_head_index is not None:
        x = x[:, metadata.hook_head_index]
    return x.flatten(1).to(sae.device).float()
