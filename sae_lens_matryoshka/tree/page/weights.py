"""What the weights say of latents: the tokens they promote, and their nearest neighbours."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from tqdm.auto import tqdm

_BLOCK_ELEMENTS = 2**24  # of products that are computed at a time
# hooks whose activations have the width of the residual stream and are not added to it
_NOT_RESIDUAL = ("hook_q", "hook_k", "hook_v", "hook_z", "q_proj", "k_proj", "v_proj")


class Nearest(NamedTuple):
    """For each latent the largest values and whose they are, the largest first."""

    values: Float[torch.Tensor, "d_sae n"]
    indices: Int[torch.Tensor, "d_sae n"]


class LogitLens(NamedTuple):
    """Tokens that latents promote and suppress.

    A value is the latent's effect on a token's logit through the final norm's scale and the
    unembedding, less its mean over the vocabulary, in standard deviations over the vocabulary.
    """

    promoted: Nearest
    suppressed: Nearest


@torch.no_grad()
def logit_lens(sae: SAE[Any], model: Any, n: int = 10) -> LogitLens | None:
    """The logit lens of every decoder row.

    Args:
        sae: An SAE of the model's residual stream.
        model: As SAELens loads it.
        n: How many tokens of each kind.

    Returns:
        None where `logit_blocks` is.
    """
    blocks = logit_blocks(sae, model)
    if blocks is None:
        return None
    found_blocks = []
    for logits in blocks:
        mean, std = logits.mean(1, keepdim=True), logits.std(1, keepdim=True)
        logits = (logits - mean) / std.clamp(min=1e-12)
        k = min(n, logits.shape[1])
        up, down = logits.topk(k), logits.topk(k, largest=False)
        found_blocks.append((up.values, up.indices, down.values, down.indices))
    up_values, up_tokens, down_values, down_tokens = (
        torch.cat(parts).cpu() for parts in zip(*found_blocks, strict=True)
    )
    return LogitLens(Nearest(up_values, up_tokens), Nearest(down_values, down_tokens))


@torch.no_grad()
def logit_blocks(
    sae: SAE[Any], model: Any
) -> Iterator[Float[torch.Tensor, "latents vocabulary"]] | None:
    """The effect of decoder rows on the logits, by the final norm's scale and the unembedding.

    Returns:
        The effects of some latents at a time, in order. None if the model has no unembedding or
        final norm that is known, or the SAE's activations are not of the residual stream.
    """
    hook = sae.cfg.metadata.hook_name or ""
    found = _unembedding(model)
    if found is None or any(name in hook for name in _NOT_RESIDUAL):
        return None
    unembedding, scale, is_centred = found
    if unembedding.shape[0] != sae.cfg.d_in:
        return None
    W_U = unembedding.detach().float().to(sae.device)
    rows = sae.W_dec.detach().float()
    if is_centred:  # a LayerNorm takes the mean away
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows * scale.detach().float().to(sae.device)
    blocks = rows.split(max(1, _BLOCK_ELEMENTS // W_U.shape[1]))
    return (block @ W_U for block in tqdm(blocks, desc="Promoted tokens", leave=False))


@torch.no_grad()
def neighbours(W_dec: Float[torch.Tensor, "d_sae d_in"], n: int = 8) -> Nearest:
    """The other latents with the largest cosine of the decoder rows."""
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    n = min(n, len(rows) - 1)
    found = []
    size = max(1, _BLOCK_ELEMENTS // max(1, len(rows)))
    for start in range(0, len(rows), size):
        cosines = rows[start : start + size] @ rows.T
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -torch.inf
        found.append(cosines.topk(n))
    return Nearest(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def _unembedding(model: Any) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """The unembedding (d_model, vocabulary), the final norm's scale, and whether it centres."""
    if hasattr(model, "W_U"):  # TransformerLens
        norm = getattr(model, "ln_final", None)
        scale = getattr(norm, "w", torch.ones(model.W_U.shape[0]))  # folded into W_U
        return model.W_U, scale, "RMS" not in type(norm).__name__
    language_model = getattr(model, "model", None)  # of transformers, in SAELens' wrapper
    head = getattr(language_model, "get_output_embeddings", lambda: None)()
    base = getattr(language_model, "base_model", None)
    if head is None or base is None:
        return None
    norms = [module for module in base.children() if "Norm" in type(module).__name__]
    if not norms or getattr(norms[-1], "weight", None) is None:
        return None
    name, scale = type(norms[-1]).__name__, norms[-1].weight
    if name.startswith("Gemma"):  # whose scale is 1 + weight
        scale = 1 + scale
    return head.weight.T, scale, "RMS" not in name
