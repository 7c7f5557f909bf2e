"""The page in a real Chromium, opened from a disk."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.building import tree_of
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.page import write_page
from sae_lens_matryoshka.tree.page.weights import logit_lens, neighbours
from sae_lens_matryoshka.tree.sources import Batch
from tests.tree.browser import open_browser
from tests.tree.worlds import (
    ALONE,
    CHILD,
    D_IN,
    DEAD,
    DENSE,
    GRANDCHILD,
    PARENT,
    exact_sae,
    small_world,
)

CONTEXT, N_TOKENS = 16, 6400
ODD = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"quotes'`",
    " &amp;",
    " 🦊👩‍👩‍👧",
    " שלום",
    "\u202eoverride",
    "\n",
    "\u2028",
    "${x}{{ y }}",
]
VOCABULARY = [*ODD, *(f" word{i}" for i in range(30))]
FOX = VOCABULARY.index(" 🦊👩‍👩‍👧")
HOOK = "blocks.1.hook_resid_pre"


class World:
    """The small world as a source of texts; the fox stands wherever the grandchild fires."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"dataset": "odd <b>texts</b>", "model": "tiny"}

    def batches(self, skip: int) -> Iterator[Batch]:
        x = small_world(N_TOKENS)
        tokens = np.random.default_rng(0).integers(0, len(VOCABULARY), N_TOKENS)
        tokens[tokens == FOX] += 1
        tokens[x[:, GRANDCHILD] > 0.5] = FOX
        for start in range(skip * 320, N_TOKENS, 320):
            own = tokens[start : start + 320].reshape(-1, CONTEXT).astype(np.int32)
            # the SAE is not run on the first token of a context
            positions = np.arange(320).reshape(-1, CONTEXT)[:, 1:].reshape(-1).astype(np.int32)
            yield Batch(x[start : start + 320][positions], own, positions)


def model() -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D_IN,
        n_heads=2,
        d_head=6,
        n_ctx=CONTEXT,
        d_vocab=len(VOCABULARY),
        act_fn="gelu",
        seed=0,
        default_prepend_bos=False,
    )
    words = {word: i for i, word in enumerate(VOCABULARY)}
    made = HookedTransformer(cfg)
    made.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=VOCABULARY[-1])),
        clean_up_tokenization_spaces=False,
    )
    return made


def written(folder: Path, sae: Any, source: Any, n_tokens: int, **options: Any) -> Path:
    gathered = gather(sae, source, folder / "gathered", n_tokens)
    tree = tree_of(gathered, sae)
    tree.save(folder / "tree.json")
    return write_page(folder, tree, gathered, find_examples(gathered), sae, **options)


@pytest.fixture(scope="module")
def sae() -> Any:
    sae = exact_sae(8, [1, 2, 8])
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.fixture(scope="module")
def odd(sae, tmp_path_factory) -> Path:
    name = "odd </script><script>alert(3)</script>"
    folder = tmp_path_factory.mktemp("page with spaces & ünicode#1")
    return written(folder, sae, World(), N_TOKENS, model=model(), name=name)


class Arrays:
    """Activations from memory, without texts."""

    def __init__(self, x: torch.Tensor):
        self.settings: dict[str, Any] = {"activations": "x"}
        self._x = x

    def batches(self, skip: int) -> Iterator[Batch]:
        yield from map(Batch, self._x.split(256)[skip:])


