"""`steer`: what x becomes in each mode, what stays, and what is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import HookedSAETransformer, TrainingSAE

from sae_lens_matryoshka.levels.slicing import truncate
from sae_lens_matryoshka.steering import latents_of_level, steer
from sae_lens_matryoshka.steering.changes import control_latents
from tests.steering.models import (
    BOS,
    MODELS,
    WIDTHS,
    activations_of,
    logits_of,
    random_sae,
    tokens,
    transformer_lens_model,
)
from tests.tiny import D_MODEL, VOCAB, tiny_model

LATENTS = [2, 9, 40]
IDS = tokens()


@pytest.fixture(params=MODELS)
def loaded(request) -> tuple[Any, str]:
    return MODELS[request.param]()


def formula(sae: Any, x: torch.Tensor, change: Any) -> torch.Tensor:
    """x − decode(a) + decode(a′), by SAELens' own encode and decode."""
    acts = sae.encode(x)
    before = sae.decode(acts)
    changed = sae.encode(x).clone()  # again: decode forgets the norms of x
    changed[..., LATENTS] = change(changed[..., LATENTS])
    return x - before + sae.decode(changed)


VALUES = torch.tensor([4.0, -1.0, 0.5])
BY_MODE = {
    "add": lambda a: a + VALUES,
    "set": lambda a: VALUES.expand_as(a),
    "scale": lambda a: a * VALUES,
    "ablate": torch.zeros_like,
}


