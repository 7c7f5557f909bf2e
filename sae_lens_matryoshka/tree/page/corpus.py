"""The texts of what was gathered, and the tokens around those where a latent fires."""

import numpy as np
from jaxtyping import Float, Int

from sae_lens_matryoshka.tree.examples import Examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.page.tokens import TextOf, naming_words

BEFORE, AFTER = 18, 8  # tokens shown around one


class Corpus:
    """All texts, in memory: 16 bytes per token.

    Attributes:
        contexts: Token ids, (n_contexts, context).
        place_of_row: Place in `contexts`, flattened, of each token that the SAE was run on.
        row_at_place: The reverse; −1 where the SAE was not run.

    Args:
        gathered: With texts; see `Gathered.has_tokens`.
    """

    def __init__(self, gathered: Gathered):
        shards = range(len(gathered.index.shards))
        texts = [gathered.tokens(i) for i in shards]
        firsts = np.cumsum([0, *(text.size for text in texts)])
        self.contexts: Int[np.ndarray, "n_contexts context"] = np.concatenate(texts)
        self.place_of_row = np.concatenate([gathered.positions(i) + firsts[i] for i in shards])
        self.row_at_place = np.full(self.contexts.size, -1)
        self.row_at_place[self.place_of_row] = np.arange(len(self.place_of_row))

    def ids(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The token ids of rows."""
        return self.contexts.reshape(-1)[self.place_of_row[rows]]

    def windows(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n width"]:
        """The places of the tokens around rows; −1 beyond the ends of their contexts."""
        places = self.place_of_row[rows][:, None] + np.arange(-BEFORE, AFTER + 1)
        length = self.contexts.shape[1]
        own = (self.place_of_row[rows] // length)[:, None]
        return np.where((places >= 0) & (places // length == own), places, -1)


def words_of_latents(corpus: Corpus, examples: Examples, text_of: TextOf) -> list[list[str]]:
    """What each latent is called: the most frequent tokens among its examples."""
    words = []
    for top, quantiles in zip(examples.top_tokens, examples.quantile_tokens, strict=True):
        rows = np.concatenate([top, quantiles.reshape(-1)])
        words.append(naming_words(corpus.ids(rows[rows >= 0]).tolist(), text_of))
    return words


class Activations:
    """One latent's activations by row, zero elsewhere, in an array that is used again."""

    def __init__(self, n_rows: int):
        self._values = np.zeros(n_rows, np.float32)
        self._rows = np.zeros(0, np.int64)

    def set(self, rows: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> None:
        """Take another latent."""
        self._values[self._rows] = 0
        self._values[rows] = values
        self._rows = rows

    def at(self, rows: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The activations on rows; 0 for row −1."""
        return np.where(rows >= 0, self._values[rows], 0)
