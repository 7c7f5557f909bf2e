"""The commands `levels` and `publish`: what they print and write, and how they refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from datasets import Dataset
from matplotlib import image
from sae_lens import (
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka import cli, load_sae
from sae_lens_matryoshka.cli import measuring
from sae_lens_matryoshka.demo.corpus import texts
from sae_lens_matryoshka.levels.slicing import set_widths, widths_of
from tests.cli.conftest import Refusal
from tests.loopback_hub import LoopbackHub, use_cache
from tests.tiny import D_MODEL, N_CTX, tiny_model, token_dataset

REPO, HOOK, WIDTHS = "ann/saes", "blocks.1.hook_resid_pre", [3, 8, 20]
DEMO_MODEL = Path(cli.__file__).parents[1] / "demo" / "model"
Weights = dict[str, torch.Tensor]
Row = dict[str, Any]
Capture = pytest.CaptureFixture[str]
HERE = {"PYTHONPATH": str(Path(cli.__file__).parents[2])}  # for a process in another folder


def save_sae(
    folder: Path, d_in: int = D_MODEL, widths: list[int] | None = WIDTHS, **metadata: Any
) -> Weights:
    """A random JumpReLU SAE in a folder, its second latent dead."""
    generator = torch.Generator().manual_seed(0)
    cfg = JumpReLUSAEConfig(d_in=d_in, d_sae=WIDTHS[-1], metadata=SAEMetadata(**metadata))
    sae = JumpReLUSAE(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        sae.b_enc[1] = -1e9
        sae.threshold.uniform_(0, 1, generator=generator)
    if widths is not None:
        set_widths(sae, widths)
    sae.save_model(folder)
    return safetensors.torch.load_file(folder / "sae_weights.safetensors")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """Those of the SAE in `sae`, in the folder that the test is in."""
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    save_sae(Path("plain"), widths=None, hook_name=HOOK)
    return save_sae(Path("sae"), hook_name=HOOK)


def table_in(output: str) -> list[Row]:
    """The rows of the Markdown table that was printed, by the titles of their columns."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    titles, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return [dict(zip(titles, map(float, row), strict=True)) for row in rows]


def from_weights(weights: Weights, width: int) -> Row:
    """What the table says of a level, one pair of latents at a time."""
    rows = weights["W_dec"][:width].double().tolist()
    norms = [sum(a * a for a in row) ** 0.5 for row in rows]
    cosines = [
        max(
            sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / norms[i] / norms[j]
            for j in range(width)
            if j != i
        )
        for i in range(width)
    ]
    return {
        "width": width,
        "latents added": width - max([0, *(w for w in WIDTHS if w < width)]),
        "mean max decoder cosine": pytest.approx(sum(cosines) / width, abs=0.00051),
        "decoder norm": pytest.approx(sum(norms) / width, abs=0.00051),
    }


def from_activations(weights: Weights, x: torch.Tensor, width: int) -> Row:
    """What the JSON says of a level, computed with the truncated tensors alone."""
    x = x.double()
    w = {name: tensor.double() for name, tensor in weights.items()}
    pre = (x - w["b_dec"]) @ w["W_enc"][:, :width] + w["b_enc"][:width]
    acts = torch.where(pre > w["threshold"][:width], pre.relu(), 0.0)
    assert 0 < (acts > 0).double().mean() < 1
    missed = acts @ w["W_dec"][:width] + w["b_dec"] - x
    explained = 1 - missed.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    return {
        "width": width,
        "l0": pytest.approx((acts > 0).sum().item() / len(x), abs=1e-6),
        "explained_variance": pytest.approx(explained.item(), rel=1e-4),
        "n_dead": int((~(acts > 0).any(0)).sum()),
    }


def is_measured_on(x: torch.Tensor, weights: Weights, rows: list[Row]) -> None:
    expected = [from_activations(weights, x, width) for width in WIDTHS]
    assert [{name: row[name] for name in expected[0]} for row in rows] == expected
    assert all(row["n_dead"] >= 1 for row in rows)


