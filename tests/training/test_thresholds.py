"""JumpReLU thresholds keep as many latents as asked, exactly on the activations they come from."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, MatryoshkaBatchTopKTrainingSAEConfig, TrainingSAE

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.levels.slicing import truncate
from sae_lens_matryoshka.training import thresholds
from sae_lens_matryoshka.training.joined_batch import JoinedBatch
from sae_lens_matryoshka.training.thresholds import (
    ActivationSample,
    batch_threshold,
    calibrate_threshold,
)
from tests.levels.test_slicing import INFERENCE, activations, assert_weights, build, snapshot
from tests.steps import relative_error, run_step
from tests.tiny import D_MODEL, N_CTX, VOCAB, run, runner_config, tiny_model

D_SAE = 20
OPTIONS: dict[str, Any] = {"d_in": D_MODEL, "d_sae": 64, "k": 3.5, "matryoshka_widths": [8, 24, 64]}


@given(data=st.data())
@settings(max_examples=300)
def test_batch_threshold_is_that_of_a_full_sort(data: st.DataObject) -> None:
    d_sae, n, d_in = (data.draw(st.integers(1, most)) for most in (24, 30, 6))
    l0 = data.draw(st.one_of(st.integers(1, d_sae), st.floats(0.01, d_sae)))
    bias = data.draw(st.sampled_from([0, -2, -8, 5]))  # half are positive, few, hardly any, most
    ties, scaled = data.draw(st.booleans()), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))

    def drawn(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.round() if ties else values

    x, W_enc, b_enc = drawn(n, d_in), drawn(d_in, d_sae), drawn(d_sae) + bias
    scales = drawn(d_sae).abs().round() + 0.5 if scaled else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "_CHUNK_ELEMENTS", d_sae * data.draw(st.integers(1, 40)))
        cut = batch_threshold(x, W_enc, b_enc, l0, scales)
    scores = (x @ W_enc + b_enc) * (1 if scales is None else scales)
    descending = [*scores.flatten().sort(descending=True).values.tolist(), 0.0]
    expected = max(0.0, descending[int(l0 * n)])
    assert cut == (expected if ties else pytest.approx(expected, rel=1e-12))


def test_wrong_guess_of_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "_CHUNK_ELEMENTS", 1)
    for values, l0, expected in (
        ([100, 1, 2, 3], 0.5, 2),  # too few scores above half of 100: all are looked at again
        ([100, -1, -2], 0.7, 0),  # and fewer positive ones than are to be kept
        ([3, 100, 2, 50], 0.5, 3),  # too low, which takes no second look
        ([-4, 3, 2, 1], 0.1, 3),  # nothing positive to guess from
    ):
        x = torch.tensor(values, dtype=torch.float32)[:, None]
        assert batch_threshold(x, torch.ones(1, 1), torch.zeros(1), l0) == expected


def jumprelu(kind: str = "jumprelu", dtype: str = "float64") -> SAE[Any]:
    """Random weights and decoder norms, and one threshold for all."""
    sae = build(INFERENCE[kind], dtype=dtype)
    sae.threshold.data.fill_(0.25)
    return sae


@torch.no_grad()
def counts(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    return (sae.encode(x) > 0).sum(-1).double()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("l0", [None, 0.01, 2.37, 7])
@pytest.mark.parametrize(
    "kind", ["jumprelu", "uncentered", "layer_norm", "constant_norm", "hook_z", "hook_z_layer_norm"]
)
def test_l0_on_the_activations_is_exact(kind: str, l0: float | None, dtype: str) -> None:
    sae = jumprelu(kind, dtype)
    x, weights = activations(sae, 11, 17), snapshot(sae)
    calibrate_threshold(sae, x, l0)
    assert counts(sae, x).sum() == int((3 if l0 is None else l0) * 11 * 17)  # k of the metadata
    threshold = sae.threshold[0].item()
    assert threshold > 0
    assert_weights(sae, {**weights, "threshold": torch.full((D_SAE,), threshold, dtype=sae.dtype)})


def test_levels_keep_their_own_threshold() -> None:
    whole = jumprelu()
    level, other, x = truncate(whole, 5), truncate(whole, 12), activations(whole, 200)
    calibrate_threshold(level, x, 1.5)
    assert whole.threshold.unique().tolist() == [0.25]
    calibrate_threshold(whole, x)
    assert other.threshold.unique().tolist() == [0.25]
    assert [counts(sae, x).sum().item() for sae in (level, whole)] == [1.5 * 200, 3 * 200]


def test_before_and_after_folding_are_the_same() -> None:
    before, after = jumprelu(), jumprelu()
    x = activations(before, 300)
    calibrate_threshold(before, x, 2.5)
    before.fold_W_dec_norm()
    after.fold_W_dec_norm()
    folded = after.threshold.clone()
    calibrate_threshold(after, x, 2.5)
    factors = after.threshold / folded
    assert len(folded.unique()) == D_SAE
    assert factors.max() / factors.min() < 1 + 1e-12
    assert relative_error(after.threshold, before.threshold) < 1e-12
    # the score at the cut itself may be rounded to either side of it
    assert abs(counts(after, x).sum().item() - 750) <= 1
    assert ((after.encode(x) - before.encode(x)).abs() > 1e-12).sum() <= 1


@pytest.mark.parametrize("l0", [0, -1, float("nan"), float("inf"), True, 20.5, "3"])
def test_l0_that_is_not_accepted(l0: Any) -> None:
    sae = jumprelu()
    with pytest.raises(ValueError, match=f"l0={l0!r} is not accepted.*d_sae=20"):
        calibrate_threshold(sae, activations(sae, 5), l0)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("jumprelu", (5, 7)),
        ("jumprelu", (5, 1)),
        ("jumprelu", (0, 6)),
        ("hook_z", (5, 2, 4)),
        ("layer_norm", (5, 7)),
    ],
)
def test_activations_of_another_shape(kind: str, shape: tuple[int, ...]) -> None:
    sae = jumprelu(kind)
    with pytest.raises(ValueError, match=re.escape(f"{shape} are not accepted: ") + ".* d_in=6"):
        calibrate_threshold(sae, torch.randn(shape), 3)
    assert sae.threshold.unique().tolist() == [0.25]


def test_what_cannot_be_calibrated() -> None:
    sae = jumprelu()
    x = activations(sae, 5)
    for details in ({"k": None}, {}, None):
        sae.cfg.metadata.training_architecture_details = details
        with pytest.raises(ValueError, match=r"l0=None is not accepted .* no `k`"):
            calibrate_threshold(sae, x)
    for value in (float("nan"), float("inf")):
        x[3, 2] = value
        with pytest.raises(ValueError, match="not finite"):
            calibrate_threshold(sae, x, 3)
    sae.threshold.data[7] = 0.0
    with pytest.raises(ValueError, match=r"sae\.threshold holds different .* 0 or less"):
        calibrate_threshold(sae, activations(sae, 5), 3)
    with pytest.raises(TypeError, match=r"needs a JumpReLUSAE.*got TopKSAE"):
        calibrate_threshold(build(INFERENCE["topk"]), x.float(), 3)  # type: ignore[arg-type]


def held(sample: ActivationSample, *batches: tuple[float, ...]) -> list[float]:
    """What is in the sample, of which a row holds one number, after some batches more."""
    for values in batches:
        batch = torch.tensor(values)[:, None].repeat(1, 2)
        sample.add(batch, JoinedBatch())
        batch.fill_(-1)  # it is the sample's no longer
    assert sample.rows is not None
    assert torch.equal(sample.rows[:, 0], sample.rows[:, 1])
    return sample.rows[:, 0].tolist()


def test_sample_fills_and_then_replaces_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationSample, "MAX_ROWS", 5)
    monkeypatch.setattr(ActivationSample, "N_REFRESHED", 2)
    sample = ActivationSample()
    assert sample.rows is None
    assert held(sample, (0, 1, 2)) == [0, 1, 2]
    sample.replace(torch.tensor([[0, 0], [10, 10], [20, 20]]))
    for values, expected in (
        ((3, 4, 5), [0, 10, 20, 3, 4]),
        ((6, 7, 8), [6, 7, 20, 3, 4]),
        ((9,), [6, 7, 9, 3, 4]),
        ((10, 11, 12), [6, 7, 9, 10, 11]),
        ((13, 14), [13, 14, 9, 10, 11]),
        ((15, 16), [13, 14, 15, 16, 11]),
        ((17, 18), [13, 14, 15, 16, 17]),  # as far as the end
        ((19, 20), [19, 20, 15, 16, 17]),
    ):
        assert held(sample, values) == expected
    for max_rows, max_elements, expected_rows in ((100, 13, 6), (4, 13, 4), (100, 1, 1)):
        monkeypatch.setattr(ActivationSample, "MAX_ROWS", max_rows)
        monkeypatch.setattr(ActivationSample, "MAX_ELEMENTS", max_elements)
        assert len(held(ActivationSample(), *[tuple(range(10))] * 3)) == expected_rows


def held_out() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (400, N_CTX), generator=generator)
    point = "blocks.1.hook_resid_pre"
    return tiny_model().run_with_cache(tokens, names_filter=point)[1][point].flatten(0, 1)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    "normalize", ["none", "expected_average_only_in", "covariance_whitening", "layer_norm"]
)
def test_saved_sae_keeps_k_latents(normalize: str, rescale: bool, tmp_path: Path) -> None:
    """On held-out activations within 4 standard errors of the difference of two means.

    The saved SAE's mean L0 is k on a sample of N activations. On M others it differs from that by
    the errors of both means: sqrt(1/N + 1/M) times the deviation of an activation's L0.
    """
    options: dict[str, Any] = {**OPTIONS, "normalize_activations": normalize}
    options["rescale_acts_by_decoder_norm"] = rescale
    if normalize == "layer_norm":
        options["aux_loss_coefficient"] = 0
    trained = run(runner_config(MatryoshkaTrainingSAEConfig(**options), tmp_path / "ours"))
    saved = SAE.load_from_disk(tmp_path / "ours" / "output")
    assert isinstance(trained, MatryoshkaTrainingSAE)
    sample = trained._sample.rows
    assert sample is not None
    assert sample.shape == (64 * 20, D_MODEL)
    assert abs(counts(saved, sample).sum().item() - int(3.5 * len(sample))) <= 1
    assert torch.equal(truncate(trained, 24).threshold, saved.threshold[:24])

    x = held_out()
    others = counts(saved, x)
    tolerance = 4 * others.std().item() * (1 / len(sample) + 1 / len(x)) ** 0.5
    error = abs(others.mean().item() - 3.5)
    assert error < tolerance

    if normalize == "layer_norm":  # there SAELens trains one level alone, none of it dead
        options["matryoshka_widths"] = [64]
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(**options)
    run(runner_config(cfg, tmp_path / "saelens", dead_feature_window=1000))
    peer = SAE.load_from_disk(tmp_path / "saelens" / "output")
    peer_error = abs(counts(peer, x).mean().item() - 3.5)
    assert peer_error > 5 * tolerance > 5 * error


def test_bfloat16(tmp_path: Path) -> None:
    """Scores in 16 bits tie: those at the cut are all left out."""
    cfg = MatryoshkaTrainingSAEConfig(**OPTIONS, dtype="bfloat16")
    trained = run(runner_config(cfg, tmp_path, dtype="bfloat16"))
    saved = SAE.load_from_disk(tmp_path / "output")
    sample = trained._sample.rows
    assert sample is not None
    assert saved.threshold.dtype == torch.bfloat16
    n_kept = counts(saved, sample).sum().item()
    saved.threshold.data = torch.nextafter(saved.threshold, torch.zeros_like(saved.threshold))
    assert n_kept <= int(3.5 * len(sample)) < counts(saved, sample).sum()


def test_without_a_batch_the_threshold_is_saelens(tmp_path: Path) -> None:
    sae, x = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**OPTIONS)), held_out()[:40]
    sae.topk_threshold.fill_(0.75)
    sae.save_inference_model(tmp_path / "unseen")
    assert SAE.load_from_disk(tmp_path / "unseen").threshold.tolist() == [0.75] * 64
    run_step(sae, x, None)
    sae.save_inference_model(tmp_path / "seen")
    assert counts(SAE.load_from_disk(tmp_path / "seen"), x).sum() == 3.5 * 40


def test_sample_of_texts_in_their_order_holds_every_position() -> None:
    """Without mixing, row i of every batch is position i of a text."""
    sample = ActivationSample()
    positions = torch.arange(1024) % 128
    for _ in range(32 + 1024):
        sample.add(positions[:, None].float(), JoinedBatch())
    assert sample.rows is not None
    counts = torch.bincount(sample.rows[:, 0].long(), minlength=128)
    assert counts.sum() == ActivationSample.MAX_ROWS
    assert counts.float().std() < 0.2 * counts.float().mean()


def test_saving_leaves_no_trace_on_the_sae() -> None:
    """Between an encode and its decode, and with a hook: the sample is no input of the user's."""
    options: dict[str, Any] = {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0}
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(d_in=6, d_sae=20, k=3, **options))
    run_step(sae, torch.randn(64, 6), None)
    x = torch.randn(5, 6)
    expected = sae.decode(sae.encode(x))
    seen: list[torch.Size] = []
    sae.hook_sae_input.add_hook(lambda tensor, hook: seen.append(tensor.shape))
    acts = sae.encode(x)
    truncate(sae, 10)
    torch.testing.assert_close(sae.decode(acts), expected)
    assert seen == [x.shape]


def test_moving_average_is_saved_with_a_warning(tmp_path: Path) -> None:
    cfg = MatryoshkaTrainingSAEConfig(d_in=6, d_sae=20, k=3)
    sae = MatryoshkaTrainingSAE(cfg)
    run_step(sae, torch.randn(64, 6), None)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    with pytest.warns(UserWarning, match="calibrate_threshold"):
        loaded.save_inference_model(tmp_path / "saved")
