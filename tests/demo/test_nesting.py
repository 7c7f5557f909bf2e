"""Families of latents, on activations that were made to have them."""

from __future__ import annotations

import torch

from sae_lens_matryoshka.demo.nesting import describe, families

WIDTHS = [2, 6]
T = 1000


def acts(n_latents: int, **where: slice) -> torch.Tensor:
    """Activations of 1 where each latent is to fire, `l3=slice(0, 10)`."""
    result = torch.zeros(T, n_latents)
    for name, tokens in where.items():
        result[tokens, int(name[1:])] = 1
    return result


def tokens() -> list[str]:
    return [" animal"] * 100 + [" dog"] * 60 + [" cat"] * 40 + [" stone"] * 800


def ours() -> torch.Tensor:
    # Latent 0 fires on animals, 3 on dogs, 4 on cats; 2 straddles; 1 nearly always fires.
    return acts(
        6,
        l0=slice(0, 200),
        l1=slice(0, 990),
        l2=slice(150, 260),
        l3=slice(100, 160),
        l4=slice(160, 200),
    )


def test_specialists_of_a_latent_and_their_tokens() -> None:
    (family,) = families(ours(), acts(3, l1=slice(0, 200)), tokens(), WIDTHS)
    assert family.parent.index == 0
    assert family.parent.n_tokens == 200
    assert family.parent.top_tokens == [" animal", " dog", " cat"]
    assert [(child.index, child.level, share) for child, share in family.children] == [
        (3, 2, 1.0),
        (4, 2, 1.0),
    ]
    assert family.children[0][0].top_tokens == [" dog"]
    assert (family.counterpart.index, family.f1) == (1, 1.0)
    assert family.holes == []
    assert family.parts == []
    told = describe([family])
    assert "latent 3 (level 2, 60 tokens: `dog`)" in told
    assert "no hole at these tokens and no split" in told


def test_a_hole_where_another_latent_took_the_tokens() -> None:
    baseline = acts(3, l1=slice(0, 100), l2=slice(100, 160))
    baseline[160:200, 1] = 1
    (family,) = families(ours(), baseline, tokens(), WIDTHS)
    assert family.counterpart.index == 1
    ((child, other, share),) = family.holes
    assert (child.index, other.index, share) == (3, 2, 0.0)
    assert "fires on 0% of the tokens of latent 3, where latent 2 (60 tokens" in describe([family])


def test_a_split_into_latents_that_only_together_cover_it() -> None:
    baseline = acts(4, l0=slice(0, 70), l1=slice(70, 135), l2=slice(135, 200), l3=slice(300, 900))
    (family,) = families(ours(), baseline, tokens(), WIDTHS)
    assert [part.index for part in family.parts] == [0, 1, 2]
    assert "split in BatchTopK" in describe([family])


def test_nothing_is_told_where_nothing_is_nested() -> None:
    apart = acts(6, l0=slice(0, 100), l1=slice(100, 200), l2=slice(200, 300), l3=slice(90, 200))
    assert families(apart, acts(3, l0=slice(0, 100)), tokens(), WIDTHS) == []
    assert describe([]).startswith("No latent of a later level")
