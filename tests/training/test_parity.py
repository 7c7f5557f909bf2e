"""One training step equals SAELens' `matryoshka_batchtopk`, over drawn shapes and options."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels import screen
from sae_lens_matryoshka.kernels.selection import Selection
from tests.steps import assert_near, dense, outcome, relative_error, run_step, twins

WAYS = [
    ("reference", "float64", "auto"),
    ("reference", "float32", "auto"),
    ("sparse", "float64", "product"),
    ("sparse", "float32", "product"),
    ("sparse", "float32", "screen"),
]
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


@st.composite
def cases(draw: st.DrawFn) -> dict:
    d_in = draw(st.integers(2, 24))
    d_sae = draw(st.integers(2, 80))
    widths = draw(st.sets(st.integers(1, d_sae), min_size=1, max_size=6))
    return {
        "options": {
            "d_in": d_in,
            "d_sae": d_sae,
            "matryoshka_widths": sorted({*widths, d_sae}),
            "k": draw(st.one_of(st.integers(1, d_sae), st.floats(0.3, min(6.0, d_sae)))),
            "rescale_acts_by_decoder_norm": draw(st.booleans()),
            "apply_b_dec_to_input": draw(st.booleans()),
            "use_matryoshka_aux_loss": draw(st.booleans()),
            "aux_loss_coefficient": draw(st.sampled_from([0.0, 1 / 32, 1.0])),
            "topk_threshold_lr": draw(st.sampled_from([0.01, 0.3])),
        },
        "batch_size": draw(st.integers(1, 40)),
        "dead_share": draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize(("implementation", "dtype", "selection"), WAYS)
@given(case=cases())
@settings(max_examples=60)
@example(
    case={
        "options": {"d_in": 16, "d_sae": 64, "matryoshka_widths": [4, 16, 64], "k": 3.5},
        "batch_size": 32,
        "dead_share": 0.2,
        "seed": 0,
    }
)
def test_step_equals_saelens(
    case: dict, implementation: str, dtype: str, selection: Selection
) -> None:
    torch.manual_seed(case["seed"])
    peer, ours = twins(implementation, dtype=dtype, **case["options"])
    ours.cfg.selection = selection
    optimizers = [torch.optim.Adam(sae.parameters(), lr=3e-3) for sae in (peer, ours)]
    tolerance = TOLERANCE[dtype]
    for step in range(4):
        x = torch.randn(case["batch_size"], peer.cfg.d_in, dtype=peer.dtype)
        dead = None
        if case["dead_share"] is not None:
            dead = torch.rand(peer.cfg.d_sae) < case["dead_share"]
        expected = outcome(peer, run_step(peer, x, dead, step))
        actual = outcome(ours, run_step(ours, x, dead, step))

        assert actual.keys() == expected.keys()
        assert torch.equal(actual["feature_acts"] > 0, expected["feature_acts"] > 0)
        # an entry that is zero but for rounding is compared on the scale of the gradient it is in
        scale = max(value.double().norm().item() for value in expected.values())
        for name, value in expected.items():
            floor = torch.finfo(peer.dtype).eps * scale
            error = (actual[name].double() - value.double()).norm().item()
            assert error <= tolerance * value.double().norm().item() + floor, (step, name)
        for sae, optimizer in zip((peer, ours), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
        # Adam divides by the gradient's size: where a gradient is rounding noise, so is its step
        ours.load_state_dict(peer.state_dict())


@pytest.mark.parametrize("use_matryoshka_aux_loss", [False, True])
@pytest.mark.parametrize(("implementation", "dtype", "selection"), WAYS)
def test_weights_after_many_steps(
    monkeypatch: pytest.MonkeyPatch,
    implementation: str,
    dtype: str,
    selection: Selection,
    use_matryoshka_aux_loss: bool,
) -> None:
    settled = []  # what each screen returned
    settle = screen.settle
    monkeypatch.setattr(
        screen, "settle", lambda *args: settled.append(settle(*args)) or settled[-1]
    )
    torch.manual_seed(3)
    peer, ours = twins(
        implementation,
        d_in=24,
        d_sae=160,
        matryoshka_widths=[8, 24, 64, 160],
        k=5,
        dtype=dtype,
        use_matryoshka_aux_loss=use_matryoshka_aux_loss,
    )
    ours.cfg.selection = selection
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-3) for sae in (peer, ours)]
    dictionary = torch.randn(100, 24, dtype=peer.dtype)
    since_fired = torch.zeros(160)
    for step in range(40):
        x = torch.relu(torch.randn(64, 100, dtype=peer.dtype) - 1.5) @ dictionary
        for sae, optimizer in zip((peer, ours), optimizers, strict=True):
            output = run_step(sae, x, since_fired > 5, step)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        since_fired += 1
        since_fired[(dense(output.feature_acts) > 0).any(0)] = 0
    assert (since_fired > 5).any(), "the run is meant to have dead latents"
    n_screened = sum(codes is not None for codes in settled)
    assert (n_screened > 30) if selection == "screen" else (n_screened == 0)
    assert_near(ours.state_dict(), peer.state_dict(), TOLERANCE[dtype])


def test_bf16_autocast_is_as_exact_as_bf16_allows() -> None:
    """Under autocast SAELens rounds the decoder's factors to bfloat16; the sparse sums never do.

    The encode product is the same bfloat16 product on both sides, so the codes agree. What SAELens
    decodes from them carries bfloat16's relative error, 2^-8 per rounded factor, and 2e-2 bounds
    what that does to losses and gradients. Ours is the closer of the two to exact arithmetic.
    """
    torch.manual_seed(1)
    options = {"d_in": 48, "d_sae": 256, "matryoshka_widths": [16, 64, 256], "k": 8}
    peer, ours = twins("sparse", **options)
    x = torch.randn(128, 48)
    dead = torch.rand(256) < 0.1
    results = []
    for sae in (peer, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = run_step(sae, x, dead)
        results.append(outcome(sae, output))
    expected, actual = results
    assert torch.equal(actual["feature_acts"], expected["feature_acts"])
    assert torch.equal(actual["topk_threshold"], expected["topk_threshold"])
    assert_near(actual, expected, 2e-2)

    codes = (expected["feature_acts"] / peer.W_dec.detach().norm(dim=-1)).double()
    exact = codes @ peer.W_dec.detach().double() + peer.b_dec.detach().double()
    assert relative_error(actual["sae_out"], exact) < 1e-6
    assert relative_error(expected["sae_out"], exact) > 1e-4


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
def test_bfloat16_parameters(implementation: str) -> None:
    """In bfloat16 each sum rounds at 2^-8 and SAELens itself is no closer to exact arithmetic."""
    torch.manual_seed(2)
    peer, ours = twins(
        implementation, d_in=32, d_sae=128, matryoshka_widths=[16, 128], k=4, dtype="bfloat16"
    )
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    expected = outcome(peer, run_step(peer, x, None))
    actual = outcome(ours, run_step(ours, x, None))
    assert torch.equal(actual["feature_acts"], expected["feature_acts"])
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype or name.startswith("loss"), name
        assert relative_error(actual[name], value) < 5e-2, name


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
def test_ties_and_few_positives_as_in_saelens(implementation: str) -> None:
    torch.manual_seed(4)
    peer, ours = twins(implementation, d_in=8, d_sae=32, matryoshka_widths=[8, 32], k=4)
    repeated = torch.randn(3, 8).repeat(10, 1)  # every score occurs ten times
    for x in (repeated, repeated, torch.zeros(30, 8)):
        expected, actual = run_step(peer, x, None), run_step(ours, x, None)
        assert torch.equal(dense(actual.feature_acts), dense(expected.feature_acts))
    with torch.no_grad():
        for sae in (peer, ours):
            sae.b_enc.fill_(-3.0)  # almost every pre-activation is negative
    for x in (torch.randn(30, 8), torch.randn(30, 8), torch.randn(30, 8) * 1e-3):
        expected, actual = (outcome(sae, run_step(sae, x, None)) for sae in (peer, ours))
        assert (expected["feature_acts"] > 0).sum() < 4 * 30
        assert torch.equal(actual["feature_acts"] > 0, expected["feature_acts"] > 0)
        assert_near(actual, expected, 1e-5)
