"""The page in a real Chromium, opened from a disk."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.gathered import Gathered
from tests.tree.browser import open_browser
from tests.tree.pages import CONTEXT, HOOK, ODD, VOCABULARY, model
from tests.tree.worlds import ALONE, CHILD, DEAD, DENSE, GRANDCHILD, PARENT


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
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
    expect(edge).to_contain_text(f"{tree.summary['n_shifted_tested']} pairs reach the coverage")
    assert edge.locator("li.ok").count() == 5
    expect(edge).to_contain_text(f"Where {CHILD} fires most:")
    assert edge.locator(".firing .peak").count() == 6  # three of the child's, three of the parent's
    assert edge.locator(".firing .also .peak").count() == 3  # the parent fires there too
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
    page.get_by_role("link", name="Guide").click()
    expect(page.locator("#about")).to_contain_text("Labels stay in this browser")


def test_labels_from_a_file(labelled, opened):
    page = opened(labelled, f"#latent={CHILD}")
    label = page.get_by_label("Label", exact=True)
    expect(label).to_have_value("from <i>a</i> file")
    expect(row(page, PARENT)).to_contain_text("general")
    label.fill("typed")
    page.reload()
    expect(label).to_have_value("typed")
    label.fill("")
    page.reload()
    expect(label).to_have_value("")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export labels").click()
    assert json.loads(download.value.path().read_text())["labels"] == {str(PARENT): "general"}


def test_one_file_holds_the_page(labelled, opened, tmp_path):
    shutil.copy(labelled, tmp_path / "alone.html")
    page = opened(tmp_path / "alone.html", f"#latent={GRANDCHILD}")
    assert set(page.locator("#examples .peak").all_text_contents()) == {" 🦊👩‍👩‍👧"}
    page.get_by_role("link", name="Texts").click()
    expect(page.locator("#tokens .token")).to_have_count(CONTEXT - 1)
    assert not (labelled.parent / "data").exists()


def test_the_change_of_the_loss(labelled, odd, opened):
    shown = opened(labelled, f"#latent={CHILD}").locator("#ablation")
    expect(shown).to_contain_text("the loss of the text that follows by −0.25 nats")
    expect(opened(labelled, f"#latent={DEAD}").locator("#ablation")).to_have_count(0)
    expect(opened(odd, f"#latent={CHILD}").locator("#ablation")).to_have_count(0)


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
    expected = codes[5].nonzero().flatten().tolist()
    tokens.nth(4).click()
    shown = page.locator("#token a.latent b")
    expect(shown).to_have_count(len(expected))
    assert sorted(map(int, shown.all_text_contents())) == expected
    page.locator("#tokens").press("ArrowRight")
    expect(page).to_have_url(re.compile("token=6"))
    expect(page.locator("#tokens")).to_be_focused()
    page.get_by_role("button", name="level 3").click()
    expect(page.get_by_role("button", name="level 3")).to_have_attribute("aria-pressed", "true")
    assert page.locator(".levels-added").count() == 2


@pytest.mark.parametrize(
    ("latent", "message"),
    [(DEAD, "Dead: it fires on none"), (DENSE, "Dense: it fires on more than a tenth")],
)
def test_warnings(latent, message, odd, opened):
    expect(opened(odd, f"#latent={latent}").locator(".warning")).to_contain_text(message)


def test_a_thousand_latents(thousand, opened):
    page = opened(thousand)
    page.get_by_label("all latents").check()
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


def test_the_forest_is_sorted_by_variety(thousand, opened):
    page = opened(thousand)  # latent n + 10 is a child of n % 10
    variety = page.evaluate(
        """() => {
          index.fired = index.fired.map((n, latent) => (latent === 2 ? n : Math.min(n, 200)));
          index.distinct = index.fired.map((_, n) => n > 9 && n % 10 === 2 || n === 21 || n === 31);
          prepareForest();
          return Array.from(variety.slice(0, 4));
        }"""
    )
    assert [int(value) for value in variety] == [0, 2, 0, 0]  # latent 2 is dense


def test_no_edge(none, opened):
    page = opened(none)
    expect(page.get_by_role("status")).to_contain_text("No edge passed the tests")
    expect(page.locator("#about")).to_contain_text("This SAE has no levels")
    page.get_by_label("all latents").check()
    row(page, 3).click()
    expect(page.locator("#family")).to_contain_text("No edge to or from this latent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(scheme, odd, opened):
    page = opened(odd, viewport={"width": 375, "height": 700}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    expect(page.locator("#about")).to_contain_text("Start here")
    page.get_by_role("link", name="Forest").click()
    row(page, PARENT).click()
    expect(page.locator("h2")).to_contain_text(f"Latent {PARENT}")
    expect(page.locator("#forest")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == (scheme == "dark")
    page.get_by_role("link", name="back").click()
    expect(row(page, PARENT)).to_be_visible()
    row(page, PARENT).click()
    page.get_by_role("link", name="Texts").click()
    expect(page.locator("#tokens")).to_be_visible()


def test_a_missing_file_is_named(none, browser, tmp_path):
    shutil.copytree(none.parent, tmp_path / "copy")
    (tmp_path / "copy/data/latents-0.js").unlink()
    page = browser.new_page()
    page.goto((tmp_path / "copy/index.html").as_uri() + "#latent=3")
    expect(page.locator("#right .warning")).to_contain_text("data/latents-0.js can't be read")
    page.close()
