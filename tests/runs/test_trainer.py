"""A batch whose loss is not finite leaves nothing behind in our trainer."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from tests.runs.variants import VARIANTS, variant_config

BATCH, D_IN, D_SAE = 12, 8, 48


def make_trainer(
    sae: TrainingSAE[Any], trainer_class: type[SAETrainer[Any, Any]] = MatryoshkaTrainer
) -> SAETrainer[Any, Any]:
    cfg = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=BATCH,
        lr=3e-3,
        lr_end=3e-3,
        device="cpu",
        dead_feature_window=1,  # so that there are dead latents
        feature_sampling_window=10**6,
    )
    return trainer_class(cfg, sae, iter(()))


def variant(name: str) -> TrainingSAE[Any]:
    torch.manual_seed(0)
    return TrainingSAE.from_dict(variant_config(name, D_IN, D_SAE, "float32").to_dict())


def batches(n: int) -> torch.Tensor:
    return torch.randn(n, BATCH, D_IN, generator=torch.Generator().manual_seed(1))


def take_steps(trainer: SAETrainer[Any, Any], given: torch.Tensor) -> None:
    for batch in given:
        trainer.step(batch)
        trainer.n_training_steps += 1


def state_of(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    moments = trainer.optimizer.state_dict()["state"]
    sample = getattr(trainer.sae, "_sample", None)
    return {
        **{name: value.clone() for name, value in trainer.sae.state_dict().items()},
        **{f"{i} {n}": m.clone() for i, state in moments.items() for n, m in state.items()},
        "act_freq_scores": trainer.act_freq_scores.clone(),
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired.clone(),
        "n_frac_active_samples": trainer.n_frac_active_samples,
        "sample": None if sample is None else sample.rows.clone(),
        "learning rate": trainer.lr_scheduler.last_epoch,
        "gradients": [parameter.grad for parameter in trainer.sae.parameters()],
    }


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_that_is_not_finite_changes_nothing(name: str) -> None:
    broken = torch.ones(BATCH, D_IN)
    broken[3, 2:5] = math.nan
    trainer = make_trainer(variant(name))
    take_steps(trainer, batches(4))
    before = state_of(trainer)
    # "unit" makes the norms 1 before it computes anything
    unit = trainer.sae.W_dec.detach() / trainer.sae.W_dec.detach().norm(dim=-1, keepdim=True)
    message = r"Training stopped at step 4: sae_in \(the activations\), .* holds 3 NaN and 0 "
    with pytest.raises(ValueError, match=message):
        trainer.step(broken)
    after = state_of(trainer)
    if name == "unit":
        torch.testing.assert_close(after.pop("W_dec"), unit)
        before.pop("W_dec")
    assert_equal(after, before)


@pytest.mark.parametrize("name", ["default", "frequency", "unit_at_update", "topk_frequency"])
def test_training_can_go_on_as_if_there_had_been_no_such_batch(name: str) -> None:
    states = []
    for with_broken in (False, True):
        trainer = make_trainer(variant(name))
        take_steps(trainer, batches(6)[:4])
        if with_broken:
            with pytest.raises(ValueError, match="stopped at step 4"):
                trainer.step(torch.full((BATCH, D_IN), math.inf))
        take_steps(trainer, batches(6)[4:])
        states.append(state_of(trainer))
    assert_equal(states[1], states[0])


@pytest.mark.parametrize("name", ["default", "reference", "topk", "jumprelu"])
def test_a_step_that_fails_before_its_check_holds_no_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector would free it late, and a checkpoint may need it at once."""
    trainer = make_trainer(variant(name))
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(loss: torch.Tensor) -> None:
        held.append(weakref.ref(loss))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trainer, "_backward", fail)
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            trainer.step(batches(1)[0])
        del caught
        assert held[0]() is None
    finally:
        gc.enable()


def test_saes_of_saelens_train_as_in_its_own_trainer() -> None:
    """They have no check, and no statistics that wait for it."""
    states = []
    for trainer_class in (SAETrainer, MatryoshkaTrainer):
        torch.manual_seed(0)
        cfg = StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=0.01)
        trainer = make_trainer(StandardTrainingSAE(cfg), trainer_class)
        take_steps(trainer, batches(4))
        states.append(state_of(trainer))
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-6)
