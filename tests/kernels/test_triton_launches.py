"""What kernels compute depends neither on the order of programs nor on what memory held before."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from sae_lens_matryoshka.kernels import (
    cut_triton,
    layout_triton,
    screen_triton,
    selection_triton,
    sums_triton,
)
from sae_lens_matryoshka.kernels.selection import Selection
from sae_lens_matryoshka.training.prefixes import level_of_latent
from tests.devices import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter's programs can be reordered"),
]

BATCH, D_IN, D_SAE, WIDTHS, N_KEEP = 12, 24, 40, (6, 16, 40), 90
Case = tuple[float | None, bool, Selection]  # last cut, are levels sorted?, how to select
CASES: list[Case] = [
    (None, True, "product"),
    (0.6, True, "product"),
    (50.0, True, "product"),
    (0.6, False, "product"),
    (1.1, True, "screen"),
]


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, constants in {
        cut_triton: {"_SCORES": 16, "_CANDIDATES": 16},
        screen_triton: {"_WIDTH": 16, "_ROWS": 4, "_BOUNDS": 16, "_DOTS": 4},
        layout_triton: {"_CODES": 8, "_CODES_OF_ROW": 4, "_RIVALS": 2, "_ROWS_PER_BIN": 5},
        sums_triton: {"_WIDTH": 16, "_CODES": 2, "_CHUNK": 4, "_LATENTS": 3, "_ROWS": 5},
    }.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    for module in (cut_triton, screen_triton):
        monkeypatch.setattr(module, "n_programs", lambda device: 7)


def results(case: Case) -> dict[str, torch.Tensor]:
    """What each operation of a step returns, without what padding leaves undefined."""
    last_cut, is_sorted, selection = case
    torch.manual_seed(0)
    x, W_dec = torch.randn(BATCH, D_IN), torch.randn(D_SAE, D_IN) / D_IN**0.5
    b_enc, b_dec, grad_out = torch.randn(D_SAE) * 0.1, torch.randn(D_IN), torch.randn(BATCH, D_IN)
    b_enc[-1] = 5.0  # a latent that is active on every row
    x[3] *= 10  # a row with many codes
    levels = level_of_latent(WIDTHS, "cpu")
    if not is_sorted:
        levels = levels.flip(0)
    n_levels = len(WIDTHS)

    codes = selection_triton.select(
        x, W_dec.T, b_enc, W_dec.norm(dim=1), N_KEEP, last_cut, selection
    )
    codes, layout = layout_triton.lay_out(codes, BATCH, levels, n_levels, is_sorted)
    residuals, losses, sae_out = sums_triton.level_residuals(
        codes.pre_acts, W_dec, b_dec, x, layout, n_levels
    )
    mixed, grad_acts, grad_b_dec = sums_triton.level_gradients(
        residuals, losses, grad_out, "inner", W_dec, layout
    )
    decoder, _ = sums_triton.sum_by_latent(mixed, layout.bags, codes.pre_acts, layout, False)
    encoder, totals = sums_triton.sum_by_latent(x, codes.rows.int(), grad_acts, layout)
    assert totals is not None
    tensors = {
        **codes._asdict(),
        **layout._asdict(),
        "residuals": residuals,
        "losses": losses,
        "sae_out": sae_out,
        "mixed": mixed,
        "grad_acts": grad_acts,
        "grad_b_dec": grad_b_dec,
        "decoder": decoder,
        "encoder": encoder,
        "totals": totals,
    }
    assert codes.n_valid == N_KEEP, "nothing is padding here"
    assert layout.latent_starts.diff().max() >= 8, "a latent's sum is meant to be split"
    assert layout.bag_starts.diff().max() >= 8, "a row's sum is meant to be split"
    return tensors


expected_results = cache(results)  # before a test changes anything


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_programs_may_run_in_any_order(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    expected = expected_results(case)
    set_index, permutations = interpreter_builder.set_grid_idx, {}

    def shuffle(x: int, y: int, z: int) -> None:
        n = interpreter_builder.grid_dim[0]
        if x == 0:
            permutations[n] = torch.randperm(n).tolist()
        set_index(permutations[n][x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffle)
    assert_equal(results(case), expected)
    assert len(permutations) > 5, "kernels are meant to run as several programs"


@pytest.fixture
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that PyTorch hands out holds anything; here it holds NaN, or a large number."""

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30 + 1)

    empty, empty_like = torch.empty, torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
        yield


