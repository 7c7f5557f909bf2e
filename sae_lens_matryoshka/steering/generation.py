"""What a model writes: as it is, steered, and with a control."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from sae_lens import SAE

from sae_lens_matryoshka.steering.changes import Latents, checked_changes, control_latents
from sae_lens_matryoshka.steering.hooks import embedding_of, hooked_module, steer
from sae_lens_matryoshka.util.checks import checked_count

_TEMPERATURE = 0.7


class Comparison(NamedTuple):
    """What follows a prompt.

    Attributes:
        unsteered: By the model as it is.
        steered: With the latents changed.
        control: With random latents of the same levels instead, and a change of the same norm.
        control_latents: These latents, in the order of the changed ones.
    """

    unsteered: str
    steered: str
    control: str
    control_latents: list[int]


def compare(
    model: Any,
    sae: SAE[Any],
    prompt: str,
    latents: Latents,
    mode: str = "add",
    *,
    max_new_tokens: int = 40,
    seed: int = 0,
    on_token: Callable[[], None] = lambda: None,
) -> Comparison:
    """Generate from a prompt three times, each from the same seed, with temperature 0.7.

    Args:
        model: As SAELens loads it, with its tokenizer.
        sae: An SAE of this model; `metadata.prepend_bos` says whether prompts start with BOS.
        prompt: The beginning of the text.
        latents: As for `steer`.
        mode: As for `steer`.
        max_new_tokens: How many tokens at most.
        seed: Of the sampling, and of the choice of control latents.
        on_token: Called before each forward pass; what it raises ends the generation.

    Raises:
        ValueError: as `steer`, or the model has no tokenizer, or the prompt is empty or too long
            for it.
    """
    chosen = checked_changes(sae, latents, mode).latents
    others = control_latents(sae, chosen, seed)
    hooked_module(model, sae)
    tokens = prompt_tokens(model, sae, prompt, checked_count("max_new_tokens", max_new_tokens))
    handle = embedding_of(model).register_forward_pre_hook(lambda module, args: on_token())
    try:
        unsteered = _generate(model, tokens, max_new_tokens, seed)
        with steer(model, sae, latents, mode):
            steered = _generate(model, tokens, max_new_tokens, seed)
        with steer(model, sae, latents, mode, control_seed=seed):
            control = _generate(model, tokens, max_new_tokens, seed)
    finally:
        handle.remove()
    return Comparison(unsteered, steered, control, others)


def prompt_tokens(
    model: Any, sae: SAE[Any], prompt: str, n_after: int = 0
) -> Int[torch.Tensor, "1 pos"]:
    """The tokens of a prompt, behind BOS if the SAE was trained with it.

    Raises:
        ValueError: the model has no tokenizer, or the prompt has no tokens, or so many that
            `n_after` more exceed the model's context.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so it can't read a prompt.")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: give some text.")
    if sae.cfg.metadata.prepend_bos and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    context = _context(model)
    if context is not None and len(ids) + n_after > context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, which with {n_after} new ones exceed the model's "
            f"context of {context}: give a shorter one."
        )
    return torch.tensor([ids], device=next(model.parameters()).device)


def _context(model: Any) -> int | None:
    if hasattr(model, "cfg"):  # TransformerLens
        return model.cfg.n_ctx
    return getattr(model.model.config, "max_position_embeddings", None)


@torch.no_grad()
def _generate(
    model: Any, tokens: Int[torch.Tensor, "1 pos"], max_new_tokens: int, seed: int
) -> str:
    end = model.tokenizer.eos_token_id
    options = {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": _TEMPERATURE}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if hasattr(model, "cfg"):  # TransformerLens
            output = model.generate(
                tokens,
                stop_at_eos=end is not None,
                prepend_bos=False,
                return_type="tokens",
                verbose=False,
                **options,
            )
        else:  # transformers' model in SAELens' wrapper
            output = model.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), pad_token_id=end, **options
            )
    return model.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