def families(n: int, n_parents: int, n_tokens: int = 2560) -> torch.Tensor:
    """Of `n` latents the first are parents, whose children share their tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(n_tokens, n)
    parents = torch.rand(n_tokens, n_parents, generator=generator) < 0.2
    x[:, :n_parents] = parents * 1.0
    for latent in range(n_parents, n):
        on = parents[:, latent % n_parents] & (torch.rand(n_tokens, generator=generator) < 0.2)
        x[:, latent] = on * 1.0
    return x


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    sae = exact_sae(1000, [10, 1000], d_in=1000)
    return written(tmp_path_factory.mktemp("1000"), sae, Arrays(families(1000, 10)), 2560)


@pytest.fixture(scope="module")
def none(tmp_path_factory) -> Path:
    sae = exact_sae(8)
    x = torch.rand(2560, D_IN, generator=torch.Generator().manual_seed(0)) * 0.55
    return written(tmp_path_factory.mktemp("none"), sae, Arrays(x), 2560)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a page, and fails on errors, dialogs and requests of anything but files."""
    wrong: list[str] = []
    contexts = []

    def goto(path: Path, link: str = "", **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        contexts[-1].on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else wrong.append(request.url)
            ),
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri() + link)
        page.wait_for_selector("article h2", state="attached")
        return page

    yield goto
    for context in contexts:
        context.close()
    assert wrong == []


def row(page: Page, latent: int) -> Any:
    return page.locator(f"#row-{latent}")


def test_from_a_root_to_a_grandchild(odd, opened):
    page = opened(odd)
    expect(row(page, CHILD)).to_have_count(0)
    row(page, PARENT).locator(".caret").click()
    row(page, CHILD).locator(".caret").click()
    row(page, GRANDCHILD).click()
    expect(page.locator("h2")).to_contain_text(f"Latent {GRANDCHILD}")
    assert page.url.endswith(f"#latent={GRANDCHILD}")
    # its parent's row opens to the evidence, and leads on to the parent
    edge = page.locator("#family details.edge").first
    edge.locator("summary .cell").click()
    tree = Tree.load(odd.parent / "tree.json")
    evidence = tree.edge(CHILD, GRANDCHILD)
    expect(edge).to_contain_text(f"On {evidence['n_both']} of them, 100 %, {CHILD} fires too")
    expect(edge).to_contain_text(f"of {tree.summary['n_shifted_tested']} pair")
    assert edge.locator("li.ok").count() == 5
    edge.locator("a.latent").click()
    expect(page.locator("h2")).to_contain_text(f"Latent {CHILD}")
    expect(page.locator("#family h3").first).to_have_text("Parents 1")
    page.go_back()
    expect(page.locator("h2")).to_contain_text(f"Latent {GRANDCHILD}")


def test_siblings_come_with_their_edges(thousand, opened):
    page = opened(thousand, "#latent=17")
    siblings = page.locator("#siblings")
    expect(siblings.locator("h3")).to_have_text("Siblings 98")
    expect(siblings.locator("details")).to_have_count(12)
    siblings.get_by_role("button").click()
    expect(siblings.locator("details")).to_have_count(98)
    siblings.locator("summary .cell").last.click()
    expect(siblings.locator("details").last).to_contain_text("specialises 7")


def test_search(odd, opened):
    page = opened(odd)
    search = page.get_by_role("searchbox")
    search.fill("🦊")
    rows = page.locator("#space .row")
    expect(rows).to_have_count(3)  # it is a token of the whole chain
    expect(row(page, GRANDCHILD)).to_contain_text(f"under {CHILD}")
    search.fill(str(ALONE))
    expect(rows.first).to_have_id(f"row-{ALONE}")
    search.fill("<script")
    assert rows.count() >= 1
    search.fill("nowhere")
    expect(page.get_by_role("status")).to_contain_text("No latent has “nowhere”")
    search.press("Escape")
    expect(row(page, PARENT)).to_be_visible()


def test_labels_stay_and_are_exported(odd, opened):
    page = opened(odd, f"#latent={CHILD}")
    page.get_by_label("Label", exact=True).fill("a <b>fox</b>")
    page.reload()
    expect(page.get_by_label("Label", exact=True)).to_have_value("a <b>fox</b>")
    expect(row(page, CHILD)).to_contain_text("a <b>fox</b>")
    page.get_by_role("searchbox").fill("b>fox")
    expect(page.locator("#space .row")).to_have_id(f"row-{CHILD}")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export labels").click()
    exported = json.loads(download.value.path().read_text())
    assert exported["labels"] == {str(CHILD): "a <b>fox</b>"}
    assert exported["weights"] == Gathered(odd.parent / "gathered").index.settings["weights"]


