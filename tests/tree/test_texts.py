"""A tree from a model and texts, examples in their contexts, and a pass that resumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.levels.slicing import truncate
from sae_lens_matryoshka.tree import build_tree
from sae_lens_matryoshka.tree import examples as examples_module
from sae_lens_matryoshka.tree.examples import Examples, contexts_of, find_examples
from sae_lens_matryoshka.tree.gathered import Gathered
from tests.levels.test_stats import jumprelu
from tests.steps import spread
from tests.tiny import D_MODEL, N_CTX, tiny_model, token_dataset

HOOK, N_PROMPTS, EXCLUDED = "blocks.1.hook_resid_pre", 16, [3, 7]


@pytest.fixture(scope="module")
def sae() -> JumpReLUSAE:
    metadata = SAEMetadata(
        hook_name=HOOK,
        context_size=N_CTX,
        prepend_bos=False,
        seqpos_slice=(1, None),
        exclude_special_tokens=EXCLUDED,
    )
    return jumprelu(D_MODEL, [4, 12, 40], metadata=metadata)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return token_dataset(400)


@pytest.fixture(scope="module")
def folder(sae, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "gathered"
    build_tree(sae, tiny_model(), data, 4000, batch_size_prompts=N_PROMPTS, folder=folder)
    return folder


def expected_rows(sae: JumpReLUSAE, data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, their prompts and codes, of the tokens that training would see."""
    tokens = torch.tensor(data.with_format(None)[:]["tokens"])
    x = tiny_model().run_with_cache(tokens, names_filter=[HOOK])[1][HOOK][:, 1:]
    seen = tokens[:, 1:]
    kept = ~torch.isin(seen, torch.tensor(EXCLUDED))
    prompts = torch.arange(len(tokens))[:, None].expand(seen.shape)[kept]
    codes = sae.encode(x[kept]).detach()
    return seen[kept][:4000].numpy(), prompts[:4000].numpy(), codes[:4000].numpy()


def test_rows_are_those_of_training(sae, data, folder):
    gathered = Gathered(folder)
    ids, prompts, codes = expected_rows(sae, data)
    shards = range(len(gathered.index.shards))
    assert gathered.n_tokens == 4000
    assert len(shards) > 2
    found = np.concatenate([gathered.codes(i).toarray() for i in shards])
    np.testing.assert_allclose(found, codes, rtol=1e-4, atol=1e-5)
    read = [gathered.tokens(i).reshape(-1)[gathered.positions(i)] for i in shards]
    np.testing.assert_array_equal(np.concatenate(read), ids)
    assert gathered.has_tokens()
    # a shard holds whole batches of prompts, the last one up to where the tokens end
    assert all(gathered.tokens(i).shape[1] == N_CTX for i in shards)
    assert prompts[gathered.index.shards[0].n_rows] % N_PROMPTS == 0


@pytest.mark.parametrize(("n_tokens", "n_prompts"), [(4000, 400), (1_000_000, N_PROMPTS)])
def test_few_texts_are_read_in_several_parts(sae, data, folder, tmp_path, n_tokens, n_prompts):
    out = tmp_path / "g"
    build_tree(sae, tiny_model(), data, n_tokens, batch_size_prompts=n_prompts, folder=out)
    few, expected = Gathered(out), Gathered(folder)
    assert 8 <= len(few.index.shards) <= 16
    assert few.n_tokens >= expected.n_tokens
    codes = [
        np.concatenate([g.codes(i).toarray() for i in range(len(g.index.shards))])[:4000]
        for g in (few, expected)
    ]
    np.testing.assert_allclose(*codes, rtol=1e-4, atol=1e-5)


def test_texts_that_are_read_at_once_have_no_shifted_copy(sae, data, tmp_path):
    message = r"ends after [\d,]+ tokens, .*: give batch_size_prompts below 400, or n_tokens=\d+\."
    with pytest.raises(ValueError, match=message):
        build_tree(sae, tiny_model(), data, batch_size_prompts=400, folder=tmp_path / "g")


def test_it_resumes_at_the_next_prompts(sae, data, folder, tmp_path, monkeypatch):
    from sae_lens_matryoshka.tree import gathering

    write, left = gathering._write, iter(range(4))

    def stop(path, tensors):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(gathering, "_write", stop)
    arguments = (sae, tiny_model(), data, 4000)
    options = {"batch_size_prompts": N_PROMPTS, "folder": tmp_path / "g"}
    with pytest.raises(KeyboardInterrupt):
        build_tree(*arguments, **options)
    monkeypatch.setattr(gathering, "_write", write)
    build_tree(*arguments, **options)
    again, whole = Gathered(tmp_path / "g"), Gathered(folder)
    assert again.index == whole.index
    for name, values in whole.sums.items():
        np.testing.assert_array_equal(again.sums[name], values)
    for i in range(len(whole.index.shards)):
        np.testing.assert_array_equal(again.tokens(i), whole.tokens(i))


