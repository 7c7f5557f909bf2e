"""The command line: what it builds, and how it refuses, in one line and before a model loads."""

import os
import shlex
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from safetensors.torch import load_file

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig, cli
from sae_lens_matryoshka.runs import runner
from sae_lens_matryoshka.runs.config import build_run_config, flat, load_run_config
from sae_lens_matryoshka.runs.interruption import TrainingInterrupted
from tests.tiny import N_CTX, tiny_model, token_dataset

CONFIG = """
model_name: tiny
hook_name: blocks.1.hook_resid_pre
lr: 3e-4
training_tokens: 1_000_000
lr_end: null
verbose: false
sae:
  d_in: 16
  d_sae: 64
  k: 4
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[LanguageModelSAERunnerConfig[Any]]:
    """The configs of the runs that the command line started, none of which trains."""
    configs = []

    class Runner:
        processes = None

        def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], **options: Any):
            configs.append(cfg)

        def run(self) -> None:
            pass

    monkeypatch.setattr("sae_lens_matryoshka.runs.runner.MatryoshkaTrainingRunner", Runner)
    return configs


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, unless a test says which."""
    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", pytest.fail)


def test_train_takes_the_config(started, config, monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert cli.main(["train", str(config)]) == 0
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    (cfg,) = started
    assert cfg.lr == 3e-4
    assert cfg.training_tokens == 1_000_000
    assert cfg.lr_end == pytest.approx(3e-5)
    assert isinstance(cfg.sae, MatryoshkaTrainingSAEConfig)
    assert cfg.sae.matryoshka_widths == [2, 6, 14, 30, 64]
    assert cfg.logger.log_to_wandb is True
    assert cfg.checkpoint_path.startswith("checkpoints/")


def test_sampled_prefixes_take_the_runs_seed(started, config):
    sampled = ["--sae.prefix_sampling", "uniform"]
    assert cli.main(["train", str(config), *sampled]) == 0
    assert cli.main(["train", str(config), *sampled, "--seed", "7"]) == 0
    assert cli.main(["train", str(config), *sampled, "--sae.prefix_seed", "3"]) == 0
    assert cli.main(["train", str(config), "--seed", "7"]) == 0
    assert [cfg.sae.prefix_seed for cfg in started] == [started[0].seed, 7, 3, 0]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("--sae.k_start 9 --sae.k_anneal_steps 100000000", "sae.k_anneal_steps=100000000"),
        (
            "--sae.inner_weight_end 0.5 --sae.inner_fade_start 100000000",
            "sae.inner_fade_start=100000000",
        ),
    ],
)
def test_schedules_end_within_the_run(started, config, refusal, words, field):
    said = refusal("train", config, *words.split())
    assert f"{field} is not accepted: the run has " in said
    assert not started


def test_flags_override_the_config(started, config):
    words = "--lr 1e-4 --sae.k 32 --sae.matryoshka_widths 8 16 64 --logger.log_to_wandb false"
    words += " --sae.level_weights 1 2 0.5 --sae.latent_order frequency"
    more = "--checkpoint_path null --seqpos_slice 1 5 --prefetch_llm_batches 2 --lr_end 1e-6"
    assert cli.main(["train", str(config), *words.split(), *more.split()]) == 0
    (cfg,) = started
    assert (cfg.lr, cfg.lr_end) == (1e-4, 1e-6)
    assert (cfg.sae.k, cfg.sae.matryoshka_widths) == (32, [8, 16, 64])
    assert (cfg.sae.level_weights, cfg.sae.latent_order) == ([1, 2, 0.5], "frequency")
    assert cfg.logger.log_to_wandb is False
    assert cfg.checkpoint_path is None
    assert cfg.seqpos_slice == (1, 5)
    assert cfg.prefetch_llm_batches == 2
    assert cfg.logger.run_name == "matryoshka-64-LR-0.0001-Tokens-1.000e+06"
    # What no flag names stays the config's.
    assert (cfg.training_tokens, cfg.sae.d_sae) == (1_000_000, 64)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--seed", "010"], "seed", 10),
        (["--streaming", "0"], "streaming", False),
        (["--sequence_separator_token", "none"], "sequence_separator_token", None),
        (["--sae.normalize_activations", "none"], "sae.normalize_activations", "none"),
        (["--sae.level_weights", "1e-1", "1"], "sae.level_weights", "2 weights"),
        (["--logger.wandb_id", "4821e90"], "logger.wandb_id", "4821e90"),
        (["--logger.run_name", "2024-01-01"], "logger.run_name", "2024-01-01"),
        (
            ["--model_from_pretrained_kwargs", "{0: 20GiB}"],
            "model_from_pretrained_kwargs",
            {0: "20GiB"},
        ),
    ],
)
def test_words_that_yaml_would_read_otherwise(started, config, words, field, value):
    if field == "sae.level_weights":
        words, value = [*words, "--sae.matryoshka_widths", "8", "64"], [0.1, 1.0]
    assert cli.main(["train", str(config), *words]) == 0
    section, _, name = field.rpartition(".")
    assert getattr(getattr(started[0], section) if section else started[0], name) == value


