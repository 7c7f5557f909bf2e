"""A run on activations alone: trained, resumed, measured and published without a model."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig, cli, load_sae
from sae_lens_matryoshka.activations.batches import ActivationsEnded
from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from tests.cli.conftest import own_environment, refusal  # noqa: F401
from tests.tiny import runner_config

CONFIG = Path(__file__).parents[2] / "configs" / "from-activations.yaml"
D_IN, D_SAE, BATCH, N_STEPS = 12, 32, 50, 12
SMALL = """--device cpu --sae.d_sae 32 --sae.k 3 --training_tokens 600 --lr_warm_up_steps 0
--train_batch_size_tokens 50 --lr_decay_steps 0 --n_batches_for_norm_estimate 2 --verbose false
--lr 1e-2"""


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", pytest.fail)
    monkeypatch.chdir(tmp_path)


def activations(n: int = 430) -> torch.Tensor:
    """Sparse combinations of 20 directions; an epoch that no number of batches fills."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.2)
    return codes @ torch.randn(20, D_IN, generator=generator)


def make_runner(source: Any, folder: Path, **options: Any) -> MatryoshkaTrainingRunner:
    torch.manual_seed(1)
    normalize = options.pop("normalize_activations", "none")
    sae = MatryoshkaTrainingSAEConfig(
        d_in=options.pop("d_in", D_IN),
        d_sae=D_SAE,
        k=3,
        matryoshka_widths=[8, D_SAE],
        normalize_activations=normalize,
    )
    settings = {
        "train_batch_size_tokens": BATCH,
        "training_tokens": N_STEPS * BATCH,
        "n_batches_for_norm_estimate": 2,
        **options,
    }
    return MatryoshkaTrainingRunner(runner_config(sae, folder, **settings), activations=source)


def stop_at(runner: MatryoshkaTrainingRunner, n: int) -> Path:
    """The checkpoint of a run that SIGTERM stops in its n-th step."""
    store: Any = runner.activations_store
    draw, n_drawn = type(store).__next__, 0

    class Stopping(type(store)):
        def __next__(self) -> torch.Tensor:
            nonlocal n_drawn
            n_drawn += 1
            if n_drawn == n:
                signal.raise_signal(signal.SIGTERM)
            return draw(self)

    store.__class__ = Stopping
    with pytest.raises(TrainingInterrupted) as stopped:
        runner.run()
    assert stopped.value.checkpoint is not None
    return stopped.value.checkpoint


@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in"])
def test_training_from_an_array_is_that_from_a_file_and_resumes(
    tmp_path: Path, normalize_activations: str
) -> None:
    options: dict[str, Any] = {"normalize_activations": normalize_activations}
    np.save("x.npy", activations().numpy())
    runner = make_runner(activations(), tmp_path, **options)
    before = runner.sae.W_dec.detach().clone()
    whole = runner.run()
    assert not torch.equal(before, whole.W_dec)
    from_file = make_runner("x.npy", tmp_path, prefetch_llm_batches=3, **options).run()
    torch.testing.assert_close(from_file.state_dict(), whole.state_dict(), rtol=0, atol=0)

    n_estimated = 2 if normalize_activations != "none" else 0
    for n in (2, 8, 9):  # in the first epoch, and in the second
        stopped = make_runner(Path("x.npy"), tmp_path, **options)
        checkpoint = stop_at(stopped, n_estimated + n)
        position = (n_estimated + n) * BATCH
        state = load_file(checkpoint / "activations_store_state.safetensors")
        assert {name: int(value) for name, value in state.items()} == {
            "epoch": position // 430,
            "row": position % 430,
            "n_rows": 430,
            "seed": 42,
        }
        resumed = make_runner(
            "x.npy", tmp_path, resume_from_checkpoint=str(checkpoint), **options
        ).run()
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_metadata_names_no_model(tmp_path: Path) -> None:
    cfg = runner_config(
        MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3), tmp_path, training_tokens=128
    )
    given = dict(vars(cfg))
    MatryoshkaTrainingRunner(cfg, activations=activations()).run()
    assert vars(cfg) == given, "the caller's config stays as it was"
    metadata = SAE.load_from_disk(cfg.output_path).cfg.metadata
    for name in ("model_name", "model_class_name", "hook_name", "dataset_path", "context_size"):
        assert metadata[name] is None
        assert json.loads((tmp_path / "output" / "runner_cfg.json").read_text())[name] is None


