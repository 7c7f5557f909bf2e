"""`build_tree`: from an SAE and activations to its tree."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from datasets.exceptions import DatasetsError
from jaxtyping import Int
from sae_lens import SAE, ActivationsStore

from sae_lens_matryoshka.activations.index import BLOCK_ROWS
from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.tree.chance import clustering_of
from sae_lens_matryoshka.tree.coactivation import Eligible
from sae_lens_matryoshka.tree.edges import RULES, Rules, find_edges
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import as_inference, discard, gather
from sae_lens_matryoshka.tree.nearby import BLOCK
from sae_lens_matryoshka.tree.sources import (
    ModelOnTexts,
    Source,
    StoredActivations,
    rows_per_shard,
)
from sae_lens_matryoshka.tree.tree import Tree
from sae_lens_matryoshka.util.checks import checked_count, checked_number, invalid_option

MIN_FIRINGS = 20  # of a latent that is looked at
_METADATA = ("hook_name", "context_size", "prepend_bos")  # that a model's activations need


def build_tree(
    sae: SAE[Any],
    model: Any = None,
    dataset: Dataset | str | None = None,
    n_tokens: int = 1_000_000,
    activations: Any = None,
    *,
    edges: str = "tested",
    min_coverage: float = Rules.min_coverage,
    batch_size_prompts: int = 16,
    folder: Path | str | None = None,
) -> Tree:
    """Find which latents specialise which, from activations or from a model and its texts.

    Args:
        sae: Any SAE of SAELens, on the device to compute on. With level widths, a parent is of an
            inner level and a child of an outer one; without, a parent is any more frequent latent.
        model: As SAELens loads it, to run on `dataset`.
        dataset: A data set of texts or tokens, or its name.
        n_tokens: How many tokens to look at, at most.
        activations: Instead of a model and a data set: a tensor or memory-mapped array (…, d_in),
            or a path as `train --activations` takes it. Their order should be that of the texts:
            the tests look at which tokens are near each other.
        edges: "tested", or "coverage" for P(parent | child) ≥ `min_coverage` alone.
        min_coverage: Least P(parent | child) of a pair that is tested.
        batch_size_prompts: Prompts that the model runs at a time, at most.
        folder: Where to keep what is gathered (see `tree.gathered`), so that an interrupted pass
            resumes; by default a temporary folder. If the tokens are too few, it is emptied.

    Raises:
        ValueError: an option is not accepted, the activations or the data set can't be read or do
            not fit the SAE, there are too few tokens, or `folder` holds something else.
        OSError: a file can't be written.
    """
    n_tokens = checked_count("n_tokens", n_tokens)
    rules = Rules(edges, checked_number("min_coverage", min_coverage, "0 to 1", least=0, most=1))
    if edges not in RULES:
        raise invalid_option("edges", edges, " or ".join(map(repr, RULES)))
    sae = as_inference(sae)
    source: Source
    if activations is not None:
        if model is not None or dataset is not None:
            raise ValueError("activations exclude a model and a dataset: give one or the other.")
        source = StoredActivations(activations, sae)
        n_tokens = min(n_tokens, source.n_rows)
    else:
        source = _texts(sae, model, dataset, n_tokens, batch_size_prompts)
    with _folder(folder) as path:
        gathered = gather(sae, source, path, n_tokens)
        try:
            return tree_of(gathered, sae, rules)
        except TooFewTokensError:
            discard(gathered)  # no tree comes of it, and the same folder takes more tokens then
            raise


class TooFewTokensError(ValueError):
    """No pair of latents fires often enough to be tested."""


def tree_of(gathered: Gathered, sae: SAE[Any], rules: Rules | None = None) -> Tree:
    """The tree of what was gathered; see `build_tree`.

    Raises:
        TooFewTokensError: no pair of latents fires often enough.
    """
    rules = rules or Rules()
    level_of, by_level = levels_of(sae)
    latents = _latent_table(gathered, level_of)
    counts = np.where(gathered.counts >= MIN_FIRINGS, gathered.counts, 0)
    eligible = Eligible(level_of, by_level, counts)
    n_pairs = eligible.n_pairs()
    if n_pairs == 0 or len(gathered.index.shards) < 2:
        raise _too_few_tokens(gathered)
    clustering = clustering_of(gathered)
    edges = find_edges(gathered, sae.W_dec, eligible, clustering, rules)
    by_chance = find_edges(gathered, sae.W_dec, eligible, clustering, rules, shifted=True)
    passed = edges[edges["passed"]]
    latents["n_children"] = passed.groupby("parent").size().reindex(latents.index, fill_value=0)
    parents = passed[passed["strongest"]].set_index("child")["parent"]
    latents["parent"] = parents.reindex(latents.index, fill_value=-1)
    summary = {
        "n_tokens": gathered.n_tokens,
        "n_latents": gathered.d_sae,
        "n_dead": int((gathered.counts == 0).sum()),
        "n_rare": int(((gathered.counts > 0) & (counts == 0)).sum()),
        "n_looked_at": n_pairs,
        "n_tested": len(edges),
        "n_passed": len(passed),
        "n_shifted_tested": len(by_chance),
        "n_shifted_passed": int(by_chance["passed"].sum()),
    }
    settings = {
        "sae": {"d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "widths": widths_or_all(sae)},
        "source": gathered.index.settings,
        "rules": {
            **asdict(rules),
            "min_firings": MIN_FIRINGS,
            "nearby_block": BLOCK,
            "parents_by_level": by_level,
        },
    }
    return Tree(latents, edges, summary, settings)


def levels_of(sae: SAE[Any]) -> tuple[Int[np.ndarray, " d_sae"], bool]:
    """The level of each latent, and whether there are several; otherwise all are of level 0."""
    widths = widths_or_all(sae)
    return np.searchsorted(widths, np.arange(sae.cfg.d_sae), side="right"), len(widths) > 1


def widths_or_all(sae: SAE[Any]) -> list[int]:
    """The widths of the levels; for an SAE without levels its own width alone."""
    try:
        return widths_of(sae)
    except ValueError:
        return [sae.cfg.d_sae]


def _latent_table(gathered: Gathered, level_of: Int[np.ndarray, " d_sae"]) -> pd.DataFrame:
    sums, largest = np.zeros(gathered.d_sae), np.zeros(gathered.d_sae)
    for i in range(len(gathered.index.shards)):
        codes = gathered.codes(i)
        sums += codes.sum(0, dtype=np.float64)
        largest = np.maximum(largest, codes.max(0).toarray().ravel())
    counts = gathered.counts
    return pd.DataFrame(
        {
            "level": level_of,
            "n_fired": counts,
            "density": counts / gathered.n_tokens,
            "mean_activation": sums / np.maximum(counts, 1),
            "max_activation": largest,
        },
        index=pd.RangeIndex(gathered.d_sae, name="latent"),
    )


def _texts(
    sae: SAE[Any], model: Any, dataset: Dataset | str | None, n_tokens: int, n_prompts: int
) -> ModelOnTexts:
    if model is None or dataset is None:
        raise ValueError("give activations, or a model and a dataset.")
    metadata = sae.cfg.metadata
    for name in _METADATA:
        if metadata[name] is None:
            raise ValueError(
                f"the metadata of this SAE has no {name}, so its model can't be run: give "
                "activations."
            )
    if metadata.hook_name not in model.hook_dict:
        raise ValueError(f"the model has no hook {metadata.hook_name!r}.")
    # the shifted copy of the tests needs several shards, also of few tokens
    most = max(1, rows_per_shard(n_tokens, sae.cfg.d_in) // metadata.context_size)
    try:
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=dataset,
            streaming=isinstance(dataset, str) and not Path(dataset).exists(),
            store_batch_size_prompts=min(checked_count("batch_size_prompts", n_prompts), most),
            total_tokens=n_tokens,
            device=str(sae.device),
        )
    except (DatasetsError, FileNotFoundError) as error:
        raise ValueError(f"dataset={dataset!r} can't be read: {error}") from error
    return ModelOnTexts(sae, model, store, dataset if isinstance(dataset, str) else "a data set")


def _too_few_tokens(gathered: Gathered) -> TooFewTokensError:
    n_prompts = gathered.index.settings.get("prompts_per_batch", 1)
    if len(gathered.index.shards) == 1 and n_prompts > 1 and gathered.n_tokens > BLOCK_ROWS:
        return TooFewTokensError(
            f"the data set ends after {gathered.n_tokens:,} tokens, which the model read at once: "
            f"give batch_size_prompts below {n_prompts}, or n_tokens={gathered.n_tokens}."
        )
    alive = np.sort(gathered.counts[gathered.counts > 0])[::-1]
    if not len(alive):
        return TooFewTokensError(f"no latent fires on these {gathered.n_tokens:,} tokens.")
    # so many that half of the latents that fire do so often enough
    needed = max(512, int(np.ceil(MIN_FIRINGS * gathered.n_tokens / alive[len(alive) // 2])))
    return TooFewTokensError(
        f"{gathered.n_tokens:,} tokens are too few for a tree: no pair of latents fires "
        f"{MIN_FIRINGS} times each. With about {needed:,} tokens half of the latents would."
    )


@contextmanager
def _folder(folder: Path | str | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
