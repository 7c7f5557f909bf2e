"""The pass over the tokens, against dense arithmetic, interrupted and resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka.tree import build_tree, gathering
from sae_lens_matryoshka.tree.encoding import Encoder
from sae_lens_matryoshka.tree.gathered import Gathered, shifted_pieces
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.sources import StoredActivations
from tests.levels.test_stats import jumprelu
from tests.tree.worlds import exact_sae, small_world

N_TOKENS, ROWS, N_SHARDS = 9000, 768, 12  # three blocks in each shard, and 552 rows in the last


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return small_world(N_TOKENS)


def gathered_in(folder: Path, x: torch.Tensor, n_tokens: int = N_TOKENS) -> Gathered:
    sae = exact_sae(8)
    return gather(sae, StoredActivations(x, sae), folder, n_tokens)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    share=st.floats(0, 1),
)
def test_a_circular_shift_in_pieces(lengths: list[int], share: float) -> None:
    n = sum(lengths)
    shift = int(share * (n - 1))
    starts = np.cumsum([0, *lengths[:-1]])
    beside = np.full(n, -1)
    for piece in shifted_pieces(lengths, shift):
        first = starts[piece.shard] + piece.start
        other = starts[piece.shifted_shard] + piece.shifted_start
        assert piece.n_rows > 0
        assert piece.start + piece.n_rows <= lengths[piece.shard]
        assert piece.shifted_start + piece.n_rows <= lengths[piece.shifted_shard]
        beside[first : first + piece.n_rows] = np.arange(other, other + piece.n_rows)
    np.testing.assert_array_equal(beside, (np.arange(n) - shift) % n)


def test_sums_and_codes_equal_dense_ones(x, tmp_path):
    gathered = gathered_in(tmp_path / "g", x)
    acts = exact_sae(8).encode(x).detach().numpy()
    fires = (acts > 0).astype(np.float32)
    assert [shard.n_rows for shard in gathered.index.shards] == [ROWS] * 11 + [552]
    codes = np.concatenate([gathered.codes(i).toarray() for i in range(N_SHARDS)])
    np.testing.assert_array_equal(codes, acts)
    np.testing.assert_array_equal(gathered.counts, fires.sum(0))
    np.testing.assert_allclose(gathered.sums["sums"], fires.T @ x.numpy(), rtol=1e-5)
    np.testing.assert_allclose(gathered.sums["total"], x.double().sum(0).numpy())
    # rows from the first shard's end on, beside those that many rows before
    shifted = fires[: N_TOKENS - ROWS].T @ x.numpy()[ROWS:]
    np.testing.assert_allclose(gathered.sums["shifted"], shifted, rtol=1e-5, atol=1e-5)
    assert fires[:, 7].sum() == 0, "the last one never fires"
    for latent in (1, 7):
        tokens, values = gathered.activations_of(latent)
        np.testing.assert_array_equal(tokens, acts[:, latent].nonzero()[0])
        np.testing.assert_array_equal(values, acts[tokens, latent])


@pytest.mark.parametrize("n_tokens", [N_TOKENS, 20 * N_TOKENS], ids=["all", "a short source"])
@pytest.mark.parametrize("n_written", [0, 1, 7, 12])
def test_a_killed_pass_resumes(n_written, n_tokens, x, tmp_path, monkeypatch):
    """Killed before any file, between the files of a shard, and after a whole one."""
    whole = gathered_in(tmp_path / "whole", x, n_tokens)
    assert [shard.n_rows for shard in whole.index.shards] == [ROWS] * 11 + [552]
    write, left = gathering._write, iter(range(n_written))

    def stop(path, tensors):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(gathering, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        gathered_in(tmp_path / "g", x, n_tokens)
    with pytest.raises(ValueError, match="is not complete: run the same command again"):
        Gathered(tmp_path / "g")
    monkeypatch.setattr(gathering, "_write", write)
    encoded = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda *args: encoded.append(1) or encode(*args))
    again = gathered_in(tmp_path / "g", x, n_tokens)
    assert len(encoded) == N_SHARDS - n_written // 2
    assert again.index == whole.index
    for name, values in whole.sums.items():
        np.testing.assert_array_equal(again.sums[name], values)
    for i in range(N_SHARDS):
        np.testing.assert_array_equal(again.codes(i).toarray(), whole.codes(i).toarray())
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    # complete, nothing is encoded again
    encoded.clear()
    gathered_in(tmp_path / "g", x, n_tokens)
    assert not encoded


def test_a_full_disk(x, tmp_path, monkeypatch):
    write, left = gathering._write, iter(range(3))

    def full(path, tensors):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(gathering, "_write", full)
    with pytest.raises(OSError, match=r"No space left.* The 1 shards before are whole; the same"):
        gathered_in(tmp_path / "g", x)
    index = json.loads((tmp_path / "g" / "index.json").read_text())
    assert len(index["shards"]) == 1


def test_other_folders_are_refused(x, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ValueError, match="holds something else: give a new or an empty folder"):
        gathered_in(tmp_path / "other", x)
    build_tree(exact_sae(8), activations=x, folder=tmp_path / "g")
    with pytest.raises(ValueError, match="gathered with n_rows=9000, not 8000: give another"):
        build_tree(exact_sae(8), activations=x[:8000], folder=tmp_path / "g")


def test_after_too_few_tokens_the_same_folder_takes_more(x, tmp_path):
    with pytest.raises(ValueError, match="100 tokens are too few for a tree"):
        build_tree(exact_sae(8), activations=x, n_tokens=100, folder=tmp_path / "g")
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["index.json"]
    tree = build_tree(exact_sae(8), activations=x, folder=tmp_path / "g")
    fresh = build_tree(exact_sae(8), activations=x, folder=tmp_path / "fresh")
    assert tree.edges.equals(fresh.edges)
    assert Gathered(tmp_path / "g").index == Gathered(tmp_path / "fresh").index


@pytest.mark.parametrize("changed", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold", "config"])
def test_another_sae_is_refused(changed, x, tmp_path):
    gathered_in(tmp_path / "g", x)
    other = exact_sae(8)
    if changed == "config":
        other.cfg.apply_b_dec_to_input = True
    else:
        with torch.no_grad():
            getattr(other, changed).add_(1)
    message = "gathered with another SAE: give another folder"
    with pytest.raises(ValueError, match=message):
        gather(other, StoredActivations(x, other), tmp_path / "g", len(x))


def test_the_callers_sae_stays_as_it_was():
    metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z")
    sae = jumprelu(12, [4, 8], reshape_activations="hook_z", metadata=metadata)
    attributes = dict(vars(sae))
    weights = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    build_tree(sae, activations=torch.randn(3000, 12))
    assert sae.hook_z_reshaping_mode
    assert vars(sae) == attributes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sae.state_dict().items())
    assert sae.encode(torch.randn(5, 3, 4)).shape == (5, 8)
