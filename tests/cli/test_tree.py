"""The command `tree`: what it prints and writes, and how it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_lens_matryoshka import cli, load_sae
from sae_lens_matryoshka.levels.fingerprint import fingerprint
from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.examples import Examples
from sae_lens_matryoshka.tree.gathered import Gathered
from tests.cli.conftest import Refusal
from tests.tree.worlds import CHILD, D_IN, PARENT, WIDTHS, exact_sae, small_world


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAEs with and without levels, and activations, in the folder that the test is in."""
    monkeypatch.chdir(tmp_path)
    exact_sae(8, WIDTHS).save_model("sae")
    exact_sae(8).save_model("plain")
    np.save("x.npy", small_world(6000).numpy())


def test_it_writes_a_tree(capsys):
    command = ["tree", "sae", "--activations", "x.npy", "--out", "out"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "6,000 tokens, 8 latents, of which 1 never fire and 0 fire too rarely" in out
    assert "pairs of a parent (of an inner level) and a rarer child" in out
    assert "latent 0 (level 1): 19." in out
    assert f"    {CHILD} (level 2): coverage 1.00 [0.99, 1.00], lift 5." in out
    assert "This SAE has no levels" not in out
    assert {path.name for path in Path("out").iterdir()} == {
        "tree.json",
        "examples.safetensors",
        "gathered",
        "index.html",
        "data",
    }
    tree = Tree.load("out/tree.json")
    assert tree.children(PARENT)[0] == CHILD
    examples = Examples.load("out/examples.safetensors")
    assert examples.top_tokens.shape == (8, 20)
    assert Gathered("out/gathered").n_tokens == 6000
    assert cli.main(command) == 0  # again, from what was gathered
    assert capsys.readouterr().out == out


def test_a_float16_sae_is_encoded_in_float32():
    load_sae("sae", dtype="float16").save_model("half")
    assert cli.main(["tree", "half", "--activations", "x.npy", "--out", "out"]) == 0
    weights = Gathered("out/gathered").index.settings["weights"]
    assert weights == fingerprint(load_sae("half", dtype="float32"))


def test_more_tokens_after_too_few(refusal: Refusal):
    command = ["tree", "sae", "--activations", "x.npy", "--out", "out"]
    assert "100 tokens are too few for a tree" in refusal(*command, "--tokens", "100")
    assert cli.main(command) == 0
    assert Tree.load("out/tree.json").summary["n_tokens"] == 6000


def index_of(page: Path) -> dict:
    """What the page knows of all latents."""
    text = page.read_text()
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def test_labels_from_a_file_and_from_the_folder(refusal: Refusal):
    Path("given.json").write_text('{"0": "given", "1": "given too"}')
    command = ["tree", "sae", "--activations", "x.npy", "--out", "out"]
    assert cli.main([*command, "--labels", "given.json"]) == 0
    assert index_of(Path("out/data/index.js"))["labels"] == {"0": "given", "1": "given too"}
    weights = Gathered("out/gathered").index.settings["weights"]
    values = {"weights": weights, "labels": {"1": "typed"}}
    Path("out/labels.json").write_text(json.dumps(values))
    assert cli.main([*command, "--labels", "given.json"]) == 0
    assert index_of(Path("out/data/index.js"))["labels"] == {"0": "given", "1": "typed"}
    assert cli.main(command) == 0
    assert index_of(Path("out/data/index.js"))["labels"] == {"1": "typed"}
    Path("out/labels.json").write_text('{"weights": "0", "sae": "fox", "labels": {}}')
    assert "labels.json has labels of another SAE, 'fox'" in refusal(*command)


def test_one_file():
    command = ["tree", "sae", "--activations", "x.npy", "--out", "out"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--single-file"]) == 0
    assert not Path("out/data").exists()
    page = Path("out/index.html").read_text()
    assert '<script type="application/json" id="data-latents-0">' in page
    assert 'src="' not in page


def test_without_levels_it_goes_by_frequency(capsys):
    assert cli.main(["tree", "plain", "--activations", "x.npy", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "This SAE has no levels: a parent is any latent that fires more often." in out
    assert "a parent (any more frequent)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sae", "--out", "out"], "a tree needs activations: give --activations or --dataset"),
        (["sae", "--activations", "x.npy", "--out", "x.npy"], "can't be written to"),
        (["sae", "--activations", "x.npy", "--out", "sae"], "sae holds something else"),
        (["sae", "--activations", "x.npy", "--out", "site"], "site holds something else"),
        (
            ["sae", "--activations", "x.npy", "--out", "out", "--export", "neuronpedia", "np"],
            "--export neuronpedia needs the model and its texts: give --dataset",
        ),
        (
            ["sae", "--dataset", "y", "--out", "out", "--export", "csv", "np"],
            "--export='csv' is not accepted: give neuronpedia and a folder",
        ),
        (
            ["sae", "--dataset", "y", "--out", "out", "--export", "neuronpedia", "sae"],
            "sae holds something else: give --export a new or an empty folder",
        ),
        (["sae", "--activations", "none.npy", "--out", "out"], "'none.npy' is not accepted"),
        (["sae", "--activations", "x.npy", "--dataset", "y", "--out", "out"], "two ways"),
        (["sae", "--activations", "x.npy", "--out", "out", "--tokens", "0"], "argument --tokens"),
        (["sae", "--activations", "x.npy", "--out", "out", "--tokens", "90"], "90 tokens are too"),
        (["sae", "--activations", "x.npy", "--out", "out", "--edges", "x"], "argument --edges"),
        (["sae", "--activations", "wide.npy", "--out", "out"], "width 13, and this SAE takes d_in"),
        (["sae", "--dataset", "y", "--out", "out"], "no model_name: give --model"),
        (["sae", "--activations", "x.npy", "--out", "out", "--ablation"], "give --dataset"),
        (
            ["sae", "--activations", "x.npy", "--out", "out", "--labels", "x.npy"],
            "x.npy can't be read",
        ),
        (["normed", "--dataset", "y", "--out", "out", "--ablation"], "'layer_norm'"),
    ],
)
def test_mistakes(words: list[str], message: str, refusal: Refusal):
    np.save("wide.npy", torch.zeros(600, D_IN + 1).numpy())
    Path("site/data").mkdir(parents=True)  # whose names are those of a page
    Path("site/index.html").write_text("")
    normed = exact_sae(8)
    normed.cfg.normalize_activations = "layer_norm"
    normed.save_model("normed")
    assert message in refusal("tree", *words)
