"""The change of the loss by gradient, against exact ablation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka.tree import ablation, build_tree
from sae_lens_matryoshka.tree.ablation import ablation_of
from sae_lens_matryoshka.tree.gathered import Gathered
from tests.levels.test_stats import jumprelu
from tests.tiny import D_MODEL, N_CTX, tiny_model, token_dataset

HOOK, N_TOKENS = "blocks.1.hook_resid_pre", 700


@pytest.fixture(scope="module")
def sae() -> JumpReLUSAE:
    metadata = SAEMetadata(
        hook_name=HOOK, context_size=N_CTX, prepend_bos=False, seqpos_slice=(1, None)
    )
    sae = jumprelu(D_MODEL, [4, 12], metadata=metadata)
    with torch.no_grad():
        sae.W_dec.mul_(1e-3)  # so small that the loss is linear in it
    return sae


@pytest.fixture(scope="module")
def data() -> Dataset:
    return token_dataset(400)


@pytest.fixture
def gathered(sae, data, tmp_path) -> Gathered:
    build_tree(sae, tiny_model(), data, N_TOKENS, batch_size_prompts=8, folder=tmp_path / "g")
    return Gathered(tmp_path / "g")


@torch.no_grad()
def exact(sae: JumpReLUSAE, gathered: Gathered, latent: int) -> float:
    """The mean change if the latent is ablated on one token at a time, the error term kept."""
    model, total, n_left = tiny_model().double(), 0.0, N_TOKENS
    for texts in map(gathered.tokens, range(len(gathered.index.shards))):
        for text in torch.from_numpy(texts).long():
            x = model.run_with_cache(text[None])[1][HOOK]
            acts = sae.encode(x.float())[0, :, latent]
            places = [t for t in range(1, min(N_CTX, 1 + n_left)) if acts[t] > 0]
            n_left = max(0, n_left - N_CTX + 1)
            if places:
                ablated = x.repeat(len(places), 1, 1)
                for row, place in zip(ablated, places, strict=True):
                    row[place] -= acts[place] * sae.W_dec[latent]
                losses = [
                    model.run_with_hooks(
                        text.expand(len(values), -1),
                        return_type="loss",
                        loss_per_token=True,
                        fwd_hooks=[(HOOK, lambda _, hook, v=values: v)],
                    ).sum()
                    / len(values)
                    for values in (ablated, x)
                ]
                total += float(losses[0] - losses[1]) * len(places)
    return total / gathered.counts[latent]


def test_it_is_what_exact_ablation_gives(sae, gathered):
    found = ablation_of(gathered, sae, tiny_model())
    chosen = [latent for latent in range(12) if gathered.counts[latent]]
    assert len(chosen) > 5
    expected = [exact(sae, gathered, latent) for latent in chosen]
    np.testing.assert_allclose(found[chosen], expected, rtol=0.02, atol=2e-6)
    assert np.isnan(found[gathered.counts == 0]).all()


def test_it_resumes(sae, gathered, monkeypatch):
    monkeypatch.setattr(ablation, "_SECONDS", -1)
    monkeypatch.setattr(ablation, "_LOGITS", 3 * N_CTX * 50)
    gradient, left = ablation._gradient, iter(range(9))

    def stop(sae, model, texts):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return gradient(sae, model, texts)

    monkeypatch.setattr(ablation, "_gradient", stop)
    with pytest.raises(KeyboardInterrupt):
        ablation_of(gathered, sae, tiny_model())
    assert ablation._read(gathered.folder / "ablation.safetensors", 12).n_contexts > 20
    monkeypatch.setattr(ablation, "_gradient", gradient)
    resumed = ablation_of(gathered, sae, tiny_model())
    (gathered.folder / "ablation.safetensors").unlink()
    np.testing.assert_allclose(resumed, ablation_of(gathered, sae, tiny_model()), rtol=1e-3)


def test_what_it_needs(sae, gathered, tmp_path: Path):
    build_tree(sae, activations=torch.randn(3000, D_MODEL), folder=tmp_path / "x")
    with pytest.raises(ValueError, match="needs texts: give a model and a dataset"):
        ablation_of(Gathered(tmp_path / "x"), sae, tiny_model())
    normed = jumprelu(D_MODEL, [4, 12], normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="normalize_activations='layer_norm'"):
        ablation_of(gathered, normed, tiny_model())