def activations() -> torch.Tensor:
    return torch.randn(6, 10, D_MODEL, generator=torch.Generator().manual_seed(1))


def test_levels_from_weights(
    weights: Weights, hub: LoopbackHub, capsys: Capture, refusal: Refusal
) -> None:
    hub.add(REPO, {f"some/id/{path.name}": path.read_bytes() for path in Path("sae").iterdir()})
    expected = [from_weights(weights, width) for width in WIDTHS]
    for words in ("sae", "plain --matryoshka-widths 3,8,20 --json a.json", f"{REPO} some/id"):
        assert cli.main(["levels", *words.split()]) == 0
        assert table_in(capsys.readouterr().out) == expected
    rows = json.loads(Path("a.json").read_text())["levels"]
    assert [row["width"] for row in rows] == WIDTHS
    assert [row["decoder_norm"] for row in rows] == [row["decoder norm"] for row in expected]
    assert [row["l0"] for row in rows] == [None] * 3
    assert "did you mean 'some/id'?" in refusal("levels", REPO, "some/idd")


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.safetensors", "state.pt"])
def test_levels_on_a_file(weights: Weights, capsys: Capture, name: str) -> None:
    x = activations()
    if name == "x.npy":
        np.save(name, x.numpy())
    elif name == "x.safetensors":
        safetensors.torch.save_file({"any name": x}, name)
    else:
        torch.save(x if name == "x.pt" else {"any name": x}, name)
    words = ["--activations", name, "--json", "rows.json", "--plot", "levels.png"]
    assert cli.main(["levels", "sae", *words]) == 0
    rows = json.loads(Path("rows.json").read_text())["levels"]
    is_measured_on(x.reshape(-1, D_MODEL), weights, rows)
    for printed, row in zip(table_in(capsys.readouterr().out), rows, strict=True):
        assert printed["L0"] == pytest.approx(row["l0"], abs=0.0051)
        assert printed["variance explained"] == pytest.approx(row["explained_variance"], abs=6e-4)
        assert printed["dead latents"] == row["n_dead"]
    picture = image.imread("levels.png")
    assert picture.shape[1] > picture.shape[0] > 100
    assert picture.std() > 0.05, "something is drawn"


@pytest.mark.usefixtures("weights")
def test_a_float16_sae_is_measured_in_float32_and_published_as_it_is() -> None:
    load_sae("sae", dtype="float16").save_model("half")
    half = safetensors.torch.load_file("half/sae_weights.safetensors")
    assert half["W_enc"].dtype == torch.float16
    x = activations().reshape(-1, D_MODEL)
    np.save("x.npy", x.numpy())
    measured = ["--activations", "x.npy"]
    assert cli.main(["levels", "half", *measured, "--json", "rows.json"]) == 0
    is_measured_on(x, half, json.loads(Path("rows.json").read_text())["levels"])
    assert cli.main(["publish", "half", REPO, *measured, "--dry-run", "--out", "out"]) == 0
    [published] = Path("out").rglob("sae_weights.safetensors")
    assert torch.equal(safetensors.torch.load_file(published)["W_enc"], half["W_enc"])