def test_flags_alone_are_enough(started):
    assert cli.main(["train", "--sae.d_in", "16", "--sae.d_sae", "64", "--sae.k", "2"]) == 0
    assert (started[0].sae.d_in, started[0].sae.d_sae, started[0].sae.k) == (16, 64, 2)


def test_any_registered_architecture_is_trained(started, config):
    words = ["--sae.architecture", "batchtopk", "--sae.topk_threshold_lr", "0.1"]
    assert cli.main(["train", str(config), *words]) == 0
    assert started[0].sae.architecture() == "batchtopk"
    assert started[0].sae.topk_threshold_lr == 0.1


def test_help_shows_the_fields(config, capsys):
    assert cli.main(["train", str(config), "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--lr float", "--sae.matryoshka_widths list", "--logger.log_to_wandb bool"):
        assert flag in text


def test_load_run_config_takes_overrides_in_the_shape_of_the_file(config):
    cfg = load_run_config(config, {"lr": 1, "sae": {"k": 2.5}, "logger": {"run_name": "a"}})
    assert (cfg.lr, cfg.sae.k, cfg.sae.d_sae, cfg.logger.run_name) == (1, 2.5, 64, "a")


WRONG = {
    "lr: fast": "lr='fast' is not accepted: give a valid number.",
    "lr: .nan": "lr=nan is not accepted: give a finite number.",
    "lr: true": "lr=True is not accepted: give a valid number.",
    "training_tokens: 1.5": "training_tokens=1.5 is not accepted: give a valid integer.",
    "training_tokens: 0": "training_tokens=0 is not accepted: give a positive integer.",
    "seed: true": "seed=True is not accepted: give a valid integer.",
    "streaming: 1": "streaming=1 is not accepted: give true or false.",
    "dataset_path: no": "dataset_path=False is not accepted: give text, in quotes",
    "lr_end: low": "lr_end='low' is not accepted: give a valid number or null.",
    "seqpos_slice: [a]": "seqpos_slice[0]='a' is not accepted: give a valid integer.",
    "sequence_separator_token: x": "give a valid integer or 'bos', 'eos' or 'sep' or null.",
    "model_kwargs: 3": "model_kwargs=3 is not accepted: give a mapping.",
    "sae: {d_in: 16, d_sae: 64, k: [1]}": "sae.k=[1] is not accepted: give a valid number.",
    "sae: {d_in: 16, d_sae: 64, k: 99}": "k=99 is not accepted: give a number above 0 and at most",
    "sae: {d_in: 16, d_sae: 64, k: 4, matryoshka_widths: [8, 8]}": "does not strictly increase",
    "sae: {d_in: 16, d_sae: 64, k: 4, matryoshka_widths: [8, x]}": "sae.matryoshka_widths[1]='x'",
    "sae: {d_in: 16}": "sae.d_sae is missing: give a value.",
    "sae: 3": "sae=3 is not accepted: give a mapping of fields to values.",
    "sae: {kk: 3}": "sae.kk is not a field of a training config; did you mean sae.k",
    "d_sae: 3": "d_sae is not a field of a training config; did you mean sae.d_sae?",
    "logger: {log_wandb: true}": "logger.log_wandb is not a field of a training config; did you "
    "mean logger.log_to_wandb",
    "xyzzy: 3": "xyzzy is not a field of a training config.",
    "sae.k: 3": "sae.k is not a field: nest it, sae: {k: …}.",
    "sea: {k: 3}": "sea is not a field of a training config; did you mean sae",
    "3: 4": "3 is not a field of a training config.",
    "sae: {architecture: topkk}": "sae.architecture='topkk' is not accepted: give one of "
    + ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY)),
    "use_chat_formatting: true": "use_chat_formatting and is_dataset_tokenized cannot both be True",
    "resume_from_checkpoint: /nowhere": "resume_from_checkpoint='/nowhere' is not a folder",
    "- lr": "is not accepted: give a mapping of fields to values.",
    "lr: [1": "line 2 is not YAML: expected ',' or ']'",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistake_in_a_config_is_named(tmp_path, refusal, text):
    path = tmp_path / "run.yaml"
    others = "" if text.startswith("sae") else "sae: {d_in: 16, d_sae: 64, k: 4}\n"
    path.write_text(text + "\n" + ("" if text[0] == "-" else others))
    assert WRONG[text] in refusal("train", path)


