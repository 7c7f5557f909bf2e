"""What the page shows of each latent, in files of some latents that it loads on demand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_lens_matryoshka.tree.examples import Examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.page.corpus import BEFORE, Activations, Corpus
from sae_lens_matryoshka.tree.page.numbers import rounded
from sae_lens_matryoshka.tree.page.relations import Relations
from sae_lens_matryoshka.tree.page.tokens import TokenTexts
from sae_lens_matryoshka.tree.page.weights import LogitLens, Nearest
from sae_lens_matryoshka.tree.tree import Tree

CHUNK = 64  # latents of a file
_N_TOP, _N_OF_QUANTILE, _N_IN_EVIDENCE = 12, 3, 3  # examples that are shown


@dataclass
class Words:
    """The texts of a file, each once, so that its examples can name them by numbers."""

    texts: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        """The number of a text."""
        if text not in self.places:
            self.places[text] = len(self.texts)
            self.texts.append(text)
        return self.places[text]


@dataclass(frozen=True)
class Details:
    """Where the details of latents come from.

    Attributes:
        tree: Latents and edges.
        gathered: Codes.
        examples: Of the same codes.
        neighbours: By decoder cosine.
        lens: Promoted tokens, if the model is known.
        corpus: The texts, if there are any.
        text_of: The texts of token ids.
        ablation: Change of the loss if a latent is ablated, if it was measured; see
            `tree.ablation`.
    """

    tree: Tree
    gathered: Gathered
    examples: Examples
    neighbours: Nearest
    lens: LogitLens | None
    corpus: Corpus | None
    text_of: TokenTexts
    ablation: Float[np.ndarray, " d_sae"] | None = None

    def files(self) -> Iterator[dict[str, Any]]:
        """The files' contents, of `CHUNK` latents each."""
        relations = Relations(self.tree.edges)
        activations = Activations(self.gathered.n_tokens)
        parent_of = self.tree.latents["parent"].tolist()
        # children of a parent lie in many files
        rows_of = lru_cache(maxsize=256)(lambda latent: self.gathered.activations_of(latent)[0])
        numbers = {
            name: self.tree.latents[name].tolist() for name in ("mean_activation", "max_activation")
        }
        for start in range(0, len(self.tree.latents), CHUNK):
            stop = min(start + CHUNK, len(self.tree.latents))
            words = Words()
            latents = [self._of_weights(latent, words) for latent in range(start, stop)]
            for latent, detail in enumerate(latents, start):
                detail["mean"], detail["max"] = (
                    rounded(column[latent]) for column in numbers.values()
                )
                detail["parents"] = relations.parents.get(latent, [])
                detail["children"] = relations.children.get(latent, [])
                if self.ablation is not None:
                    detail["ablation"] = rounded(float(self.ablation[latent]))
                detail["histogram"] = self.examples.histogram[latent].tolist()
                detail["top"], detail["quantiles"] = [], []
            for latent, rows, values in self.gathered.sorted_activations(start, stop):
                activations.set(rows, values)
                detail = latents[latent - start]
                detail["top"] = self._shown(
                    self.examples.top_tokens[latent], activations, words, _N_TOP
                )
                if parent_of[latent] >= 0:
                    self._add_parent(detail["top"], rows_of(parent_of[latent]))
                detail["quantiles"] = [
                    self._shown(of_quantile, activations, words, _N_OF_QUANTILE)
                    for of_quantile in self.examples.quantile_tokens[latent]
                ]
            yield {"words": words.texts, "latents": latents}

    def _of_weights(self, latent: int, words: Words) -> dict[str, Any]:
        def tokens(nearest: Nearest) -> list[list[Any]]:
            texts = (words(self.text_of(token)) for token in nearest.indices[latent].tolist())
            return [
                [w, round(v, 1)]
                for w, v in zip(texts, nearest.values[latent].tolist(), strict=True)
            ]

        near = zip(
            self.neighbours.indices[latent].tolist(),
            self.neighbours.values[latent].tolist(),
            strict=True,
        )
        return {
            "neighbours": [[other, round(cosine, 2)] for other, cosine in near],
            "promoted": tokens(self.lens.promoted) if self.lens else [],
            "suppressed": tokens(self.lens.suppressed) if self.lens else [],
        }

    def _add_parent(self, shown: list[list[Any]], fires: Int[np.ndarray, " n"]) -> None:
        """Add to the first examples, those of the evidence, the places where the parent fires."""
        if self.corpus is None:
            return
        shown = shown[:_N_IN_EVIDENCE]
        windows = self.corpus.windows(np.array([row for row, *_ in shown]))
        run = self.corpus.row_at_place[windows]
        both = (windows >= 0) & np.isin(run, fires)
        for example, places, own in zip(shown, windows, both, strict=True):
            first = int((places >= 0).argmax())
            example.append((own.nonzero()[0] - first).tolist())

    def _shown(
        self,
        rows: Int[np.ndarray, " n"],
        activations: Activations,
        words: Callable[[str], int],
        n_most: int,
    ) -> list[list[Any]]:
        """Examples: row, place of its token among the words, words, and flat place, activation, ….

        Texts that occur twice are shown once. Without texts there are no words.
        """
        rows = rows[rows >= 0]
        if self.corpus is None:
            rows = rows[:n_most]
            values = activations.at(rows)
            return [
                [row, 0, [], [0, rounded(v)]]
                for row, v in zip(rows.tolist(), values.tolist(), strict=True)
            ]
        shown, seen = [], set()
        windows = self.corpus.windows(rows)
        ids = self.corpus.contexts.reshape(-1)[windows]
        run = self.corpus.row_at_place[windows]
        fired = activations.at(np.where(windows >= 0, run, -1))
        for row, places, own, values in zip(rows.tolist(), windows, ids, fired, strict=True):
            inside = (places >= 0).nonzero()[0]
            first, last = int(inside[0]), int(inside[-1]) + 1
            key = tuple(own[first:last].tolist())
            if key in seen:
                continue
            seen.add(key)
            flat = [
                number
                for place in values.nonzero()[0].tolist()
                for number in (place - first, rounded(float(values[place])))
            ]
            shown.append([row, BEFORE - first, list(map(words, self.text_of.of(key))), flat])
            if len(shown) == n_most:
                break
        return shown
