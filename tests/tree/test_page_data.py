"""What the page's files hold."""

import json

import numpy as np
import pytest
import torch

from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.page import write_page
from sae_lens_matryoshka.tree.page.corpus import Corpus
from sae_lens_matryoshka.tree.page.weights import logit_lens, neighbours
from tests.tree.pages import HOOK, model
from tests.tree.worlds import CHILD, GRANDCHILD, PARENT, exact_sae


def test_what_each_level_explains(odd, sae):
    text = json.loads((odd.parent / "data/text-0.js").read_text()[len('receive("text-0",') : -2])
    gathered = Gathered(odd.parent / "gathered")
    ids = torch.tensor(gathered.tokens(0)[0]).long()
    mean = torch.from_numpy(gathered.sums["total"] / gathered.n_tokens).float()
    with torch.no_grad():
        x = model().run_with_cache(ids[None])[1][HOOK][0][1:]
        codes, W_dec = sae.encode(x), sae.W_dec.detach()
    for level, width in enumerate([1, 2, 8]):
        error = (codes[:, :width] @ W_dec[:width] - x).square().sum(1)
        shares = 1 - error / (x - mean).square().sum(1)
        found = [shares_of_token[level] for shares_of_token in text["explained"][1:]]
        np.testing.assert_allclose(found, shares, rtol=0.01, atol=1e-3)
        total = 1 - error.sum() / (x - mean).square().sum()
        assert text["total"][level] == pytest.approx(float(total), rel=0.01, abs=1e-3)
    assert text["explained"][0] is text["latents"][0] is None


def test_examples_say_where_the_parent_fires(odd):
    file = (odd.parent / "data/latents-0.js").read_text()
    latents = json.loads(file[len('receive("latents-0",') : -2])["latents"]
    corpus = Corpus(Gathered(odd.parent / "gathered"))
    fires, _ = Gathered(odd.parent / "gathered").activations_of(CHILD)
    places = set(corpus.place_of_row[fires].tolist())
    for row, peak, words, _, marked in latents[GRANDCHILD]["top"][:3]:
        first = int(corpus.place_of_row[row]) - peak
        assert marked == [i for i in range(len(words)) if first + i in places]
        assert peak in marked
    assert all(len(example) == 4 for example in latents[PARENT]["top"])


def test_a_failed_page_leaves_the_earlier_one(none, monkeypatch):
    before = {path: path.read_bytes() for path in none.parent.rglob("*") if path.is_file()}
    gathered = Gathered(none.parent / "gathered")
    tree = Tree.load(none.parent / "tree.json")
    examples = find_examples(gathered)
    monkeypatch.setattr(Gathered, "sorted_activations", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(none.parent, tree, gathered, examples, exact_sae(8), name="another")
    assert before == {path: path.read_bytes() for path in none.parent.rglob("*") if path.is_file()}


def test_logit_lens_and_neighbours(sae):
    own = model()
    lens = logit_lens(sae, own, n=3)
    assert lens is not None
    rows = sae.W_dec - sae.W_dec.mean(1, keepdim=True)
    logits = (rows * own.ln_final.w) @ own.W_U
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    torch.testing.assert_close(lens.promoted.values, z.sort(1, descending=True).values[:, :3])
    torch.testing.assert_close(lens.suppressed.indices, z.argsort(1)[:, :3])
    W_dec = torch.tensor([[1.0, 0], [2, 0.2], [-1, 0], [0, 1]])
    near = neighbours(W_dec, n=2)
    assert near.indices[0].tolist() == [1, 3]
    assert near.values[1, 0].item() == pytest.approx(1 / np.sqrt(1.01))
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_q"
    assert logit_lens(sae, own) is None
    sae.cfg.metadata.hook_name = HOOK
