"""What each level of an SAE is like: from its weights, from activations, inside its model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from sae_lens import SAE, ActivationsStore, TopKSAE, run_evals
from sae_lens.evals import EvalConfig, ExplainedVarianceCalculator
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import cosine_similarities, get_special_token_ids
from tqdm.auto import tqdm

from sae_lens_matryoshka.levels.slicing import decode_levels, levels, widths_of
from sae_lens_matryoshka.training.code_stats import CodeStats
from sae_lens_matryoshka.training.diagnosis import Measured
from sae_lens_matryoshka.training.thresholds import k_of_training

_CHUNK_ELEMENTS = 2**25
_N_CHUNKS = 16  # of activations in one tensor, to see how L0 differs between them


class LevelStats(NamedTuple):
    """One level of an SAE; what was not measured is None.

    Attributes:
        width: Its latents.
        n_added: Those of them that the level before does not have.
        max_cosine: Mean over its latents of the largest cosine similarity of their decoder row with
            that of another of its latents; None for a level of one latent.
        decoder_norm: Mean norm of its decoder rows, in units of the activations.
        l0: Mean number of active latents per activation, as the saved SAE encodes.
        explained_variance: 1 − E‖x − x̂‖² / E‖x − E x‖², as SAELens defines it.
        n_dead: Latents that were active on none of the activations measured.
        l0_error: Standard error of `l0`, over the batches.
        n_tokens: Activations that `l0` and `n_dead` were counted on.
        ce_recovered: Share of the model's next-token loss that is kept with the reconstruction in
            place of the activation; 0 is zero ablation, 1 the model as it is (SAELens'
            `ce_loss_score`).
    """

    width: int
    n_added: int
    max_cosine: float | None
    decoder_norm: float
    l0: float | None = None
    explained_variance: float | None = None
    n_dead: int | None = None
    ce_recovered: float | None = None
    l0_error: float | None = None
    n_tokens: int | None = None


@torch.no_grad()
def stats_from_weights(sae: SAE[Any]) -> list[LevelStats]:
    """What the weights of an SAE say of its levels, smallest first.

    Raises:
        ValueError: the widths of `sae` are not known.
    """
    widths = widths_of(sae)
    W_dec = sae.W_dec.detach().float()
    norms = W_dec.norm(dim=-1)
    max_cosines = _max_cosines(W_dec, widths)
    return [
        LevelStats(
            width=width,
            n_added=width - start,
            max_cosine=max_cosines[p, :width].mean().item() if width > 1 else None,
            decoder_norm=norms[:width].mean().item(),
        )
        for p, (start, width) in enumerate(pairwise([0, *widths]))
    ]


@torch.no_grad()
def measure_levels(
    sae: SAE[Any],
    batches: torch.Tensor | Iterable[torch.Tensor],
    n_batches: int | None = None,
    codes: CodeStats | None = None,
) -> list[LevelStats]:
    """The levels of an SAE, measured on activations: L0, variance explained, dead latents.

    Each level is measured as `levels` returns it, as an SAE of its own.

    Args:
        sae: An SAE whose widths are known.
        batches: One tensor or several, each (…, d_in), for hook_z with the heads flattened.
        n_batches: How many there are, for the progress bar.
        codes: Takes the codes of the whole SAE as well, for a diagnosis.

    Raises:
        ValueError: the widths of `sae` are not known, or the activations are empty, not finite, not
            of floating point or of another dimension.
    """
    rows = stats_from_weights(sae)
    nested = levels(sae)
    for level in nested:
        level.turn_off_forward_pass_hook_z_reshaping()
    norms = nested[-1].W_dec.norm(dim=-1)
    firings = [torch.zeros(row.width, dtype=torch.int64, device=sae.device) for row in rows]
    variances = [ExplainedVarianceCalculator() for _ in rows]
    n_tokens: list[int] = []  # of each batch, as n_active: (batches, P)
    n_active: list[list[int]] = []
    if isinstance(batches, torch.Tensor):
        _check(batches, sae.cfg.d_in)
        batches = batches.flatten(0, -2).chunk(_N_CHUNKS)
    for batch in tqdm(batches, desc="Measuring levels", total=n_batches, leave=False):
        before = [int(counts.sum()) for counts in firings]
        for x in _chunks(sae, batch):
            for p, (acts, reconstruction) in enumerate(_encoded(nested, x)):
                firings[p] += (acts != 0).sum(0)
                variances[p].add_batch(reconstruction, x)
                if codes is not None and acts.shape[1] == sae.cfg.d_sae:
                    tokens, latents = acts.nonzero(as_tuple=True)
                    codes.add(acts[tokens, latents] * norms[latents], latents, len(x), len(norms))
        n_tokens.append(batch[..., 0].numel())
        counts = [int(counts.sum()) for counts in firings]
        n_active.append([now - then for now, then in zip(counts, before, strict=True)])
    if sum(n_tokens) == 0:
        raise ValueError("there are no activations to measure the levels on.")
    l0s = torch.tensor(n_active).sum(0) / sum(n_tokens)
    errors = _standard_errors(torch.tensor(n_active), torch.tensor(n_tokens))
    return [
        row._replace(
            l0=l0.item(),
            l0_error=error,
            n_tokens=sum(n_tokens),
            explained_variance=variance.compute(),
            n_dead=int((counts == 0).sum()),
        )
        for row, l0, error, variance, counts in zip(
            rows, l0s, errors, variances, firings, strict=True
        )
    ]


def measure_levels_in_model(
    sae: SAE[Any],
    model: Any,
    store: ActivationsStore,
    n_batches: int,
    codes: CodeStats | None = None,
) -> list[LevelStats]:
    """The levels of an SAE, measured in its model on the next `n_batches` batches of prompts.

    L0 and dead latents are counted on every token that training saw. Variance explained and the
    loss are SAELens' (`run_evals`), which leaves special tokens out: the activation at the first
    token of a prompt is often so large that it would be most of the variance.

    Args:
        sae: An SAE whose widths are known.
        model: The model that `store` runs, as SAELens loads it.
        store: `ActivationsStore.from_sae(model, sae, dataset, …)`.
        n_batches: Each of `store.store_batch_size_prompts` prompts.
        codes: As `measure_levels`.

    Raises:
        ValueError: as `measure_levels`.
    """
    excluded = sae.cfg.metadata.exclude_special_tokens or False
    tokens = [store.get_batch_tokens() for _ in range(n_batches)]
    # SAELens' own reset doesn't rewind the texts, and each level is to see the same.
    replay = copy.copy(store)
    replay.get_batch_tokens = partial(_next_of, itertools.cycle(tokens))
    rows = []
    for row, level in zip(
        measure_levels(sae, _activations(store, tokens, excluded), n_batches, codes),
        tqdm(levels(sae), desc="Running the model with each level", leave=False),
        strict=True,
    ):
        metrics, _ = run_evals(
            level,
            replay,
            model,
            ActivationScaler(),
            EvalConfig(
                n_eval_reconstruction_batches=n_batches,
                n_eval_sparsity_variance_batches=n_batches,
                compute_ce_loss=True,
                compute_variance_metrics=True,
            ),
            exclude_special_tokens=excluded or True,
        )
        rows.append(
            row._replace(
                explained_variance=metrics["reconstruction_quality"]["explained_variance"],
                ce_recovered=metrics["model_performance_preservation"]["ce_loss_score"],
            )
        )
    return rows


def measured_of(
    sae: SAE[Any],
    rows: list[LevelStats],
    codes: CodeStats,
    baseline_explained_variance: float | None = None,
) -> Measured:
    """What a diagnosis is made from, once the levels of an SAE are measured.

    Args:
        sae: The SAE that `rows` and `codes` are of. Where nothing says with which k it was trained,
            its L0 stands in.
        rows: Of `measure_levels` or `measure_levels_in_model`.
        codes: What they added to it.
        baseline_explained_variance: As `Measured`.

    Raises:
        ValueError: the levels were not measured on activations.
    """
    explained_variance = [
        row.explained_variance for row in rows if row.explained_variance is not None
    ]
    l0 = [row.l0 for row in rows if row.l0 is not None]
    if not len(l0) == len(explained_variance) == len(rows):
        raise ValueError("rows hold no l0 and explained_variance: measure them on activations.")
    k = getattr(sae.cfg, "k", None) or k_of_training(sae) or l0[-1]
    return Measured(
        widths=[row.width for row in rows],
        explained_variance=explained_variance,
        l0=l0,
        firing_rates=codes.firing_rates,
        n_tokens=codes.n_tokens,
        weak_score=codes.weak_score,
        weak_half=codes.weak_half,
        k=k,
        baseline_explained_variance=baseline_explained_variance,
    )


def _next_of(tokens: Iterator[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """The next batch of prompts, whatever size is asked for."""
    return next(tokens)


def _activations(
    store: ActivationsStore, batches: Iterable[torch.Tensor], excluded: bool | Iterable[int]
) -> Iterator[torch.Tensor]:
    if excluded is True:
        excluded = get_special_token_ids(store.model.tokenizer)  # type: ignore[arg-type]
    special = torch.tensor(list(excluded or []), dtype=torch.long)
    for tokens in batches:
        kept = ~torch.isin(tokens[:, slice(*store.seqpos_slice)], special.to(tokens.device))
        yield store.get_activations(tokens)[kept.to(store.device)]


def _encoded(
    nested: list[SAE[Any]], x: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Codes and reconstruction of each level."""
    if isinstance(nested[-1], TopKSAE):  # whose levels choose anew among the latents they have
        for level in nested:
            acts = level.encode(x).to_dense()
            yield acts, level.decode(acts)
    else:
        acts = nested[-1].encode(x)
        for level, reconstruction in zip(nested, decode_levels(nested[-1], acts), strict=True):
            yield acts[:, : level.cfg.d_sae], reconstruction