def test_levels_on_cached_activations(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    model = tiny_model()
    monkeypatch.setattr("sae_lens.cache_activations_runner.load_model", lambda *_, **__: model)
    cfg = CacheActivationsRunnerConfig(
        dataset_path="tokens",
        model_name="tiny",
        model_batch_size=8,
        hook_name=HOOK,
        d_in=D_MODEL,
        training_tokens=256,
        context_size=N_CTX,
        new_cached_activations_path="cached",
        buffer_size_gb=9e-6,  # two shards
        streaming=False,
        prepend_bos=False,
        device="cpu",
    )
    CacheActivationsRunner(cfg, override_dataset=token_dataset(40)).run()
    x = torch.tensor(Dataset.load_from_disk("cached")[HOOK]).reshape(-1, D_MODEL)
    assert len(x) == 256
    words = ["--activations", "cached", "--json", "rows.json"]
    assert cli.main(["levels", "sae", *words]) == 0
    is_measured_on(x, weights, json.loads(Path("rows.json").read_text())["levels"])
    save_sae(Path("sae"), hook_name="blocks.0.hook_resid_pre")
    telling = "cached holds no activations of blocks.0.hook_resid_pre."
    assert telling in refusal("levels", "sae", *words)


IN_THE_DEMO = """
import sys, numpy, torch
from sae_lens import ActivationsStore
from sae_lens.load_model import load_model
from transformers import AutoModelForCausalLM
from sae_lens_matryoshka import cli
from sae_lens_matryoshka import load_sae
assert cli.main(sys.argv[1:]) == 0
name = "sae-lens-matryoshka/tiny-gpt-neox"
options = {"dataset": "corpus", "streaming": False, "store_batch_size_prompts": 4}
model = load_model("HookedTransformer", name, "cpu")
store = ActivationsStore.from_sae(model, load_sae("sae"), **options)
tokens = torch.cat([store.get_batch_tokens() for _ in range(2)])
model = AutoModelForCausalLM.from_pretrained(name)
hidden = model(tokens, output_hidden_states=True).hidden_states[2]
numpy.save("x.npy", hidden.detach().numpy())
"""


def test_levels_in_the_model(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "sae-lens-matryoshka" / "tiny-gpt-neox")
    (tmp_path / "corpus").mkdir()
    Dataset.from_dict({"text": texts(60, 7)}).to_parquet(tmp_path / "corpus" / "train.parquet")
    weights = save_sae(
        tmp_path / "sae",
        d_in=128,
        hook_name="blocks.1.hook_resid_post",
        context_size=64,
        prepend_bos=True,
    )
    words = "levels sae --dataset corpus --model tiny-gpt-neox --n-batches 2 --plot a.png"
    words += " --batch-size-prompts 4 --json rows.json"
    more = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    command = [sys.executable, "-W", "ignore", "-c", IN_THE_DEMO, *words.split()]
    printed = subprocess.run(
        command, cwd=tmp_path, env=os.environ | more | HERE, stdout=-1, text=True, check=True
    ).stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["levels"]
    x = torch.from_numpy(np.load(tmp_path / "x.npy"))
    assert x.shape == (8, 64, 128)
    for width, row, shown in zip(WIDTHS, rows, table_in(printed), strict=True):
        expected = from_activations(weights, x.reshape(-1, 128), width)
        assert row["l0"] == pytest.approx(expected["l0"].expected, abs=0.005)
        assert row["n_dead"] == expected["n_dead"]
        assert row["explained_variance"] <= 1
        assert shown["CE loss recovered"] == pytest.approx(row["ce_recovered"], abs=0.00051)
        assert shown["L0"] == pytest.approx(row["l0"], abs=0.0051)
    assert image.imread(tmp_path / "a.png").std() > 0.05
    finished = subprocess.run(
        [*command, "--no-ce-loss"],
        cwd=tmp_path,
        env=os.environ | more | HERE,
        stdout=-1,
        check=True,
    )
    without = json.loads((tmp_path / "rows.json").read_text())["levels"]
    assert b"CE loss" not in finished.stdout
    for row, other in zip(rows, without, strict=True):
        assert other["ce_recovered"] is None
        assert (other["l0"], other["n_dead"]) == (pytest.approx(row["l0"]), row["n_dead"])


def test_unknown_model_and_hook(tmp_path: Path, refusal: Refusal) -> None:
    sae = tmp_path / "sae"
    save_sae(sae, hook_name="blocks.0.hook_x", context_size=8, prepend_bos=True)
    said = refusal("levels", str(sae), "--dataset", "t", "--model", "gtp2")
    assert "TransformerLens does not know the model 'gtp2'; did you mean gpt2" in said
    small = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "load_model", lambda *_, **__: small)
        said = refusal("levels", str(sae), "--dataset", "t", "--model", "gpt2")
    assert "the model 'gpt2' has no hook 'blocks.0.hook_x'" in said