def test_config_that_cannot_be_read_is_named(tmp_path, refusal):
    assert f"{tmp_path / 'none.yaml'} cannot be read" in refusal("train", tmp_path / "none.yaml")
    assert "cannot be read" in refusal("train", tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: \xe9")
    assert "cannot be read" in refusal("train", tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lrr 3", "lrr is not a field of a training config; did you mean lr?"),
        ("--sae.kk=3", "sae.kk is not a field of a training config; did you mean sae.k"),
        ("--k 3", "k is not a field of a training config; did you mean sae.k?"),
        ("--matryoshka_widths 3", "did you mean sae.matryoshka_widths?"),
        ("--lr fast", "lr='fast' is not accepted: give a valid number."),
        ("--training_tokens 1.5", "training_tokens=1.5 is not accepted: give a valid integer."),
        (
            "--sae.implementation fast",
            "sae.implementation='fast' is not accepted: give 'auto', 'ref",
        ),
        ("--sae.k", "--sae.k lacks a value."),
        ("--sae.k 99", "k=99 is not accepted: give a number above 0 and at most d_sae=64."),
        ("--sae.architecture topkk", "sae.architecture='topkk' is not accepted: give one of abs"),
        ("--resume_from_checkpoint /nowhere", "resume_from_checkpoint='/nowhere' is not a folder"),
        ("other.yaml", "'other.yaml' belongs to no --field; a config comes first."),
        ("--resume_from_checkpoint ''", "resume_from_checkpoint=''"),
        ("--sae foo", "sae is not a field"),
        ("--sae.k_is_integer true", "sae.k_is_integer is not a field"),
        ("--sae.architecture", "sae.architecture=''"),
        ("--kk 3", "did you mean sae.k?"),
    ],
)
def test_mistake_in_a_flag_is_named(config, refusal, words, message):
    assert message in refusal("train", config, *shlex.split(words))


def test_missing_field_is_named(refusal):
    assert "sae.d_in is missing: give a value, or activations" in refusal("train")