@pytest.mark.parametrize("case", CASES)
def test_what_memory_held_does_not_matter(case: Case, request: pytest.FixtureRequest) -> None:
    expected = expected_results(case)
    request.getfixturevalue("_poisoned_memory")
    assert_equal(results(case), expected)


@pytest.mark.parametrize("selection", ["product", "screen"])
@pytest.mark.parametrize("n_codes", [0, 1, 5])
@pytest.mark.usefixtures("_poisoned_memory")
def test_every_element_is_written_where_few_codes_are_valid(
    n_codes: int, selection: Selection
) -> None:
    x, W_enc = torch.zeros(3, D_IN), torch.zeros(D_IN, D_SAE)
    b_enc = torch.full((D_SAE,), -1.0)
    x[:2, 0], W_enc[0, :2] = 1.0, 2.0
    W_enc[:, (n_codes + 1) // 2 :] = 0.0
    if n_codes == 1:
        x[1] = 0.0
    if n_codes == 5:
        b_enc[5] = 1.0  # on all three rows
        W_enc[0, 1] = 0.0
    if selection == "product":
        codes = selection_triton.select(x, W_enc, b_enc, None, 20, 0.5, selection)
    else:
        codes = screen_triton.select_screened(x, W_enc, b_enc, None, 20, 0.0)
        assert codes is not None
    assert codes.n_valid == n_codes
    levels = level_of_latent(WIDTHS, "cpu")
    codes, layout = layout_triton.lay_out(codes, 3, levels, len(WIDTHS), True)
    W_dec, b_dec = W_enc.T.contiguous(), x[0]
    residuals, losses, sae_out = sums_triton.level_residuals(
        codes.pre_acts, W_dec, b_dec, x, layout, len(WIDTHS)
    )
    gradients = sums_triton.level_gradients(residuals, losses, None, "none", W_dec, layout)
    sums = sums_triton.sum_by_latent(x, codes.rows.int(), gradients[1], layout)
    for tensor in (codes.scores, codes.pre_acts, residuals, losses, sae_out, *gradients, *sums):
        assert tensor is not None
        assert tensor.isfinite().all()
    assert int(codes.rows.max()) < 3
    assert int(codes.latents.max()) < D_SAE


def test_how_often_a_step_launches_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the floor was right or wrong: the host does not know, unless there is a screen."""
    from triton.runtime.interpreter import GridExecutor

    counts: list[Counter[str]] = []
    launch = GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        counts[-1][executor.fn.__name__] += 1
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    for case in CASES:
        counts.append(Counter())
        results(case)
    assert counts[0] == counts[1] == counts[2]
    assert counts[3] - counts[0] == Counter({"_sort_rows": 1})
    assert counts[0] == {
        "_collect": 1,
        "_judge_limit": 1,
        "_histogram": 6,
        "_find_digit": 6,
        "_order": 1,
        "_collect_again": 1,
        "_count": 2 + 1,  # of the selection, and of the layout
        "_pick_codes": 1,
        "_place": 1,
        "_rank": 1,
        "_sum_chunk": 3,
        "_residuals": 1,
        "_mix": 1,
        "_dot": 1,
        "_sum_by_latent": 2,
    }
    assert counts[4] - counts[0] == Counter(
        {"_round_rows": 2, "_bound": 1, "_score": 2, "_histogram": 3, "_find_digit": 3}
    )
    assert counts[0] - counts[4] == Counter({"_collect_again": 1, "_count": 1})
