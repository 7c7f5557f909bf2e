"""Names of models and places."""

import pytest
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from sae_lens_matryoshka.util.hook_names import short_model_name


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
