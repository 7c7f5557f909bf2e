"""What the training SAE promises besides equal numbers."""

import math
from typing import Any

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.kernels import selection
from tests.steps import assert_near, dense, outcome, relative_error, run_step, twins


def make_sae(**options: Any) -> MatryoshkaTrainingSAE:
    settings = {"d_in": 8, "d_sae": 32, "k": 3, "matryoshka_widths": [4, 12, 32], **options}
    return MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**settings))


def test_no_dense_tensor_outlives_the_forward_pass() -> None:
    batch, d_sae = 512, 4096
    sae = make_sae(d_sae=d_sae, matryoshka_widths=[64, 512, d_sae])
    saved: list[int] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    dead = torch.arange(d_sae) % 100 == 0
    for step in range(2):  # the first batch ranks all scores, the second those above a floor
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            output = run_step(sae, torch.randn(batch, 8), dead, step)
    assert saved
    assert max(saved) <= max(8 * d_sae, 3 * batch * 8, batch * int(dead.sum()))
    assert output.feature_acts.is_sparse
    assert output.feature_acts.is_coalesced()
    assert output.feature_acts._nnz() == 3 * batch
    assert output.hidden_pre is output.feature_acts


def test_auto_is_sparse_and_dense_for_hooks() -> None:
    torch.manual_seed(0)
    sae = make_sae()
    x = torch.randn(20, 8)
    assert run_step(sae, x, None).feature_acts.is_sparse

    def silence_first_level(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([torch.zeros_like(acts[:, :4]), acts[:, 4:]], dim=-1)

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", silence_first_level)]):
        output = run_step(sae, x, None)
    assert not output.feature_acts.is_sparse
    assert not output.feature_acts[:, :4].any()
    expected = (x - sae.b_dec).pow(2).sum(-1).mean()
    torch.testing.assert_close(output.losses["inner_mse_loss_4"], expected)


def test_a_step_ranks_all_scores_once_and_then_those_above_a_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    sae = make_sae(d_sae=256, matryoshka_widths=[32, 256])
    run_step(sae, torch.randn(64, 8), None)

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("all scores are ranked")

    monkeypatch.setattr(selection, "select_full", refuse)
    for batch_size in (64, 48, 80):
        run_step(sae, torch.randn(batch_size, 8), None)
    with pytest.raises(pytest.fail.Exception):
        run_step(sae, torch.randn(64, 8) / 3, None)  # nothing is above the floor any more


@pytest.mark.parametrize("use_torch_hooks", [False, True])
def test_hooks_see_what_saelens_shows_them(use_torch_hooks: bool) -> None:
    torch.manual_seed(0)
    shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    results = []
    for sae in twins("sparse", d_in=8, d_sae=32, k=3, matryoshka_widths=[4, 32]):
        seen = shapes.setdefault(type(sae).__name__, [])
        for name in (f"hook_sae_{point}" for point in ("input", "acts_pre", "acts_post", "recons")):

            def halve(*args: Any, name: str = name, seen: list = seen, **_: Any) -> torch.Tensor:
                seen.append((name, tuple(args[-1].shape)))
                return args[-1] / 2

            if use_torch_hooks:
                getattr(sae, name).register_forward_hook(lambda module, args, out, f=halve: f(out))
            else:
                sae.add_hook(name, lambda out, hook, f=halve: f(out))
        x = torch.arange(80.0).sin().view(10, 8)
        results.append(outcome(sae, run_step(sae, x, None)))
    expected, actual = results
    peers_view, our_view = shapes.values()
    assert our_view == peers_view
    assert_near(actual, expected, 1e-5)


def test_gradient_to_the_activations_comes_from_the_reference() -> None:
    torch.manual_seed(0)
    peer, ours = twins("sparse", d_in=8, d_sae=32, k=3, matryoshka_widths=[4, 32])
    grads = []
    for sae in (peer, ours):
        x = torch.arange(80.0).sin().view(10, 8).requires_grad_()
        run_step(sae, x, None).loss.backward()
        grads.append(x.grad)
    assert relative_error(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
def test_level_metrics_on_logging_steps_only(implementation: str) -> None:
    torch.manual_seed(0)
    sae = make_sae(implementation=implementation, rescale_acts_by_decoder_norm=False)
    x, dead = torch.randn(50, 8), torch.arange(32) % 5 == 0
    assert run_step(sae, x, dead).metrics.keys() == {"topk_threshold"}

    output = run_step(sae, x, dead, is_logging_step=True)
    acts = dense(output.feature_acts)
    assert len(output.metrics) == 1 + 3 * 3
    for width in (4, 12, 32):
        reconstruction = acts[:, :width] @ sae.W_dec[:width] + sae.b_dec
        unexplained = (x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        metrics = {name: output.metrics[f"{name}_level_{width}"]
                   for name in ("explained_variance", "l0", "dead_latents")}  # fmt: skip
        assert all(callable(metric) for metric in metrics.values())
        assert metrics["explained_variance"]().item() == pytest.approx(
            1 - unexplained.item(), rel=1e-4
        )
        assert metrics["l0"]().item() == pytest.approx((acts[:, :width] > 0).sum().item() / 50)
        assert metrics["dead_latents"]().item() == dead[:width].sum().item()


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda x, sae: x[3, 2:5].fill_(math.nan),
            r"step 7: sae_in .*\(20, 8\), holds 3 NaN and 0",
        ),
        (lambda x, sae: x[1].fill_(-math.inf), r"step 7: sae_in .*holds 0 NaN and 8 infinite"),
        (lambda x, sae: x.fill_(1e30), r"step 7: inner_mse_loss_4.*holds 0 NaN and 1 infinite"),
        (lambda x, sae: sae.b_dec.data[:1].fill_(math.nan), r"step 7: the parameter b_dec"),
        (lambda x, sae: sae.b_enc.data[9:10].fill_(math.nan), r"step 7: the parameter b_enc"),
        (lambda x, sae: sae.W_enc.data[:, 9].fill_(math.nan), r"step 7: the parameter W_enc"),
        (lambda x, sae: sae.W_dec.data[9].fill_(math.nan), r"step 7: the parameter W_dec"),
    ],
)
def test_non_finite_values_stop_the_step(spoil: Any, message: str, implementation: str) -> None:
    torch.manual_seed(0)
    sae = make_sae(implementation=implementation)
    x = torch.randn(20, 8)
    run_step(sae, x, None)
    threshold = sae.topk_threshold.clone()
    spoil(x, sae)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    message = message.replace("inner_mse_loss_4", "(inner_mse_loss_4|mse_loss)")
    with pytest.raises(ValueError, match=message):
        run_step(sae, x, None, step=7)
    assert torch.equal(sae.topk_threshold, threshold)
    assert all(p.grad is None for p in sae.parameters())
    torch.testing.assert_close(sae.state_dict(), before, equal_nan=True)