def test_deep_links(odd, opened):
    page = opened(odd, f"#latent={GRANDCHILD}")
    expect(page.locator("h2")).to_contain_text(f"Latent {GRANDCHILD}")
    expect(row(page, GRANDCHILD)).to_have_attribute("aria-selected", "true")  # opened in the forest
    page.goto(odd.as_uri() + "#latent=99")
    expect(page.locator("#right")).to_contain_text("There is no latent 99: they go from 0 to 7.")
    page.goto(odd.as_uri() + "#text=0&token=3")
    expect(page.locator("#token")).to_contain_text("This token:")


def test_keyboard(odd, opened):
    page = opened(odd)
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("ArrowDown")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("h2")).to_contain_text(f"Latent {GRANDCHILD}")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(row(page, GRANDCHILD)).to_have_count(0)
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    expect(page.locator("h2")).to_contain_text(f"Latent {PARENT}")


def test_odd_tokens_are_shown_as_they_are(odd, opened):
    page = opened(odd, f"#latent={GRANDCHILD}")
    peaks = page.locator("#examples .peak")
    assert peaks.count() >= 12 + 5 * 3 - 5
    assert set(peaks.all_text_contents()) == {" 🦊👩‍👩‍👧"}
    shown = "".join(page.locator("#examples .example").all_text_contents())
    for token in ODD[:6]:
        assert token in shown
    assert "↵" in shown
    assert page.locator("#right img, #right script").count() == 0
    expect(page.locator("h1")).to_have_text("odd </script><script>alert(3)</script>")
    page.goto(odd.as_uri() + "#about=1")
    expect(page.locator("#about")).to_contain_text("Texts: odd <b>texts</b>.")


def test_a_text_with_its_latents_by_level(odd, sae, opened):
    page = opened(odd)
    page.get_by_role("link", name="Texts").click()
    tokens = page.locator("#tokens .token")
    expect(tokens).to_have_count(CONTEXT - 1)
    ids = Gathered(odd.parent / "gathered").tokens(0)[0]
    text = page.locator("#tokens").text_content()
    assert text == re.sub("\n", "↵", "".join(VOCABULARY[i] for i in ids))
    with torch.no_grad():
        x = model().run_with_cache(torch.tensor(ids)[None].long())[1][HOOK][0]
        codes = sae.encode(x)
    tokens.nth(4).click()
    shown = page.locator("#token a.latent b").all_text_contents()
    expected = codes[5].nonzero().flatten().tolist()
    assert sorted(map(int, shown)) == expected
    page.locator("#tokens").press("ArrowRight")
    expect(page).to_have_url(re.compile("token=6"))
    expect(page.locator("#tokens")).to_be_focused()
    page.get_by_role("button", name="level 3").click()
    expect(page.get_by_role("button", name="level 3")).to_have_attribute("aria-pressed", "true")
    assert page.locator(".levels-added").count() == 2


def test_what_each_level_explains(odd, sae):
    text = json.loads((odd.parent / "data/text-0.js").read_text()[len('receive("text-0",') : -2])
    gathered = Gathered(odd.parent / "gathered")
    ids = torch.tensor(gathered.tokens(0)[0]).long()
    mean = torch.from_numpy(gathered.sums["total"] / gathered.n_tokens).float()
    with torch.no_grad():
        x = model().run_with_cache(ids[None])[1][HOOK][0][1:]
        codes, W_dec = sae.encode(x), sae.W_dec.detach()
    for level, width in enumerate([1, 2, 8]):
        error = (codes[:, :width] @ W_dec[:width] - x).square().sum(1)
        shares = 1 - error / (x - mean).square().sum(1)
        found = [shares_of_token[level] for shares_of_token in text["explained"][1:]]
        np.testing.assert_allclose(found, shares, rtol=0.01, atol=1e-3)
        total = 1 - error.sum() / (x - mean).square().sum()
        assert text["total"][level] == pytest.approx(float(total), rel=0.01, abs=1e-3)
    assert text["explained"][0] is text["latents"][0] is None


