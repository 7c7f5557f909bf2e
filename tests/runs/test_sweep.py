"""A sweep trains each SAE as it would be trained alone, and is stopped and resumed as one run."""

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from sae_lens_matryoshka.runs import trainer
from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
from sae_lens_matryoshka.runs.lockstep import LockstepTrainer
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.runs.sweep import SweepRunner, TrainedSweep
from sae_lens_matryoshka.runs.varying import plan_sweep
from tests.tiny import D_MODEL, N_CTX, tiny_model, token_dataset

D_SAE, BATCH, N_STEPS = 64, 32, 12
K_AND_SEED = ("k=4,8", "seed=0,1")
ROWS = torch.randn(5 * BATCH, D_MODEL, generator=torch.Generator().manual_seed(0))
NAMES = ["k=4_seed=0", "k=4_seed=1", "k=8_seed=0", "k=8_seed=1"]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model()


@pytest.fixture
def runner_of(
    model: HookedTransformer,
) -> Callable[[LanguageModelSAERunnerConfig[Any]], LanguageModelSAETrainingRunner]:
    def make(
        cfg: LanguageModelSAERunnerConfig[Any], activations: Any = None
    ) -> LanguageModelSAETrainingRunner:
        torch.manual_seed(cfg.seed)
        if activations is not None:
            return MatryoshkaTrainingRunner(cfg, activations=activations)
        return MatryoshkaTrainingRunner(cfg, override_dataset=token_dataset(), override_model=model)

    return make


@pytest.fixture
def make_sweep(runner_of, tmp_path: Path) -> Callable[..., SweepRunner]:
    """Sweeps of 12 steps; each batch is one pass of the model, so none waits in a buffer."""

    def make(*vary: str, activations: Any = None, **options: Any) -> SweepRunner:
        values = {
            "model_name": "tiny",
            "hook_name": "blocks.1.hook_resid_pre",
            "dataset_path": "tokens",
            "streaming": False,
            "prepend_bos": False,
            "context_size": N_CTX,
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
            "n_eval_batches": 1,
            "output_path": str(tmp_path / "output"),
            "checkpoint_path": str(tmp_path / "checkpoints"),
            "verbose": False,
            "logger.log_to_wandb": False,
            "logger.wandb_id": "id",
            "sae.d_in": D_MODEL,
            "sae.d_sae": D_SAE,
            "sae.k": 4,
            "sae.matryoshka_widths": [8, D_SAE],
            **{name.replace("__", "."): value for name, value in options.items()},
        }
        given = {name: value for name, value in values.items() if value is not None}
        sweep = plan_sweep(given, {}, vary or K_AND_SEED)
        return SweepRunner(runner_of(sweep.cfg, activations), sweep.cfgs)

    return make


def at_batch(
    sweep: SweepRunner, n: int, act: Callable[[], object] = lambda: None, factor: float = 1
) -> None:
    """Call `act` before the n-th batch, counted from 1, is drawn, and multiply that batch."""
    store = sweep._shared.activations_store
    batches = store.get_data_loader()

    def loader() -> Iterator[torch.Tensor]:
        for i in itertools.count(1):
            if i == n:
                act()
            batch = next(batches)
            yield batch * factor if i == n else batch

    store._dataloader = loader()


def interrupted(sweep: SweepRunner, n: int) -> Path:
    """The checkpoint of a sweep that a signal before its n-th batch stops."""
    at_batch(sweep, n, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted) as caught:
        sweep.run()
    assert caught.value.checkpoint is not None
    return caught.value.checkpoint


