"""`train --dry-run`: what it prints, and what it refuses, without a network."""

from pathlib import Path

import pytest

from sae_lens_matryoshka import cli

CONFIGS = Path(__file__).parents[2] / "configs"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dry_run(*words: str) -> int:
    return cli.main(["train", str(CONFIGS / "gemma-2-2b.yaml"), "--dry-run", *words])


def test_prints_what_would_run(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert dry_run() == 0
    # 2·2304·65536 + 2304 + 65536 parameters, 16 bytes each; 500M tokens in batches of 2,048
    assert capsys.readouterr().out.splitlines() == [
        "blocks.12.hook_resid_post of gemma-2-2b: width 2304, as sae.d_in",
        "monology/pile-uncopyrighted: not checked, it is on the Hub",
        "matryoshka, normalize_activations='expected_average_only_in', k=40",
        "levels of 2048, 6144, 14336, 30720, 65536 latents",
        "cuda: not on this machine, where PyTorch finds no CUDA device",
        "244,140 steps of 2,048 tokens; 302,057,728 parameters, 4.5 GiB with gradients and Adam's "
        "moments in float32",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "implementation"),
    [
        ([], "sparse"),
        (["--sae.implementation", "triton"], "triton"),
        (["--sae.implementation", "reference"], "reference"),
        (
            ["--sae.normalize_activations", "layer_norm", "--sae.aux_loss_coefficient", "0"],
            "reference",
        ),
    ],
)
def test_prints_which_implementation_runs(
    words: list[str], implementation: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dry_run("--device", "cpu", *words) == 0
    assert f"implementation '{implementation}' on cpu" in capsys.readouterr().out.splitlines()


def test_prints_what_it_can_not_check(capsys: Capture) -> None:
    assert cli.main(["train", str(CONFIGS / "gpt2-small.yaml"), "--dry-run"]) == 0
    assert "gpt2: not checked, its config is not on this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model_name", "gema-2-2b"],
            "does not know the model 'gema-2-2b'; did you mean gemma-2",
        ),
        (["--hook_name", "blocks.26.hook_resid_post"], "gemma-2-2b has the layers 0 to 25"),
        (
            ["--sae.d_in", "2048"],
            "d_in=2048, and blocks.12.hook_resid_post of gemma-2-2b has width 2304",
        ),
        (["--dataset_path", "the pile"], "dataset_path='the pile' is neither a folder nor a name"),
        (["--output_path", "file/out"], "output_path='file/out' can't be written to"),
    ],
)
def test_refuses(words: list[str], said: str, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert dry_run(*words) == 2
    assert said in capsys.readouterr().err
