"""The page: a folder to open in a browser, without a server and without a network."""

from sae_lens_matryoshka.tree.page.writing import write_page

__all__ = ["write_page"]
