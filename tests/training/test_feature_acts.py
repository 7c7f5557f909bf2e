"""What SAELens' trainer asks of sparse activations is answered as PyTorch would answer it."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.steps import run_step, twins


def step_acts(latent_order: str = "index") -> torch.Tensor:
    torch.manual_seed(0)
    options = {"d_in": 8, "d_sae": 30, "k": 3, "matryoshka_widths": [5, 30]}
    _, ours = twins("sparse", **options)
    ours.cfg.latent_order = latent_order  # type: ignore[assignment]
    ours.register_buffer("firing_rates", torch.rand(30))
    return run_step(ours, torch.randn(6, 8), None).feature_acts


@pytest.mark.parametrize("latent_order", ["index", "frequency"])
def test_firings_are_those_of_the_dense_tensor(latent_order: str) -> None:
    acts = step_acts(latent_order)
    assert acts.is_sparse
    fired = acts.to_dense() > 0
    assert fired.sum() == 18
    for dim in (0, -2):
        counts = acts.bool().float().sum(dim)
        assert counts.dtype == torch.float32
        assert torch.equal(counts, fired.float().sum(dim))
        assert torch.equal(acts.bool().sum(dim), fired.sum(dim))
    assert torch.equal(acts.bool().float().sum(-1).to_dense(), fired.float().sum(-1))
    assert torch.equal(acts.float().sum(0).to_dense(), acts.to_dense().sum(0))
    assert torch.equal((2 * acts).to_dense(), 2 * acts.to_dense())


def test_counting_firings_does_not_sort_the_codes() -> None:
    acts = step_acts("frequency")
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        firings = acts.bool().float()
        assert not firings.sum(-2).bool().is_sparse
        firings.sum(0)
    assert called
    assert not any("coalesce" in name or "sort" in name for name in called), called


def test_options_of_the_sum_are_pytorchs() -> None:
    firings = step_acts().bool().float()
    assert firings.sum(0, dtype=torch.float64).dtype == torch.float64
    assert firings.sum(0, keepdim=True).shape == (1, 30)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda acts: pickle.loads(pickle.dumps(acts))])
def test_copies_are_plain_sparse_tensors(copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    acts = step_acts()
    copy_of_acts = copied(acts)
    assert type(copy_of_acts) is torch.Tensor
    assert torch.equal(copy_of_acts.to_dense(), acts.to_dense())
