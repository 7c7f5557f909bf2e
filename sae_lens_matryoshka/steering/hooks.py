"""`steer`: a model in which some latents of an SAE are changed, and nothing else is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, TrainingSAE
from torch import nn

from sae_lens_matryoshka.levels.slicing import truncate
from sae_lens_matryoshka.levels.stats import token_ids
from sae_lens_matryoshka.steering.changes import (
    Changes,
    Latents,
    checked_changes,
    control_latents,
)


@contextmanager
def steer(
    model: Any,
    sae: SAE[Any],
    latents: Latents,
    mode: str = "add",
    *,
    control_seed: int | None = None,
) -> Iterator[None]:
    """While the block runs, change latents of `sae` in every forward pass of `model`.

    With a = sae.encode(x) the activations on a token, v the value that is given for latent j, and
    everything else that is in x kept, the error of the SAE included, x becomes

        x′ = x − decode(a) + decode(a′) = x + Σ_j (a′_j − a_j) d_j

        "add"     a′_j = a_j + v, also where this is negative
        "set"     a′_j = v, on every token, whatever its threshold or TopK would say
        "scale"   a′_j = v a_j, which changes tokens where the latent fires
        "ablate"  a′_j = 0

    where d_j is what one unit of `sae.encode` adds to the reconstruction: the decoder row, divided
    by its norm if the SAE multiplies activations with it, and in the units of x if the SAE
    normalises its input. a is of the model as it runs, after what was changed before this hook.

    Tokens that the SAE was not trained on stay as they are: `exclude_special_tokens` of its
    metadata, and the positions before `seqpos_slice`, in passes over more than one token.

    Args:
        model: As SAELens loads it (a HookedTransformer, or transformers' model in HookedProxyLM),
            or a model of transformers, on any device.
        sae: An SAE of this model.
        latents: Values by latent: {23: 4.0}; `dict.fromkeys([23, *tree.children(23)], 2.0)` for a
            latent with its children, `dict.fromkeys(latents_of_level(sae, 1), 0.5)` for a level.
            For "ablate" the latents alone: [23].
        mode: "add", "set", "scale" or "ablate".
        control_seed: For a control: Σ_j (a′_j − a_j) d_j is replaced by the same sum with the rows
            of random latents of the same levels, scaled to the same norm on every token.

    Raises:
        ValueError: an unknown mode, a latent or value that is not accepted, a model without the
            SAE's hook; and from the forward pass, if activations do not have its width.
    """
    changes = checked_changes(sae, latents, mode)
    if isinstance(sae, TrainingSAE):
        sae = truncate(sae, sae.cfg.d_sae)
    hook = hooked_module(model, sae)
    control = None if control_seed is None else control_latents(sae, changes.latents, control_seed)
    steering = _Steering(sae, changes, control, model)
    handles = [
        embedding_of(model).register_forward_pre_hook(steering.read_tokens),
        hook.register_forward_hook(steering.change),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooked_module(model: Any, sae: SAE[Any]) -> nn.Module:
    """The module whose output is the input of `sae`.

    Raises:
        ValueError: the model has none such, or the SAE reads at one place and writes at another.
    """
    metadata = sae.cfg.metadata
    name, written = metadata.hook_name, metadata.hook_name_out
    if written not in (None, name):
        raise ValueError(
            f"this SAE reads {name} and writes {written}: a transcoder, which can't steer."
        )
    modules = getattr(model, "hook_dict", None)
    if modules is None:  # of transformers, not in SAELens' wrapper
        modules = dict(model.named_modules())
    if not name or name not in modules:
        attached = f"{name}.hook_sae_output" in modules
        hint = ": an SAE is attached there, so call reset_saes() first." if attached else "."
        raise ValueError(f"the model has no hook {name!r}{hint}")
    return modules[name]


def embedding_of(model: Any) -> nn.Module:
    """The module of a model that is called with the tokens of each forward pass."""
    if hasattr(model, "embed"):  # TransformerLens
        return model.embed
    return getattr(model, "model", model).get_input_embeddings()


class _Steering:
    """The hooks of one `steer`."""

    def __init__(self, sae: SAE[Any], changes: Changes, control: list[int] | None, model: Any):
        metadata = sae.cfg.metadata
        self._sae, self._changes = sae, changes
        self._rows = _unit_rows(sae, changes.latents)
        self._control_rows = None if control is None else _unit_rows(sae, control)
        self._head = metadata.hook_head_index
        self._excluded = token_ids(metadata.exclude_special_tokens, model)
        self._first = (metadata.seqpos_slice or (None,))[0] or 0
        self._is_kept: Bool[torch.Tensor, "batch pos"] = torch.zeros(0, 0, dtype=torch.bool)

    def read_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Find the tokens of this pass that stay as they are."""
        tokens: Int[torch.Tensor, "batch pos"] = args[0]
        kept = torch.isin(tokens, self._excluded.to(tokens.device))
        if tokens.shape[1] > 1:  # else generation continues after a prompt
            kept[:, : self._first] = True
        self._is_kept = kept

    def change(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output of the hook with the change."""
        if isinstance(output, tuple):
            return (self._changed(output[0]), *output[1:])
        return self._changed(output)

    def _changed(self, x: Float[torch.Tensor, "batch pos ..."]) -> torch.Tensor:
        own = x if self._head is None else x[:, :, self._head]
        delta = self._delta(own).reshape(own.shape).to(x)
        kept = self._is_kept.to(x.device).reshape(*own.shape[:2], *[1] * (own.dim() - 2))
        delta = delta.masked_fill(kept, 0)
        if self._head is None:
            return x + delta
        changed = x.clone()
        changed[:, :, self._head] += delta
        return changed

    def _delta(self, x: Float[torch.Tensor, "batch pos ..."]) -> torch.Tensor:
        sae, d_in = self._sae, self._sae.cfg.d_in
        width = x[0, 0].numel()
        if width != d_in:
            raise ValueError(
                f"the activations at {sae.cfg.metadata.hook_name} have width {width}, and this SAE "
                f"takes d_in={d_in}: give an SAE of this model."
            )
        x = x if sae.hook_z_reshaping_mode else x.flatten(2)
        acts = sae.encode(x.to(sae.device)).to_dense()[..., self._changes.latents]
        by_latent = self._changes.of(acts.float())
        delta = by_latent @ self._rows
        if self._control_rows is not None:
            control = by_latent @ self._control_rows
            norms = control.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            delta = control * (delta.norm(dim=-1, keepdim=True) / norms)
        # affine, and its state is gone after one call
        changed, unchanged = sae.run_time_activation_norm_fn_out(
            torch.stack([delta, torch.zeros_like(delta)])
        )
        return changed - unchanged


def _unit_rows(sae: SAE[Any], latents: list[int]) -> Float[torch.Tensor, "n d_in"]:
    """What one unit of each latent's activation adds to the decoder's output."""
    rows = sae.W_dec.detach()[latents].float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows
