"""The hook of the documentation site rewrites links to files of the repository."""

from pathlib import Path

import pytest

from scripts.site_pages import DOCS, ROOT, relinked

URL = "https://example.org/ann/saes/"


@pytest.mark.parametrize(
    ("source", "uri", "link", "expected"),
    [
        # between pages
        (DOCS / "tree.md", "tree.md", "[a](levels.md#formats)", "[a](levels.md#formats)"),
        (DOCS / "results/toy.md", "results/toy.md", "[a](../gpu.md)", "[a](../gpu.md)"),
        # from a page outside docs/
        (ROOT / "CHANGELOG.md", "changes.md", "[a](docs/gpu.md#b)", "[a](gpu.md#b)"),
        (
            DOCS / "results/toy.md",
            "results/toy.md",
            "[a](../../CHANGELOG.md)",
            "[a](../changes.md)",
        ),
        # to files that are no pages
        (
            DOCS / "results/toy.md",
            "results/toy.md",
            "[a](../../tests/peers)",
            "[a](https://example.org/ann/saes/blob/main/tests/peers)",
        ),
        (ROOT / "CHANGELOG.md", "changes.md", "[a](LICENSE)", f"[a]({URL}blob/main/LICENSE)"),
        # what MkDocs has to check itself
        (DOCS / "tree.md", "tree.md", "[a](../no/such.py)", "[a](../no/such.py)"),
        (DOCS / "tree.md", "tree.md", "[a](https://b.org/c.md)", "[a](https://b.org/c.md)"),
        (DOCS / "tree.md", "tree.md", "[a](#page)", "[a](#page)"),
    ],
)
def test_links(source: Path, uri: str, link: str, expected: str) -> None:
    text = "See {}, or\n`code`."
    assert relinked(text.format(link), source, uri, URL) == text.format(expected)


def test_without_a_repository_the_path_remains() -> None:
    text = "[a](../tests/peers), [peers](../tests/peers) and [levels](levels.md)"
    expected = "a (`tests/peers`), `tests/peers` and [levels](levels.md)"
    assert relinked(text, DOCS / "tree.md", "tree.md", None) == expected
