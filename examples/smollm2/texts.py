"""English texts from Debian packages, cleaned of markup: one document per entry or page."""

import gzip
import html.parser
import random
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MAX_CHARACTERS = 7_000_000  # of a source
MAX_DOCUMENT = 200_000  # characters
MIN_DOCUMENT = 40
HELD_OUT = 0.05  # of the characters of each source

_DIGITS = {
    c: i
    for i, c in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")
}
_BLOCKS = re.compile("p|div|li|dt|dd|pre|tr|td|th|br|hr|h[1-6]|blockquote")
_SKIPPED_TAGS = {"head", "script", "style", "nav"}
# classes and ids of what surrounds the text
_SKIPPED_NAMES = {"related", "sphinxsidebar", "navheader", "navfooter", "docnav"}
_SKIPPED_NAMES |= {"toc", "headerlink", "banner", "footer"}
# what GCIDE writes behind each paragraph: where it is from
_ORIGIN = re.compile(
    r"\s*\[(?:1913 Webster|Webster 1913 Suppl\.|WordNet[^]]*|Century Dict[^]]*|PJC|\+\w+)"
    r"(?: ?\+ ?\w+)*\]"
)


class Source(NamedTuple):
    """A Debian package and how its files are read."""

    name: str
    package: str
    files: str  # pattern of the files inside the package
    read: Callable[[Path], Iterator[str]]


def read_dictionary(index: Path) -> Iterator[str]:
    """The entries of a dictionary in dictd's format, whose index is this file."""
    data = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    spans: dict[tuple[int, int], None] = {}  # several headwords can share an entry
    for line in index.read_text(encoding="utf-8").splitlines():
        headword, start, length, *_ = line.split("\t")
        if not headword.startswith(("00-database", "00database")):
            spans[_number(start), _number(length)] = None
    for start, length in spans:
        yield clean_entry(data[start : start + length].decode(errors="replace"))


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def clean_entry(text: str) -> str:
    """A dictionary's entry, a line per paragraph, without pronunciation, links and origins."""
    *paragraphs, rest = _ORIGIN.split(text)
    if not paragraphs or "." in rest:  # else the next headword, which GCIDE lets trail behind
        paragraphs.append(rest)
    text = "\n\n".join(paragraphs)
    text = re.sub(r"\s*\\[^\\]*\\", "", text)  # Spurt \Spurt\
    text = re.sub(r"\s*\([^()]*\[[^]\s]{2,4}\][^()]*\)", "", text)  # (sp[^u]rt)
    text = re.sub(r"\[[^]\w\s]([A-Za-z]{1,2})\]", r"\1", text)  # [=a]lfr
    text = re.sub(r"(?m)^\s*/[^/\n]*/, ", " ", text)  # /jag'eez/, n.
    text = re.sub(r"\s*\{?\(https?:[^)]*\)\}?\.?|\s*\(\d{4}-\d\d-\d\d\)", "", text)
    text = re.sub(r"(?m)^(\s*(?:\d+\.\s+)?)<[^<>]+>", r"\1", text)  # <networking>
    text = re.sub(r"[{}]", "", text)
    return "\n".join(filter(None, (" ".join(part.split()) for part in text.split("\n\n"))))


def read_page(page: Path) -> Iterator[str]:
    """The text of an HTML page."""
    yield clean_html(page.read_text(encoding="utf-8", errors="replace"))


def clean_html(text: str) -> str:
    """The text of an HTML page without navigation: a line per block, code as it stands."""
    parser = _PageText()
    parser.feed(text)
    parser.close()
    lines = (re.sub(r"^ (?=\S)", "", line.rstrip()) for line in "".join(parser.pieces).split("\n"))
    return "\n".join(filter(None, lines))


class _PageText(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipped: str | None = None  # the tag that is skipped, up to its end
        self._depth = 0  # of that tag
        self._in_code = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped is None:
            names = {*(dict(attrs).get("class") or "").split(), dict(attrs).get("id")}
            if tag in _SKIPPED_TAGS or names & _SKIPPED_NAMES:
                self._skipped = tag
            elif _BLOCKS.fullmatch(tag):
                self.pieces.append("\n")
        self._depth += tag == self._skipped
        self._in_code |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipped:
            self._depth -= 1
            if self._depth == 0:
                self._skipped = None
        elif _BLOCKS.fullmatch(tag):
            self.pieces.append("\n")
        if tag == "pre":
            self._in_code = False

    def handle_data(self, data: str) -> None:
        if self._skipped is None:
            data = data.replace("\N{NO-BREAK SPACE}", " ").replace("\N{PILCROW SIGN}", "")
            self.pieces.append(data if self._in_code else re.sub(r"\s+", " ", data))


def read_fortunes(file: Path) -> Iterator[str]:
    """The sayings of a file of `fortune`."""
    text = re.sub(".\b", "", file.read_text(encoding="utf-8", errors="replace"))
    for saying in text.expandtabs(4).split("\n%\n"):
        yield "\n".join(filter(None, (line.rstrip() for line in saying.split("\n"))))


# python3-doc and postgresql-doc depend on the package of the current version
SOURCES = (
    Source("gcide", "dict-gcide", "usr/share/dictd/gcide.index", read_dictionary),
    Source("wordnet", "dict-wn", "usr/share/dictd/wn.index", read_dictionary),
    Source("foldoc", "dict-foldoc", "usr/share/dictd/foldoc.index", read_dictionary),
    Source("jargon", "dict-jargon", "usr/share/dictd/jargon.index", read_dictionary),
    Source("python", "python3-doc", "usr/share/doc/python3*/html/*/**/*.html", read_page),
    Source("postgresql", "postgresql-doc", "usr/share/doc/postgresql-doc-*/html/*.html", read_page),
    Source("git", "git-doc", "usr/share/doc/git-doc/**/*.html", read_page),
    Source("reference", "debian-reference-en", "usr/share/debian-reference/*.html", read_page),
    Source(
        "handbook", "debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", read_page
    ),
    Source("fortunes", "fortunes", "usr/share/games/fortunes/*[!8t]", read_fortunes),
)


def read_source(source: Source, root: Path) -> list[str]:
    """The documents of an unpacked package, each once, in the order of its files."""
    documents: dict[str, None] = {}
    for path in sorted(root.glob(source.files)):
        for document in source.read(path):
            if len(document) > MAX_DOCUMENT:
                document = document[:MAX_DOCUMENT].rpartition("\n")[0]
            if len(document) >= MIN_DOCUMENT:
                documents[document] = None
    return list(documents)


def split_documents(
    documents: list[str], seed: int, max_characters: int = MAX_CHARACTERS
) -> tuple[list[str], list[str]]:
    """Shuffle documents, cap them, and hold the first ones out.

    Returns:
        The documents to train on, and those held out: whole documents, at least one if there are
        two, until they have `HELD_OUT` of the characters.
    """
    order = random.Random(seed).sample(documents, len(documents))
    kept, n_characters = [], 0
    for document in order:
        if n_characters >= max_characters:
            break
        kept.append(document)
        n_characters += len(document)
    n_held_out, missing = 0, HELD_OUT * n_characters
    while missing > 0 and n_held_out < len(kept) - 1:
        missing -= len(kept[n_held_out])
        n_held_out += 1
    return kept[n_held_out:], kept[:n_held_out]
