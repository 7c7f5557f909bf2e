"""Training steps that Triton kernels compute, against SAELens' and against the reference."""

import dataclasses
import math
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.kernels import selection_triton, triton_support
from sae_lens_matryoshka.kernels.dispatch import EAGER, backend_for
from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from tests.devices import DEVICE
from tests.steps import dense, outcome, relative_error, run_step, spread, twins
from tests.training.test_parity import cases
from tests.training.test_variants import ARCHITECTURES, D_IN, D_SAE, make, step_of, variants

pytestmark = pytest.mark.gpu

BATCH = 5


def assert_same_outcome(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    scale = max(value.double().norm().item() for value in expected.values())
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm().item()
        assert error <= tolerance * value.double().norm().item() + 1e-7 * scale, name


@given(case=cases())
@settings(max_examples=8)
def test_step_equals_saelens(case: dict) -> None:
    torch.manual_seed(case["seed"])
    peer, ours = twins("triton", dtype="float32", **case["options"], device=DEVICE)
    for step in range(2):  # the second knows the first one's cut
        x = torch.randn(min(case["batch_size"], 8), peer.cfg.d_in, device=DEVICE)
        dead = None
        if case["dead_share"] is not None:
            dead = torch.rand(peer.cfg.d_sae, device=DEVICE) < case["dead_share"]
        expected = outcome(peer, run_step(peer, x, dead, step))
        actual = outcome(ours, run_step(ours, x, dead, step))
        assert torch.equal(actual["feature_acts"] > 0, expected["feature_acts"] > 0)
        assert_same_outcome(actual, expected, 1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(options=variants(), seed=st.integers(0, 2**16))
@settings(max_examples=6)
def test_variants_equal_the_reference(
    architecture: str, options: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    options = {**options, "dtype": "float32", "device": DEVICE}
    saes = [
        make(architecture, implementation, options) for implementation in ("reference", "triton")
    ]
    spread(saes[0])
    saes[1].load_state_dict(saes[0].state_dict())
    for step in range(2):
        x = torch.randn(BATCH, D_IN, device=DEVICE)
        dead = torch.rand(D_SAE, device=DEVICE) < 0.3
        results = []
        for sae in saes:
            output = step_of(sae, x, dead, step)
            output.loss.backward()
            metrics = {k: m() for k, m in output.metrics.items() if callable(m)}
            grads = {k: p.grad for k, p in sae.named_parameters() if p.grad is not None}
            results.append({"loss": output.loss.detach(), **output.losses, **metrics, **grads})
            results[-1]["feature_acts"] = dense(output.feature_acts)
            sae.zero_grad()
        assert_same_outcome(results[1], results[0], 1e-5)
        if "firing_rates" in saes[0].state_dict():
            torch.testing.assert_close(saes[1].firing_rates, saes[0].firing_rates)


@pytest.mark.parametrize("rescale_acts_by_decoder_norm", [False, True])
def test_the_screen_changes_nothing_but_rounding(
    rescale_acts_by_decoder_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screened = []  # what each screen returned
    screen = selection_triton.select_screened
    monkeypatch.setattr(
        selection_triton,
        "select_screened",
        lambda *args: screened.append(screen(*args)) or screened[-1],
    )
    torch.manual_seed(0)
    options = {
        "d_in": 24,
        "d_sae": 96,
        "matryoshka_widths": [8, 24, 96],
        "k": 3,
        "rescale_acts_by_decoder_norm": rescale_acts_by_decoder_norm,
    }
    peer, ours = twins("triton", **options, device=DEVICE)
    ours.cfg.selection = "screen"
    product = MatryoshkaTrainingSAE(dataclasses.replace(ours.cfg, selection="product"))
    product.load_state_dict(ours.state_dict())
    for step in range(3):
        x = torch.randn(12, 24, device=DEVICE)
        dead = torch.arange(96, device=DEVICE) % 7 == 0
        expected, by_product, by_screen = (
            outcome(sae, run_step(sae, x, dead, step)) for sae in (peer, product, ours)
        )
        for other in (expected, by_product):
            assert torch.equal(by_screen["feature_acts"] > 0, other["feature_acts"] > 0)
            assert_same_outcome(by_screen, other, 1e-5)
    assert sum(codes is not None for codes in screened) == 2, "no cut is known in the first step"


def test_padding_changes_nothing() -> None:
    """Where fewer scores are above 0 than are to be kept."""
    torch.manual_seed(0)
    peer, ours = twins("triton", d_in=8, d_sae=32, matryoshka_widths=[8, 32], k=4, device=DEVICE)
    with torch.no_grad():
        for sae in (peer, ours):
            sae.b_enc.fill_(-3.0)
    for scale in (1.0, 1.0, 1e-3):
        x = torch.randn(6, 8, device=DEVICE) * scale
        expected, actual = (outcome(sae, run_step(sae, x, None)) for sae in (peer, ours))
        assert (expected["feature_acts"] > 0).sum() < 4 * 6
        assert torch.equal(actual["feature_acts"] > 0, expected["feature_acts"] > 0)
        assert_same_outcome(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    """bfloat16 autocast on float32 parameters, and bfloat16 parameters; see test_parity."""
    torch.manual_seed(1)
    options = {"d_in": 24, "d_sae": 96, "matryoshka_widths": [16, 96], "k": 4}
    peer, ours = twins("triton", **options, dtype=dtype, device=DEVICE)
    x = torch.randn(16, 24, device=DEVICE, dtype=peer.dtype)
    results = []
    for sae in (peer, ours):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "float32"):
            output = run_step(sae, x, torch.arange(96, device=DEVICE) % 9 == 0)
        results.append(outcome(sae, output))
    expected, actual = results
    assert_no_more_than_ties_differ(actual["feature_acts"], expected["feature_acts"])
    for name, value in expected.items():
        # bfloat16 scores tie at the cut, and on a CPU SAELens keeps others of those that tie
        if dtype == "float32" or name.startswith("loss"):
            assert relative_error(actual[name], value) < 2e-2, name


def assert_no_more_than_ties_differ(actual: torch.Tensor, expected: torch.Tensor) -> None:
    differing = actual != expected
    assert (actual > 0).sum() == (expected > 0).sum()
    cut = expected[expected > 0].min()
    assert (torch.maximum(actual, expected)[differing] == cut).all()


@pytest.mark.parametrize("name", ["x", "b_dec", "b_enc", "W_enc", "W_dec"])
def test_nan_is_named(name: str) -> None:
    torch.manual_seed(0)
    _, sae = twins("triton", d_in=8, d_sae=32, matryoshka_widths=[4, 32], k=3, device=DEVICE)
    x = torch.randn(6, 8, device=DEVICE)
    run_step(sae, x, None)
    if name == "x":
        x[3, 2:5] = math.nan
    else:
        getattr(sae, name).data.T[..., :1] = math.nan
    named = r"sae_in .*\(6, 8\), holds 3 NaN" if name == "x" else f"the parameter {name}"
    with pytest.raises(ValueError, match=f"stopped at step 7: {named}"):
        run_step(sae, x, None, step=7)


def test_deterministic_runs_are_equal_to_the_bit() -> None:
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(5)
            _, sae = twins(
                "triton", d_in=16, d_sae=48, matryoshka_widths=[8, 48], k=4, device=DEVICE
            )
            optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
            for step in range(3):
                dead = torch.arange(48, device=DEVICE) % 6 == 0
                run_step(sae, torch.randn(8, 16, device=DEVICE), dead, step).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            runs.append(sae.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


def test_a_run_of_saelens_trainer() -> None:
    """Losses agree to 2e-3 at every step, and what is scored at the end to 1e-3.

    Rounding differs, and now and then another latent is kept; weights whose gradient is mostly
    rounding part by more, since Adam divides by its size.
    """
    n_steps, d_in, d_sae, batch, k = 50, 8, 24, 4, 3.0
    if DEVICE == "cuda":
        n_steps, d_in, d_sae, batch, k = 200, 64, 1024, 256, 10.0
    curves, finals = [], []
    for implementation in ("reference", "triton"):
        torch.manual_seed(0)
        features = torch.randn(2 * d_in, d_in) / d_in**0.5
        active = torch.rand(4, batch, len(features)) < k / 2 / len(features)
        batches = (active.float() @ features).to(DEVICE)
        options = {"d_in": d_in, "d_sae": d_sae, "k": k, "device": DEVICE}
        cfg = MatryoshkaTrainingSAEConfig(**options, implementation=implementation)
        sae = MatryoshkaTrainingSAE(cfg)
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=10**9,
                train_batch_size_samples=batch,
                lr=3e-3,
                lr_end=3e-3,
                device=DEVICE,
                dead_feature_window=20,
                feature_sampling_window=10**6,
            ),
            sae,
            iter(()),
        )
        losses = []
        for step in range(n_steps):
            losses.append(trainer.step(batches[step % 4]).loss.item())
            trainer.n_training_steps += 1
        curves.append(torch.tensor(losses))
        scores = run_step(sae, batches.flatten(0, 1), None, is_logging_step=True).metrics
        finals.append({k: v() if callable(v) else v for k, v in scores.items()})
    assert curves[0][-4:].mean() < 0.8 * curves[0][:4].mean(), "the run is meant to learn"
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-3, atol=0)
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("latent_order", ["index", "frequency"])
def test_padding_of_feature_acts_is_zero(latent_order: str) -> None:
    options = {"d_in": 8, "d_sae": 32, "k": 4, "device": DEVICE, "latent_order": latent_order}
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**options, implementation="triton"))
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)
        sae.b_enc[-1] = 5.0  # only the latent of the padding is active
        sae.W_enc[:, -1] = 0.0
    acts = run_step(sae, torch.randn(6, 8, device=DEVICE) * 0.01, None).feature_acts
    assert acts._nnz() == 4 * 6
    expected = torch.zeros(6, 32, device=DEVICE)
    expected[:, -1] = 5 * sae.W_dec[-1].detach().norm()
    torch.testing.assert_close(acts.to_dense(), expected)
    fired = acts.bool().float().sum(0).to_dense()  # as SAELens' trainer counts them
    assert fired.tolist() == [0.0] * 31 + [6.0]


