"""Per-level numbers, against the slow way to the same numbers."""

import statistics
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import (
    ActivationsStore,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    run_evals,
)
from sae_lens.evals import EvalConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sae_lens_matryoshka.levels import stats as level_stats
from sae_lens_matryoshka.levels.report import draw_level_stats
from sae_lens_matryoshka.levels.slicing import levels, set_widths, truncate
from sae_lens_matryoshka.levels.stats import (
    LevelStats,
    measure_levels,
    measure_levels_in_model,
    stats_from_weights,
)
from tests.tiny import D_MODEL, N_CTX, VOCAB, tiny_model, token_dataset


def jumprelu(d_in: int, widths: list[int], seed: int = 0, **options: Any) -> JumpReLUSAE:
    """A random JumpReLU SAE with these levels."""
    generator = torch.Generator().manual_seed(seed)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=widths[-1], **options))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.threshold.uniform_(0, 2, generator=generator)
    set_widths(sae, widths)
    return sae


@given(
    widths=st.sets(st.integers(1, 12), min_size=1, max_size=4).map(sorted),
    chunk=st.sampled_from([1, 30, 2**25]),
)
def test_weights(widths: list[int], chunk: int) -> None:
    sae = jumprelu(5, widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(level_stats, "_CHUNK_ELEMENTS", chunk)
        rows = stats_from_weights(sae)
    assert [row.width for row in rows] == widths
    assert sum(row.n_added for row in rows) == widths[-1]
    for row in rows:
        directions = torch.nn.functional.normalize(sae.W_dec[: row.width], dim=1)
        cosines = directions @ directions.T - 3 * torch.eye(row.width)
        if row.width > 1:
            assert row.max_cosine == pytest.approx(cosines.max(1).values.mean().item(), abs=1e-6)
        else:
            assert row.max_cosine is None
        norm = sae.W_dec[: row.width].norm(dim=1).mean().item()
        assert row.decoder_norm == pytest.approx(norm, rel=1e-6)
        assert (row.l0, row.explained_variance, row.n_dead, row.ce_recovered) == (None,) * 4


@given(chunk=st.sampled_from([1, 50, 2**25]), splits=st.sampled_from([1, 7, 64]))
def test_activations(chunk: int, splits: int) -> None:
    """The numbers are those of the truncated SAEs, however the activations are split."""
    sae = jumprelu(5, [2, 5, 11])
    with torch.no_grad():
        sae.threshold[4] = torch.inf  # one latent that is surely dead
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(level_stats, "_CHUNK_ELEMENTS", chunk)
        rows = measure_levels(sae, iter(x.split(splits)))
    for row, expected in zip(rows, stats_from_weights(sae), strict=True):
        assert row[:4] == pytest.approx(expected[:4])
    for row, level in zip(rows, levels(sae), strict=True):
        acts = level.encode(x)
        missed = (level.decode(acts) - x).pow(2).sum()
        explained = 1 - missed / (x - x.mean(0)).pow(2).sum()
        assert row.l0 == pytest.approx((acts > 0).sum().item() / 64)
        assert row.explained_variance == pytest.approx(explained.item(), rel=1e-5)
        assert row.n_dead == (~(acts > 0).any(0)).sum()
        assert row.n_dead == 0 or row.width > 4


def test_topk_levels_choose_among_their_own_latents() -> None:
    """Each level is measured as it is saved, which for TopK is not a prefix of the whole."""
    sae = TopKSAE(TopKSAEConfig(d_in=5, d_sae=12, k=3))
    with torch.no_grad():
        sae.b_enc.fill_(5.0)  # every latent would fire,
        sae.W_enc.mul_(0.01)  # whatever the activation
    set_widths(sae, [2, 6, 12])
    x = torch.randn(40, 5)
    rows = measure_levels(sae, x)
    assert [row.l0 for row in rows] == [2, 3, 3]
    for row, level in zip(rows, levels(sae), strict=True):
        explained = 1 - (level(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        assert row.explained_variance == pytest.approx(explained.item(), rel=1e-5)


def test_standard_error_is_over_batches() -> None:
    sae = jumprelu(5, [2, 11])
    batches = torch.randn(90, 5, generator=torch.Generator().manual_seed(2)).split([20, 30, 40])
    rows = measure_levels(sae, iter(batches))
    for row in rows:
        l0s = [(sae.encode(x)[:, : row.width] > 0).sum().item() / len(x) for x in batches]
        assert row.l0_error == pytest.approx(statistics.stdev(l0s) / 3**0.5, rel=1e-5)
        assert row.n_tokens == 90
    (single,) = measure_levels(jumprelu(5, [4]), iter(batches[:1]))
    assert (single.l0_error, single.n_tokens) == (None, 20)


def test_hook_z_takes_flat_activations() -> None:
    metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z")
    sae = jumprelu(6, [3, 8], reshape_activations="hook_z", metadata=metadata)
    x = torch.randn(10, 6)
    rows = measure_levels(sae, x)
    acts = sae.encode(x.reshape(10, 2, 3))
    assert rows[-1].l0 == pytest.approx((acts > 0).sum().item() / 10)
    assert sae.hook_z_reshaping_mode, "the SAE itself is as it was"


@pytest.mark.parametrize(
    ("activations", "telling"),
    [
        (torch.randn(4, 7), r"shape \(4, 7\).* d_in=5"),
        (torch.full((4, 5), torch.nan), "not finite"),
        (torch.randn(0, 5), "no activations"),
        (torch.randn(5), r"shape \(5,\).* two dimensions"),
        (torch.ones(4, 5, dtype=torch.int64), "torch.int64 are not accepted"),
    ],
)
def test_activations_that_are_not_accepted(activations: torch.Tensor, telling: str) -> None:
    with pytest.raises(ValueError, match=telling):
        measure_levels(jumprelu(5, [2, 5]), activations)


@pytest.mark.parametrize("excluded", [None, False, [3, 7]])
def test_in_the_model(excluded: Any) -> None:
    """L0 over the tokens that training sees, variance and loss as in SAELens' `run_evals`."""
    model = tiny_model()
    metadata = SAEMetadata(
        hook_name="blocks.1.hook_resid_pre",
        context_size=N_CTX,
        prepend_bos=False,
        exclude_special_tokens=excluded,
    )
    sae = jumprelu(D_MODEL, [8, 24, 64], metadata=metadata)
    model.tokenizer = _tokenizer()
    options = {"dataset": token_dataset(40), "streaming": False, "store_batch_size_prompts": 4}
    store, again = (ActivationsStore.from_sae(model, sae, **options) for _ in range(2))
    with mock.patch.object(model, "forward", wraps=model.forward) as forward:
        rows = measure_levels_in_model(sae, model, store, n_batches=3)
    assert forward.call_count == 3 * (2 + len(rows)), "unchanged, ablated and with each level"

    batches = [again.get_batch_tokens() for _ in range(3)]
    tokens = torch.cat(batches)
    _, cache = model.run_with_cache(tokens, prepend_bos=False)
    x = cache["blocks.1.hook_resid_pre"]
    kept = ~torch.isin(tokens, torch.tensor(excluded or []))
    plain = ~torch.isin(tokens, torch.tensor(excluded or [0]))
    for row in rows:
        level = truncate(sae, row.width)
        l0 = (level.encode(x[kept]) > 0).sum().item() / kept.sum().item()
        assert row.l0 == pytest.approx(l0)
        missed = (level(x[plain]) - x[plain]).pow(2).sum()
        explained = 1 - missed / (x[plain] - x[plain].mean(0)).pow(2).sum()
        assert row.explained_variance == pytest.approx(explained.item(), rel=1e-4)
        again.get_batch_tokens = partial(_pop, list(batches))
        metrics, _ = run_evals(
            level,
            again,
            model,
            ActivationScaler(),
            EvalConfig(n_eval_reconstruction_batches=3, compute_ce_loss=True),
            exclude_special_tokens=excluded or True,
        )
        ce_recovered = metrics["model_performance_preservation"]["ce_loss_score"]
        # A quotient of small differences of float32 losses
        assert row.ce_recovered == pytest.approx(ce_recovered, rel=1e-5)


def _pop(batches: list[torch.Tensor], batch_size: int) -> torch.Tensor:
    return batches.pop(0)


def _tokenizer() -> PreTrainedTokenizerFast:
    """For the tiny model, whose tokens mean nothing: token 0 begins texts."""
    words = WordLevel({str(i): i for i in range(VOCAB)}, unk_token="1")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="0")


ROWS = [
    LevelStats(1, 1, None, 0.5, 0.25, 0.1234, 0, 0.4),
    LevelStats(8, 7, 0.75, 1.0, 2.0, 0.9, 3, None),
]


def test_plot_replaces_a_file_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "levels.png"
    draw_level_stats(path, ROWS, "first")
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    broken = [ROWS[0]._replace(l0=None), ROWS[1]]
    with pytest.raises(TypeError):
        draw_level_stats(path, broken, "second")
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