def assert_equal(sweep: TrainedSweep, other: TrainedSweep) -> None:
    assert list(sweep.saes) == list(other.saes)
    for name, sae in sweep.saes.items():
        torch.testing.assert_close(sae.state_dict(), other.saes[name].state_dict(), rtol=0, atol=0)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("vary", "options"),
    [
        (K_AND_SEED, {}),
        (["sae.k=4,8"], {"sae__normalize_activations": "expected_average_only_in"}),
        (["k=4,8"], {"sae__normalize_activations": "covariance_whitening"}),
        (["latent_order=index,frequency", "matryoshka_widths=8/64,16/32/64"], {}),
        (["prefix_sampling=log_uniform,uniform", "seed=0,5"], {"sae__min_prefix": 4}),
        (["d_sae=32,64"], {"sae__matryoshka_widths": None}),
        (["architecture=matryoshka,matryoshka_topk,batchtopk"], {"prefetch_llm_batches": 2}),
        (["k=4,8"], {"activations": ROWS, "prefetch_llm_batches": 2}),
    ],
)
def test_each_sae_is_the_one_of_its_run_alone(make_sweep, runner_of, tmp_path, vary, options):
    sweep = make_sweep(*vary, **options)
    trained = sweep.run()
    assert not trained.failures
    assert len(trained.saes) == len(sweep._cfgs) > 1
    for name, cfg in sweep._cfgs.items():
        together = tmp_path / "output" / name
        assert cfg.output_path == str(together)
        cfg.output_path = str(tmp_path / "alone" / name)
        alone = runner_of(cfg, options.get("activations"))
        sae = alone.run()
        torch.testing.assert_close(
            trained.saes[name].state_dict(), sae.state_dict(), rtol=0, atol=0
        )
        files = {path.name for path in Path(cfg.output_path).iterdir()}
        assert {path.name for path in together.iterdir()} == files
        for file in sorted(files):
            one, other = ((folder / file) for folder in (together, Path(cfg.output_path)))
            if file == "runner_cfg.json":
                one, other = (json.loads(path.read_text()) for path in (one, other))
                assert one.pop("output_path") != other.pop("output_path")
                assert one == other
            else:
                assert one.read_bytes() == other.read_bytes(), file


def test_only_its_seed_decides_an_saes_initial_weights(make_sweep):
    sweep = make_sweep("seed=42,7")
    state = torch.random.get_rng_state()
    other = make_sweep("k=4,8", "seed=7,42")
    # the store shuffles with the same random numbers, whatever the sweep is
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, theirs = sweep._runners, other._runners
    for seed in (7, 42):
        for k in (4, 8):
            one, same = ours[f"seed={seed}"].sae.W_dec, theirs[f"k={k}_seed={seed}"].sae.W_dec
            assert torch.equal(one, same)
    assert not torch.equal(ours["seed=7"].sae.W_dec, ours["seed=42"].sae.W_dec)


def test_activations_after_those_of_training_are_held_out(make_sweep):
    sweep = make_sweep("k=4")
    batches = make_sweep("k=4")._shared.activations_store
    held_out = sweep.run(n_held_out=2 * BATCH - 1).held_out
    expected = [next(batches) for _ in range(N_STEPS + 2)][N_STEPS:]
    assert torch.equal(held_out, torch.cat(expected))


@pytest.mark.parametrize(
    ("options", "n_estimated"),
    [({}, 0), ({"sae__normalize_activations": "expected_average_only_in"}, 2)],
)
def test_resumes_as_a_whole(make_sweep, options, n_estimated):
    whole = make_sweep(**options).run()
    checkpoint = interrupted(make_sweep(**options), n_estimated + 7)
    assert checkpoint.name == str(7 * BATCH)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["failures.json", *NAMES]
    for name in NAMES:
        state = torch.load(checkpoint / name / "trainer_state.pt")
        assert (state["n_training_steps"], state["n_training_samples"]) == (7, 7 * BATCH)
    resumed = make_sweep(resume_from_checkpoint=str(checkpoint), **options).run()
    assert_equal(resumed, whole)


def test_resumes_as_a_whole_on_activations_without_a_model(make_sweep, tmp_path):
    whole = make_sweep("k=4,8", activations=ROWS, n_checkpoints=1).run()
    (checkpoint,) = (tmp_path / "checkpoints" / "id").iterdir()
    options = {"activations": ROWS, "resume_from_checkpoint": str(checkpoint)}
    assert_equal(make_sweep("k=4,8", **options).run(), whole)
    metadata = whole.saes["k=8"].cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == (None, None)


