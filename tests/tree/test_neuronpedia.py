"""What `tree --export neuronpedia` writes, read by sae-dashboard, against the tree's data."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from sae_lens import JumpReLUSAE

from sae_lens_matryoshka.tree import Tree, neuronpedia
from sae_lens_matryoshka.tree.building import tree_of
from sae_lens_matryoshka.tree.examples import Examples, find_examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.neuronpedia import description, export_neuronpedia
from sae_lens_matryoshka.tree.page.corpus import Corpus
from tests.hub.test_peers import run_peers
from tests.tree.pages import CONTEXT, HOOK, N_TOKENS, VOCABULARY, World, model
from tests.tree.worlds import CHILD, DEAD, GRANDCHILD, PARENT, WIDTHS, exact_sae


class Exported(NamedTuple):
    folder: Path
    tree: Tree
    gathered: Gathered
    examples: Examples
    sae: JumpReLUSAE
    features: list[dict[str, Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("neuronpedia")
    sae = exact_sae(8, WIDTHS)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "tiny"
    gathered = gather(sae, World(), folder / "gathered", N_TOKENS)
    tree, examples = tree_of(gathered, sae), find_examples(gathered)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "_BATCH", 3)
        out = folder / "out"
        export_neuronpedia(out, tree, gathered, examples, sae, model(), "My SAE (2)")
    features = [f for i in range(3) for f in json.loads(_text(out, i))["features"]]
    return Exported(out, tree, gathered, examples, sae, features)


def _text(folder: Path, i: int, name: str = "batch") -> str:
    return (folder / f"{name}-{i}.json").read_text()


def test_sae_dashboard_reads_it(exported: Exported) -> None:
    """Its classes accept these fields and no others, and write them again as they are."""
    run_peers("read_dashboard.py", exported.folder)
    for i in range(3):
        written = json.loads(_text(exported.folder, i))
        assert json.loads(_text(exported.folder, i, "read")) == written
        assert (written["model_id"], written["layer"]) == ("tiny", 1)
        assert (written["sae_set"], written["sae_id_suffix"]) == ("my-sae-2", None)
    assert [feature["feature_index"] for feature in exported.features] == list(range(8))


def test_values_are_those_of_the_tree(exported: Exported) -> None:
    codes = np.concatenate([exported.gathered.codes(i).toarray() for i in range(_n(exported))])
    for latent, feature in enumerate(exported.features):
        fired = codes[:, latent]
        assert feature["frac_nonzero"] == pytest.approx((fired > 0).mean())
        assert feature["n_tokens_in_prompt"] == CONTEXT
        assert feature["n_prompts_total"] == len(Corpus(exported.gathered).contexts)
        assert feature["dataset"] == "odd <b>texts</b>"
        assert feature["neuron_alignment_indices"][0] == latent
        assert feature["neuron_alignment_values"][0] == feature["neuron_alignment_l1"][0] == 1
        if latent == DEAD:
            assert feature["activations"] == feature["freq_hist_data_bar_values"] == []
            continue
        heights = exported.examples.histogram[latent]
        assert feature["freq_hist_data_bar_heights"] == heights.tolist()
        width = fired.max() / len(heights)
        middles = width * (np.arange(len(heights)) + 0.5)
        np.testing.assert_allclose(feature["freq_hist_data_bar_values"], middles, atol=1e-3)


def test_activations_are_those_of_the_texts(exported: Exported) -> None:
    corpus = Corpus(exported.gathered)
    rows = exported.examples.top_tokens[GRANDCHILD]
    activations = exported.features[GRANDCHILD]["activations"]
    top = [a for a in activations if a["bin_contains"] == -1]
    assert len(top) == len(rows)
    codes = np.concatenate([exported.gathered.codes(i).toarray() for i in range(_n(exported))])
    for row, shown in zip(rows.tolist(), top, strict=True):
        own = shown["qualifying_token_index"]
        assert shown["tokens"][own] == VOCABULARY[corpus.ids(np.array([row]))[0]]
        assert shown["values"][own] == pytest.approx(codes[row, GRANDCHILD], abs=1e-3)
        n = len(shown["tokens"])
        assert own < n == len(shown["values"]) <= CONTEXT
        assert shown["bin_max"] == pytest.approx(codes[:, GRANDCHILD].max(), abs=1e-3)
        beside = corpus.row_at_place[corpus.place_of_row[row] - own + np.arange(n)]
        expected = np.where(beside >= 0, codes[beside, GRANDCHILD], 0)
        np.testing.assert_allclose(shown["values"], expected, atol=1e-3)
    others = [a for a in activations if a["bin_contains"] != -1]
    assert sum({a["bin_min"]: a["bin_contains"] for a in others}.values()) == pytest.approx(
        exported.features[GRANDCHILD]["frac_nonzero"]
    )
    for shown in others:
        value = shown["values"][shown["qualifying_token_index"]]
        assert shown["bin_min"] <= value <= shown["bin_max"]


def test_logits_are_those_of_the_decoder(exported: Exported) -> None:
    W_U = model().W_U.detach()
    centred = exported.sae.W_dec.detach() - exported.sae.W_dec.detach().mean(1, keepdim=True)
    logits = (centred @ W_U).numpy()
    for latent, feature in enumerate(exported.features):
        order = np.argsort(logits[latent])
        expected = np.sort(logits[latent])
        np.testing.assert_allclose(feature["pos_values"], expected[::-1][:10], atol=1e-3)
        np.testing.assert_allclose(feature["neg_values"], expected[:10], atol=1e-3)
        assert feature["pos_str"][0] == VOCABULARY[order[-1]]
        assert feature["neg_str"][0] == VOCABULARY[order[0]]
        assert sum(feature["logits_hist_data_bar_heights"]) == len(VOCABULARY)
        assert len(feature["logits_hist_data_bar_values"]) == 50


def test_descriptions_name_parents_and_children(exported: Exported) -> None:
    assert description(exported.tree, DEAD) == ""
    text = (exported.folder / "explanations.jsonl").read_text()
    lines = {line["index"]: line for line in map(json.loads, text.splitlines())}
    passed = exported.tree.edges[exported.tree.edges["passed"]]
    assert set(lines) == {str(latent) for latent in {*passed["parent"], *passed["child"]}}
    children = ", ".join(map(str, exported.tree.children(PARENT)))
    assert lines["0"] == {
        "modelId": "tiny",
        "layer": "1-my-sae-2",
        "index": "0",
        "description": f"level 1; children {children}",
    }
    assert lines[str(CHILD)]["description"] == f"level 2; parents {PARENT}"


def test_an_sae_without_a_layer() -> None:
    with pytest.raises(ValueError, match=r"needs a model and a layer, .* hook_name=None"):
        neuronpedia.check_export(exact_sae(8))


def test_an_sae_of_a_layer_of_transformers() -> None:
    sae = exact_sae(8)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = "model.layers.7", "tiny"
    neuronpedia.check_export(sae)
    assert neuronpedia._layer("model.layers.7") == neuronpedia._layer("blocks.7.hook_z") == 7


def _n(exported: Exported) -> int:
    return len(exported.gathered.index.shards)
