"""Where each latent fires: its top examples, examples from each quantile, and a histogram."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save
from tqdm.auto import tqdm

from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.util.files import atomic_file

_CODES_AT_A_TIME = 2**24


class Examples(NamedTuple):
    """Examples of all latents; missing ones are token −1 with activation 0.

    Attributes:
        top_tokens: The tokens of the largest activations, the largest first, numbered over all
            shards of what was gathered.
        top_values: The activations there.
        quantile_tokens: Tokens from each part of the activations in descending order, evenly
            spaced; the parts are equal in number.
        quantile_values: The activations there.
        histogram: Activations in bins of equal width, from 0 to the latent's largest.
    """

    top_tokens: Int[np.ndarray, "d_sae top"]
    top_values: Float[np.ndarray, "d_sae top"]
    quantile_tokens: Int[np.ndarray, "d_sae quantiles each"]
    quantile_values: Float[np.ndarray, "d_sae quantiles each"]
    histogram: Int[np.ndarray, "d_sae bins"]

    def save(self, path: Path) -> None:
        """Write a .safetensors file, whole or not at all."""
        with atomic_file(path) as unfinished:
            unfinished.write_bytes(save(self._asdict()))

    @classmethod
    def load(cls, path: Path | str) -> "Examples":
        """Read what `save` wrote."""
        return cls(**load_file(path))


class Contexts(NamedTuple):
    """Texts around tokens; beyond the ends of a context, token −1.

    Attributes:
        tokens: Token ids.
        values: A latent's activation on each; NaN where the SAE was not run.
    """

    tokens: Int[np.ndarray, "n width"]
    values: Float[np.ndarray, "n width"]


def find_examples(
    gathered: Gathered,
    n_top: int = 20,
    n_quantiles: int = 5,
    n_each: int = 4,
    n_bins: int = 40,
) -> Examples:
    """Examples of every latent, from one look at the codes, some latents at a time."""
    d_sae = gathered.d_sae
    shape = (d_sae, n_quantiles, n_each)
    top, quantiles = np.full((d_sae, n_top), -1), np.full(shape, -1)
    found = Examples(
        top,
        np.zeros(top.shape, np.float32),
        quantiles,
        np.zeros(shape, np.float32),
        np.zeros((d_sae, n_bins), np.int64),
    )
    # evenly spaced places in each part, as shares of the number of activations
    shares = (np.arange(n_quantiles * n_each) + 0.5) / (n_quantiles * n_each)
    ends = np.cumsum(gathered.counts)
    with tqdm(desc="Finding examples", total=d_sae, leave=False) as bar:
        start = 0
        while start < d_sae:
            before = ends[start - 1] if start else 0
            fitting = int(np.searchsorted(ends, before + _CODES_AT_A_TIME, side="right"))
            stop = max(start + 1, fitting)
            for latent, tokens, values in gathered.sorted_activations(start, stop):
                n = min(n_top, len(tokens))
                found.top_tokens[latent, :n], found.top_values[latent, :n] = tokens[:n], values[:n]
                places = np.unique((shares * len(tokens)).astype(np.int64), return_index=True)
                for where, source in (
                    (found.quantile_tokens, tokens),
                    (found.quantile_values, values),
                ):
                    where[latent].reshape(-1)[places[1]] = source[places[0]]
                bins = np.minimum(values / values[0] * n_bins, n_bins - 1).astype(np.int64)
                found.histogram[latent] = np.bincount(bins, minlength=n_bins)
            bar.update(stop - start)
            start = stop
    return found


def contexts_of(
    gathered: Gathered, latent: int, tokens: Int[np.ndarray, " n"], before: int, after: int
) -> Contexts:
    """The texts around tokens, and a latent's activations on them.

    Args:
        gathered: Codes and texts; see `Gathered.has_tokens`.
        latent: Whose activations.
        tokens: Numbered over all shards, as in `Examples`.
        before: How many tokens to show before each.
        after: How many after it.
    """
    shown = np.full((len(tokens), before + 1 + after), -1)
    values = np.full(shown.shape, np.nan, np.float32)
    firsts = np.cumsum([0, *(shard.n_rows for shard in gathered.index.shards)])
    fired, activations = gathered.activations_of(latent)
    shards = np.searchsorted(firsts, tokens, side="right") - 1
    for shard in np.unique(shards).tolist():
        texts, positions = gathered.tokens(shard), gathered.positions(shard)
        on_row = np.zeros(len(positions), np.float32)
        inside = (fired >= firsts[shard]) & (fired < firsts[shard + 1])
        on_row[fired[inside] - firsts[shard]] = activations[inside]
        on_text = np.full(texts.size, np.nan, np.float32)
        on_text[positions] = on_row
        length = texts.shape[1]
        for i in (shards == shard).nonzero()[0].tolist():
            place = int(positions[tokens[i] - firsts[shard]])
            offset = place % length
            first, last = max(0, offset - before), min(length, offset + after + 1)
            there = slice(place - offset + first, place - offset + last)
            here = slice(before - offset + first, before - offset + last)
            shown[i, here], values[i, here] = texts.reshape(-1)[there], on_text[there]
    return Contexts(shown, values)
