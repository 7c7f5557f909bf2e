"""One text through a language model and an SAE: what each level makes of each token."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from sae_lens_matryoshka.levels.slicing import decode_levels, widths_of


class TextActivations(NamedTuple):
    """The activations on one text."""

    tokens: list[str]
    activations: Float[torch.Tensor, "n_tokens d_in"]
    was_trained_on: Bool[torch.Tensor, " n_tokens"]  # whether training used such tokens


class TextReconstruction(NamedTuple):
    """What each level reconstructs of the activations on one text.

    Attributes:
        tokens: The text.
        explained: Share of each token's squared distance from b_dec; NaN for tokens that training
            left out.
        strongest: Of the latents that the level adds, the one that contributes most; -1 if none is
            active, or where training left out the token.
    """

    tokens: list[str]
    explained: Float[torch.Tensor, "n_levels n_tokens"]
    strongest: Int[torch.Tensor, "n_levels n_tokens"]


@torch.no_grad()
def run_on_text(sae: SAE[Any], model: Any, text: str) -> TextActivations:
    """The activations that `sae` reads on one text, whose positions are those of a whole context.

    Args:
        sae: Its metadata says where to read, and which positions and tokens training left out.
        model: Its model, as SAELens loads it.
        text: Not longer than the model's context.
    """
    metadata, tokenizer = sae.cfg.metadata, model.tokenizer
    first = [tokenizer.bos_token_id] if metadata.prepend_bos else []
    ids = torch.tensor(first + tokenizer(text, add_special_tokens=False)["input_ids"])
    hook_name = metadata.hook_name
    _, cache = model.run_with_cache(
        ids[None],
        names_filter=[hook_name],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name),
    )
    was_trained_on = torch.zeros(len(ids), dtype=torch.bool)
    was_trained_on[slice(*(metadata.seqpos_slice or (None,)))] = True
    excluded = torch.tensor(metadata.exclude_special_tokens or [], dtype=torch.long)
    was_trained_on &= ~torch.isin(ids, excluded)
    start = len(first)
    tokens = [tokenizer.decode([token]) for token in ids[start:].tolist()]
    return TextActivations(tokens, cache[hook_name][0, start:], was_trained_on[start:])


@torch.no_grad()
def reconstruct(sae: SAE[Any], text: TextActivations) -> TextReconstruction:
    """What each level reconstructs of the activations on one text, and its strongest latents."""
    x = text.activations
    acts = sae.encode(x)
    errors = (decode_levels(sae, acts) - x).pow(2).sum(-1)
    explained = 1 - errors / (x - sae.b_dec).pow(2).sum(-1)
    explained[:, ~text.was_trained_on] = torch.nan
    strengths = acts * sae.W_dec.norm(dim=-1)
    strongest = []
    for start, end in pairwise([0, *widths_of(sae)]):
        values, latents = strengths[:, start:end].max(dim=-1)
        is_shown = (values > 0) & text.was_trained_on
        strongest.append(torch.where(is_shown, latents + start, -1))
    return TextReconstruction(text.tokens, explained, torch.stack(strongest))
