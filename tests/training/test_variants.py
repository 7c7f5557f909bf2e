"""Every option of the nested objective against its reference, on all three architectures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from sae_lens_matryoshka import (
    MatryoshkaJumpReLUTrainingSAEConfig,
    MatryoshkaTopKTrainingSAE,
    MatryoshkaTopKTrainingSAEConfig,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
)
from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.layout import lay_out
from sae_lens_matryoshka.training.prefixes import level_of_latent
from tests.steps import assert_near, dense, run_step, spread
from tests.training.sparse_objective import decode_nested, mixing_matrix

D_IN, D_SAE, BATCH = 6, 24, 17


def step_of(sae: TrainingSAE[Any], x: torch.Tensor, dead: Any, step: int) -> TrainStepOutput:
    coefficients = {"l0": 0.3} if "jumprelu" in sae.cfg.architecture() else {}
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=coefficients,
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=True,
        )
    )


@st.composite
def variants(draw: st.DrawFn) -> dict[str, Any]:
    widths = sorted({*draw(st.sets(st.integers(1, D_SAE - 1), max_size=4)), D_SAE})
    sampling = draw(st.sampled_from(["fixed", "uniform", "log_uniform", "inverse_sqrt", "pareto"]))
    options: dict[str, Any] = {
        "matryoshka_widths": widths,
        "prefix_sampling": sampling,
        "stop_gradient": draw(st.sampled_from(["none", "all", "inner"])),
        "latent_order": draw(st.sampled_from(["index", "frequency"])),
        "bias_level": draw(st.booleans()),
        "decoder_norm": draw(st.sampled_from(["free", "unit", "unit_at_update"])),
        "encoder_bias": draw(st.booleans()),
    }
    n_levels = len(widths)
    if sampling != "fixed":
        options["min_prefix"] = draw(st.integers(1, 5))
        n_levels = options["n_prefixes"] = draw(st.integers(1, 6))
    n_levels += options["bias_level"]
    weights = st.lists(st.floats(0.01, 3), min_size=n_levels, max_size=n_levels)
    options["level_weights"] = draw(st.one_of(st.floats(0.1, 2), weights))
    if draw(st.booleans()):
        options |= {"inner_weight_end": 0.2, "inner_fade_start": 1, "inner_fade_steps": 2}
    return options


ARCHITECTURES = {
    "matryoshka": {"k": 2.5, "use_matryoshka_aux_loss": True},
    "matryoshka_topk": {"k": 3},
    "matryoshka_jumprelu": {"jumprelu_bandwidth": 0.7, "jumprelu_init_threshold": 0.4},
}


def make(architecture: str, implementation: str, options: dict[str, Any]) -> TrainingSAE[Any]:
    sae_class, config_class = get_sae_training_class(architecture)
    options = {"dtype": "float64", **ARCHITECTURES[architecture], **options}
    options["implementation"] = implementation
    return sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(options=variants(), seed=st.integers(0, 2**16), scheduled=st.booleans())
@settings(max_examples=20)
def test_sparse_steps_equal_the_reference(
    architecture: str, options: dict[str, Any], seed: int, scheduled: bool
) -> None:
    if scheduled and architecture != "matryoshka_jumprelu":
        options = {**options, "k_start": 6, "k_anneal_steps": 3}
    torch.manual_seed(seed)
    reference = make(architecture, "reference", options)
    spread(reference)
    sparse = make(architecture, "sparse", options)
    sparse.load_state_dict(reference.state_dict())
    optimizers = [torch.optim.SGD(sae.parameters(), lr=0.02) for sae in (reference, sparse)]
    for step in range(3):
        x = torch.randn(BATCH, D_IN, dtype=torch.float64)
        dead = torch.rand(D_SAE) < 0.3
        expected, actual = (step_of(sae, x, dead, step) for sae in (reference, sparse))
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual.losses, expected.losses)
        torch.testing.assert_close(dense(actual.feature_acts), dense(expected.feature_acts))
        assert actual.metrics.keys() == expected.metrics.keys()
        for name, metric in expected.metrics.items():
            if callable(metric):
                torch.testing.assert_close(actual.metrics[name](), metric(), msg=name)
        for output, optimizer in zip((expected, actual), optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
        for (name, one), other in zip(
            reference.named_parameters(), sparse.parameters(), strict=True
        ):
            if one.requires_grad:
                assert one.grad is not None
                assert other.grad is not None
                torch.testing.assert_close(other.grad, one.grad, msg=name, rtol=1e-7, atol=1e-9)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(sparse.state_dict(), reference.state_dict())


@given(
    seed=st.integers(0, 2**16),
    weights=st.lists(st.floats(0, 3), min_size=1, max_size=5),
    stop_gradient=st.sampled_from(["none", "all", "inner"]),
    n=st.integers(0, 60),
)
def test_gradients_are_the_mixed_residuals(
    seed: int, weights: list[float], stop_gradient: Any, n: int
) -> None:
    torch.manual_seed(seed)
    inner = torch.randperm(D_SAE - 1)[: len(weights) - 1] + 1
    widths = [*sorted(inner.tolist()), D_SAE]
    keys = torch.randperm(BATCH * D_SAE)[:n].sort().values
    values = torch.rand(n, dtype=torch.float64) + 0.1
    codes = Codes(keys // D_SAE, keys % D_SAE, values, values, 0.0)
    acts = values.clone().requires_grad_()
    W_dec = torch.randn(D_SAE, D_IN, dtype=torch.float64, requires_grad=True)
    b_dec = torch.randn(D_IN, dtype=torch.float64, requires_grad=True)
    table = level_of_latent(tuple(widths), "cpu")
    _, layout = lay_out(codes, BATCH, table, len(widths), True)
    levels, _ = decode_nested(
        acts,
        W_dec,
        b_dec,
        torch.randn(BATCH, D_IN, dtype=torch.float64),
        layout,
        len(widths),
        stop_gradient=stop_gradient,
    )
    (levels.losses * torch.tensor(weights, dtype=torch.float64)).sum().backward()

    M = mixing_matrix(weights, stop_gradient)
    assert torch.equal(M, M.triu())
    R = torch.einsum("gp,pbi->gbi", M, levels.residuals) * 2 / BATCH
    per_code = R[table[codes.latents].long(), codes.rows]
    expected = torch.zeros_like(W_dec)
    expected.index_add_(0, codes.latents, values[:, None] * per_code)
    torch.testing.assert_close(W_dec.grad, expected)
    torch.testing.assert_close(acts.grad, (per_code * W_dec.detach()[codes.latents]).sum(-1))
    weighted = torch.tensor(weights, dtype=torch.float64)[:, None, None] * levels.residuals
    torch.testing.assert_close(b_dec.grad, weighted.sum((0, 1)) * 2 / BATCH)


def test_the_matrix_by_hand() -> None:
    assert mixing_matrix([1, 1, 1]).tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert mixing_matrix([2, 3, 5]).tolist() == [[2, 3, 5], [0, 3, 5], [0, 0, 5]]
    assert mixing_matrix([2, 3, 5], "all").tolist() == [[2, 0, 0], [0, 3, 0], [0, 0, 5]]
    assert mixing_matrix([2, 3, 5], "inner").tolist() == [[2, 0, 5], [0, 3, 5], [0, 0, 5]]


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
def test_bias_level_and_weights_by_hand(implementation: str) -> None:
    torch.manual_seed(0)
    options = {"matryoshka_widths": [4, 24], "bias_level": True, "level_weights": [0.5, 2.0, 3.0]}
    sae = make("matryoshka", implementation, options)
    x = torch.randn(BATCH, D_IN, dtype=torch.float64)
    output = step_of(sae, x, None, 0)
    bias_loss = (sae.b_dec - x).pow(2).sum(-1).mean()
    torch.testing.assert_close(output.losses["bias_mse_loss"], bias_loss)
    losses = output.losses
    torch.testing.assert_close(
        output.loss, 0.5 * bias_loss + 2 * losses["inner_mse_loss_4"] + 3 * losses["mse_loss"]
    )


JUMPRELU = {"jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 0.1, "target_l0": 2.0}


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("jumprelu", {**JUMPRELU, "jumprelu_sparsity_loss_mode": "step"}),
        ("jumprelu", {**JUMPRELU, "jumprelu_sparsity_loss_mode": "tanh"}),
        ("jumprelu", {**JUMPRELU, "jumprelu_sparsity_loss_mode": "quadratic"}),
        ("topk", {"rescale_acts_by_decoder_norm": False}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_one_level_equals_saelens(
    architecture: str, options: dict[str, Any], implementation: str
) -> None:
    torch.manual_seed(0)
    options = {**ARCHITECTURES[f"matryoshka_{architecture}"], **options}
    sae_class, config_class = get_sae_training_class(architecture)
    peer = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, dtype="float64", **options))
    one_level = {**options, "matryoshka_widths": [D_SAE]}
    ours = make(f"matryoshka_{architecture}", implementation, one_level)
    spread(peer)
    ours.load_state_dict(peer.state_dict())
    optimizers = [torch.optim.SGD(sae.parameters(), lr=0.02) for sae in (peer, ours)]
    for step in range(5):
        x, dead = torch.randn(BATCH, D_IN, dtype=torch.float64), torch.rand(D_SAE) < 0.4
        expected, actual = (step_of(sae, x, dead, step) for sae in (peer, ours))
        torch.testing.assert_close(actual.loss, expected.loss)
        assert actual.losses.keys() == expected.losses.keys()
        torch.testing.assert_close(actual.sae_out, expected.sae_out)
        for output, optimizer in zip((expected, actual), optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
    assert_near(ours.state_dict(), peer.state_dict(), 1e-12)


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
def test_k_falls_as_scheduled(implementation: str) -> None:
    torch.manual_seed(0)
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=2, k_start=10, k_anneal_steps=4, implementation=implementation
    )
    sae = MatryoshkaTrainingSAE(cfg)
    x = torch.randn(50, D_IN)
    l0 = [
        (dense(run_step(sae, x, None, step).feature_acts) > 0).sum().item() / 50
        for step in (0, 1, 2, 3, 4, 9)
    ]
    assert l0 == [10, 8, 6, 4, 2, 2]


def test_one_weight_in_a_list_is_a_number() -> None:
    options: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "k": 2}
    cfg = MatryoshkaTrainingSAEConfig(**options, matryoshka_widths=[4, 24], level_weights=[0.5])
    assert cfg.weights_at(0) == [0.5, 1.0]
    cfg = MatryoshkaTrainingSAEConfig(**options, matryoshka_widths=[24], level_weights=[0.5])
    assert cfg.weights_at(0) == [0.5]


def test_whole_and_numpy_numbers_can_be_used_and_saved(tmp_path: Any) -> None:
    cfg = MatryoshkaTopKTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=8.0,
        inner_weight_end=np.float32(0.5),
        inner_fade_steps=3,  # type: ignore[arg-type]
    )
    sae = MatryoshkaTopKTrainingSAE(cfg)
    assert (sae.encode(torch.randn(3, D_IN)) > 0).sum(-1).max() <= 8
    sae.save_inference_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.k == 8


def test_what_is_left_out_can_be_replaced() -> None:
    cfg = MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=2, prefix_sampling="uniform")
    assert (cfg.n_prefixes, cfg.n_levels, len(cfg.prefixes_at(0))) == (None, 10, 10)
    assert replace(cfg, prefix_sampling="fixed").prefixes_at(0) == cfg.matryoshka_widths
    recipe = MatryoshkaTrainingSAEConfig.recommended(D_IN, D_SAE, 2, 100, k_start=None)
    assert (recipe.k_at(0), recipe.latent_order) == (2, "frequency")


def test_k_of_topk_falls_in_integers() -> None:
    torch.manual_seed(0)
    cfg = MatryoshkaTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=2, k_start=5, k_anneal_steps=4)
    sae = MatryoshkaTopKTrainingSAE(cfg)
    with torch.no_grad():
        sae.b_enc.fill_(20.0)  # every pre-activation is positive, so exactly k latents are active
    counts = [
        (step_of(sae, torch.randn(50, D_IN), None, step).feature_acts > 0).sum(-1).unique().tolist()
        for step in range(6)
    ]
    assert counts == [[5], [4], [4], [3], [2], [2]]  # 5, 4.25, 3.5 (to even), 2.75, 2


def test_inner_weights_fade_and_compound() -> None:
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=2,
        matryoshka_widths=[4, 8, 24],
        level_weights=0.5,
        inner_weight_end=0.2,
        inner_fade_start=10,
        inner_fade_steps=10,
    )
    assert cfg.weights_at(0) == cfg.weights_at(10) == [0.25, 0.5, 1.0]
    assert cfg.weights_at(15) == pytest.approx([0.15, 0.3, 1.0])
    assert cfg.weights_at(20) == cfg.weights_at(10**6) == pytest.approx([0.05, 0.1, 1.0])


@pytest.mark.parametrize("decoder_norm", ["unit", "unit_at_update"])
def test_decoder_norm(decoder_norm: Any) -> None:
    torch.manual_seed(0)
    sae = make("matryoshka", "sparse", {"decoder_norm": decoder_norm})
    ones = torch.ones(D_SAE, dtype=torch.float64)
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=-1), ones)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    for step in range(3):
        x = torch.randn(BATCH, D_IN, dtype=torch.float64)
        step_of(sae, x, None, step).loss.backward()
        assert sae.W_dec.grad is not None
        along = (sae.W_dec.grad * sae.W_dec.detach()).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along))
        torch.testing.assert_close(sae.W_dec.detach().norm(dim=-1), ones)  # where it is projected
        optimizer.step()
        optimizer.zero_grad()
    assert (sae.W_dec.detach().norm(dim=-1) - 1).abs().max() > 1e-3


def test_saved_decoder_is_of_unit_norm(tmp_path: Any) -> None:
    torch.manual_seed(0)
    options = {"decoder_norm": "unit", "rescale_acts_by_decoder_norm": False}
    sae = make("matryoshka", "sparse", options)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
    step_of(sae, torch.randn(BATCH, D_IN, dtype=torch.float64), None, 0).loss.backward()
    optimizer.step()
    state_dict = sae.state_dict()
    sae.process_state_dict_for_saving_inference(state_dict)
    norms = state_dict["W_dec"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_threshold_that_starts_late() -> None:
    torch.manual_seed(0)
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=2, topk_threshold_start_step=2, topk_threshold_lr=0.25
    )
    sae = MatryoshkaTrainingSAE(cfg)
    seen = []
    for step in range(5):
        acts = dense(run_step(sae, torch.randn(30, D_IN), None, step).feature_acts)
        seen.append((acts[acts > 0].min().item(), sae.topk_threshold.item()))
    assert [threshold for _, threshold in seen[:3]] == [0, 0, 0]
    assert seen[3][1] == pytest.approx(seen[3][0])
    assert seen[4][1] == pytest.approx(0.75 * seen[3][0] + 0.25 * seen[4][0])


BAD = [
    ({"level_weights": [1.0, 2.0]}, r"level_weights=\[1\.0, 2\.0\].*list of 3 weights"),
    ({"level_weights": [1.0, -1.0, 1.0]}, r"level_weights=\[1\.0, -1\.0, 1\.0\].*0 or more"),
    ({"level_weights": [0.0, 0, 0]}, r"level_weights=\[0\.0, 0, 0\].*not all 0"),
    ({"level_weights": 0}, r"level_weights=0 .*β above 0"),
    ({"level_weights": -0.5}, r"level_weights=-0\.5 .*β above 0"),
    ({"level_weights": "steep"}, r"level_weights='steep'"),
    ({"level_weights": [1, 1, 1], "bias_level": True}, r"level_weights=.*list of 4 weights"),
    (
        {"level_weights": 1e30, "matryoshka_widths": [2, 4, 8, 16]},
        r"level_weights=1e\+30 .*nearer to 1 for 4 levels",
    ),
    ({"stop_gradient": "outer"}, r"stop_gradient='outer'.*'none', 'all', 'inner'"),
    ({"prefix_sampling": "pareto", "n_prefixes": 17}, r"n_prefixes=17 .*1 to 16"),
    (
        {"prefix_sampling": "uniform", "n_prefixes": 4, "min_prefix": 14},
        r"n_prefixes=4 .*1 to 3, the number of lengths from min_prefix=14 to d_sae=16",
    ),
    ({"prefix_sampling": "uniform", "min_prefix": 17}, r"min_prefix=17 .*1 to d_sae=16"),
    ({"prefix_sampling": "zipf"}, r"prefix_sampling='zipf'.*'pareto'"),
    ({"n_prefixes": 3}, r"n_prefixes=3 .*prefix_sampling other than 'fixed'"),
    ({"min_prefix": 3}, r"min_prefix=3 .*prefix_sampling other than 'fixed'"),
    ({"latent_order": "norm"}, r"latent_order='norm'.*'index', 'frequency'"),
    ({"latent_order": "frequency", "dtype": "bfloat16"}, r"latent_order='frequency'.*bfloat16"),
    ({"decoder_norm": "two"}, r"decoder_norm='two'.*'unit_at_update'"),
    ({"k_start": 3, "k_anneal_steps": 5}, r"k_start=3 .*from k=4.*to d_sae=16"),
    ({"k_start": 17, "k_anneal_steps": 5}, r"k_start=17 .*to d_sae=16"),
    ({"k_start": 8}, r"k_start=8.*only with k_anneal_steps"),
    ({"k_anneal_steps": 8}, r"k_anneal_steps=8 .*only with k_start"),
    ({"k_start": 8, "k_anneal_steps": -1}, r"k_anneal_steps=-1 .*0 or more"),
    ({"inner_weight_end": 1.5, "inner_fade_steps": 5}, r"inner_weight_end=1\.5 .*from 0 to 1"),
    ({"inner_weight_end": 0.5}, r"inner_weight_end=0\.5 .*inner_fade_start or inner_fade_steps"),
    ({"bias_level": "yes"}, r"bias_level='yes' .*true or false"),
    ({"inner_fade_steps": 5}, r"inner_fade_steps=5 .*inner_weight_end below 1"),
    ({"inner_fade_start": 5}, r"inner_fade_start=5 .*inner_weight_end below 1"),
    ({"prefix_seed": -1}, r"prefix_seed=-1 .*0 or more"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize(
    "config_class", [MatryoshkaTrainingSAEConfig, MatryoshkaTopKTrainingSAEConfig]
)
def test_bad_options(config_class: Any, options: dict[str, Any], message: str) -> None:
    given_options = {"d_in": 8, "d_sae": 16, "k": 4, "matryoshka_widths": [4, 8, 16], **options}
    with pytest.raises(ValueError, match=message):
        config_class(**given_options)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (MatryoshkaTopKTrainingSAEConfig, {"k": 2.5}, r"k=2\.5 .*an integer"),
        (
            MatryoshkaTopKTrainingSAEConfig,
            {"k": 4, "normalize_activations": "layer_norm"},
            r"'layer_norm'.*aux_loss_coefficient=1\.0",
        ),
        (
            MatryoshkaJumpReLUTrainingSAEConfig,
            {"matryoshka_widths": [16], "level_weights": []},
            r"level_weights=\[\]",
        ),
        (MatryoshkaJumpReLUTrainingSAEConfig, {"d_sae": 0}, r"d_sae=0 "),
        (
            MatryoshkaTrainingSAEConfig,
            {"k": 4, "prefix_sampling": "uniform", "baseline_explained_variance": 0.7},
            r"baseline_explained_variance=0\.7 .*prefix_sampling='fixed'",
        ),
        (MatryoshkaTrainingSAEConfig, {"k": 4, "topk_threshold_start_step": -1}, r"start_step=-1 "),
    ],
)
def test_bad_options_of_one_architecture(config_class: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**{"d_in": 8, "d_sae": 16, **options})