@pytest.mark.parametrize(
    ("latent", "message"),
    [(DEAD, "Dead: it fires on none"), (DENSE, "Dense: it fires on more than a tenth")],
)
def test_warnings(latent, message, odd, opened):
    expect(opened(odd, f"#latent={latent}").locator(".warning")).to_contain_text(message)


def test_a_thousand_latents(thousand, opened):
    page = opened(thousand)
    page.get_by_label("latents without family too").check()
    page.get_by_label("sorted by").select_option("number")
    assert page.locator("#space .row").count() < 100  # only those in sight
    row(page, 0).locator(".caret").click()
    assert page.locator("#space").evaluate("node => node.clientHeight") == (10 + 99) * 34
    page.locator("#rows").press("End")
    expect(row(page, 9)).to_be_visible()
    page.get_by_label("sorted by").select_option("frequency")
    expect(page.locator("#space .row").last).to_be_visible()
    page.goto(thousand.as_uri() + "#latent=999")
    expect(page.locator("#examples")).to_contain_text("no texts, only token numbers")
    expect(page.locator("#right")).to_contain_text("Promoted tokens need a model")


def test_no_edge(none, opened):
    page = opened(none)
    expect(page.get_by_role("status")).to_contain_text("No edge passed the tests")
    expect(page.locator("#about")).to_contain_text("This SAE has no levels")
    page.get_by_label("latents without family too").check()
    row(page, 3).click()
    expect(page.locator("#family")).to_contain_text("No edge to or from this latent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(scheme, odd, opened):
    page = opened(odd, viewport={"width": 375, "height": 700}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    row(page, PARENT).click()
    expect(page.locator("h2")).to_contain_text(f"Latent {PARENT}")
    expect(page.locator("#forest")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == (scheme == "dark")
    page.get_by_role("link", name="back").click()
    expect(row(page, PARENT)).to_be_visible()


def test_a_missing_file_is_named(none, browser, tmp_path):
    shutil.copytree(none.parent, tmp_path / "copy")
    (tmp_path / "copy/data/latents-0.js").unlink()
    page = browser.new_page()
    page.goto((tmp_path / "copy/index.html").as_uri() + "#latent=3")
    expect(page.locator("#right .warning")).to_contain_text("data/latents-0.js can't be read")
    page.close()


def test_a_failed_page_leaves_the_earlier_one(none, monkeypatch):
    before = {path: path.read_bytes() for path in none.parent.rglob("*") if path.is_file()}
    gathered = Gathered(none.parent / "gathered")
    tree = Tree.load(none.parent / "tree.json")
    examples = find_examples(gathered)
    monkeypatch.setattr(Gathered, "sorted_activations", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(none.parent, tree, gathered, examples, exact_sae(8), name="another")
    assert before == {path: path.read_bytes() for path in none.parent.rglob("*") if path.is_file()}


def test_logit_lens_and_neighbours(sae):
    own = model()
    lens = logit_lens(sae, own, n=3)
    assert lens is not None
    rows = sae.W_dec - sae.W_dec.mean(1, keepdim=True)
    logits = (rows * own.ln_final.w) @ own.W_U
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    torch.testing.assert_close(lens.promoted.values, z.sort(1, descending=True).values[:, :3])
    torch.testing.assert_close(lens.suppressed.indices, z.argsort(1)[:, :3])
    W_dec = torch.tensor([[1.0, 0], [2, 0.2], [-1, 0], [0, 1]])
    near = neighbours(W_dec, n=2)
    assert near.indices[0].tolist() == [1, 3]
    assert near.values[1, 0].item() == pytest.approx(1 / np.sqrt(1.01))
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_q"
    assert logit_lens(sae, own) is None
    sae.cfg.metadata.hook_name = HOOK
