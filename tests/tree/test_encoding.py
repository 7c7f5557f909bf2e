"""Sparse codes from the screen, against SAELens' own dense ones."""

import numpy as np
import pytest
import torch

from sae_lens_matryoshka.tree import encoding
from sae_lens_matryoshka.tree.encoding import Encoder, encode
from tests.levels.test_stats import jumprelu


@pytest.mark.parametrize("applies_b_dec", [False, True])
def test_the_screen_finds_the_codes_of_saelens(monkeypatch, applies_b_dec: bool) -> None:
    monkeypatch.setattr(encoding, "pays_off", lambda: True)  # on any processor
    found = []
    screen = encoding.products_above
    monkeypatch.setattr(
        encoding, "products_above", lambda *args: found.append(screen(*args)) or found[-1]
    )
    sae = jumprelu(64, [512, 2048], apply_b_dec_to_input=applies_b_dec)
    with torch.no_grad():
        sae.threshold += 30 if applies_b_dec else 20  # 2.5 standard deviations: few latents fire
        sae.threshold[::7] = -1  # below 0 the ReLU decides, and a bias keeps most latents off
        sae.b_enc[::7] -= 30
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    codes, expected = Encoder(sae)(x), encode(sae, x)
    assert [each is not None for each in found] == [True]
    assert expected.nnz > 1000
    np.testing.assert_allclose(codes.toarray(), expected.toarray(), rtol=1e-5, atol=2e-5)
    dense = sae.encode(x).detach().numpy()
    np.testing.assert_allclose(codes.toarray(), dense, rtol=1e-5, atol=2e-5)
