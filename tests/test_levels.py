"""A truncated SAE is its first latents, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.levels import truncate


@pytest.fixture
def saved(tmp_path: Path) -> JumpReLUSAE:
    torch.manual_seed(0)
    sae = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(d_in=6, d_sae=20, k=3, matryoshka_widths=[5, 20])
    )
    sae.topk_threshold.fill_(0.02)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, JumpReLUSAE)
    return loaded


@pytest.mark.parametrize("width", [1, 5, 13, 20])
def test_truncation_decodes_the_first_latents(saved: JumpReLUSAE, width: int) -> None:
    x = torch.randn(4, 3, 6)
    level = truncate(saved, width)
    acts = saved.encode(x)
    assert (acts > 0).any()
    torch.testing.assert_close(level.encode(x), acts[..., :width])
    torch.testing.assert_close(level(x), acts[..., :width] @ saved.W_dec[:width] + saved.b_dec)
    assert level.W_dec.data_ptr() == saved.W_dec.data_ptr()
    assert (level.cfg.d_sae, saved.cfg.d_sae) == (width, 20)
    assert level.cfg.device == saved.cfg.device == "cpu"


@pytest.mark.parametrize("width", [0, 21])
def test_width_outside_the_dictionary(saved: JumpReLUSAE, width: int) -> None:
    with pytest.raises(ValueError, match=f"width={width} .* 1 to d_sae=20"):
        truncate(saved, width)
