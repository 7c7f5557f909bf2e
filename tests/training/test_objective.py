"""The sparse objective against the dense formula, and the sparse sums against plain loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.kernels.codes import Codes, Layout
from sae_lens_matryoshka.kernels.dispatch import EAGER
from sae_lens_matryoshka.kernels.layout import lay_out
from sae_lens_matryoshka.kernels.sums import sum_by_latent
from sae_lens_matryoshka.training import objective
from sae_lens_matryoshka.training.objective import (
    auxiliary_loss,
    reference_losses,
    reference_reconstructions,
    sparse_auxiliary_loss,
)
from sae_lens_matryoshka.training.prefixes import level_of_latent
from tests.training.sparse_objective import decode_nested, encode_kept

WIDTHS = (3, 7, 12)
BATCH, D_IN = 5, 4
LEVELS = level_of_latent(WIDTHS, "cpu")


def drawn_codes(seed: int, n: int) -> Codes:
    """n non-zero codes at random positions of a 5 × 12 matrix; rows and latents may stay empty."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(BATCH * WIDTHS[-1], generator=generator)[:n].sort().values
    values = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    return Codes(keys // WIDTHS[-1], keys % WIDTHS[-1], values, values, 0.0)


def layout_of(codes: Codes) -> Layout:
    return lay_out(codes, BATCH, LEVELS, len(WIDTHS), True)[1]


def parameters(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (
        torch.randn(WIDTHS[-1], D_IN, dtype=torch.float64, requires_grad=True),
        torch.randn(D_IN, dtype=torch.float64, requires_grad=True),
        torch.randn(BATCH, D_IN, dtype=torch.float64),
    )


@given(seed=st.integers(0, 2**16), n=st.integers(0, 60), n_dead=st.integers(0, 4))
def test_nested_levels_equal_the_dense_formula(seed: int, n: int, n_dead: int) -> None:
    codes = drawn_codes(seed, n)
    W_dec, b_dec, target = parameters(seed)
    dead = torch.randperm(WIDTHS[-1])[:n_dead].sort().values
    dense = torch.zeros(BATCH, WIDTHS[-1], dtype=torch.float64)
    dense[codes.rows, codes.latents] = codes.pre_acts
    dense.requires_grad_()
    acts = codes.pre_acts.clone().requires_grad_()

    reconstructions = reference_reconstructions(dense, W_dec, b_dec, WIDTHS)
    expected = reference_losses(reconstructions, target)
    actual, dead_rows = decode_nested(
        acts, W_dec, b_dec, target, layout_of(codes), len(WIDTHS), dead
    )
    for field in ("losses", "residuals", "sae_out"):
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field))
    assert torch.equal(dead_rows, W_dec[dead])

    # any mix of the levels' losses, the reconstruction and the dead rows
    weights = torch.randn(len(WIDTHS), dtype=torch.float64)
    out_weights = torch.randn(BATCH, D_IN, dtype=torch.float64)
    grads = []
    for levels, rows, codes_in in ((expected, W_dec[dead], dense), (actual, dead_rows, acts)):
        total = (levels.losses * weights).sum() + (levels.sae_out * out_weights).sum()
        total = total + rows.pow(3).sum()
        grads.append(torch.autograd.grad(total, (codes_in, W_dec, b_dec)))
    torch.testing.assert_close(grads[1][0], grads[0][0][codes.rows, codes.latents])
    for actual_grad, expected_grad in zip(grads[1][1:], grads[0][1:], strict=True):
        torch.testing.assert_close(actual_grad, expected_grad)


@given(seed=st.integers(0, 2**16), n=st.integers(0, 60), n_dead=st.integers(0, 4))
def test_encoder_gradients_equal_the_dense_formula(seed: int, n: int, n_dead: int) -> None:
    torch.manual_seed(seed)
    codes = drawn_codes(seed, n)
    dead = torch.randperm(WIDTHS[-1])[:n_dead].sort().values
    raw = torch.randn(BATCH, D_IN, dtype=torch.float64)
    W_enc = torch.randn(D_IN, WIDTHS[-1], dtype=torch.float64, requires_grad=True)
    b_enc = torch.randn(WIDTHS[-1], dtype=torch.float64, requires_grad=True)
    b_in = torch.randn(D_IN, dtype=torch.float64, requires_grad=True)

    dense = (raw - b_in) @ W_enc + b_enc
    kept = dense[codes.rows, codes.latents]
    x = (raw - b_in).detach()
    acts, rows, biases = encode_kept(
        x,
        W_enc,
        b_enc,
        b_in,
        codes._replace(pre_acts=kept.detach()),
        layout_of(codes),
        dead,
    )
    assert torch.equal(acts, kept)
    dead_pre_acts = x @ rows.T + biases
    torch.testing.assert_close(dead_pre_acts, dense[:, dead])

    weights = torch.randn(n, dtype=torch.float64)
    grads = [
        torch.autograd.grad((a * weights).sum() + d.pow(2).sum(), (W_enc, b_enc, b_in))
        for a, d in ((kept, dense[:, dead]), (acts, dead_pre_acts))
    ]
    for actual, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(actual, expected)