def _standard_errors(n_active: torch.Tensor, n_tokens: torch.Tensor) -> list[float | None]:
    """Of each level's L0, from how it differs between batches; None from fewer than two."""
    kept = n_tokens > 0
    l0s = n_active[kept] / n_tokens[kept, None]
    if len(l0s) < 2:
        return [None] * n_active.shape[1]
    return (l0s.std(0) / len(l0s) ** 0.5).tolist()


def _check(batch: torch.Tensor, d_in: int) -> None:
    if batch.ndim < 2 or batch.shape[-1] != d_in or not batch.is_floating_point():
        raise ValueError(
            f"activations of shape {tuple(batch.shape)} and {batch.dtype} are not accepted: give "
            f"floating-point numbers, of two dimensions or more, the last of them d_in={d_in}."
        )
    if not batch.isfinite().all():
        raise ValueError("activations hold values that are not finite.")


def _chunks(sae: SAE[Any], batch: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a batch, as many at a time as encode in bounded memory."""
    _check(batch, sae.cfg.d_in)
    rows = batch.reshape(-1, sae.cfg.d_in)
    if len(rows):
        for x in rows.split(max(1, _CHUNK_ELEMENTS // sae.cfg.d_sae)):
            yield x.to(sae.device, sae.dtype)


def _max_cosines(W_dec: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """(P, d_sae): of each latent, the largest cosine similarity with another one of each level."""
    d_sae = len(W_dec)
    result = torch.empty(len(widths), d_sae, device=W_dec.device)
    starts = range(0, d_sae, max(1, _CHUNK_ELEMENTS // d_sae))
    for start in tqdm(starts, desc="Comparing decoder rows", leave=False, disable=len(starts) < 3):
        rows = slice(start, start + starts.step)
        cosines = cosine_similarities(W_dec[rows], W_dec)
        own = torch.arange(len(cosines), device=W_dec.device)
        cosines[own, own + start] = -torch.inf
        nearest = [cosines[:, s:e].max(dim=1).values for s, e in pairwise([0, *widths])]
        result[:, rows] = torch.stack(nearest).cummax(0).values
    return result