def test_model_that_is_neither_here_nor_on_the_hub(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sae(tmp_path / "sae", hook_name="blocks.0.hook_x", context_size=8, prepend_bos=True)
    offline = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(measuring, "load_model", offline)
    monkeypatch.chdir(tmp_path)
    said = refusal("levels", "sae", "--dataset", "t", "--model", "gpt2", code=1)
    expected = (
        f"the model 'gpt2' can't be loaded; {tmp_path} has no folder of that name: no network"
    )
    assert said == f"error: {expected}\n"


WRONG = {
    "levels none": "There is no folder 'none'",
    "levels bad": "bad holds no SAE",
    "levels plain": "--matryoshka-widths",
    "levels plain --matryoshka-widths a,b": "argument --matryoshka-widths: invalid",
    "levels plain --matryoshka-widths 3,21": "matryoshka_widths=[3, 21] holds 21, outside 1 to 20",
    "levels sae --plot a.png": "--plot needs measurements: give --activations or --dataset",
    "levels sae --activations x.npy --plot a.gif": "--plot='a.gif' is not accepted",
    "levels sae --activations x.npy --dataset t": "--activations and --dataset are two ways",
    "levels sae --model gpt2": "--model needs --dataset",
    "levels sae --no-ce-loss": "--no-ce-loss is for --dataset",
    "levels sae --activations none.npy": "--activations='none.npy' is not accepted: give an",
    "levels sae --activations bad/x.npy": "bad/x.npy can't be read",
    "levels sae --activations two.pt": "two.pt holds 2 tensors: give one of activations.",
    "levels sae --activations wide.npy": "activations of shape (4, 17) and",
    "levels sae --activations scalar.npy": "scalar.npy holds activations of shape ()",
    "levels sae --activations nan.npy": "nan.npy, row 0: not finite.",
    "levels sae --activations empty.npy": "there are no activations to measure the levels on.",
    "levels sae --activations bad": "bad",
    "levels sae --dataset t": "the metadata of this SAE has no context_size",
    "levels sae --n-batches 0": "argument --n-batches: '0' is not accepted: give a positive",
    "levels sae --batch-size-prompts -1": "argument --batch-size-prompts: ",
    "publish none ann/saes": "There is no folder 'none'",
    "publish sae saes --dry-run": "repo_id='saes' is not accepted: give owner/name",
    "publish sae ann/saes --out o": "--out needs --dry-run",
    "publish sae ann/saes --dry-run --out bad": "bad exists: give a new or an empty",
    "publish sae ann/saes --dry-run --sae-id ../x": "sae_id='../x' is not accepted",
}


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.usefixtures("weights")
def test_mistake_is_named(hub: LoopbackHub, refusal: Refusal, words: str) -> None:
    Path("bad").mkdir()
    Path("bad/x.npy").write_text("no activations")
    for name, shape in {"x": (4, 16), "wide": (4, 17), "empty": (0, 16), "scalar": ()}.items():
        np.save(name, np.zeros(shape))
    np.save("nan", np.full((4, 16), np.nan))
    torch.save({"a": torch.ones(4, 16), "b": torch.ones(4, 16)}, "two.pt")
    before = sorted(Path().rglob("*"))
    assert WRONG[words] in refusal(*words.split())
    assert sorted(Path().rglob("*")) == before
    assert hub.requests == []


@pytest.mark.usefixtures("weights")
def test_hub_that_is_down(hub: LoopbackHub, refusal: Refusal) -> None:
    with hub.down():
        for words in (["levels", REPO, "some/id"], ["publish", "sae", REPO]):
            assert f"can't be reached for {REPO}" in refusal(*words, code=1)


DISK_FULL = """
import resource, sys
from sae_lens_matryoshka import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(cli.main(sys.argv[2:]))
"""


def on_a_full_disk(limit: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A command that fails, because files can't become larger than this limit."""
    command = [sys.executable, "-W", "ignore", "-c", DISK_FULL, str(limit), *words]
    ended = subprocess.run(
        command, env=os.environ | HERE, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 1
    assert re.fullmatch(r"error: .*File too large.*", ended.stderr.splitlines()[-1])
    return ended


@pytest.mark.usefixtures("weights")
def test_plot_that_cannot_be_written(refusal: Refusal) -> None:
    np.save("x", activations().numpy())
    Path("old.png").write_bytes(b"old")
    Path("folder.png").mkdir()
    before = sorted(Path().iterdir())
    words = ["levels", "sae", "--activations", "x.npy", "--plot"]
    for plot in ("none/levels.png", "x.npy/levels.png"):
        assert "is not a folder to write levels.png to" in refusal(*words, plot)
    assert "folder" in refusal(*words, "folder.png", code=1)
    on_a_full_disk(5000, *words, "old.png")
    assert sorted(Path().iterdir()) == before
    assert Path("old.png").read_bytes() == b"old"


@pytest.mark.usefixtures("weights")
def test_publication_that_cannot_be_written() -> None:
    assert Path("sae/sae_weights.safetensors").stat().st_size > 2500
    before = sorted(Path().iterdir())
    ended = on_a_full_disk(2500, "publish", "sae", REPO, "--dry-run", "--out", "out")
    assert sorted(Path().iterdir()) == before
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


def test_dry_run_asks_the_hub_nothing(weights: Weights, hub: LoopbackHub, capsys: Capture) -> None:
    np.save("x", activations().numpy())
    words = ["publish", "sae", REPO, "--dry-run", "--activations", "x.npy"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said == "published/ann/saes holds what would be uploaded to ann/saes.\n"
    assert cli.main([*words, "--out", "o", "--with-levels", "--sae-id", "a/b"]) == 0
    assert hub.requests == []
    names = {path.relative_to("o").as_posix() for path in Path("o").rglob("*") if path.is_file()}
    saes = ("a/b", "a/b/level_3", "a/b/level_8")
    files = {f"{sae}/{name}" for sae in saes for name in ("cfg.json", "sae_weights.safetensors")}
    assert names == {*files, "a/b/runner_cfg.json", "README.md"}
    assert torch.equal(load_sae("o/a/b/level_8").W_dec, weights["W_dec"][:8])
    for card in ("o/README.md", "published/ann/saes/README.md"):
        rows = table_in(Path(card).read_text().partition("## Levels")[2].partition("## Load")[0])
        for row, width in zip(rows, WIDTHS, strict=True):
            measured = from_activations(weights, activations().reshape(-1, D_MODEL), width)
            assert row["L0"] == pytest.approx(measured["l0"].expected, abs=0.0051)
            assert row["dead latents"] == measured["n_dead"]


def test_publish(
    weights: Weights,
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    refusal: Refusal,
) -> None:
    assert "hf auth login" in refusal("publish", "sae", REPO, code=1)
    assert hub.repos == {}
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    assert cli.main(["publish", "sae", REPO, "--private"]) == 0
    assert capsys.readouterr().out == "ann/saes is published; its card is README.md.\n"
    assert hub.repos[REPO].private
    assert cli.main(["publish", "sae", REPO, "--sae-id", "again"]) == 0
    assert capsys.readouterr().out == "ann/saes is published; its card is again/README.md.\n"
    assert torch.equal(load_sae(REPO, "again").W_enc, weights["W_enc"])
    assert not Path("published").exists()


@pytest.mark.parametrize("more", [[], ["--with-levels"]])
@pytest.mark.usefixtures("weights")
def test_widths_given_are_published(more: list[str]) -> None:
    words = ["--matryoshka-widths", "3,8,20", "--dry-run", "--out", "o", *more]
    assert cli.main(["publish", "plain", REPO, *words]) == 0
    assert widths_of(load_sae(f"o/{HOOK}")) == WIDTHS