@given(seed=st.integers(0, 2**16), n=st.integers(0, 60))
def test_layout_orders_the_codes_by_bag_and_by_latent(seed: int, n: int) -> None:
    codes = drawn_codes(seed, n)
    layout = layout_of(codes)
    positions = list(zip(codes.rows.tolist(), codes.latents.tolist(), strict=True))
    assert layout.bags.tolist() == [
        row * 3 + sum(latent >= width for width in WIDTHS) for row, latent in positions
    ]
    assert layout.bags.tolist() == sorted(layout.bags.tolist())
    assert layout.bag_starts.tolist() == [
        sum(bag < number for bag in layout.bags.tolist()) for number in range(BATCH * 3 + 1)
    ]
    by_latent = sorted(range(n), key=lambda code: (positions[code][1], code))
    assert layout.by_latent.tolist() == by_latent
    assert layout.latent_starts.tolist() == [
        sum(latent < number for _, latent in positions) for number in range(WIDTHS[-1] + 1)
    ]


@given(seed=st.integers(0, 2**16), n=st.integers(0, 60))
def test_codes_of_levels_in_any_order_are_put_in_order(seed: int, n: int) -> None:
    codes = drawn_codes(seed, n)
    levels = LEVELS[torch.randperm(WIDTHS[-1])]
    ordered, layout = lay_out(codes, BATCH, levels, len(WIDTHS), False)
    positions = list(zip(codes.rows.tolist(), codes.latents.tolist(), strict=True))
    expected = sorted(
        positions, key=lambda position: (position[0], levels[position[1]].item(), position[1])
    )
    assert list(zip(ordered.rows.tolist(), ordered.latents.tolist(), strict=True)) == expected
    assert layout.bags.tolist() == [row * 3 + levels[latent].item() for row, latent in expected]
    values = dict(zip(positions, codes.scores.tolist(), strict=True))
    assert ordered.scores.tolist() == [values[position] for position in expected]


def test_backward_may_run_twice() -> None:
    codes = drawn_codes(0, 30)
    W_dec, b_dec, target = parameters(0)
    acts = codes.pre_acts.clone().requires_grad_()
    levels, _ = decode_nested(acts, W_dec, b_dec, target, layout_of(codes), 3)
    first = torch.autograd.grad(levels.losses.sum(), (acts, W_dec), retain_graph=True)
    second = torch.autograd.grad(levels.losses.sum(), (acts, W_dec))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(0, 60),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=60)
def test_sums_by_latent_equal_plain_loops(seed: int, n: int, dtype: torch.dtype) -> None:
    codes = drawn_codes(seed, n)
    layout = layout_of(codes)
    matrix = torch.randn(11, D_IN).to(dtype)
    rows = torch.randint(0, 11, (n,), dtype=torch.int32)
    weights = codes.scores.to(dtype)
    expected = torch.zeros(WIDTHS[-1], D_IN, dtype=torch.float64)
    totals = torch.zeros(WIDTHS[-1], dtype=torch.float64)
    for latent, row, weight in zip(codes.latents, rows, weights.double(), strict=True):
        expected[latent] += weight * matrix[row].double()
        totals[latent] += weight
    sums, sum_of_weights = sum_by_latent(matrix, rows, weights, layout)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(sums.double(), expected, rtol=10 * eps, atol=10 * eps)
    torch.testing.assert_close(sum_of_weights.double(), totals, rtol=10 * eps, atol=10 * eps)


def test_auxiliary_loss_by_hand() -> None:
    residual = -torch.tensor([[1.0, 2.0, 0.0, 0.0]])  # the living latents leave (1, 2, 0, 0) over
    rows = torch.eye(4)[:3]
    pre_acts = torch.tensor([[1.0, -0.5, 0.25]])
    # k_aux = 2 of 3 dead latents: the largest scores are the first and the last
    assert auxiliary_loss(residual, pre_acts, None, rows).item() == 0 + 4 + 0.25**2
    # the norms rank 1·1, −0.5·1 and 0.25·8: the same two, and their values don't change
    assert auxiliary_loss(residual, pre_acts, torch.tensor([1, 1, 8.0]), rows).item() == 4.0625
    # one dead latent of k_aux = 2 weighs half
    assert auxiliary_loss(residual, pre_acts[:, :1], None, rows[:1]).item() == 0.5 * 4


@given(
    seed=st.integers(0, 2**16),
    batch_size=st.integers(1, 9),
    d_in=st.integers(2, 9),
    n_more=st.integers(1, 40),
    ranks_by_norm=st.booleans(),
)
def test_sparse_auxiliary_loss_is_the_dense_one(
    seed: int, batch_size: int, d_in: int, n_more: int, ranks_by_norm: bool
) -> None:
    torch.manual_seed(seed)
    n_dead = objective._SPARSE_FROM * (d_in // 2) + n_more
    residual, x = torch.randn(2, batch_size, d_in, dtype=torch.float64)
    encoder_rows, decoder_rows = torch.randn(2, n_dead, d_in, dtype=torch.float64)
    biases = torch.randn(n_dead, dtype=torch.float64)
    parameters = [p.requires_grad_() for p in (encoder_rows, biases, decoder_rows)]
    norms = torch.rand(n_dead, dtype=torch.float64) + 0.1 if ranks_by_norm else None
    losses = (
        auxiliary_loss(residual, x @ encoder_rows.T + biases, norms, decoder_rows),
        sparse_auxiliary_loss(residual, x, encoder_rows, biases, norms, decoder_rows, EAGER),
    )
    torch.testing.assert_close(losses[1], losses[0])
    expected, actual = (torch.autograd.grad(3 * loss, parameters) for loss in losses)
    torch.testing.assert_close(actual, expected)