@pytest.mark.parametrize("block", [1, 300, 2**24])
def test_examples_equal_a_sort(block, sae, data, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(examples_module, "_CODES_AT_A_TIME", block)
    _, _, codes = expected_rows(sae, data)
    gathered = Gathered(folder)
    examples = find_examples(gathered, n_top=6, n_quantiles=3, n_each=2, n_bins=5)
    for latent in range(40):
        tokens = codes[:, latent].nonzero()[0]
        values = -np.sort(-codes[tokens, latent])
        n = min(6, len(values))
        np.testing.assert_allclose(examples.top_values[latent, :n], values[:n], rtol=1e-4)
        np.testing.assert_allclose(
            codes[examples.top_tokens[latent, :n], latent], values[:n], rtol=1e-4
        )
        assert (examples.top_tokens[latent, n:] == -1).all()
        assert examples.histogram[latent].sum() == len(values)
        if len(values) >= 6:
            places = (np.arange(6) + 0.5) / 6 * len(values)
            of_quantiles = values[places.astype(int)].reshape(3, 2)
            np.testing.assert_allclose(examples.quantile_values[latent], of_quantiles, rtol=1e-4)
            edges = np.linspace(0, values[0], 6)
            counts = np.histogram(values, edges)[0]
            assert abs(examples.histogram[latent] - counts).sum() <= 2  # on an edge
    examples.save(tmp_path / "examples.safetensors")
    for saved, read in zip(examples, Examples.load(tmp_path / "examples.safetensors"), strict=True):
        np.testing.assert_array_equal(saved, read)


def test_contexts(sae, data, folder):
    ids, prompts, codes = expected_rows(sae, data)
    gathered = Gathered(folder)
    latent = int(gathered.counts.argmax())
    tokens = np.array([0, 1234, 3999])
    shown, values = contexts_of(gathered, latent, tokens, before=2, after=3)
    assert shown.shape == values.shape == (3, 6)
    all_tokens = np.array(data.with_format(None)[:]["tokens"])
    for row, token in enumerate(tokens):
        assert shown[row, 2] == ids[token]
        assert values[row, 2] == pytest.approx(codes[token, latent], rel=1e-4)
        prompt = all_tokens[prompts[token]]
        text = [t for t in shown[row] if t >= 0]
        assert any(prompt[i : i + len(text)].tolist() == text for i in range(N_CTX - len(text) + 1))
        # the SAE was not run on excluded tokens, nor beyond the ends
        not_run = np.isin(shown[row], [*EXCLUDED, -1])
        assert np.isnan(values[row][not_run]).all()
    assert shown[0, 0] == -1  # the first row is at position 1
    assert np.isnan(values[0, 1])  # position 0 is read by the model and not by the SAE


def test_a_training_sae_is_taken_as_it_is_saved(data):
    torch.manual_seed(0)
    cfg = MatryoshkaTrainingSAEConfig(d_in=D_MODEL, d_sae=40, k=4, matryoshka_widths=[4, 12, 40])
    training = MatryoshkaTrainingSAE(cfg)
    spread(training)
    with torch.no_grad():
        training.topk_threshold.fill_(0.5)
    x = torch.randn(3000, D_MODEL)
    trees = [build_tree(s, activations=x) for s in (training, truncate(training, 40))]
    assert trees[0].latents.equals(trees[1].latents)
    assert trees[0].edges.equals(trees[1].edges)


def test_another_models_width(data):
    metadata = SAEMetadata(
        hook_name=HOOK, context_size=N_CTX, prepend_bos=False, model_name="other"
    )
    wide = jumprelu(D_MODEL + 1, [4, 12], metadata=metadata)
    message = f"activations of other at {HOOK} do not have the width of this SAE, d_in=17"
    with pytest.raises(ValueError, match=message):
        build_tree(wide, tiny_model(), data, 2000)


def test_a_data_set_that_does_not_exist(sae):
    with pytest.raises(ValueError, match="dataset='no/where' can't be read"):
        build_tree(sae, tiny_model(), "no/where", 2000)
    metadata = SAEMetadata(hook_name="blocks.9.hook_x", context_size=N_CTX, prepend_bos=False)
    other = jumprelu(D_MODEL, [4], metadata=metadata)
    with pytest.raises(ValueError, match=r"the model has no hook 'blocks\.9\.hook_x'"):
        build_tree(other, tiny_model(), token_dataset(10))
