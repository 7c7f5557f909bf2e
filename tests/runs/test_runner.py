"""Runs resume after a signal or an exception as if nothing had happened."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.runs import trainer as trainer_module
from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner, check_resumable
from tests.tiny import D_MODEL, N_CTX, runner_config, tiny_model, token_dataset

D_SAE, BATCH, N_STEPS = 64, 32, 12
FILES = {
    "sae_weights.safetensors",
    "cfg.json",
    "sparsity.safetensors",
    "trainer_state.pt",
    "activation_scaler.json",
    "activations_store_state.safetensors",
    "runner_cfg.json",
}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model()


@pytest.fixture
def make_runner(
    model: HookedTransformer, tmp_path: Path
) -> Callable[..., MatryoshkaTrainingRunner]:
    """Runs of 12 steps; each batch is one pass of the model, so none waits in a buffer."""

    def make(
        *,
        normalize_activations: str = "none",
        runner_class: type[LanguageModelSAETrainingRunner] = MatryoshkaTrainingRunner,
        **options: Any,
    ) -> Any:
        torch.manual_seed(1)
        sae = MatryoshkaTrainingSAEConfig(
            d_in=D_MODEL,
            d_sae=D_SAE,
            k=4,
            matryoshka_widths=[8, D_SAE],
            normalize_activations=normalize_activations,
        )
        settings = {
            "store_batch_size_prompts": BATCH // N_CTX,
            "n_batches_in_buffer": BATCH // N_CTX,
            "train_batch_size_tokens": BATCH,
            "activations_mixing_fraction": 0,
            "training_tokens": N_STEPS * BATCH,
            "dead_feature_window": 3,
            "feature_sampling_window": 5,
            "lr": 1e-2,
            "lr_warm_up_steps": 3,
            "lr_decay_steps": 4,
            "n_batches_for_norm_estimate": 2,
            "output_path": None,
            **options,
        }
        return runner_class(
            runner_config(sae, tmp_path, **settings),
            override_dataset=token_dataset(),
            override_model=model,
        )

    return make


def at_batch(
    runner: MatryoshkaTrainingRunner, n: int, act: Callable[[], None], factor: float = 1
) -> None:
    """Call `act` before the n-th batch, counted from 1, is drawn, and multiply that batch."""
    batches = runner.activations_store.get_data_loader()

    def loader() -> Iterator[torch.Tensor]:
        for i in itertools.count(1):
            if i == n:
                act()
            batch = next(batches)
            yield batch * factor if i == n else batch

    runner.activations_store._dataloader = loader()


def interrupted(
    runner: MatryoshkaTrainingRunner, n: int, *signums: signal.Signals
) -> TrainingInterrupted:
    """What ends a run that is sent these signals before its n-th batch."""

    def send() -> None:
        for signum in signums:
            signal.raise_signal(signum)

    at_batch(runner, n, send)
    with pytest.raises(TrainingInterrupted) as caught:
        runner.run()
    return caught.value


def fail() -> None:
    raise OSError("the stream broke")


def the_trainer(monkeypatch: pytest.MonkeyPatch) -> list[SAETrainer]:
    """The trainers that runs start from here on, last one last."""
    trainers: list[SAETrainer] = []
    fit = SAETrainer.fit

    def remember(self: SAETrainer):
        trainers.append(self)
        return fit(self)

    monkeypatch.setattr(SAETrainer, "fit", remember)
    return trainers


def checkpoints(runner: MatryoshkaTrainingRunner) -> list[str]:
    folder = Path(runner.cfg.checkpoint_path)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def moments(trainer: SAETrainer) -> list[torch.Tensor]:
    return [
        value
        for parameter in trainer.sae.parameters()
        for value in trainer.optimizer.state[parameter].values()
    ]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_finishes_the_step_and_saves_it(make_runner, signum):
    runner = make_runner()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stopped = interrupted(runner, 5, signum)

    assert stopped.signum == signum
    checkpoint = stopped.checkpoint
    assert checkpoint == Path(runner.cfg.checkpoint_path) / str(5 * BATCH)
    assert {path.name for path in checkpoint.iterdir()} == FILES
    assert str(stopped) == (
        f"{signum.name}: step 5 (160 training samples) is saved in {checkpoint}. To resume, "
        f"start the same run with --resume_from_checkpoint {checkpoint} (in a config: "
        "resume_from_checkpoint)."
    )
    state = torch.load(checkpoint / "trainer_state.pt")
    assert (state["n_training_steps"], state["n_training_samples"]) == (5, 5 * BATCH)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (MatryoshkaTrainingRunner, LanguageModelSAETrainingRunner),
        (LanguageModelSAETrainingRunner, MatryoshkaTrainingRunner),
    ],
)
def test_checkpoints_resume_in_saelens_runner_and_its_in_ours(
    make_runner, monkeypatch, first, second
):
    """One of them with fused Adam, the other without."""
    trainers = the_trainer(monkeypatch)
    whole = make_runner().run()
    make_runner(runner_class=first, n_checkpoints=1).run()
    [checkpoint] = [
        path for path in Path(trainers[-1].cfg.checkpoint_path).iterdir() if path.name != "final"
    ]
    resumed = make_runner(runner_class=second, resume_from_checkpoint=str(checkpoint)).run()
    is_fused = [trainer.optimizer.param_groups[0]["fused"] for trainer in trainers]
    assert is_fused == [
        True,
        *((True, None) if first is MatryoshkaTrainingRunner else (None, True)),
    ]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in"])
def test_resuming_restores_everything_and_ends_with_the_same_weights(
    make_runner, monkeypatch, normalize_activations
):
    trainers = the_trainer(monkeypatch)
    # The first batches estimate the scale, and a resumed run does not draw them again.
    n_estimated = 2 if normalize_activations != "none" else 0
    whole = make_runner(normalize_activations=normalize_activations).run()

    stopped = make_runner(normalize_activations=normalize_activations)
    checkpoint = interrupted(stopped, n_estimated + 7, signal.SIGINT).checkpoint
    at_stop = trainers[-1]
    parameters = {name: value.clone() for name, value in stopped.sae.state_dict().items()}

    resumed = make_runner(
        normalize_activations=normalize_activations, resume_from_checkpoint=str(checkpoint)
    )
    restored: dict[str, object] = {}

    def look() -> None:
        trainer = trainers[-1]
        restored["parameters"] = {k: v.clone() for k, v in resumed.sae.state_dict().items()}
        restored["moments"] = [value.clone() for value in moments(trainer)]
        restored["since_fired"] = trainer.n_forward_passes_since_fired.clone()
        restored["act_freq"] = trainer.act_freq_scores.clone()
        restored["counts"] = (
            trainer.n_training_steps,
            trainer.n_training_samples,
            trainer.n_frac_active_samples,
            trainer.lr_scheduler.get_last_lr(),
            trainer.activation_scaler.scaling_factor,
        )

    at_batch(resumed, 1, look)
    sae = resumed.run()

    assert restored["counts"] == (
        7,
        7 * BATCH,
        at_stop.n_frac_active_samples,
        at_stop.lr_scheduler.get_last_lr(),
        at_stop.activation_scaler.scaling_factor,
    )
    assert parameters.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"}
    assert parameters["topk_threshold"] > 0
    torch.testing.assert_close(restored["parameters"], parameters, rtol=0, atol=0)
    assert len(restored["moments"]) == 12
    torch.testing.assert_close(restored["moments"], moments(at_stop), rtol=0, atol=0)
    assert torch.equal(restored["since_fired"], at_stop.n_forward_passes_since_fired)
    assert restored["since_fired"].max() == 7
    assert torch.equal(restored["act_freq"], at_stop.act_freq_scores)

    # Each latent's encoder row stays contiguous, in the weight and in its moments.
    trainer = trainers[-1]
    assert sae.W_enc.stride() == (1, D_MODEL)
    assert trainer.optimizer.state[sae.W_enc]["exp_avg"].stride() == (1, D_MODEL)
    assert trainer.n_training_steps == N_STEPS
    torch.testing.assert_close(sae.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_periodic_checkpoints_count_their_own_step_and_are_not_saved_again_on_resuming(
    make_runner, monkeypatch
):
    trainers = the_trainer(monkeypatch)
    first = make_runner(n_checkpoints=3)
    first.run()
    # SAELens saves at the first step past each quarter of the run.
    assert checkpoints(first) == ["128", "224", "320"]
    checkpoint = Path(first.cfg.checkpoint_path) / "224"
    assert torch.load(checkpoint / "trainer_state.pt")["n_training_steps"] == 7

    resumed = make_runner(n_checkpoints=3, resume_from_checkpoint=str(checkpoint))
    resumed.run()
    assert checkpoints(resumed) == ["320"]
    assert trainers[-1].n_training_steps == N_STEPS
    torch.testing.assert_close(resumed.sae.state_dict(), first.sae.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("n", "signums", "message"),
    [
        (5, [signal.SIGINT, signal.SIGTERM], "second signal, nothing saved"),
        (1, [signal.SIGTERM], "before the first step"),
    ],
)
def test_signals_that_stop_at_once(make_runner, n, signums, message):
    runner = make_runner()
    stopped = interrupted(runner, n, *signums)
    assert message in str(stopped)
    assert (stopped.signum, stopped.checkpoint) == (signal.SIGTERM, None)
    assert checkpoints(runner) == []


def test_signal_in_the_last_step_lets_the_run_finish(make_runner, tmp_path):
    runner = make_runner(output_path=str(tmp_path / "output"))
    at_batch(runner, N_STEPS, lambda: signal.raise_signal(signal.SIGINT))
    runner.run()
    assert (tmp_path / "output" / "sae_weights.safetensors").is_file()


def test_signal_without_a_checkpoint_path_says_which_field_to_set(make_runner):
    stopped = interrupted(make_runner(checkpoint_path=None), 5, signal.SIGINT)
    assert "none of the 5 steps could be saved, because checkpoint_path" in str(stopped)
    assert stopped.checkpoint is None


def test_prefetched_batches(make_runner, monkeypatch):
    trainers = the_trainer(monkeypatch)
    runner = make_runner(prefetch_llm_batches=2)
    checkpoint = interrupted(runner, 6, signal.SIGTERM).checkpoint
    # The signal comes while batch 6 is made, up to three batches ahead of the step.
    n_steps = trainers[-1].n_training_steps
    assert 3 <= n_steps <= 6
    assert checkpoint.name == str(n_steps * BATCH)
    assert {path.name for path in checkpoint.iterdir()} == FILES
    make_runner(prefetch_llm_batches=2, resume_from_checkpoint=str(checkpoint)).run()
    assert trainers[-1].n_training_steps == N_STEPS


# A sparsity window is cleared between steps 5 and 6.
@pytest.mark.parametrize("n_steps", [4, 5])
def test_broken_stream_keeps_the_last_step(make_runner, caplog, n_steps):
    runner = make_runner()
    at_batch(runner, n_steps + 1, fail)
    with pytest.raises(OSError, match="the stream broke"):
        runner.run()
    n_samples = n_steps * BATCH
    assert checkpoints(runner) == [str(n_samples)]
    assert f"step {n_steps} ({n_samples} training samples) is saved in" in caplog.text

    checkpoint = Path(runner.cfg.checkpoint_path) / str(n_samples)
    resumed = make_runner(resume_from_checkpoint=str(checkpoint)).run()
    whole = make_runner().run()
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_exception_before_the_first_step_saves_nothing(make_runner):
    runner = make_runner()
    at_batch(runner, 1, fail)
    with pytest.raises(OSError, match="the stream broke"):
        runner.run()
    assert checkpoints(runner) == []


def test_nan_activations_keep_the_step_before(make_runner, monkeypatch):
    trainers = the_trainer(monkeypatch)
    runner = make_runner()
    at_batch(runner, 6, lambda: None, factor=float("nan"))
    with pytest.raises(ValueError, match=r"step 5: sae_in \(the activations\)"):
        runner.run()
    assert checkpoints(runner) == [str(5 * BATCH)]
    state = torch.load(Path(runner.cfg.checkpoint_path) / "160" / "trainer_state.pt")
    assert (state["n_training_steps"], state["n_training_samples"]) == (5, 5 * BATCH)
    assert trainers[-1].n_forward_passes_since_fired.max() == 5


def test_step_that_breaks_off_after_counting_is_undone(make_runner, monkeypatch):
    runner = make_runner()
    measure, n_calls = trainer_module.get_total_norm, 0

    def measure_or_fail(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 6:
            raise torch.OutOfMemoryError("no memory for the gradient")
        return measure(*args)

    monkeypatch.setattr(trainer_module, "get_total_norm", measure_or_fail)
    gradients_when_saving = []
    save = SAETrainer.save_trainer_state

    def look_and_save(trainer, path):
        gradients_when_saving.extend(p.grad for p in trainer.sae.parameters())
        save(trainer, path)

    monkeypatch.setattr(SAETrainer, "save_trainer_state", look_and_save)
    with pytest.raises(torch.OutOfMemoryError):
        runner.run()
    assert gradients_when_saving == [None] * 4, "memory that saving may need"
    checkpoint = Path(runner.cfg.checkpoint_path) / str(5 * BATCH)
    state = torch.load(checkpoint / "trainer_state.pt")
    assert state["n_forward_passes_since_fired"].max() == 5
    # Step 6 began by clearing the sparsity window that steps 1 to 5 had filled.
    assert state["n_frac_active_samples"] == 5 * BATCH
    assert state["act_freq_scores"].sum() == 5 * BATCH * 4

    # All else is as in a run whose stream broke before that step.
    monkeypatch.undo()
    other = make_runner()
    at_batch(other, 6, fail)
    with pytest.raises(OSError, match="the stream broke"):
        other.run()
    expected = Path(other.cfg.checkpoint_path) / str(5 * BATCH)
    since_fired = torch.load(expected / "trainer_state.pt")["n_forward_passes_since_fired"]
    assert torch.equal(state["n_forward_passes_since_fired"], since_fired)
    weights, others = (load_file(p / "sae_weights.safetensors") for p in (checkpoint, expected))
    torch.testing.assert_close(weights, others, rtol=0, atol=0)

    trainers = the_trainer(monkeypatch)
    make_runner(resume_from_checkpoint=str(checkpoint)).run()
    assert trainers[-1].n_training_steps == N_STEPS


def test_weights_that_are_not_finite_are_not_saved(make_runner, caplog):
    runner = make_runner(n_checkpoints=3)

    def break_weights() -> None:
        with torch.no_grad():
            runner.sae.b_dec[2] = torch.nan

    at_batch(runner, 9, break_weights)
    with pytest.raises(ValueError, match="step 8: the parameter b_dec"):
        runner.run()
    assert checkpoints(runner) == ["128", "224"]
    assert "step 8 could not be saved" in caplog.text
    assert "b_dec not finite after step 8" in caplog.text


def test_moments_that_are_not_finite_are_not_saved(make_runner, monkeypatch):
    trainers = the_trainer(monkeypatch)
    runner = make_runner(n_checkpoints=3)

    def break_moments() -> None:
        # The weight it belongs to stops moving, and nothing in the losses tells.
        trainers[-1].optimizer.state[runner.sae.W_dec]["exp_avg_sq"][3, 2] = torch.inf

    at_batch(runner, 9, break_moments)
    with pytest.raises(ValueError, match="Adam's exp_avg_sq of W_dec not finite after step 10"):
        runner.run()
    assert checkpoints(runner) == ["128", "224"]


def test_checkpoint_is_replaced_by_a_whole_one_or_not_at_all(make_runner, monkeypatch, tmp_path):
    def stopped_at_step_4(lr: float) -> TrainingInterrupted:
        # With an id of its own, a run writes into the same folder as the one before.
        runner = make_runner(lr=lr, logger=LoggingConfig(log_to_wandb=False, wandb_id="same"))
        return interrupted(runner, 4, signal.SIGINT)

    folder = tmp_path / "checkpoints" / "same"
    assert stopped_at_step_4(lr=1e-2).checkpoint == folder / "128"
    first = load_file(folder / "128" / "sae_weights.safetensors")["W_enc"]

    def disk_full(self: SAETrainer, checkpoint_path: Path) -> None:
        (checkpoint_path / "trainer_state.pt").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "save_trainer_state", disk_full)
        stopped = stopped_at_step_4(lr=2e-2)
    assert stopped.checkpoint is None
    assert "could not be saved" in str(stopped)
    assert "no space left on device" in str(stopped)
    assert [path.name for path in folder.iterdir()] == ["128"]
    assert torch.equal(load_file(folder / "128" / "sae_weights.safetensors")["W_enc"], first)

    assert stopped_at_step_4(lr=2e-2).checkpoint == folder / "128"
    assert [path.name for path in folder.iterdir()] == ["128"]
    assert not torch.equal(load_file(folder / "128" / "sae_weights.safetensors")["W_enc"], first)


@pytest.fixture
def checkpoint(make_runner) -> Path:
    runner = make_runner(normalize_activations="expected_average_only_in")
    return interrupted(runner, 2 + 3, signal.SIGINT).checkpoint


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def without_weights(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()
    (folder / "trainer_state.pt").unlink()


def cut_off(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def finished(folder: Path) -> None:
    (folder / "activation_scaler.json").write_text(
        json.dumps({"scaling_factor": None, "has_whitening": False})
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "is not a folder"),
        (without_weights, "it lacks sae_weights.safetensors, trainer_state.pt"),
        (cut_off, "sae_weights.safetensors is broken"),
        (finished, "holds a finished SAE"),
    ],
)
def test_resuming_from_a_bad_checkpoint_fails_before_the_model_loads(
    make_runner, checkpoint, monkeypatch, damage, message
):
    cfg = make_runner(
        normalize_activations="expected_average_only_in", resume_from_checkpoint=str(checkpoint)
    ).cfg
    damage(checkpoint)
    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", pytest.fail)
    with pytest.raises(ValueError, match=message) as caught:
        MatryoshkaTrainingRunner(cfg)
    assert f"resume_from_checkpoint='{checkpoint}'" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_sae", 128, r"trained with sae\.d_sae=64; the config has sae\.d_sae=128"),
        ("matryoshka_widths", [3, 64], r"the config has sae\.matryoshka_widths=\[3, 64\]"),
        ("k", 5, r"the config has sae\.k=5"),
        ("level_weights", 0.5, r"with sae\.level_weights=1\.0; the config has .*weights=0\.5"),
        ("latent_order", "frequency", r"with sae\.latent_order='index'; .*='frequency'"),
        ("inner_weight_end", 0.5, r"with sae\.inner_weight_end=1\.0; .*=0\.5"),
    ],
)
def test_resuming_another_sae_fails_before_the_model_loads(
    make_runner, checkpoint, monkeypatch, field, value, message
):
    cfg = make_runner(normalize_activations="expected_average_only_in").cfg
    cfg.resume_from_checkpoint = str(checkpoint)
    setattr(cfg.sae, field, value)
    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", pytest.fail)
    with pytest.raises(ValueError, match=message):
        MatryoshkaTrainingRunner(cfg)


def test_a_checkpoint_older_than_an_option_is_resumed_with_its_default(make_runner, checkpoint):
    path = checkpoint / "cfg.json"
    saved = json.loads(path.read_text())
    for name in ("level_weights", "bias_level", "n_prefixes"):
        del saved[name]
    path.write_text(json.dumps(saved))
    cfg = make_runner(normalize_activations="expected_average_only_in").cfg
    cfg.resume_from_checkpoint = str(checkpoint)
    cfg.sae.prefix_seed, cfg.sae.baseline_explained_variance = 7, 0.5  # neither changes a number
    check_resumable(cfg)
    cfg.sae.bias_level = True
    with pytest.raises(ValueError, match=r"with sae\.bias_level=False; .*sae\.bias_level=True"):
        check_resumable(cfg)


COMMAND = """
import sys, time
import sae_lens.llm_sae_training_runner as llm_runner
from sae_lens_matryoshka.cli import main
from tests.tiny import tiny_model, token_dataset