def trainer_of(sae: MatryoshkaTrainingSAE, n_dead: int) -> MatryoshkaTrainer:
    """A trainer of `sae`, `n_dead` latents of which have not fired for long."""
    trainer = MatryoshkaTrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=64,
            lr_end=3e-4,
            device=DEVICE,
            dead_feature_window=1000,
            feature_sampling_window=10**6,
        ),
        sae,
        iter(()),
    )
    trainer.n_forward_passes_since_fired[:n_dead] = 10**6
    return trainer


@pytest.mark.skipif(DEVICE == "cpu", reason="only CUDA tells what waits for it")
@pytest.mark.parametrize("options", [{}, {"prefix_sampling": "uniform"}, {"level_weights": 0.5}])
def test_a_step_of_our_trainer_waits_for_no_more_than_an_event(options: dict[str, Any]) -> None:
    """PyTorch does not count the wait for an event, after which the GPU is still busy."""
    cfg = MatryoshkaTrainingSAEConfig(d_in=32, d_sae=512, k=8, device=DEVICE, **options)
    trainer = trainer_of(MatryoshkaTrainingSAE(cfg), n_dead=10)
    for step in range(3):
        x = torch.randn(64, 32, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            trainer.step(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.n_training_steps += 1


class AskedOfTheDevice(TorchDispatchMode):
    """Counts what makes the host wait for a device, on any device; kernels' own work aside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if masks or name in WAITING_OPERATIONS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


WAITING_OPERATIONS = {
    "_coalesce",
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


@pytest.fixture
def _kernels_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def unseen(executor: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA, PyTorch itself tells what waits")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_sampling": "uniform"},
        {"level_weights": 0.5},
        {"latent_order": "frequency"},
        {"stop_gradient": "inner", "bias_level": True},
    ],
)
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.usefixtures("_kernels_unseen")
def test_our_trainer_asks_the_device_whether_the_loss_is_finite_before_the_update_alone(
    options: dict[str, Any], with_dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=8, d_sae=32, k=3, implementation="triton", device=DEVICE, **options
    )
    trainer = trainer_of(MatryoshkaTrainingSAE(cfg), n_dead=6 if with_dead else 0)
    asked = AskedOfTheDevice()
    questions: list[tuple[str, dict[str, int]]] = []  # before each part of the step, and after it

    def watch(name: str) -> None:
        part = getattr(trainer, name)

        def watched(*args: Any) -> None:
            questions.append((f"before {name}", dict(asked.counts)))
            part(*args)
            questions.append((f"after {name}", dict(asked.counts)))

        monkeypatch.setattr(trainer, name, watched)

    watch("_backward")
    watch("_update")
    # on CUDA the dead latents are counted while the device computes; see `TrueIndices`
    forward = {"nonzero": 1}
    for _ in range(2):
        asked.counts.clear()
        questions.clear()
        with asked:
            trainer.step(torch.randn(6, 8))
        trainer.n_training_steps += 1
        assert questions == [
            ("before _backward", forward),
            ("after _backward", forward),
            ("before _update", {"_local_scalar_dense": 1, **forward}),
            ("after _update", {"_local_scalar_dense": 1, **forward}),
        ]
        assert asked.counts == {"_local_scalar_dense": 1, **forward}


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA, PyTorch itself tells what waits")
@pytest.mark.usefixtures("_kernels_unseen")
def test_a_screened_step_also_asks_whether_its_codes_are_settled() -> None:
    torch.manual_seed(0)
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=8, d_sae=64, k=3, implementation="triton", device=DEVICE, selection="screen"
    )
    sae = MatryoshkaTrainingSAE(cfg)
    n_asked = []
    # without a cut; settled by the first screen, by the second, and by the product
    for scale in (1.0, 1.0, 0.78, 0.3):
        with AskedOfTheDevice() as asked:
            run_step(sae, torch.randn(64, 8) * scale, None).loss.backward()
        assert asked.counts.keys() == {"_local_scalar_dense"}
        n_asked.append(asked.counts["_local_scalar_dense"])
    assert n_asked == [1, 2, 3, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_lie_in_memory_as_their_parameters_do(dtype: str) -> None:
    """PyTorch copies a gradient that doesn't."""
    sae = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(
            d_in=8, d_sae=32, k=3, implementation="triton", device=DEVICE, dtype=dtype
        )
    )
    strides = {}
    for name, parameter in sae.named_parameters():
        parameter.register_hook(
            lambda gradient, name=name: strides.update({name: gradient.stride()})
        )
    run_step(sae, torch.randn(6, 8, device=DEVICE, dtype=sae.dtype), None).loss.backward()
    assert strides == {name: parameter.stride() for name, parameter in sae.named_parameters()}


def test_one_place_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_support, "_why_no_launch", lambda: None)
    triton = backend_for("auto", cuda, torch.float32)
    assert triton is not None
    assert triton.select.__wrapped__ is selection_triton.select  # type: ignore[attr-defined]
    assert backend_for("triton", cuda, torch.bfloat16) is triton
    assert backend_for("auto", cuda, torch.float64) is EAGER
    assert backend_for("sparse", cuda, torch.float32) is EAGER
    assert backend_for("auto", cpu, torch.float32) is EAGER
    assert backend_for("reference", cuda, torch.float32) is None
    assert backend_for("auto", torch.device("mps"), torch.float32) is None
    with pytest.raises(ValueError, match=r"for an SAE of torch.float64: give 'auto', .*bfloat16"):
        backend_for("triton", cuda, torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"'triton' is not accepted for an SAE on cpu: give 'auto'"
    ):
        backend_for("triton", cpu, torch.float32)
    monkeypatch.setattr(triton_support, "_why_no_launch", lambda: "there is no C compiler")
    with pytest.warns(UserWarning, match="in PyTorch, .* because there is no C compiler"):
        assert backend_for("auto", cuda, torch.float32) is EAGER
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert backend_for("auto", cuda, torch.float32) is EAGER
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="because Triton is not installed"):
        assert backend_for("auto", cuda, torch.float32) is EAGER


