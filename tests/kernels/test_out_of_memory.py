"""An out-of-memory error in a step names the tensor."""

import pytest
import torch

from sae_lens_matryoshka.kernels import selection, sums
from sae_lens_matryoshka.kernels.out_of_memory import name_tensor_on_oom
from tests.steps import run_step, twins

PYTORCH_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def fail(*args: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError(PYTORCH_MESSAGE)


def test_names_the_tensor_and_its_size() -> None:
    with (
        pytest.raises(
            torch.OutOfMemoryError,
            match=r"Out of memory for the scores: \(8192, 65536\) of torch.float32, 2.00 GiB"
            r".* CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        name_tensor_on_oom("the scores", (8192, 65536), torch.float32),
    ):
        fail()


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), name_tensor_on_oom("the scores", (2,), torch.float32):
        raise KeyError


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (selection, "select_full", r"the pre-activations: \(20, 32\)"),
        (sums, "embedding_bag", r"the residuals: \(20, 2, 8\)"),
        (sums, "_dot_bags", r"the gradients of the residuals: \(20, 2, 8\)"),
    ],
)
def test_each_stage_of_a_step(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, message: str
) -> None:
    _, sae = twins("sparse", d_in=8, d_sae=32, matryoshka_widths=[4, 32], k=3)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(torch.OutOfMemoryError, match=f"Out of memory for {message}"):
        run_step(sae, torch.randn(20, 8), None).loss.backward()


@pytest.mark.parametrize("weight", ["W_dec", "W_enc"])
def test_gradients_of_weights(monkeypatch: pytest.MonkeyPatch, weight: str) -> None:
    _, sae = twins("sparse", d_in=8, d_sae=32, matryoshka_widths=[4, 32], k=3)
    loss = run_step(sae, torch.randn(20, 8), None).loss
    embedding_bag, n_calls = sums.embedding_bag, 0

    def fail_at_last(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls == {"W_dec": 1, "W_enc": 3}[weight]:  # each has its bias' sum besides
            fail()
        return embedding_bag(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sums, "embedding_bag", fail_at_last)
    with pytest.raises(torch.OutOfMemoryError, match=f"Out of memory for the gradient of {weight}"):
        loss.backward()
