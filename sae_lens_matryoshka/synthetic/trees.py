"""Trees of trained SAEs, judged against the true hierarchy."""

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities
from tqdm.auto import tqdm

from sae_lens_matryoshka.levels.slicing import set_widths, widths_of
from sae_lens_matryoshka.synthetic.models import Benchmark, parents_of
from sae_lens_matryoshka.synthetic.randomness import Purpose, RandomStream
from sae_lens_matryoshka.synthetic.results import Result, result_folder
from sae_lens_matryoshka.synthetic.scores import match
from sae_lens_matryoshka.training.thresholds import calibrate_threshold
from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.building import tree_of
from sae_lens_matryoshka.tree.edges import Rules
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.sources import StoredActivations
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

RANDOM = "random"  # an SAE of random directions
_SCORES_FILE = "tree_scores.json"
_BATCH_SIZE = 2048
_COVERAGES = (0.5, 0.7, 0.9)  # of the rule that is compared with
_COLUMNS = {
    "n_edges": ("edges", 0),
    "precision": ("ancestors", 3),
    "recall": ("parents found", 3),
    "direct_precision": ("direct: precision", 3),
    "direct_recall": ("direct: recall", 3),
    "shifted": ("shifted pass", 3),
}


class TreeScore(NamedTuple):
    """Edges of one SAE by one rule, of those between latents that are matched to features.

    Attributes:
        variant: Of the SAE.
        seed: Of the SAE.
        parents: Whether parents are of an inner level or of any more frequent latent.
        rule: What the edges pass.
        n_edges: Number of edges.
        precision: Share of the edges that join a feature's ancestor and the feature.
        recall: Share of the pairs of a feature and its parent, both matched, that have an edge.
        direct_precision: Of the edges without another way from parent to child, the share that
            joins the nearest matched ancestor of a feature and the feature.
        direct_recall: Share of the pairs of a feature and its nearest matched ancestor that have
            such an edge.
        shifted: Share of the tested pairs of the shifted copy that pass.
    """

    variant: str
    seed: int
    parents: str
    rule: str
    n_edges: float
    precision: float | None
    recall: float | None
    direct_precision: float | None
    direct_recall: float | None
    shifted: float | None


def score_trees(
    benchmark: Benchmark, results: Sequence[Result], out: Path, device: str = "cpu"
) -> list[TreeScore]:
    """Build and score the trees of trained SAEs, and of a random SAE for each seed.

    Scores are kept beside each SAE; those that are there are not computed again.
    """
    scores: list[TreeScore] = []
    seeds = sorted({result.seed for result in results})
    jobs = [(RANDOM, seed) for seed in seeds] + [(r.variant, r.seed) for r in results]
    for variant, seed in tqdm(jobs, desc="Trees"):
        path = result_folder(out, variant, seed) / _SCORES_FILE
        if not path.is_file():
            model = benchmark.build(seed, device)
            with RandomStream(seed, Purpose.TREE, device).active():
                x = _samples(model, benchmark.n_scoring_samples)
                if variant == RANDOM:
                    sae: SAE[Any] = random_sae(benchmark, x)
                else:
                    sae = SAE.load_from_disk(path.parent, device=device)
            found = list(_score(sae, model, x, variant, seed))
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as unfinished:
                unfinished.write_text(json.dumps([s._asdict() for s in found], indent=1) + "\n")
        scores += [TreeScore(**values) for values in json.loads(path.read_text())]
    return scores


