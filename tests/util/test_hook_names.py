"""Names of models and places."""

import pytest
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from sae_lens_matryoshka.util.hook_names import short_model_name, transformer_lens_hook_name


def test_every_model_keeps_its_identity() -> None:
    for official in OFFICIAL_MODEL_NAMES:
        assert get_official_model_name(short_model_name(official)) == official


def test_names_are_those_of_saebench() -> None:
    assert short_model_name("google/gemma-2-2b") == "gemma-2-2b"
    assert short_model_name("EleutherAI/pythia-160m-deduped") == "pythia-160m-deduped"
    assert short_model_name("pythia-160m-deduped") == "pythia-160m-deduped"
    assert short_model_name("sae-lens-matryoshka/tiny-gpt-neox") == "tiny-gpt-neox"


def test_near_names() -> None:
    with pytest.raises(ValueError, match="did you mean gemma-2-2b"):
        short_model_name("gema-2-2b")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.7", "blocks.7.hook_resid_post"),
        ("gpt_neox.layers.11", "blocks.11.hook_resid_post"),
        ("transformer.h.0", "blocks.0.hook_resid_post"),
        ("model.layers.7.mlp", "model.layers.7.mlp"),
        ("blocks.7.hook_resid_post", "blocks.7.hook_resid_post"),
    ],
)
def test_outputs_of_layers_have_two_names(name: str, expected: str) -> None:
    assert transformer_lens_hook_name(name) == expected