def test_train_trains_and_saves_for_inference(config, tmp_path, monkeypatch, capsys):
    token_dataset().to_parquet(tmp_path / "corpus" / "train.parquet")
    model = tiny_model()  # making it seeds torch, so it is made beforehand
    monkeypatch.setattr(
        "sae_lens.llm_sae_training_runner.load_model", lambda *args, **kwargs: model
    )
    words = (
        f"--dataset_path {tmp_path / 'corpus'} --streaming false --context_size {N_CTX} "
        "--train_batch_size_tokens 64 --training_tokens 640 --n_batches_in_buffer 4 "
        f"--store_batch_size_prompts 4 --logger.log_to_wandb false --output_path {tmp_path / 'out'}"
    )
    assert cli.main(["train", str(config), *words.split()]) == 0
    assert f"The trained SAE is in {tmp_path / 'out'}." in capsys.readouterr().out
    assert {"cfg.json", "sae_weights.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    weights = [load_file(tmp_path / "out" / "sae_weights.safetensors")["W_dec"]]
    for seed in ("42", "43"):  # 42 is SAELens' default
        assert cli.main(["train", str(config), *words.split(), "--seed", seed]) == 0
        weights.append(load_file(tmp_path / "out" / "sae_weights.safetensors")["W_dec"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (
            TrainingInterrupted(signal.SIGTERM, "saved.", Path("/a b/64")),
            143,
            "SIGTERM: saved.\nResume with: sae-matryoshka train {} --lr 1 "
            "--resume_from_checkpoint '/a b/64'\n",
        ),
        (TrainingInterrupted(signal.SIGINT, "nothing."), 130, "SIGINT: nothing.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_interrupted_training_exits_with_the_signals_code(
    started, config, monkeypatch, capsys, raised, code, printed
):
    def run(self) -> None:
        raise raised

    monkeypatch.setattr(runner.MatryoshkaTrainingRunner, "run", run)
    assert cli.main(["train", str(config), "--lr", "1"]) == code
    assert capsys.readouterr().err == printed.format(config)


def test_a_stop_of_several_processes_says_how_to_start_them_again(
    started, config, monkeypatch, capsys
):
    def run(self) -> None:
        raise TrainingInterrupted(signal.SIGTERM, "saved.", Path("x/64"))

    monkeypatch.setattr(runner.MatryoshkaTrainingRunner, "run", run)
    processes = types.SimpleNamespace(rank=0, n=2)
    monkeypatch.setattr(runner.MatryoshkaTrainingRunner, "processes", processes)
    assert cli.main(["train", str(config)]) == 143
    command = "torchrun --standalone --nproc-per-node 2 -m sae_lens_matryoshka train"
    assert f"Resume with: {command} {config} --resume_from" in capsys.readouterr().err
    processes.rank = 1
    assert cli.main(["train", str(config)]) == 143
    assert capsys.readouterr().err == ""


def test_a_schedule_longer_than_the_run_warns(started, config):
    words = "--training_tokens 1000 --train_batch_size_tokens 100 --lr_warm_up_steps 11"
    with pytest.warns(match="lr_warm_up_steps=11 and lr_decay_steps=0 are more than the 10 steps"):
        assert cli.main(["train", str(config), *words.split()]) == 0


def test_demo_is_dispatched(monkeypatch, capsys):
    calls = []

    def run_demo(out: Path, seed: int) -> int:
        calls.append((out, seed))
        if str(out) == "taken":
            raise ValueError("out='taken' holds something else")
        return 7

    demo = types.ModuleType("sae_lens_matryoshka.demo.run")
    demo.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sae_lens_matryoshka.demo.run", demo)
    assert cli.main(["demo"]) == 7
    assert cli.main(["demo", "--out", "here", "--seed", "3"]) == 7
    assert cli.main(["demo", "--out", "taken"]) == 2
    assert calls == [(Path("demo_run"), 0), (Path("here"), 3), (Path("taken"), 0)]
    assert capsys.readouterr().err == "error: out='taken' holds something else\n"


@pytest.mark.parametrize(
    ("words", "widths"),
    [
        ("--d_sae 4096", [128, 384, 896, 1920, 4096]),
        ("--d_sae 4096 --matryoshka_widths 16 512 4096", [16, 512, 4096]),
    ],
)
def test_saelens_own_command_line_knows_the_architecture(words, widths):
    cfg = _parse_cfg_args(["--architecture", "matryoshka", *words.split(), "--verbose", "false"])
    assert isinstance(cfg.sae, MatryoshkaTrainingSAEConfig)
    assert cfg.sae.matryoshka_widths == widths


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
def test_every_architectures_own_dictionary_is_accepted(architecture):
    sae = SAE_TRAINING_CLASS_REGISTRY[architecture][1](d_in=16, d_sae=128)
    assert build_run_config(flat({"sae": sae.to_dict()}, "config")).sae.to_dict() == sae.to_dict()


def test_build_run_config_leaves_the_mapping_alone():
    config = {"sae": {"d_in": 16, "d_sae": 64, "k": 4, "matryoshka_widths": [8, 64]}}
    cfg = build_run_config(flat(config, "config"))
    cfg.sae.matryoshka_widths.append(128)
    assert config == {"sae": {"d_in": 16, "d_sae": 64, "k": 4, "matryoshka_widths": [8, 64]}}
