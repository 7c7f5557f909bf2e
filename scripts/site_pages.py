"""Hook of MkDocs: pages from files outside docs/, and links that lead out of docs/.

A link from a page to a file of the repository becomes one to `repo_url` in mkdocs.yml. Where that
is not set, the label and the file's path remain, without a link. A link to a file that does not
exist stays as it is, so that `mkdocs build --strict` reports it.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# pages whose text is a file at the root of the repository
PAGES = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_BRANCH = "main"
_LINK = re.compile(r"\[(?P<label>[^][]+)\]\((?P<path>[^():#\s]+)(?P<anchor>#[^)\s]+)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `PAGES`."""
    # tests of the links run without MkDocs
    from mkdocs.structure.files import File

    for uri, name in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make every link of a page one that the site can follow."""
    return relinked(markdown, Path(page.file.abs_src_path), page.file.src_uri, config.repo_url)


def relinked(markdown: str, source: Path, uri: str, repo_url: str | None) -> str:
    """The text of a page, with links to files of the repository rewritten.

    Args:
        markdown: The text.
        source: The file that it is from, whose folder links start from.
        uri: The page in the site, relative to docs/.
        repo_url: Address of the repository, or None.
    """

    def link(match: re.Match[str]) -> str:
        path = (source.parent / match["path"]).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]
        label, anchor = match["label"], match["anchor"] or ""
        in_site = _uri_of(path)
        if in_site is not None:
            return f"[{label}]({os.path.relpath(in_site, os.path.dirname(uri) or '.')}{anchor})"
        name = path.relative_to(ROOT).as_posix()
        if repo_url is None:
            return f"`{name}`" if name.endswith(label) else f"{label} (`{name}`)"
        return f"[{label}]({repo_url.rstrip('/')}/blob/{_BRANCH}/{name}{anchor})"

    return _LINK.sub(link, markdown)


def _uri_of(path: Path) -> str | None:
    """Where a file is in the site, relative to docs/; None if it is not part of it."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return next((uri for uri, name in PAGES.items() if path == ROOT / name), None)