def given_for(mode: str) -> Any:
    return LATENTS if mode == "ablate" else dict(zip(LATENTS, VALUES.tolist(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
        {"k": 8},
        {"k": 8, "rescale_acts_by_decoder_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", BY_MODE)
def test_x_is_changed_by_the_formula(loaded, mode, config):
    model, hook = loaded
    sae = random_sae(hook, **config)
    before = activations_of(model, hook, IDS)
    with steer(model, sae, given_for(mode), mode):
        after = activations_of(model, hook, IDS)
    with torch.no_grad():
        expected = formula(sae, before, BY_MODE[mode])
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.equal(activations_of(model, hook, IDS), before)  # the hooks are gone


@pytest.mark.parametrize("changes", [({5: 0.0}, "add"), ({5: 1.0, 50: 1.0}, "scale")])
def test_changing_nothing_changes_nothing(loaded, changes):
    model, hook = loaded
    expected = logits_of(model, IDS)
    with steer(model, random_sae(hook), *changes):
        assert torch.equal(logits_of(model, IDS), expected)


def test_adding_is_adding_the_decoder_row_bit_for_bit(loaded):
    model, hook = loaded
    sae = random_sae(hook)
    before = activations_of(model, hook, IDS)
    with steer(model, sae, {40: 4.0}):
        assert torch.equal(activations_of(model, hook, IDS), before + 4.0 * sae.W_dec[40])
        steered = logits_of(model, IDS)
    assert (steered - logits_of(model, IDS)).abs().max() > 0.01


def test_a_latent_that_is_set_is_on_below_its_threshold(loaded):
    model, hook = loaded
    sae = random_sae(hook)
    acts = sae.encode(activations_of(model, hook, IDS))[..., 9]
    assert (acts == 0).any()
    with steer(model, sae, {9: 3.0}, "set"):
        change = activations_of(model, hook, IDS)
    change -= activations_of(model, hook, IDS)
    along = (change @ sae.W_dec[9]) / sae.W_dec[9].square().sum()
    torch.testing.assert_close(along, 3.0 - acts, rtol=1e-3, atol=1e-3)


def test_tokens_that_the_sae_was_not_trained_on_stay(loaded):
    model, hook = loaded
    sae = random_sae(hook)
    sae.cfg.metadata.exclude_special_tokens = [BOS, 7]
    sae.cfg.metadata.seqpos_slice = (2, None)
    ids = IDS.clone()
    ids[1, 5] = 7
    before = activations_of(model, hook, ids)
    with steer(model, sae, {40: 4.0}):
        changed = (activations_of(model, hook, ids) != before).any(-1)
        single = (activations_of(model, hook, ids[:, 1:2]) != 0).any(-1)
    expected = torch.ones_like(changed)
    expected[:, :2] = False
    expected[1, 5] = False
    assert torch.equal(changed, expected)
    assert single.all()  # a single token continues a text


def test_heads_of_hook_z():
    model, _ = transformer_lens_model()
    hook = "blocks.1.attn.hook_z"
    before = activations_of(model, hook, IDS)
    for reshape in ("none", "hook_z"):
        sae = random_sae(hook, reshape_activations=reshape)
        with steer(model, sae, {40: 4.0}):
            after = activations_of(model, hook, IDS)
        assert torch.equal(after, before + 4.0 * sae.W_dec[40].view(2, 8))
    one = random_sae(hook, d_in=8)
    one.cfg.metadata.hook_head_index = 1
    with steer(model, one, {40: 4.0}):
        after = activations_of(model, hook, IDS)
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert torch.equal(after[:, :, 1], before[:, :, 1] + 4.0 * one.W_dec[40])


def test_a_training_sae_is_the_sae_it_is_saved_as():
    model, hook = transformer_lens_model()
    cfg = {"architecture": "matryoshka", "d_in": D_MODEL, "d_sae": 64, "k": 8}
    torch.manual_seed(0)
    sae: Any = TrainingSAE.from_dict({**cfg, "matryoshka_widths": WIDTHS, "device": "cpu"})
    sae.cfg.metadata.hook_name = hook
    with torch.no_grad():
        sae.W_dec.mul_(3)
    results = []
    for kind in (sae, truncate(sae, 64)):
        with steer(model, kind, {40: 4.0}, "set"):
            results.append(activations_of(model, hook, IDS))
    assert torch.equal(*results)
    assert not torch.equal(results[0], activations_of(model, hook, IDS))


def test_it_nests_and_leaves_after_an_error():
    model, hook = transformer_lens_model()
    sae = random_sae(hook)
    before = activations_of(model, hook, IDS)
    with steer(model, sae, {1: 1.0}), steer(model, sae, {2: 1.0}):
        both = activations_of(model, hook, IDS)
    torch.testing.assert_close(both, before + sae.W_dec[1] + sae.W_dec[2])
    with pytest.raises(ZeroDivisionError), steer(model, sae, {1: 1.0}):
        _ = 1 / 0
    assert torch.equal(activations_of(model, hook, IDS), before)


@pytest.mark.parametrize("mode", BY_MODE)
def test_a_control_has_the_same_norm_and_another_direction(mode):
    model, hook = transformer_lens_model()
    sae = random_sae(hook)
    before = activations_of(model, hook, IDS)
    changes = []
    for seed in (None, 0, 1):
        with steer(model, sae, given_for(mode), mode, control_seed=seed):
            changes.append(activations_of(model, hook, IDS) - before)
    for control in changes[1:]:
        torch.testing.assert_close(control.norm(dim=-1), changes[0].norm(dim=-1))
    assert (changes[1] - changes[0]).norm() > 0.5 * changes[0].norm()
    assert not torch.allclose(changes[1], changes[2])


@given(st.integers(0, 2), st.integers(0, 1000), st.data())
def test_control_latents_are_others_of_the_same_level(level, seed, data):
    sae = random_sae("hook")
    own = latents_of_level(sae, level)
    chosen = data.draw(st.lists(st.sampled_from(own), min_size=1, unique=True))
    others = control_latents(sae, chosen, seed)
    assert set(others) <= set(own)
    assert len(set(others)) == len(chosen)
    if 2 * len(chosen) <= len(own):
        assert not set(others) & set(chosen)
    assert all(a != b for a, b in zip(chosen, others, strict=True))
    assert others == control_latents(sae, chosen, seed)


def test_levels_by_number():
    sae = random_sae("hook")
    assert [latents_of_level(sae, i) for i in range(3)] == [
        range(8),
        range(8, 24),
        range(24, 64),
    ]
    with pytest.raises(ValueError, match="level=3 is not accepted: give 0 to 2"):
        latents_of_level(sae, 3)


@pytest.mark.parametrize(
    ("latents", "mode", "message"),
    [
        ({64: 1.0}, "add", "latent=64 is not accepted: give 0 to 63"),
        ({-1: 1.0}, "add", "latent=-1 is not accepted"),
        ({True: 1.0}, "add", "latent=True is not accepted"),
        ({"2": 1.0}, "add", "latent='2' is not accepted"),
        ({2: math.nan}, "set", "value of latent 2=nan is not accepted: give a finite number"),
        ({2: 1.0}, "clamp", "mode='clamp' is not accepted: give 'add', 'set', 'scale', 'ablate'"),
        ({2: 1.0}, "ablate", "mode='ablate' takes no values"),
        ([2], "add", "mode='add' takes a value for each latent"),
    ],
)
def test_mistakes(latents, mode, message):
    model, hook = transformer_lens_model()
    with pytest.raises(ValueError, match=message), steer(model, random_sae(hook), latents, mode):
        pytest.fail("it was accepted")


def test_an_sae_of_another_model(loaded):
    model, hook = loaded
    with (
        pytest.raises(ValueError, match="the model has no hook 'elsewhere'"),
        steer(model, random_sae("elsewhere"), {2: 1.0}),
    ):
        pytest.fail("it was accepted")
    wide = random_sae(hook, d_in=D_MODEL + 1)
    message = f"at {hook} have width 16, and this SAE takes d_in=17"
    with steer(model, wide, {2: 1.0}), pytest.raises(ValueError, match=message):
        logits_of(model, IDS)
    transcoder = random_sae(hook)
    transcoder.cfg.metadata.hook_name_out = "elsewhere"
    with (
        pytest.raises(ValueError, match="a transcoder, which can't steer"),
        steer(model, transcoder, {2: 1.0}),
    ):
        pytest.fail("it was accepted")


def test_a_hook_where_saelens_attached_an_sae():
    model = HookedSAETransformer(tiny_model().cfg)
    hook = "blocks.1.hook_resid_pre"
    sae = random_sae(hook)
    with steer(model, sae, {2: 1.0}):
        steered = logits_of(model, IDS)
    assert steered.shape == (*IDS.shape, VOCAB)
    model.add_sae(sae)
    with (
        pytest.raises(ValueError, match="an SAE is attached there"),
        steer(model, sae, {2: 1.0}),
    ):
        pytest.fail("it was accepted")