def test_a_first_selection_tells_whether_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    why_no_launch = triton_support._why_no_launch.__wrapped__
    assert why_no_launch(DEVICE) is None

    def fail(*args: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(selection_triton, "select", fail)
    assert why_no_launch(DEVICE) == (
        "a first kernel failed (RuntimeError: Failed to find C compiler.)"
    )
    monkeypatch.setitem(sys.modules, selection_triton.__name__, None)  # its import fails
    assert why_no_launch(DEVICE).startswith("a first kernel failed (ModuleNotFoundError")
    monkeypatch.undo()
    monkeypatch.setattr(selection_triton, "select", lambda *args: EAGER.select(*args[:4], 2, None))
    assert why_no_launch(DEVICE) == "a first kernel gave a wrong result"


def test_config_names_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError,
        match=r"'triton' is not accepted on this machine, because PyTorch finds no CUDA device: "
        r"give 'auto', 'sparse' or 'reference'",
    ):
        MatryoshkaTrainingSAEConfig(d_in=8, d_sae=32, k=2, implementation="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="because Triton is not installed"):
        MatryoshkaTrainingSAEConfig(d_in=8, d_sae=32, k=2, implementation="triton")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"'triton' is not accepted together with dtype='float64'"):
        MatryoshkaTrainingSAEConfig(d_in=8, d_sae=32, k=2, implementation="triton", dtype="float64")
