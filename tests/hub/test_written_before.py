"""Files that an earlier version wrote keep loading.

Both were made with `tests.tiny` by version 746ea28: a checkpoint after 11 of 20 steps, and the SAE
that the same run saved at its end.
"""

from pathlib import Path

import torch
from sae_lens import TrainingSAE
from safetensors.torch import load_file

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.hub import load_sae
from sae_lens_matryoshka.levels import truncate, widths_of
from sae_lens_matryoshka.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.runs.runner import check_resumable
from tests.tiny import runner_config, tiny_model, token_dataset

FILES = Path(__file__).parents[1] / "written_before"
CHECKPOINT, SAVED = FILES / "checkpoint", FILES / "sae"
OPTIONS = {
    "d_in": 16,
    "d_sae": 48,
    "k": 4,
    "matryoshka_widths": [6, 18, 48],
    "latent_order": "frequency",
    "stop_gradient": "inner",
    "level_weights": 0.9,
    "k_start": 8,
    "k_anneal_steps": 10,
    "normalize_activations": "expected_average_only_in",
    "device": "cpu",
}


def test_saved_sae_loads_and_truncates():
    sae = load_sae(SAVED)
    stored = load_file(SAVED / "sae_weights.safetensors")
    torch.testing.assert_close(dict(sae.state_dict()), stored, rtol=0, atol=0)
    assert widths_of(sae) == [6, 18, 48]
    level = truncate(sae, 18)
    assert torch.equal(level.W_dec, stored["W_dec"][:18])
    assert torch.equal(level.W_enc, stored["W_enc"][:, :18])
    assert widths_of(level) == [6, 18]


def test_checkpoint_loads_for_training():
    sae = TrainingSAE.load_from_disk(CHECKPOINT)
    stored = load_file(CHECKPOINT / "sae_weights.safetensors")
    weights = sae.state_dict()
    assert "firing_rates" in stored
    assert weights.keys() == stored.keys()
    for name, tensor in stored.items():  # SAELens casts the threshold to the SAE's dtype
        assert torch.equal(weights[name], tensor.to(weights[name])), name
    expected = MatryoshkaTrainingSAEConfig(**OPTIONS)
    for name in OPTIONS:
        assert getattr(sae.cfg, name) == getattr(expected, name), name


def test_checkpoint_resumes_to_the_end(tmp_path, monkeypatch):
    cfg = runner_config(
        MatryoshkaTrainingSAEConfig(**OPTIONS),
        tmp_path,
        n_checkpoints=1,
        device="cpu",
        resume_from_checkpoint=str(CHECKPOINT),
    )
    check_resumable(cfg)
    n_steps = torch.load(CHECKPOINT / "trainer_state.pt")["n_training_steps"]
    assert n_steps == 11
    steps = []
    runner = MatryoshkaTrainingRunner(
        cfg, override_dataset=token_dataset(), override_model=tiny_model()
    )
    forward = type(runner.sae).training_forward_pass

    def counted(self, step_input):
        steps.append(step_input.n_training_steps)
        return forward(self, step_input)

    monkeypatch.setattr(type(runner.sae), "training_forward_pass", counted)
    runner.run()
    assert steps == list(range(11, 20))