def test_an_sae_of_a_checkpoint_resumes_alone(make_sweep, runner_of):
    whole = make_sweep().run()
    checkpoint = interrupted(make_sweep(), 7)
    cfg = make_sweep(resume_from_checkpoint=str(checkpoint))._cfgs["k=8_seed=1"]
    sae = runner_of(cfg).run()
    expected = whole.saes["k=8_seed=1"].state_dict()
    torch.testing.assert_close(sae.state_dict(), expected, rtol=0, atol=0)


def test_periodic_checkpoints(make_sweep, tmp_path):
    whole = make_sweep(n_checkpoints=3, save_final_checkpoint=True).run()
    folder = tmp_path / "checkpoints" / "id"
    assert sorted(path.name for path in folder.iterdir()) == ["128", "224", "320", "final_384"]
    assert torch.load(folder / "224" / NAMES[0] / "trainer_state.pt")["n_training_steps"] == 7
    shutil.rmtree(folder / "320")
    resume = str(folder / "224")
    resumed = make_sweep(n_checkpoints=3, resume_from_checkpoint=resume)
    shutil.rmtree(folder / "128")
    assert_equal(resumed.run(), whole)
    assert sorted(path.name for path in folder.iterdir()) == ["224", "320", "final_384"]


def test_a_broken_stream_keeps_the_last_step_of_all(make_sweep, tmp_path):
    """A sparsity window is cleared between steps 5 and 6."""
    whole = make_sweep().run()
    sweep = make_sweep()

    def fail() -> None:
        raise OSError("the stream broke")

    at_batch(sweep, 6, fail)
    with pytest.raises(OSError, match="the stream broke"):
        sweep.run()
    checkpoint = tmp_path / "checkpoints" / "id" / "160"
    assert_equal(make_sweep(resume_from_checkpoint=str(checkpoint)).run(), whole)


def test_a_batch_that_no_sae_can_take_stops_all_after_the_step_before(make_sweep, tmp_path):
    sweep = make_sweep()
    at_batch(sweep, 6, factor=float("nan"))
    with pytest.raises(ValueError, match=r"step 5: sae_in \(the activations\)"):
        sweep.run()
    folder = tmp_path / "checkpoints" / "id"
    assert [path.name for path in folder.iterdir()] == ["160"]
    for name in NAMES:
        state = torch.load(folder / "160" / name / "trainer_state.pt")
        assert (state["n_training_steps"], state["n_training_samples"]) == (5, 5 * BATCH)
        assert state["act_freq_scores"].sum() > 0
        assert state["n_forward_passes_since_fired"].max() == 5


@pytest.mark.parametrize("failing", [NAMES[0], NAMES[2]])
def test_an_sae_that_fails_leaves_the_others_as_they_are(
    make_sweep, tmp_path, monkeypatch, caplog, failing
):
    """Its last completed step is saved on its own, and a resumed sweep still leaves it out."""
    whole = make_sweep().run()
    shutil.rmtree(tmp_path / "output")
    sweep = make_sweep()
    norm_of = trainer.get_total_norm
    n_calls = itertools.count(1)
    n_before = 5 * len(NAMES) + NAMES.index(failing)

    def norm_or_fail(gradients: list[torch.Tensor]) -> torch.Tensor:
        if next(n_calls) == n_before + 1:
            raise torch.OutOfMemoryError("no memory for the gradient")
        return norm_of(gradients)

    monkeypatch.setattr(trainer, "get_total_norm", norm_or_fail)
    checkpoint = interrupted(sweep, 8)
    others = [name for name in NAMES if name != failing]
    assert sorted(path.name for path in checkpoint.iterdir()) == ["failures.json", *others]
    saved = tmp_path / "checkpoints" / "id" / failing / "160"
    assert (
        f"The sweep continues without {failing}, which failed after step 5: no memory for the "
        f"gradient\nOf {failing} alone, step 5 (160 training samples) is saved in {saved}."
    ) in caplog.text
    state = torch.load(saved / "trainer_state.pt")
    assert (state["n_training_steps"], state["n_training_samples"]) == (5, 160)
    assert state["n_forward_passes_since_fired"].max() == 5

    resumed = make_sweep(resume_from_checkpoint=str(checkpoint)).run()
    assert resumed.failures == {failing: "after step 5: no memory for the gradient"}
    assert_equal(resumed, whole._replace(saes={name: whole.saes[name] for name in others}))
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == others


