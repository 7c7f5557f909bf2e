"""Help, and mistakes in a command, are answered without importing what takes seconds."""

import json
import subprocess
import sys

import pytest

COMMANDS = ("train", "cache", "levels", "tree", "steer", "eval", "synth", "publish", "demo")
ANSWERS = {  # the first word, the rest, and the answer
    "--help": "usage: sae-matryoshka",
    "--version": "sae-matryoshka 0.",
    "trian": "error: 'trian' is not a command (train, cache, levels, tree, steer, eval, synth, "
    "publish, demo); ",
    "--hepl": "error: '--hepl' is not a command",
    "": "error: the following arguments are required: COMMAND",
    **{f"{name} --help": f"usage: sae-matryoshka {name}" for name in COMMANDS if name != "train"},
    **{
        f"{name} --wrong": f"error: --wrong is not an option of sae-matryoshka {name}"
        for name in COMMANDS
        if name not in ("train", "cache")  # their options are fields of SAELens' classes
    },
    "train --wrong 3": "error: wrong is not a field of a training config.",
    "train --lrr 3 --dry-run": "error: lrr is not a field of a training config; did you mean lr?",
    "train --k=3": "error: k is not a field of a training config; did you mean sae.k?",
    "train --sae.architecture jumprelu --sae.k 3": "error: sae.k is not a field",
    "train --dryrun": "error: dryrun is not a field of a training config; did you mean dry-run?",
    "train none.yaml": "error: none.yaml cannot be read",
    "train lr": "error: lr cannot be read",
    "levels sae --activation x --datset y": "--datset is not an option of sae-matryoshka levels; "
    "did you mean --dataset",
    "cache": "error: cache needs a config: sae-matryoshka cache CONFIG.yaml --out DIR",
    "cache --out x": "error: cache needs a config",
    "eval sae": "error: the following arguments are required: --out",
    "eval sae --out x core.dataset": "error: 'core.dataset' is not an option",
    "steer sae --latent 23=x --prompt y": "error: argument --latent: '23=x' is not accepted",
    "steer sae --latent 23 --prompt y": "error: --mode=add takes --latent 23=4.",
    "steer sae --latent 2=1 --mode ablate --prompt y": "error: --mode=ablate takes --latent 2.",
    "steer sae --latent 2=1 --latent 2=3 --prompt y": "error: --latent names latent 2 twice",
    "publish sae": "error: the following arguments are required: REPO_ID",
    "demo --seed x": "error: argument --seed: invalid int value: 'x'",
    "synth toi --out x": "error: argument benchmark: invalid choice: 'toi'",
}
SCRIPT = """
import contextlib, io, json, sys
from sae_lens_matryoshka.cli import main

answers = {}
for command in json.load(sys.stdin):
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer), contextlib.redirect_stderr(answer):
        try:
            code = main(command.split())
        except SystemExit as left:
            code = left.code
    slow = [name for name in ("torch", "sae_lens", "numpy", "pydantic") if name in sys.modules]
    answers[command] = [code, slow, answer.getvalue()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, list[str], str]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(list(ANSWERS)),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", ANSWERS)
def test_answers_at_once(answers: dict[str, tuple[int, list[str], str]], command: str) -> None:
    code, slow, answer = answers[command]
    assert ANSWERS[command] in answer
    assert code == (2 if "error:" in answer else 0)
    assert slow == []
