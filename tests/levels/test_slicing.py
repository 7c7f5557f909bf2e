"""A truncated SAE is its first latents wherever SAELens takes an SAE, and changes nothing else."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, ActivationsStore, HookedSAETransformer
from sae_lens.evals import EvalConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.levels.slicing import (
    decode_levels,
    levels,
    set_widths,
    truncate,
    widths_of,
)
from tests.steps import dense, relative_error
from tests.tiny import D_MODEL, run, runner_config, tiny_model, token_dataset

WIDTHS = [5, 12, 20]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
RESCALED: dict[str, Any] = {"k": 7, "rescale_acts_by_decoder_norm": True}
UNSCALED: dict[str, Any] = {"k": 7, "rescale_acts_by_decoder_norm": False}
HOOK_Z, LAYER_NORM = {"reshape_activations": "hook_z"}, {"normalize_activations": "layer_norm"}
# By name: the architecture as SAELens registers it, and options.
INFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "uncentered": ("jumprelu", {"apply_b_dec_to_input": False}),
    "hook_z": ("jumprelu", HOOK_Z),
    "layer_norm": ("jumprelu", LAYER_NORM),
    "constant_norm": ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    "hook_z_layer_norm": ("jumprelu", {**HOOK_Z, **LAYER_NORM}),
    "topk": ("topk", UNSCALED),
    "topk_rescaled": ("topk", RESCALED),
}
TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "matryoshka": ("matryoshka", RESCALED),
    "matryoshka_unscaled": ("matryoshka", UNSCALED),
    "matryoshka_hook_z": ("matryoshka", {**RESCALED, **HOOK_Z}),
    "saelens": ("matryoshka_batchtopk", RESCALED),
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", UNSCALED),
    "topk_sparse": ("topk", {**RESCALED, "use_sparse_activations": True}),
}
DECODED = ("matryoshka", "matryoshka_hook_z", "topk", "topk_sparse")


def build(
    kind: tuple[str, dict[str, Any]],
    training: bool = False,
    widths: list[int] = WIDTHS,
    seed: int = 0,
    **settings: Any,
) -> SAE[Any]:
    """An SAE of random weights, whose thresholds differ where it has some."""
    get = sae_lens.registry.get_sae_training_class if training else sae_lens.registry.get_sae_class
    sae_class, cfg_class = get(kind[0])
    options = {"d_in": 6, "d_sae": widths[-1], **kind[1], **settings}
    if "matryoshka_widths" in {field.name for field in fields(cfg_class)}:
        options["matryoshka_widths"] = widths
    if "k" in options:
        options["k"] = min(options["k"], widths[-1])
    metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z", l0=3.5, num_dead_features=2)
    sae = sae_class(cfg_class(**options, metadata=metadata))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values.abs() if name == "threshold" else values)
    if "topk_threshold" in dict(sae.named_buffers()):
        sae.topk_threshold.fill_(0.75)
    set_widths(sae, widths, k=3)
    return sae


def activations(sae: SAE[Any], *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, sae.cfg.d_in, generator=generator).to(sae.dtype)
    return x.unflatten(-1, (2, -1)) if sae.hook_z_reshaping_mode else x


def snapshot(sae: SAE[Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def assert_weights(sae: SAE[Any], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(sae.state_dict()), expected, rtol=0, atol=0)


def assert_shares(sae: SAE[Any], whole: SAE[Any]) -> None:
    for name, tensor in sae.named_parameters():
        assert tensor.data_ptr() == whole.get_parameter(name).data_ptr(), name


def expected_codes(sae: SAE[Any], x: torch.Tensor, width: int) -> torch.Tensor:
    """The first codes of the whole; for TopK the k largest of them, by definition."""
    acts = sae.encode(x)[..., :width]
    if sae.cfg.architecture() != "topk":
        return acts
    scores = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    if sae.cfg.rescale_acts_by_decoder_norm:
        scores = scores * sae.W_dec.norm(dim=-1)
    scores = scores[..., :width]
    smallest = scores.topk(min(sae.cfg.k, width)).values[..., -1:]
    return torch.where(scores >= smallest, scores.relu(), 0.0)


def assert_cut(whole: SAE[Any], level: SAE[Any], x: torch.Tensor) -> None:
    """`level` encodes as the first latents of `whole` do, and decodes as `whole` does those."""
    width, tolerance = level.cfg.d_sae, TOLERANCE[whole.dtype]
    codes, expected = level.encode(x), expected_codes(whole, x, width)
    assert codes.shape == expected.shape
    assert relative_error(codes, expected) < tolerance
    padded = torch.nn.functional.pad(codes, (0, whole.cfg.d_sae - width))
    reconstruction = level.decode(codes)
    assert reconstruction.shape == x.shape
    assert relative_error(reconstruction, whole.decode(padded)) < tolerance


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", INFERENCE)
def test_inference_sae(kind: str, dtype: str) -> None:
    whole = build(INFERENCE[kind], dtype=dtype)
    x, weights, cfg = activations(whole, 4, 3), snapshot(whole), copy.deepcopy(whole.cfg)
    assert (expected_codes(whole, x, 20) > 0).float().mean() > 0.05
    for width in (1, 5, 13, 20):
        level = truncate(whole, width)
        assert type(level) is type(whole)
        assert level.cfg.d_sae == level.W_dec.shape[0] == width
        assert (level.cfg.device, level.device) == (whole.cfg.device, whole.device)
        assert_cut(whole, level, x)
        assert_shares(level, whole)
    twice = truncate(truncate(whole, 13), 5)
    assert_cut(whole, twice, x)
    assert_shares(twice, whole)
    assert whole.cfg == cfg
    assert_weights(whole, weights)


def test_after_folding() -> None:
    unfolded, whole = (build(INFERENCE["jumprelu"], dtype="float64") for _ in range(2))
    whole.fold_W_dec_norm()
    whole.fold_activation_norm_scaling_factor(3.0)
    x, level = activations(whole, 4, 3), truncate(whole, 13)
    assert_cut(whole, level, x)
    norms = unfolded.W_dec.norm(dim=-1)[:13]
    assert relative_error(level.encode(x), unfolded.encode(3 * x)[..., :13] * norms) < 1e-12
    assert relative_error(level(x), truncate(unfolded, 13)(3 * x) / 3) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TRAINING)
def test_training_sae_is_cut_as_it_is_saved(kind: str, dtype: str, tmp_path: Path) -> None:
    sae = build(TRAINING[kind], training=True, dtype=dtype)
    before = snapshot(sae)
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    for width in (1, 5, 13, 20):
        level = truncate(sae, width)
        assert type(level) is type(saved)
        assert_weights(level, truncate(saved, width).state_dict())
        assert_cut(saved, level, activations(saved, 4, 3))
    assert_weights(sae, before)


@pytest.mark.parametrize("kind", TRAINING)
def test_training_on_leaves_a_level_as_it_is(kind: str) -> None:
    sae = build(TRAINING[kind], training=True)
    for level in (truncate(sae, 13), truncate(sae, 20), levels(sae)[0]):
        before = snapshot(level)
        for parameter in sae.parameters():
            parameter.data.add_(1.0)
        assert_weights(level, before)


def test_what_is_not_accepted() -> None:
    sae = build(INFERENCE["jumprelu"])
    for width in (0, -1, 21, True, 2.5, 5.0, "5", None):
        accepted = "1 to d_sae=20" if width == 21 else "a positive integer"
        with pytest.raises(ValueError, match=f"width={width!r} is not accepted: give {accepted}"):
            truncate(sae, width)  # type: ignore[arg-type]
    for width in (19, 21):
        with pytest.raises(ValueError, match=rf"\(4, {width}\) are not .* d_sae=20"):
            decode_levels(sae, torch.ones(4, width))
    for details in (None, {}, {"k": 3}, {"matryoshka_widths": []}):
        sae.cfg.metadata.training_architecture_details = details
        for function in (widths_of, levels, lambda sae: decode_levels(sae, torch.ones(4, 20))):
            with pytest.raises(ValueError, match=r"JumpReLUSAE of 20 .* load_sae\(…, matryoshka_w"):
                function(sae)


@pytest.mark.parametrize(
    "kind", [("matching_pursuit", {}), ("temporal", {"n_heads": 1, "bottleneck_factor": 2})]
)
def test_sae_that_cannot_be_cut(kind: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(TypeError, match="SAE can't be truncated"):
        truncate(build(kind), 5)


@pytest.mark.parametrize("kind", ["matryoshka", "saelens"])
def test_widths_of(kind: str, tmp_path: Path) -> None:
    sae = build(TRAINING[kind], training=True)
    sae.save_inference_model(tmp_path)
    for source in (sae, SAE.load_from_disk(tmp_path)):
        cut = {width: widths_of(truncate(source, width)) for width in (3, 5, 13, 20)}
        assert cut == {3: [3], 5: [5], 13: [5, 12, 13], 20: WIDTHS}
        widths_of(source).clear()  # a copy
        assert widths_of(source) == WIDTHS


def test_metadata() -> None:
    whole = build(INFERENCE["jumprelu"])
    original = copy.deepcopy(whole.cfg.metadata)
    level = truncate(whole, 13)
    came_from = {"width": 13, "d_sae": 20, "matryoshka_widths": WIDTHS}
    details = {"k": 3, "matryoshka_widths": [5, 12, 13]}
    assert level.cfg.metadata.matryoshka_level == came_from
    assert level.cfg.metadata.training_architecture_details == details
    assert level.cfg.metadata.hook_name == "blocks.0.attn.hook_z"
    assert not {"l0", "num_dead_features"} & level.cfg.metadata.keys()

    again = truncate(level, 5)
    assert again.cfg.metadata.matryoshka_level == {**came_from, "width": 5}
    assert (widths_of(again), level.cfg.metadata.matryoshka_level) == ([5], came_from)

    uncut = truncate(whole, 20).cfg.metadata
    assert (uncut.l0, uncut.num_dead_features) == (3.5, 2)
    assert uncut.matryoshka_level == {**came_from, "width": 20}
    assert whole.cfg.metadata == original


@pytest.mark.parametrize("cuts", [[13], [20], [13, 5]])
@pytest.mark.parametrize("kind", INFERENCE)
def test_saved_level_is_plain_saelens(kind: str, cuts: list[int], tmp_path: Path) -> None:
    level = build(INFERENCE[kind])
    for width in cuts:
        level = truncate(level, width)
    level.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is type(level)
    assert (loaded.cfg, widths_of(loaded)) == (level.cfg, widths_of(level))
    x = activations(level, 4, 3)
    assert torch.equal(loaded.encode(x), level.encode(x))
    assert torch.equal(loaded(x), level(x))


def test_copy_and_change_of_dtype() -> None:
    whole = build(INFERENCE["jumprelu"])
    level, x = truncate(whole, 13), activations(whole, 4, 3)
    copied = copy.deepcopy(level)
    assert copied.cfg == level.cfg
    assert torch.equal(copied(x), level(x))
    assert copied.W_dec.data_ptr() != level.W_dec.data_ptr()
    double = copied.to(dtype=torch.float64)
    assert (double.cfg.dtype, level.cfg.dtype, whole.cfg.dtype) == ("float64", *["float32"] * 2)
    assert double(x).dtype == torch.float64
    assert relative_error(double(x), level(x)) < 1e-6
    assert_shares(level, whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SAE[Any]:
    cfg = MatryoshkaTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4, matryoshka_widths=[8, 24, 64])
    folder = tmp_path_factory.mktemp("trained")
    run(runner_config(cfg, folder))
    return SAE.load_from_disk(folder / "output")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["trained", "hook_z"])
def test_in_the_transformer(trained: SAE[Any], kind: str) -> None:
    whole = trained if kind == "trained" else build(INFERENCE[kind], d_in=D_MODEL)
    model, level = HookedSAETransformer(tiny_model().cfg), truncate(whole, 13)
    tokens, point = torch.arange(32).view(2, 16), whole.cfg.metadata.hook_name
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[level])
    before = model.run_with_cache(tokens)[1][point]
    assert cache[f"{point}.hook_sae_acts_post"].shape == (2, 16, 13)
    assert relative_error(cache[f"{point}.hook_sae_output"], level(before)) < 1e-6
    spliced = model.run_with_hooks(tokens, fwd_hooks=[(point, lambda x, hook: level(x))])
    assert relative_error(logits, spliced) < 1e-6
    assert relative_error(logits, model(tokens)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 24, 30, 64])
def test_run_evals(trained: SAE[Any], width: int) -> None:
    model, level, point = tiny_model(), truncate(trained, width), trained.cfg.metadata.hook_name
    options = {"dataset": token_dataset(), "streaming": False, "store_batch_size_prompts": 16}
    stores = [ActivationsStore.from_sae(model, level, **options) for _ in range(2)]
    config = EvalConfig(n_eval_sparsity_variance_batches=3, compute_sparsity_metrics=True)
    metrics, _ = sae_lens.run_evals(
        level, stores[0], model, ActivationScaler(), config, exclude_special_tokens=False
    )
    tokens = torch.cat([stores[1].get_batch_tokens() for _ in range(3)])
    x = model.run_with_cache(tokens, names_filter=point)[1][point]
    expected = (trained.encode(x)[..., :width] > 0).sum(-1).double().mean().item()
    assert 0 < expected < width
    assert metrics["sparsity"]["l0"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "training"),
    [*((kind, False) for kind in INFERENCE.values()), *((TRAINING[n], True) for n in DECODED)],
    ids=[*INFERENCE, *(f"training_{name}" for name in DECODED)],
)
@given(data=st.data())
@settings(max_examples=25)
def test_levels_and_decoding_all_of_them(
    kind: tuple[str, dict[str, Any]], training: bool, data: st.DataObject
) -> None:
    widths = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=5)))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    seed, d_in = data.draw(st.integers(0, 2**16)), 2 * data.draw(st.integers(1, 6))
    sae = build(kind, training, widths, seed, d_in=d_in, dtype="float64")
    x, found = activations(sae, *shape), levels(sae)
    acts = sae.encode(x)
    assert acts.is_sparse == ("use_sparse_activations" in kind[1])
    decoded = decode_levels(sae, acts)
    assert decoded.shape == (len(widths), *x.shape)
    for width, level, reconstruction in zip(widths, found, decoded, strict=True):
        assert level.cfg == truncate(sae, width).cfg
        assert_weights(level, truncate(sae, width).state_dict())
        assert_shares(level, found[-1] if training else sae)
        if not training:
            assert_cut(sae, level, x)
        level.encode(activations(level, *shape))  # decoding undoes its norms and heads
        expected = level.decode(dense(acts)[..., :width]).reshape(x.shape)
        assert relative_error(reconstruction, expected) < 1e-11


def test_widths_of_a_training_sae_are_its_config() -> None:
    cfg = MatryoshkaTrainingSAEConfig(d_in=6, d_sae=20, k=3, matryoshka_widths=[5, 20])
    sae = MatryoshkaTrainingSAE(cfg)
    set_widths(sae, [5, 20])
    with pytest.raises(ValueError, match=r"widths=\[3, 20\] .* cfg.matryoshka_widths=\[5, 20\]"):
        set_widths(sae, [3, 20])
