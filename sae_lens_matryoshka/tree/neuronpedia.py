"""A tree for Neuronpedia: what sae-dashboard 0.8.0 writes for its importer, and explanations.

    batch-N.json         features 128 N to 128 N + 127, with the fields of sae-dashboard's
                         `NeuronpediaDashboardBatch`
    explanations.jsonl   a line per latent with relations, with the fields `modelId`, `layer`,
                         `index` and `description` of Neuronpedia's explanations

A batch has no field for parents, children or a description; in Neuronpedia the description of a
feature is that of its explanation.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_matryoshka.tree.examples import Examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import as_inference
from sae_lens_matryoshka.tree.page.corpus import Activations, Corpus
from sae_lens_matryoshka.tree.page.tokens import TokenTexts
from sae_lens_matryoshka.tree.page.weights import logit_blocks
from sae_lens_matryoshka.tree.tree import Tree
from sae_lens_matryoshka.util.files import atomic_folder

_BATCH = 128  # latents of a file, as Neuronpedia has them
_N_LOGITS, _N_LOGIT_BINS, _N_ALIGNED = 10, 50, 3  # as in sae-dashboard
_N_RELATIONS = 10  # named in a description
# of sae-dashboard: correlations that are not computed here, and what other kinds of SAEs have
_EMPTY = (
    *(f"correlated_{kind}" for kind in ("neurons_indices", "neurons_l1", "neurons_pearson")),
    *(f"correlated_{kind}" for kind in ("features_indices", "features_l1", "features_pearson")),
    *("decoder_weights_dist", "vector"),
)


def check_export(sae: SAE[Any]) -> None:
    """Check that Neuronpedia has a place for an SAE.

    Raises:
        ValueError: its metadata has no model, or a hook without a layer.
    """
    metadata = sae.cfg.metadata
    if metadata.model_name is None or _layer(metadata.hook_name) is None:
        raise ValueError(
            f"--export neuronpedia needs a model and a layer, and the metadata of this SAE has "
            f"model_name={metadata.model_name!r} and hook_name={metadata.hook_name!r}."
        )


def export_neuronpedia(
    folder: Path,
    tree: Tree,
    gathered: Gathered,
    examples: Examples,
    sae: SAE[Any],
    model: Any,
    name: str,
) -> None:
    """Write batches and explanations, all or nothing.

    Args:
        folder: Where to; what it holds is replaced.
        tree: The tree.
        gathered: What it was built from, with texts.
        examples: `find_examples(gathered)`.
        sae: The SAE.
        model: That was run.
        name: What the SAE is called, of which the source set's name is made.

    Raises:
        ValueError: see `check_export`.
        OSError: a file can't be written; the folder stays as it was.
    """
    check_export(sae)
    metadata = sae.cfg.metadata
    head = {
        "model_id": metadata.model_name,
        "layer": _layer(metadata.hook_name),
        "sae_set": re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"),
        "sae_id_suffix": None,
    }
    features = _features(tree, gathered, examples, as_inference(sae), model)
    with atomic_folder(folder) as unfinished:
        for i in tqdm(range(-(-gathered.d_sae // _BATCH)), desc="Neuronpedia", leave=False):
            batch = list(islice(features, _BATCH))
            _write(unfinished / f"batch-{i}.json", [{**head, "features": batch}])
        layer = f"{head['layer']}-{head['sae_set']}"
        explanations = (
            {"modelId": head["model_id"], "layer": layer, "index": str(latent), "description": text}
            for latent in range(gathered.d_sae)
            if (text := description(tree, latent))
        )
        _write(unfinished / "explanations.jsonl", explanations)


def description(tree: Tree, latent: int) -> str:
    """The level of a latent, its parents and its children; empty if it has neither."""
    named = [
        f"{title} {', '.join(map(str, others[:_N_RELATIONS]))}"
        + (f" and {len(others) - _N_RELATIONS} more" if len(others) > _N_RELATIONS else "")
        for title, others in (
            ("parents", tree.parents(latent)),
            ("children", tree.children(latent)),
        )
        if others
    ]
    if not named:
        return ""
    return "; ".join([f"level {tree.latents['level'].tolist()[latent] + 1}", *named])


def _features(
    tree: Tree, gathered: Gathered, examples: Examples, sae: SAE[Any], model: Any
) -> Iterator[dict[str, Any]]:
    corpus, text_of = Corpus(gathered), TokenTexts(getattr(model, "tokenizer", None))
    activations = Activations(gathered.n_tokens)
    blocks = logit_blocks(sae, model)
    logits = chain.from_iterable(blocks) if blocks is not None else None
    fired: dict[int, Any] = {}
    densities = tree.latents["density"].tolist()
    rows = sae.W_dec.detach().float().cpu()
    for latent in range(gathered.d_sae):
        if latent % _BATCH == 0:
            stop = min(latent + _BATCH, gathered.d_sae)
            fired = {number: rest for number, *rest in gathered.sorted_activations(latent, stop)}
        aligned = rows[latent].topk(min(_N_ALIGNED, rows.shape[1]))
        shares = aligned.values.abs() / rows[latent].abs().sum().clamp(min=1e-12)
        feature: dict[str, Any] = {
            "feature_index": latent,
            "neuron_alignment_indices": aligned.indices.tolist(),
            "neuron_alignment_values": _rounded(aligned.values),
            "neuron_alignment_l1": _rounded(shares),
            **_of_logits(next(logits) if logits is not None else None, text_of),
            "frac_nonzero": densities[latent],
            **{name: [] for name in ("freq_hist_data_bar_values", "freq_hist_data_bar_heights")},
            "n_prompts_total": len(corpus.contexts),
            "n_tokens_in_prompt": corpus.contexts.shape[1],
            "dataset": tree.settings["source"].get("dataset", ""),
            **{name: [] for name in _EMPTY},
            "activations": [],
        }
        if latent in fired:
            tokens, values = fired[latent]
            histogram = examples.histogram[latent]
            middles = (np.arange(len(histogram)) + 0.5) / len(histogram) * values[0]
            feature["freq_hist_data_bar_values"] = _rounded(middles)
            feature["freq_hist_data_bar_heights"] = histogram.tolist()
            activations.set(tokens, values)
            # of the largest ones sae-dashboard writes no bounds but the maximum
            top = {"bin_min": -1, "bin_max": round(float(values[0]), 3), "bin_contains": -1}
            shown = _shown(examples.top_tokens[latent], top, corpus, activations, text_of)
            quantiles = examples.quantile_tokens[latent]
            for part, of_part in zip(
                quantiles, np.array_split(values, len(quantiles)), strict=True
            ):
                if len(of_part):
                    bounds = {
                        "bin_min": round(float(of_part[-1]), 3),
                        "bin_max": round(float(of_part[0]), 3),
                        "bin_contains": len(of_part) / gathered.n_tokens,
                    }
                    shown += _shown(part, bounds, corpus, activations, text_of)
            feature["activations"] = shown
        yield feature


def _of_logits(
    logits: Float[torch.Tensor, " vocabulary"] | None, text_of: TokenTexts
) -> dict[str, list[Any]]:
    """Promoted and suppressed tokens, and a histogram of all; empty without logits."""
    names = ("neg_str", "neg_values", "pos_str", "pos_values")
    bars = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")
    if logits is None:
        return {name: [] for name in (*names, *bars)}
    k = min(_N_LOGITS, len(logits))
    lists: list[list[Any]] = []
    for is_largest in (False, True):
        found = logits.topk(k, largest=is_largest)
        lists += [[text_of(token) for token in found.indices.tolist()], _rounded(found.values)]
    heights, edges = np.histogram(logits.cpu().numpy(), _N_LOGIT_BINS)
    lists += [heights.tolist(), _rounded((edges[1:] + edges[:-1]) / 2)]
    return dict(zip((*names, *bars), lists, strict=True))


def _shown(
    rows: Int[np.ndarray, " n"],
    bounds: dict[str, float],
    corpus: Corpus,
    activations: Activations,
    text_of: TokenTexts,
) -> list[dict[str, Any]]:
    """The texts around rows, with a latent's activation on each token."""
    rows = rows[rows >= 0]
    ids = corpus.contexts.reshape(-1)
    shown = []
    for row, places in zip(rows.tolist(), corpus.windows(rows), strict=True):
        inside = places[places >= 0]
        values = activations.at(corpus.row_at_place[inside])
        own = int((inside == corpus.place_of_row[row]).argmax())
        shown.append(
            {
                **bounds,
                "tokens": text_of.of(ids[inside].tolist()),
                "values": _rounded(values),
                "qualifying_token_index": own,
            }
        )
    return shown


def _layer(hook_name: str | None) -> int | None:
    found = re.search(
        r"\.(\d+)(?:\.|$)", hook_name or ""
    )  # blocks.7.hook_resid_post, model.layers.7
    return int(found[1]) if found else None


def _rounded(values: Any) -> list[float]:
    """With three decimals, as sae-dashboard rounds."""
    return [round(float(value), 3) for value in values]


def _write(path: Path, values: Any) -> None:
    """A line of JSON for each value."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, allow_nan=False) + "\n" for value in values)