def test_overrides(tmp_path: Path) -> None:
    trained = make_runner(activations(), tmp_path).run()
    again = make_runner(activations(), tmp_path)
    with pytest.raises(ValueError, match="activations replace a model and its data set"):
        MatryoshkaTrainingRunner(again.cfg, override_model=object(), activations=activations())  # type: ignore[arg-type]
    runner = MatryoshkaTrainingRunner(again.cfg, override_sae=trained, activations=activations())
    assert runner.sae is trained


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (activations(), {"d_in": 13}, "sae.d_in=13 is not accepted: .* have d_in=12"),
        (activations(49), {}, "holds 49 rows, fewer than a batch of 50"),
        ("none.npy", {}, "'none.npy' is not accepted: give an existing"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, source: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner(source, tmp_path, **options)


def test_generator_that_ends_keeps_what_was_trained(tmp_path: Path) -> None:
    runner = make_runner(iter(activations().split(100)), tmp_path)
    with pytest.raises(ActivationsEnded, match="ended after 430 rows"):
        runner.run()
    [checkpoint] = Path(runner.cfg.checkpoint_path).iterdir()
    assert checkpoint.name == "400"


def test_the_command_trains_measures_and_publishes_without_a_model(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refusal: Any,  # noqa: F811
) -> None:
    Path("acts").mkdir()
    np.save("acts/0.npy", activations().numpy().astype(np.float16))
    command = [
        "train",
        str(CONFIG),
        "--activations",
        "acts",
        *SMALL.split(),
        "--output_path",
        "out",
    ]
    command += ["--checkpoint_path", "null", "--sae.matryoshka_widths", "8", "32"]
    assert cli.main([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "acts: 430 rows of width 12 in 1 shard, float16; 1.40 epochs"
    assert "levels of 8, 32 latents" in lines
    assert not Path("out").exists()

    assert cli.main(command) == 0
    assert "The trained SAE is in out." in capsys.readouterr().out
    sae = load_sae("out")
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (12, 32)

    words = ["--activations", "acts", "--json", "rows.json", "--diagnose"]
    assert cli.main(["levels", "out", *words]) == 0
    report = json.loads(Path("rows.json").read_text())
    assert [level["n_tokens"] for level in report["levels"]] == [430, 430]
    assert report["levels"][1]["explained_variance"] > 0
    assert cli.main(["publish", "out", "ann/saes", "--dry-run", "--activations", "acts"]) == 0
    assert Path("published/ann/saes/out/sae_weights.safetensors").is_file()
    capsys.readouterr()  # with the traces of progress bars
    said = refusal("levels", "out", "--dataset", "texts")
    assert "the metadata of this SAE has no hook_name, so its model can't be run" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--activations", "--activations takes one path"),
        ("--activations acts none", "--activations takes one path"),
        ("--activations none", "activations='none' is not accepted: give an existing folder"),
        ("--activations acts --sae.d_in 13", "sae.d_in=13 is not accepted: the rows of acts have"),
        ("--activations acts --train_batch_size_tokens 431", "acts holds 430 rows, fewer than a"),
        ("--activations acts --seed -1", "seed=-1 is not accepted"),
        ("--seed 1", "sae.d_in is missing: give a value, or activations by --activations."),
        ("--activations acts --output_path acts/0.npy/o", "output_path='acts/0.npy/o' can't be"),
        ("--activations acts --vary k=4,8 --shard-moments", "--vary trains on one process"),
        ("--activations acts --shard-moments yes", "--shard-moments takes no value"),
        ("--activations acts --process-timeout soon", "process-timeout='soon' is not accepted"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_mistake_in_the_command_is_named(
    words: str,
    message: str,
    more: list[str],
    refusal: Any,  # noqa: F811
) -> None:
    Path("acts").mkdir()
    np.save("acts/0.npy", activations().numpy())
    assert message in refusal("train", CONFIG, *SMALL.split(), *words.split(), *more)
