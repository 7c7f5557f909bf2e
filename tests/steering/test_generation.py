"""`compare` and the command `steer`: what is generated, and that a seed repeats it."""

from typing import Any

import pytest
import torch

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.cli.steer import side_by_side
from sae_lens_matryoshka.steering import compare
from sae_lens_matryoshka.steering.generation import prompt_tokens
from tests.steering.models import BOS, random_sae, transformer_lens_model, wrapped_model
from tests.tiny import N_CTX, VOCAB


@pytest.fixture(params=[transformer_lens_model, wrapped_model], ids=["lens", "transformers"])
def loaded(request) -> tuple[Any, Any]:
    model, hook = request.param()
    return model, random_sae(hook)


def test_three_texts_from_one_seed(loaded):
    model, sae = loaded
    passes = []
    first = compare(
        model, sae, "w3 w4", {40: 9.0}, seed=3, max_new_tokens=8, on_token=lambda: passes.append(1)
    )
    assert all(4 <= len(text.split()) <= 8 for text in first[:3])  # without BOS
    assert len(set(first[:3])) == 3
    assert first.control_latents != [40]
    assert 3 * 8 <= len(passes) <= 3 * 9  # with a cache; TransformerLens embeds once more
    before = torch.get_rng_state()
    assert compare(model, sae, "w3 w4", {40: 9.0}, seed=3, max_new_tokens=8) == first
    assert torch.equal(torch.get_rng_state(), before)
    other = compare(model, sae, "w3 w4", {40: 9.0}, seed=4, max_new_tokens=8)
    assert other.unsteered != first.unsteered


def test_changing_nothing_generates_the_same(loaded):
    model, sae = loaded
    texts = compare(model, sae, "w3 w4", {40: 0.0}, max_new_tokens=8)
    assert texts.unsteered == texts.steered == texts.control


def test_prompts_begin_as_in_training(loaded):
    model, sae = loaded
    sae.cfg.metadata.prepend_bos = True
    assert prompt_tokens(model, sae, "w3 w4").tolist() == [[BOS, 3, 4]]
    sae.cfg.metadata.prepend_bos = False
    assert prompt_tokens(model, sae, "w3 w4").tolist() == [[3, 4]]


def test_what_on_token_raises_ends_it(loaded):
    model, sae = loaded

    def stop() -> None:
        raise TimeoutError("too long")

    with pytest.raises(TimeoutError, match="too long"):
        compare(model, sae, "w3", {40: 9.0}, on_token=stop, max_new_tokens=4)
    assert compare(model, sae, "w3", {40: 0.0}, max_new_tokens=4).steered


def test_prompts_that_are_refused(loaded):
    model, sae = loaded
    with pytest.raises(ValueError, match="the prompt is empty"):
        compare(model, sae, "", {40: 9.0})
    message = f"10 tokens, which with 8 new ones exceed the model's context of {N_CTX}"
    with pytest.raises(ValueError, match=message):
        compare(model, sae, "w3 " * 10, {40: 9.0}, max_new_tokens=8)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        compare(model, sae, "w3", {40: 9.0})


def test_the_command(tmp_path, monkeypatch, capsys):
    model, hook = transformer_lens_model()
    sae = random_sae(hook)
    sae.cfg.metadata.model_name = "tiny"
    sae.save_model(tmp_path / "sae")
    monkeypatch.setattr("sae_lens_matryoshka.cli.measuring.load_model_of", lambda *_: model)
    command = ["steer", str(tmp_path / "sae"), "--latent", "40=9", "--latent", "3=1", "--seed", "2"]
    command += ["--mode", "set", "--prompt", "w3 w4", "--max-new-tokens", "6"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    texts = compare(model, sae, "w3 w4", {40: 9.0, 3: 1.0}, "set", seed=2, max_new_tokens=6)
    titles = out.splitlines()
    assert titles[0] == "w3 w4 …"
    assert titles[2].startswith("unsteered")
    assert "steered: set 40=9," in titles[2]
    words = set(out.replace(",", " ").split())
    for text in texts[:3]:
        assert set(text.split()) <= words
    assert set(map(str, texts.control_latents)) <= words
    assert cli.main(command) == 0
    assert capsys.readouterr().out == out
    assert cli.main([*command[:2], "--latent", f"{VOCAB + 14}=1", "--prompt", "x"]) == 2
    assert "latent=64 is not accepted: give 0 to 63" in capsys.readouterr().err


def test_columns():
    drawn = side_by_side(("a", "b"), ("one two three four five six seven", " x\n\ny"), 40)
    assert drawn.splitlines() == [
        "a                        b",
        "----------------------   ----------------------",
        "one two three four       x",
        "five six seven",
        "                         y",
    ]