@pytest.mark.parametrize("n_checkpoints", [0, 3])
def test_an_sae_that_is_not_finite_is_left_out(make_sweep, tmp_path, n_checkpoints, monkeypatch):
    """Also where nothing in its losses tells: found when a checkpoint or the end is saved."""
    sweep = make_sweep(n_checkpoints=n_checkpoints)
    started: list[LockstepTrainer] = []
    fit = LockstepTrainer.fit

    def remember(self: LockstepTrainer) -> Any:
        started.append(self)
        return fit(self)

    monkeypatch.setattr(LockstepTrainer, "fit", remember)

    def break_moments() -> None:
        broken = started[0].trainers[NAMES[1]]
        broken.optimizer.state[broken.sae.W_dec]["exp_avg_sq"][3, 2] = torch.inf

    at_batch(sweep, 9, break_moments)
    trained = sweep.run()
    assert list(trained.saes) == [NAMES[0], *NAMES[2:]]
    n_steps = 10 if n_checkpoints else 12
    (reason,) = trained.failures.values()
    assert f"Adam's exp_avg_sq of W_dec not finite after step {n_steps}" in reason
    assert not (tmp_path / "output" / NAMES[1]).exists()


def test_wandb_has_every_saes_metrics_under_its_name(make_sweep, monkeypatch):
    logged: list[tuple[int, dict[str, Any]]] = []
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **options: started.append(options))
    monkeypatch.setattr("wandb.log", lambda row, step: logged.append((step, row)))
    monkeypatch.setattr("wandb.log_artifact", lambda *args, **options: None)
    make_sweep(
        "k=4,8",
        logger__log_to_wandb=True,
        logger__wandb_log_frequency=3,
        logger__eval_every_n_wandb_logs=2,
    ).run()
    (options,) = started
    assert options["id"] == "id"
    assert {name: sae["k"] for name, sae in options["config"]["saes"].items()} == {
        "k=4": 4,
        "k=8": 8,
    }
    steps = [(step, row) for step, row in logged if "k=4/losses/overall_loss" in row]
    assert [step for step, _ in steps] == [2, 5, 8, 11]
    for _, row in steps:
        for k in (4, 8):
            assert row[f"k={k}/metrics/l0"] == row[f"k={k}/metrics/l0_level_64"] == k
    score = "k=8/model_performance_preservation"
    assert [step for step, row in logged if score in row] == [5, 11]
    assert {key.split("/")[0] for _, row in logged for key in row} == {"k=4", "k=8", "details"}


def test_only_a_checkpoint_of_the_same_saes_resumes_before_anything_is_built(
    make_sweep, monkeypatch
):
    checkpoint = interrupted(make_sweep("k=4,8"), 3)
    monkeypatch.setattr("sae_lens_matryoshka.runs.sweep._runner_of", pytest.fail)
    with pytest.raises(ValueError, match="k=16' is not a folder"):
        make_sweep("k=4,16", resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"trained with sae.d_sae=64; the config has sae.d_sae=8"):
        make_sweep(
            "k=4,8",
            sae__d_sae=8,
            sae__matryoshka_widths=None,
            resume_from_checkpoint=str(checkpoint),
        )
    shutil.rmtree(checkpoint / "k=8")
    with pytest.raises(ValueError, match=f"{checkpoint}/k=8' is not a folder"):
        make_sweep("k=4,8", resume_from_checkpoint=str(checkpoint))