model = tiny_model()
run_with_cache = model.run_with_cache

def slowly(*args, **kwargs):
    print("batch", flush=True)
    time.sleep(0.05)
    return run_with_cache(*args, **kwargs)

model.run_with_cache = slowly
llm_runner.load_model = lambda *args, **kwargs: model
token_dataset().to_parquet("corpus/a.parquet")
sys.exit(main())
"""
CONFIG = """
model_name: tiny
hook_name: blocks.1.hook_resid_pre
dataset_path: corpus
streaming: false
context_size: 16
store_batch_size_prompts: 2
n_batches_in_buffer: 2
train_batch_size_tokens: 32
activations_mixing_fraction: 0
training_tokens: 1_000_000
sae: {d_in: 16, d_sae: 64, k: 4, matryoshka_widths: [8, 64]}
logger: {log_to_wandb: false}
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, subprocess.Popen]]:
    """`sae-matryoshka train`, once for each signal, in processes that start side by side."""
    started = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path_factory.mktemp(signum.name)
        (folder / "corpus").mkdir()
        (folder / "run.yaml").write_text(CONFIG)
        started[signum] = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "train", "run.yaml", "--lr", "1e-3"],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize(
    ("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_command_saves_on_a_signal_and_says_how_to_resume(commands, make_runner, signum, exit_code):
    process = commands[signum]
    n_batches = 0
    while n_batches < 8:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        n_batches += line == "batch\n"
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == exit_code, errors
    assert "Traceback" not in errors
    command = next(line for line in errors.splitlines() if line.startswith("Resume with: "))
    start = "Resume with: sae-matryoshka train run.yaml --lr 1e-3 --resume_from_checkpoint "
    assert command.startswith(start)
    checkpoint = Path(command.removeprefix(start))
    assert {path.name for path in checkpoint.iterdir()} == FILES
    state = torch.load(checkpoint / "trainer_state.pt")
    assert state["n_training_steps"] >= 7
    assert checkpoint.name == str(state["n_training_samples"])
    assert state["n_training_samples"] == BATCH * state["n_training_steps"]

    resumed = make_runner(
        resume_from_checkpoint=str(checkpoint),
        training_tokens=state["n_training_samples"] + BATCH,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
    )
    resumed.run()
    assert resumed.sae.topk_threshold > 0
