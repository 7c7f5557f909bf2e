"""Trees of trained SAEs, judged against the true hierarchy."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.synthetic import SyntheticModel
from tqdm.auto import tqdm

from sae_lens_matryoshka.levels.slicing import set_widths
from sae_lens_matryoshka.synthetic.hierarchy import compare, truth_of
from sae_lens_matryoshka.synthetic.models import Benchmark
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.results import Result, result_folder
from sae_lens_matryoshka.training.thresholds import calibrate_threshold
from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.building import tree_of, widths_or_all
from sae_lens_matryoshka.tree.edges import Rules, direct, strongest
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.sources import StoredActivations
from sae_lens_matryoshka.util.files import atomic_file

RANDOM = "random"  # an SAE of random directions
TESTED = "tested"
MIN_COSINES = (0.5, 0.7)  # as the other scores; a feature that is half of the row's squared norm
_SCORES_FILE = "tree_scores.json"
_BATCH_SIZE = 2048
_COUNTS = ("n_looked_at", "n_tested", "n_shifted_tested", "n_shifted_passed")  # of a tree's summary
_COVERAGES = (0.5, 0.7, 0.9)  # of the rule that is compared with
_RULES = Rules(min_coverage=min(_COVERAGES))


class TreeScore(NamedTuple):
    """Edges of one SAE by one rule; precision and recall are of those between matched latents.

    Attributes:
        variant: Of the SAE.
        seed: Of the SAE.
        parents: Whether parents are of an inner level or of any more frequent latent.
        rule: What the edges pass.
        min_cosine: Least absolute cosine of a latent's decoder row and the feature it stands for.
        n_edges: Number of edges.
        n_judged: Number of those between latents that are matched to features.
        precision: Share of the judged edges that join a feature's ancestor and the feature.
        recall: Share of the pairs of a feature and an ancestor, both matched, that have an edge.
        n_parents: Number of pairs of a feature and its parent, both matched.
        parents_found: Share of these that have an edge.
        direct_precision: Of the judged edges without another way over edges from parent to child,
            the share that joins the nearest matched ancestor of a feature and the feature.
        direct_recall: Share of the pairs of a feature and its nearest matched ancestor that have
            such an edge.
        strongest_precision: As `direct_precision`, of the strongest edge of each child.
        n_looked_at: Pairs of the SAE whose parent may be a parent of the child.
        n_tested, n_shifted_tested, n_shuffled_tested: Those of a coverage of at least 0.5: of the
            SAE, of the copy with the children shifted, and of the same SAE on activations whose
            coordinates were shuffled each for itself.
        n_shifted_passed, n_shuffled_passed: How many of these pass the tests.
    """

    variant: str
    seed: int
    parents: str
    rule: str
    min_cosine: float
    n_edges: int
    n_judged: int
    precision: float | None
    recall: float | None
    n_parents: int
    parents_found: float | None
    direct_precision: float | None
    direct_recall: float | None
    strongest_precision: float | None
    n_looked_at: int
    n_tested: int
    n_shifted_tested: int
    n_shifted_passed: int
    n_shuffled_tested: int
    n_shuffled_passed: int


def score_trees(
    benchmark: Benchmark, results: Sequence[Result], out: Path, device: str = "cpu"
) -> list[TreeScore]:
    """Build and score the trees of trained SAEs, and of a random SAE for each seed.

    Scores are kept beside each SAE; those that were made by the same rules are not made again.
    """
    scores: list[TreeScore] = []
    seeds = sorted({result.seed for result in results})
    jobs = [(RANDOM, seed) for seed in seeds] + [(r.variant, r.seed) for r in results]
    for variant, seed in tqdm(jobs, desc="Trees"):
        path = result_folder(out, variant, seed) / _SCORES_FILE
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get("rules") != asdict(_RULES):
            values = [s._asdict() for s in _scores(benchmark, path.parent, variant, seed, device)]
            kept = {"rules": asdict(_RULES), "scores": values}
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as unfinished:
                unfinished.write_text(json.dumps(kept, indent=1) + "\n")
        scores += [TreeScore(**values) for values in kept["scores"]]
    return scores


def random_sae(benchmark: Benchmark, x: Float[torch.Tensor, "n d_in"]) -> SAE[Any]:
    """An SAE of random directions, with the L0 and the levels of the benchmark's SAEs."""
    cfg = JumpReLUSAEConfig(
        d_in=benchmark.d_in, d_sae=benchmark.d_sae, apply_b_dec_to_input=True, device=str(x.device)
    )
    sae = JumpReLUSAE(cfg)
    rows = torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.zero_()
        sae.b_dec.copy_(x.mean(0))
    set_widths(sae, benchmark.matryoshka_widths)
    calibrate_threshold(sae, x, l0=benchmark.k)
    return sae


def rules_of(tree: Tree) -> dict[str, pd.DataFrame]:
    """The edges of a tree by the plain rule at several coverages, and those that are tested."""
    rules = {}
    for coverage in _COVERAGES:
        edges = tree.edges[tree.edges["coverage"] >= coverage].assign(passed=True)
        edges["strongest"] = strongest(edges)
        edges["direct"] = direct(edges, len(tree.latents))
        rules[f"coverage {coverage}"] = edges
    return {**rules, TESTED: tree.edges[tree.edges["passed"]]}


def _scores(
    benchmark: Benchmark, folder: Path, variant: str, seed: int, device: str
) -> Iterator[TreeScore]:
    """The scores of one SAE: with parents by frequency and, if it has levels, by level."""
    model = benchmark.build(seed, device)
    with RandomStream(seed, Purpose.TREE, device).active():
        x = _samples(model, benchmark.n_scoring_samples)
        sae: SAE[Any] = (
            random_sae(benchmark, x)
            if variant == RANDOM
            else SAE.load_from_disk(folder, device=device)
        )
        shuffled = torch.stack([column[torch.randperm(len(x))] for column in x.T], dim=1)
    truths = {cosine: truth_of(sae, model, cosine) for cosine in MIN_COSINES}
    widths = widths_or_all(sae)
    by = {"frequency": [sae.cfg.d_sae], "level": widths}
    if len(widths) == 1:
        del by["level"]
    trees, of_shuffled = _trees(sae, x, by), _trees(sae, shuffled, by)
    for parents, tree in trees.items():
        null = of_shuffled[parents].summary
        counts = {
            **{name: tree.summary[name] for name in _COUNTS},
            "n_shuffled_tested": null["n_tested"],
            "n_shuffled_passed": null["n_passed"],
        }
        for (rule, edges), (cosine, truth) in product(rules_of(tree).items(), truths.items()):
            values = compare(edges, truth)
            yield TreeScore(variant, seed, parents, rule, cosine, **values, **counts)


def _samples(model: SyntheticModel, n: int) -> Float[torch.Tensor, "n d_in"]:
    sizes = [min(_BATCH_SIZE, n - start) for start in range(0, n, _BATCH_SIZE)]
    return torch.cat([model.sample(size) for size in sizes])


def _trees(sae: SAE[Any], x: torch.Tensor, by: dict[str, list[int]]) -> dict[str, Tree]:
    """The tree for each choice of levels."""
    with TemporaryDirectory() as folder:
        gathered = gather(sae, StoredActivations(x, sae), Path(folder), len(x))
        trees = {}
        for parents, widths in by.items():
            set_widths(sae, widths)
            trees[parents] = tree_of(gathered, sae, _RULES)
        return trees
