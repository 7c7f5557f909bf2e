"""What is published is what was trained, completely or not at all, with a correct card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from huggingface_hub import ModelCard
from sae_lens import SAE, JumpReLUSAE
from safetensors.torch import load_file

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig, cli, load_sae
from sae_lens_matryoshka.hub.publish import publish, write_publication
from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.levels.stats import LevelStats
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from tests.loopback_hub import LoopbackHub, use_cache
from tests.tiny import D_MODEL, runner_config, tiny_model, token_dataset

REPO, HOOK, WIDTHS = "ann/saes", "blocks.1.hook_resid_pre", [4, 12, 32]
MODEL, DATASET = "pythia-70m-deduped", "NeelNanda/c4-code-tokenized-2b"
WEIGHTS = "sae_weights.safetensors"
SAE_FILES = {"cfg.json", WEIGHTS, "sparsity.safetensors", "runner_cfg.json"}
NOTES = {"notes.txt": b"mine"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short run of SAELens' runner saved."""
    folder = tmp_path_factory.mktemp("run")
    sae = MatryoshkaTrainingSAEConfig(d_in=D_MODEL, d_sae=32, k=4, matryoshka_widths=WIDTHS)
    options = {"model_name": MODEL, "dataset_path": DATASET, "training_tokens": 512, "lr": 1e-2}
    cfg = runner_config(sae, folder, **options)
    overrides = {"override_model": tiny_model(), "override_dataset": token_dataset(100)}
    MatryoshkaTrainingRunner(cfg, **overrides).run()
    assert {path.name for path in (folder / "output").iterdir()} == SAE_FILES
    return folder / "output"


@pytest.fixture(autouse=True)
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(monkeypatch, tmp_path / "cache")


