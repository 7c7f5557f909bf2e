"""Activations in which it is known what specialises what, and SAEs that read them exactly."""

import torch
from jaxtyping import Bool, Float
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_matryoshka.levels.slicing import set_widths

# latents of `small_world`
PARENT, CHILD, GRANDCHILD, DENSE, TOPIC_A, TOPIC_B, ALONE, DEAD = range(8)
WIDTHS = [1, 5, 8]
D_IN = 12


def exact_sae(d_sae: int, widths: list[int] | None = None, d_in: int = D_IN) -> JumpReLUSAE:
    """An SAE whose latent j fires with activation a where x has a > 0.5 in dimension j."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            getattr(sae, name).copy_(torch.eye(*getattr(sae, name).shape))
        for name in ("b_enc", "b_dec"):
            getattr(sae, name).zero_()
        sae.threshold.fill_(0.5)
    if widths is not None:
        set_widths(sae, widths)
    return sae


def small_firings(n_tokens: int, seed: int = 0) -> Bool[torch.Tensor, "n_tokens 8"]:
    """Firings of a chain of three, a dense latent, two of one topic, a rare one and a dead one.

    The topic is on for blocks of 64 tokens, and there both of its latents fire independently.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(p: float) -> torch.Tensor:
        return torch.rand(n_tokens, generator=generator) < p

    parent = drawn(0.2)
    child = parent & drawn(0.4)
    grandchild = child & drawn(0.4)
    topic = torch.rand(n_tokens // 64 + 1, generator=generator) < 0.1
    topic = topic.repeat_interleave(64)[:n_tokens]
    columns = [parent, child, grandchild, drawn(0.55), topic & drawn(0.8), topic & drawn(0.3)]
    return torch.stack([*columns, drawn(0.05), torch.zeros_like(parent)], dim=1)


def small_world(n_tokens: int, seed: int = 0) -> Float[torch.Tensor, "n_tokens 12"]:
    """Activations with these firings, of magnitude 1 to 2, and noise below every threshold."""
    fires = small_firings(n_tokens, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.rand(n_tokens, D_IN, generator=generator) * 0.1
    x[:, : fires.shape[1]] += fires * (1 + torch.rand(fires.shape, generator=generator))
    return x
