"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], n_text: int = 1) -> str:
    """A Markdown table.

    Args:
        titles: Titles of the columns.
        rows: The cells of each row.
        n_text: Number of text columns, aligned left; the numbers after them are aligned right.
    """
    alignment = "|" + "---|" * n_text + "---:|" * (len(titles) - n_text)
    head, *body = ("| " + " | ".join(cells) + " |" for cells in (titles, *rows))
    return "\n".join([head, alignment, *body])