def write_tree_report(scores: Sequence[TreeScore], out: Path) -> list[str]:
    """Write `tree.md` and `tree.csv`; returns their names."""
    with atomic_file(out / "tree.md") as path:
        path.write_text(tree_table(scores) + "\n")
    with atomic_file(out / "tree.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, TreeScore._fields)
        writer.writeheader()
        writer.writerows(score._asdict() for score in scores)
    return ["tree.md", "tree.csv"]


def tree_table(scores: Sequence[TreeScore]) -> str:
    """Means and standard deviations over seeds, a row for each variant, parents and rule."""
    groups: dict[tuple[str, str, str], list[TreeScore]] = {}
    for score in scores:
        groups.setdefault((score.variant, score.parents, score.rule), []).append(score)
    rows = []
    for key, group in groups.items():
        cells = []
        for name, (_, digits) in _COLUMNS.items():
            values = [v for score in group if (v := getattr(score, name)) is not None]
            cell = f"{statistics.fmean(values):.{digits}f}" if values else ""
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(cell)
        rows.append([*key, *cells, str(len(group))])
    titles = ["variant", "parents by", "rule", *(title for title, _ in _COLUMNS.values()), "n"]
    return markdown_table(titles, rows, n_text=3)


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


def _samples(model: SyntheticModel, n: int) -> Float[torch.Tensor, "n d_in"]:
    sizes = [min(_BATCH_SIZE, n - start) for start in range(0, n, _BATCH_SIZE)]
    return torch.cat([model.sample(size) for size in sizes])


def _score(
    sae: SAE[Any], model: SyntheticModel, x: torch.Tensor, variant: str, seed: int
) -> Iterator[TreeScore]:
    cosines = cosine_similarities(sae.W_dec, model.feature_dict.feature_vectors).detach()
    latents, features = match(cosines)
    is_close = cosines[latents, features].abs() >= 0.5
    feature_of = np.full(len(cosines), -1)
    feature_of[latents[is_close].cpu().numpy()] = features[is_close].cpu().numpy()
    parent_of = parents_of(model).numpy()
    width = sae.cfg.d_sae
    by = {"frequency": [width], "level": _widths(sae)}
    with TemporaryDirectory() as folder:
        gathered = gather(sae, StoredActivations(x, sae), Path(folder), len(x))
        for parents, widths in by.items():
            if parents == "level" and len(widths) == 1:
                continue
            set_widths(sae, widths)
            tree = tree_of(gathered, sae, Rules(min_coverage=min(_COVERAGES)))
            for rule, edges in rules_of(tree).items():
                shifted = None
                if rule == "tested" and tree.summary["n_shifted_tested"]:
                    shifted = tree.summary["n_shifted_passed"] / tree.summary["n_shifted_tested"]
                values = compare(edges, feature_of, parent_of)
                yield TreeScore(variant, seed, parents, rule, **values, shifted=shifted)


def rules_of(tree: Tree) -> dict[str, pd.DataFrame]:
    """The edges of a tree by the plain rule at several coverages, and those that are tested."""
    edges = tree.edges[["parent", "child", "coverage", "passed"]]
    rules = {f"coverage {c}": edges[edges["coverage"] >= c] for c in _COVERAGES}
    return {**rules, "tested": edges[edges["passed"]]}


def compare(
    edges: pd.DataFrame,
    feature_of: Int[np.ndarray, " d_sae"],
    parent_of: Int[np.ndarray, " n_features"],
) -> dict[str, Any]:
    """Compare edges with the true hierarchy; `TreeScore` says how.

    Args:
        edges: Their `parent` and `child`, latents.
        feature_of: The feature of each latent, −1 if it is matched to none.
        parent_of: The parent of each feature, −1 if it has none.
    """
    pairs = feature_of[edges[["parent", "child"]].to_numpy(dtype=int)]
    found = {(int(a), int(b)) for a, b in pairs[(pairs >= 0).all(1)]}
    matched = {int(feature) for feature in feature_of if feature >= 0}
    ancestors = {feature: _ancestors(feature, parent_of) for feature in matched}
    true_parents = {(a[0], f) for f, a in ancestors.items() if a and a[0] in matched}
    nearest = {
        (next(p for p in a if p in matched), f) for f, a in ancestors.items() if matched & {*a}
    }
    children: dict[int, set[int]] = {}
    for parent, child in found:
        children.setdefault(parent, set()).add(child)
    direct = {
        (parent, child)
        for parent, child in found
        if not any(child in children.get(other, ()) for other in children[parent] - {child})
    }
    return {
        "n_edges": float(len(found)),
        "precision": _share(sum(p in ancestors[c] for p, c in found), len(found)),
        "recall": _share(len(found & true_parents), len(true_parents)),
        "direct_precision": _share(len(direct & nearest), len(direct)),
        "direct_recall": _share(len(direct & nearest), len(nearest)),
    }


def _ancestors(feature: int, parent_of: Int[np.ndarray, " n_features"]) -> list[int]:
    """The parent of a feature, its parent, and so on."""
    found = []
    while (feature := int(parent_of[feature])) >= 0:
        found.append(feature)
    return found


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _widths(sae: SAE[Any]) -> list[int]:
    try:
        return widths_of(sae)
    except ValueError:
        return [sae.cfg.d_sae]