@pytest.fixture
def ann(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The Hub, where we are logged in as the owner of the repository."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    return hub


def with_metadata(run: Path, folder: Path, **metadata: Any) -> Path:
    """A copy of the SAE, without the config of its run, with these metadata."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("runner_cfg.json"))
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= metadata
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.parametrize("more", [[], ["--with-levels"]])
def test_loads_the_sae_once(run: Path, tmp_path: Path, more: list[str]) -> None:
    words = ["publish", str(run), REPO, "--dry-run", "--out", str(tmp_path / "out"), *more]
    with mock.patch.object(SAE, "load_from_disk", wraps=SAE.load_from_disk) as load:
        assert cli.main(words) == 0
    assert load.call_count == 1


def run_code_of(card: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, names)
    return names


def test_whole_and_levels_load_as_they_were(ann: LoopbackHub, run: Path) -> None:
    assert publish(run, REPO, with_levels=True) == "README.md"
    levels = {f"{HOOK}/level_{width}": width for width in WIDTHS[:-1]}
    files = ann.files(REPO)
    expected = {f"{level}/{name}" for level in levels for name in ("cfg.json", WEIGHTS)}
    assert set(files) == {"README.md", *expected, *(f"{HOOK}/{name}" for name in SAE_FILES)}
    assert all(f'from_pretrained("{REPO}", "{id}")' in files["README.md"].decode() for id in levels)
    raw = load_file(run / WEIGHTS)
    x = 3 * torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0))
    pre = (x - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]
    acts = torch.where(pre > raw["threshold"], pre.relu(), 0.0)
    assert 0 < (acts > 0).float().mean() < 1
    for sae_id, width in {HOOK: 32, **levels}.items():
        for sae in (SAE.from_pretrained(REPO, sae_id), load_sae(REPO, sae_id)):
            assert (type(sae), sae.cfg.d_sae) == (JumpReLUSAE, width)
            assert widths_of(sae) == [w for w in WIDTHS if w <= width]
            assert torch.equal(sae.W_enc, raw["W_enc"][:, :width])
            assert torch.equal(sae.W_dec, raw["W_dec"][:width])
            torch.testing.assert_close(sae.encode(x), acts[:, :width])
            cut = {"width": width, "d_sae": 32, "matryoshka_widths": WIDTHS}
            assert sae.cfg.metadata.matryoshka_level == (cut if width < 32 else None)
    _, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(REPO, HOOK)
    assert sparsity is not None
    assert torch.equal(sparsity, load_file(run / "sparsity.safetensors")["sparsity"])


def test_private_repository(ann: LoopbackHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, REPO, "sae", private=True)
    assert ann.repos[REPO].private
    assert widths_of(load_sae(REPO, "sae")) == WIDTHS
    for token in ("", ann.add_user("bob")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionError, match="hf auth login"):
            publish(run, REPO, "other")
    assert {path.split("/")[0] for path in ann.files(REPO)} == {"README.md", "sae"}


@pytest.mark.parametrize("before", [{}, {REPO: NOTES}], ids=["new", "there"])
@pytest.mark.parametrize(("token", "status"), [("", 401), ("hf_unknown", 401), ("bob", 403)])
def test_token_that_may_not_write(
    hub: LoopbackHub,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Any,
    token: str,
    status: int,
) -> None:
    for repo, files in before.items():
        hub.add(repo, files)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("bob") if token == "bob" else token)
    with pytest.raises(PermissionError, match=rf"refused {REPO} \(status {status}\).*HF_TOKEN"):
        publish(run, REPO)
    assert {repo: hub.files(repo) for repo in hub.repos} == before


FAULTS = ["/commit/", "/upload/", "/preupload/", "/resolve/", "/create", "down"]


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_hub_keeps_what_was_there(ann: LoopbackHub, run: Path, fault: str) -> None:
    ann.add(REPO, NOTES)
    telling = rf"can't be reached for {REPO}: .*refused" if fault == "down" else r"\(status 500\)"
    failing = ann.down() if fault == "down" else ann.answer_with(500, only=fault)
    with failing, pytest.raises(ConnectionError, match=telling):
        publish(run, REPO)
    # If only downloads fail, everything but the card is uploaded.
    uploaded = {f"{HOOK}/{name}" for name in SAE_FILES} if fault == "/resolve/" else set()
    assert set(ann.files(REPO)) == {"notes.txt", *uploaded}
    assert publish(run, REPO) == "README.md"
    assert len(ann.files(REPO)) == 2 + len(SAE_FILES)
    assert ann.files(REPO)["notes.txt"] == b"mine"


@pytest.mark.parametrize("by_hand", [False, True])
def test_second_sae_leaves_the_first_and_the_card(
    ann: LoopbackHub, run: Path, by_hand: bool
) -> None:
    if by_hand:
        ann.add(REPO, {"README.md": b"# By hand"})
    assert publish(run, REPO, "a/first") == ("a/first/README.md" if by_hand else "README.md")
    first = ann.files(REPO)
    assert not by_hand or first["README.md"] == b"# By hand"
    assert publish(run, REPO, "a/second") == "a/second/README.md"
    both = ann.files(REPO)
    assert {path: both[path] for path in first} == first
    assert set(both) - set(first) == {f"a/second/{name}" for name in {*SAE_FILES, "README.md"}}
    assert f'load_sae("{REPO}", "a/second")' in both["a/second/README.md"].decode()
    assert widths_of(load_sae(REPO, "a/second")) == WIDTHS


def test_publishing_again_renews_its_own_card(ann: LoopbackHub, run: Path) -> None:
    assert publish(run, REPO, "a/first") == "README.md"
    stats = [LevelStats(32, 32, 0.5, 1.0, 4.0, 0.75, 3, n_tokens=4096, l0_error=0.123)]
    assert publish(run, REPO, "a/first", stats=stats, measured_on="news") == "README.md"
    card = ann.files(REPO)["README.md"].decode()
    assert "Measured on 4,096 tokens of news. L0 is" in card
    assert "± 0.12 for the whole SAE" in card
    assert "a/first/README.md" not in ann.files(REPO)


def test_card(ann: LoopbackHub, run: Path) -> None:
    publish(run, REPO)
    card = ModelCard.load(REPO)
    assert (card.data.library_name, card.data.base_model) == ("saelens", f"EleutherAI/{MODEL}")
    assert card.data.datasets == [DATASET]
    assert card.data.tags[:3] == ["sparse-autoencoder", "sae", "matryoshka"]
    facts = {"| d_in, d_sae | 16, 32 |", f"| hook | `{HOOK}` |", "| context size | 16 |"}
    assert facts <= {*card.text.splitlines()}
    names = run_code_of(card.text)
    assert (names["sae"].cfg.d_sae, names["second_level"].cfg.d_sae) == (32, 12)
    assert torch.equal(names["second_level"].W_dec, load_file(run / WEIGHTS)["W_dec"][:12])


def test_card_without_stats_or_config(run: Path, tmp_path: Path) -> None:
    folder = with_metadata(run, tmp_path / "sae", model_name=None)
    assert write_publication(folder, tmp_path / "out", REPO) == [HOOK]
    card = (tmp_path / "out" / "README.md").read_text()
    norms = load_file(run / WEIGHTS)["W_dec"].norm(dim=1)
    rows = [re.findall(r"[\d.]+", line) for line in card.splitlines() if re.match(r"\| \d", line)]
    assert [(int(row[0]), float(row[-1])) for row in rows] == [
        (width, pytest.approx(norms[:width].mean().item(), abs=0.00051)) for width in WIDTHS
    ]
    assert "L0 and variance explained were not measured." in card
    assert "an unnamed model" in card
    training = json.loads((tmp_path / "out" / HOOK / "runner_cfg.json").read_text())
    assert (training["training_architecture"], training["k"]) == ("matryoshka", 4)


@pytest.mark.parametrize(
    ("model", "dataset", "base_model", "datasets"),
    [
        ("gpt2-small", "monology/pile-uncopyrighted", "gpt2", ["monology/pile-uncopyrighted"]),
        ("ann/unheard-of", "data/corpus", "ann/unheard-of", None),  # which is a folder here
        ("tiny", "/home/ann/corpus", None, None),
        ("/home/ann/model", "tokens", None, None),
        ("./models/mine", "a/b/c", None, None),
    ],
)
def test_card_names_only_what_the_hub_may_have(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, dataset: str,
    base_model: str | None, datasets: list[str] | None
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("data/corpus").mkdir(parents=True)
    with_metadata(run, tmp_path / "sae", model_name=model, dataset_path=dataset)
    write_publication("sae", Path("out"), REPO)
    data = ModelCard(Path("out/README.md").read_text()).data
    assert (data.base_model, data.datasets) == (base_model, datasets)


@pytest.mark.parametrize("local_dataset", [False, True])
def test_no_local_paths_are_uploaded(
    ann: LoopbackHub, run: Path, tmp_path: Path, local_dataset: bool
) -> None:
    saved = json.loads((run / "runner_cfg.json").read_text())
    if local_dataset:
        saved["dataset_path"] = str(run.parent / "corpus")
        run = with_metadata(run, tmp_path / "sae", dataset_path=saved["dataset_path"])
        (run / "runner_cfg.json").write_text(json.dumps(saved))
    publish(run, REPO, with_levels=True)
    training = json.loads(ann.files(REPO)[f"{HOOK}/runner_cfg.json"])
    assert {"output_path", "checkpoint_path", "logger"} <= saved.keys() - training.keys()
    assert (training["lr"], training["sae"]["matryoshka_widths"]) == (1e-2, WIDTHS)
    path = saved["output_path"].removesuffix("/output").encode()
    assert not [name for name, data in ann.files(REPO).items() if path in data]


def test_converted_from_dictionary_learning(ann: LoopbackHub, tmp_path: Path) -> None:
    shapes = {"W_enc": (6, 9), "b_enc": (9,), "W_dec": (9, 6), "b_dec": (6,)}
    weights = {name: torch.randn(*shape) for name, shape in shapes.items()}
    weights |= {"threshold": torch.tensor(0.5), "k": torch.tensor(3)}
    torch.save(weights, tmp_path / "ae.pt")
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "group_sizes": [2, 3, 4], "k": 3}
    trainer |= {"layer": 12, "lm_name": "google/gemma-2-2b"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    publish(tmp_path, REPO)
    sae = SAE.from_pretrained(REPO, "blocks.12.hook_resid_post")
    assert widths_of(sae) == [2, 5, 9]
    assert torch.equal(sae.W_dec, weights["W_dec"])
    assert sae.threshold.tolist() == [0.5] * 9
    card = ModelCard.load(REPO)
    assert card.data.base_model == "google/gemma-2-2b"
    assert torch.equal(run_code_of(card.text)["second_level"].W_dec, weights["W_dec"][:5])


BAD_REPOS = ["saes", "ann/my saes", "ann/saes/more", "../saes"]
BAD_IDS = ["../x", "a/../../x", "/x", "."]


@pytest.mark.parametrize(
    ("repo_id", "sae_id"), [*((bad, None) for bad in BAD_REPOS), *((REPO, bad) for bad in BAD_IDS)]
)
def test_bad_names_are_refused(
    ann: LoopbackHub, run: Path, tmp_path: Path, repo_id: str, sae_id: str | None
) -> None:
    telling = re.escape(f"sae_id={sae_id!r}" if sae_id else f"repo_id={repo_id!r}")
    with pytest.raises(ValueError, match=f"{telling} is not accepted"):
        write_publication(run, tmp_path / "out", repo_id, sae_id)
    with pytest.raises(ValueError, match=f"{telling} is not accepted"):
        publish(run, repo_id, sae_id)
    assert (list(tmp_path.rglob("*")), ann.requests) == ([], [])


def test_folder_with_something_in_it_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match=f"{re.escape(str(taken))} exists: give a new"):
            write_publication(run, taken, REPO)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    write_publication(run, tmp_path / "empty", REPO)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "empty"}