def test_compiling_falls_back_and_stays_right() -> None:
    torch.manual_seed(0)
    peer, ours = twins("auto", d_in=8, d_sae=32, k=3, matryoshka_widths=[4, 32])
    ours.training_forward_pass = torch.compile(ours.training_forward_pass)  # type: ignore[method-assign]
    for step in range(3):
        x = torch.randn(20 + step, 8)
        expected, actual = (outcome(sae, run_step(sae, x, None)) for sae in (peer, ours))
        assert_near(actual, expected, 1e-5)


def test_layer_norm_without_auxiliary_loss() -> None:
    """SAELens' inner levels fail here; ours reconstruct in the activations' own space."""
    torch.manual_seed(0)
    sae = make_sae(normalize_activations="layer_norm", aux_loss_coefficient=0.0)
    x = torch.randn(20, 8) * 3 + 5
    output = run_step(sae, x, None)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    acts = dense(output.feature_acts) / sae.W_dec.norm(dim=-1)
    for width, name in ((4, "inner_mse_loss_4"), (32, "mse_loss")):
        in_space = (acts[:, :width] @ sae.W_dec[:width] + sae.b_dec) * std + mean
        torch.testing.assert_close(output.losses[name], (in_space - x).pow(2).sum(-1).mean())


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_folding_a_normalization_as_saelens_does(normalization: str) -> None:
    torch.manual_seed(0)
    peer, ours = twins(
        "sparse",
        d_in=8,
        d_sae=32,
        k=3,
        matryoshka_widths=[4, 32],
        dtype="float64",
        normalize_activations=normalization,
    )
    raw = torch.randn(40, 8, dtype=torch.float64) * 4 + 2
    scaler = ActivationScaler()
    if normalization == "covariance_whitening":
        scaler.estimate_whitening(8, iter([raw]), n_batches_for_norm_estimate=1)
    else:
        scaler.estimate_scaling_factor(8, iter([raw]), n_batches_for_norm_estimate=1)
    for sae in (peer, ours):
        for _ in range(3):
            run_step(sae, scaler(raw), None)
        if scaler.whitening is not None:
            sae.fold_activation_whitening(
                scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix
            )
        else:
            assert scaler.scaling_factor is not None
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    assert relative_error(ours(raw), peer(raw)) < 1e-9
    assert_near(ours.state_dict(), peer.state_dict(), 1e-9)


def test_encoder_rows_stay_contiguous_wherever_the_weights_come_from(tmp_path: Any) -> None:
    sae = make_sae()
    run_step(sae, torch.randn(5, 8), None).loss.backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.T.is_contiguous(), "the gradient is accumulated without a copy"
    sae.save_model(tmp_path)
    loaded = MatryoshkaTrainingSAE.load_from_disk(tmp_path)
    for name, value in sae.state_dict().items():
        # SAELens casts the threshold to the weights' dtype as it loads
        assert torch.equal(loaded.state_dict()[name], value.to(torch.float32)), name
    for module in (sae, loaded, loaded.to(dtype=torch.float64)):
        assert module.W_enc.T.is_contiguous()
        assert module.W_enc.shape == (8, 32)
