"""Measures of each level of an SAE: from its weights, on activations, inside its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, ActivationsStore, TopKSAE
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.util import cosine_similarities, get_special_token_ids
from tqdm.auto import tqdm

from sae_lens_matryoshka.levels.slicing import decode_levels, levels, widths_of
from sae_lens_matryoshka.training.code_stats import CodeStats
from sae_lens_matryoshka.training.diagnosis import Measured
from sae_lens_matryoshka.training.thresholds import k_of_training

_CHUNK_ELEMENTS = 2**25
_N_CHUNKS = 16  # that one tensor of activations is split into, for the standard error of L0


class LevelStats(NamedTuple):
    """Measures of one level of an SAE; None where not measured.

    Attributes:
        width: Number of latents.
        n_added: Latents that the previous level lacks.
        max_cosine: For each latent, the largest cosine similarity of its decoder row with another
            one of the level, averaged over the level; None for a level of one latent.
        decoder_norm: Mean norm of the decoder rows, in units of the activations.
        l0: Mean number of active latents per token, as the saved SAE encodes.
        explained_variance: 1 − E‖x − x̂‖² / E‖x − E x‖², as SAELens defines it.
        n_dead: Latents that no measured token activated.
        ce_recovered: Share of the model's next-token loss that is kept with the reconstruction in
            place of the activation; 0 is zero ablation, 1 the unchanged model (SAELens'
            `ce_loss_score`).
        l0_error: Standard error of `l0`, over the batches.
        n_tokens: Tokens that `l0` and `n_dead` were counted on.
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
    """What the weights tell about the levels of an SAE, smallest first.

    Raises:
        ValueError: `sae` has no level widths.
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
    batches: Float[torch.Tensor, "... d_in"] | Iterable[Float[torch.Tensor, "... d_in"]],
    n_batches: int | None = None,
    codes: CodeStats | None = None,
) -> list[LevelStats]:
    """Measure L0, variance explained and dead latents of each level on activations.

    Each level is measured as the SAE that `levels` returns.

    Args:
        sae: An SAE with level widths.
        batches: Activations, in one tensor or several; for hook_z with the heads flattened.
        n_batches: Number of batches, for the progress bar.
        codes: Collects the codes of the whole SAE as well, for a diagnosis.

    Raises:
        ValueError: `sae` has no level widths, or the activations are empty, not finite, not of
            floating point or of another dimension.
    """
    rows = stats_from_weights(sae)
    nested = levels(sae)
    for level in nested:
        level.turn_off_forward_pass_hook_z_reshaping()
    norms = nested[-1].W_dec.norm(dim=-1)
    firings = [torch.zeros(row.width, dtype=torch.int64, device=sae.device) for row in rows]
    variances = [ExplainedVarianceCalculator() for _ in rows]
    n_tokens: list[int] = []  # of each batch
    n_active: list[list[int]] = []  # of each batch and level
    if isinstance(batches, torch.Tensor):
        _check_activations(batches, sae.cfg.d_in)
        batches = batches.flatten(0, -2).chunk(_N_CHUNKS)
    for batch in tqdm(batches, desc="Measuring levels", total=n_batches, leave=False):
        n_active.append([0] * len(rows))
        for x in _chunks(sae, batch):
            for p, (acts, reconstruction) in enumerate(_encode_and_decode(nested, x)):
                fired = (acts != 0).sum(0)
                firings[p] += fired
                n_active[-1][p] += int(fired.sum())
                variances[p].add_batch(reconstruction, x)
                if codes is not None and acts.shape[1] == sae.cfg.d_sae:
                    tokens, latents = acts.nonzero(as_tuple=True)
                    codes.add(acts[tokens, latents] * norms[latents], latents, len(x), len(norms))
        n_tokens.append(batch[..., 0].numel())
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


@torch.no_grad()
def measure_levels_in_model(
    sae: SAE[Any],
    model: Any,
    store: ActivationsStore,
    n_batches: int,
    codes: CodeStats | None = None,
) -> list[LevelStats]:
    """Measure the levels of an SAE in its model, on the next `n_batches` batches of prompts.

    L0 and dead latents count every token that training saw. Variance explained and the loss are
    those of SAELens' `run_evals` on each level, which excludes special tokens: the activation at
    the first token of a prompt is often so large that it would dominate the variance.

    Args:
        sae: An SAE with level widths.
        model: The model that `store` runs, as SAELens loads it.
        store: `ActivationsStore.from_sae(model, sae, dataset, …)`.
        n_batches: Batches of `store.store_batch_size_prompts` prompts each.
        codes: As in `measure_levels`.

    Raises:
        ValueError: as `measure_levels`.
    """
    excluded = sae.cfg.metadata.exclude_special_tokens or False
    batches = [store.get_batch_tokens() for _ in range(n_batches)]
    activations = _activations(store, batches, _token_ids(excluded, model))
    rows = measure_levels(sae, activations, n_batches, codes)
    nested = levels(sae)
    for level in nested:
        level.turn_off_forward_pass_hook_z_reshaping()
    variances = [ExplainedVarianceCalculator() for _ in rows]
    losses = torch.zeros(2 + len(rows), dtype=torch.float64)
    special = _token_ids(excluded or True, model)
    for tokens in tqdm(batches, desc="Running the model with each level", leave=False):
        is_counted = ~torch.isin(tokens, special.to(tokens.device))
        losses += torch.tensor(_batch_losses(nested, model, tokens, is_counted, variances))
    unchanged, ablated, *with_level = losses
    return [
        row._replace(
            explained_variance=variance.compute(),
            ce_recovered=((ablated - loss) / (ablated - unchanged)).item(),
        )
        for row, variance, loss in zip(rows, variances, with_level, strict=True)
    ]


def measured_of(
    sae: SAE[Any],
    rows: list[LevelStats],
    codes: CodeStats,
    baseline_explained_variance: float | None = None,
) -> Measured:
    """What `diagnose` takes, from the measured levels of an SAE.

    Args:
        sae: The SAE that was measured. Where the k of its training is not known, L0 stands in.
        rows: What `measure_levels` or `measure_levels_in_model` returned.
        codes: The codes that it collected.
        baseline_explained_variance: As in `Measured`.

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


def _token_ids(excluded: bool | Iterable[int], model: Any) -> Int[torch.Tensor, " n"]:
    """The tokens to exclude; True means every special token of the model's tokenizer."""
    if excluded is True:
        excluded = get_special_token_ids(model.tokenizer)
    return torch.tensor(list(excluded or []), dtype=torch.long)


def _activations(
    store: ActivationsStore,
    batches: Iterable[Int[torch.Tensor, "prompts context"]],
    excluded: Int[torch.Tensor, " n"],
) -> Iterator[Float[torch.Tensor, "tokens d_in"]]:
    """The activations that training would see of each batch of prompts."""
    for tokens in batches:
        tokens_seen = tokens[:, slice(*store.seqpos_slice)]
        kept = ~torch.isin(tokens_seen, excluded.to(tokens.device))
        yield store.get_activations(tokens)[kept.to(store.device)]


def _batch_losses(
    nested: list[SAE[Any]],
    model: Any,
    tokens: Int[torch.Tensor, "prompts context"],
    is_counted: Bool[torch.Tensor, "prompts context"],
    variances: list[ExplainedVarianceCalculator],
) -> list[float]:
    """Next-token loss of the unchanged model, the ablated one and the one with each level.

    `run_evals` on each level would repeat the first two passes. The unchanged model's activations
    are what every level encodes, since nothing before the hook point changes.

    Returns:
        Sums over the counted tokens; `variances` get the levels' reconstructions.
    """
    metadata = nested[-1].cfg.metadata
    head = metadata.hook_head_index

    def sae_input(activations: torch.Tensor) -> torch.Tensor:
        return activations.flatten(2) if head is None else activations[:, :, head]

    def loss(hook: Callable[..., torch.Tensor | None]) -> float:
        hooks = [(metadata.hook_name, hook)]
        options = {"return_type": "both", "loss_per_token": True, "fwd_hooks": hooks}
        losses = model.run_with_hooks(tokens, **options)[1]
        return losses[is_counted[:, :-1].to(losses.device)].double().sum().item()

    def loss_with(positions: torch.Tensor, values: torch.Tensor) -> float:
        def replace(activations: torch.Tensor, hook: Any) -> torch.Tensor:
            activations = activations.clone(memory_format=torch.contiguous_format)
            sae_input(activations)[positions.to(activations.device)] = values.to(activations)
            return activations

        return loss(replace)

    seen: list[torch.Tensor] = []
    losses = [loss(lambda activations, hook: seen.append(activations))]
    losses.append(loss_with(torch.ones_like(is_counted), torch.zeros(())))
    x = sae_input(seen[0])[is_counted.to(seen[0].device)]
    chunks = [[r for _, r in _encode_and_decode(nested, rows)] for rows in _chunks(nested[-1], x)]
    for variance, parts in zip(variances, zip(*chunks, strict=True), strict=True):
        reconstruction = torch.cat(parts)
        variance.add_batch(reconstruction.to(x.device), x)
        losses.append(loss_with(is_counted, reconstruction))
    return losses


def _encode_and_decode(
    nested: list[SAE[Any]], x: Float[torch.Tensor, "batch d_in"]
) -> Iterator[tuple[Float[torch.Tensor, "batch width"], Float[torch.Tensor, "batch d_in"]]]:
    """Codes and reconstruction of each level."""
    if isinstance(nested[-1], TopKSAE):  # whose levels choose again among their latents
        for level in nested:
            acts = level.encode(x).to_dense()
            yield acts, level.decode(acts)
    else:
        acts = nested[-1].encode(x)
        for level, reconstruction in zip(nested, decode_levels(nested[-1], acts), strict=True):
            yield acts[:, : level.cfg.d_sae], reconstruction


def _standard_errors(
    n_active: Int[torch.Tensor, "batches levels"], n_tokens: Int[torch.Tensor, " batches"]
) -> list[float | None]:
    """The standard error of each level's L0 over the batches; None from fewer than two."""
    is_filled = n_tokens > 0
    l0s = n_active[is_filled] / n_tokens[is_filled, None]
    if len(l0s) < 2:
        return [None] * n_active.shape[1]
    return (l0s.std(0) / len(l0s) ** 0.5).tolist()


def _check_activations(batch: torch.Tensor, d_in: int) -> None:
    if batch.ndim < 2 or batch.shape[-1] != d_in or not batch.is_floating_point():
        raise ValueError(
            f"activations of shape {tuple(batch.shape)} and {batch.dtype} are not accepted: give "
            f"floating-point numbers of two dimensions or more, the last of them d_in={d_in}."
        )
    if not batch.isfinite().all():
        raise ValueError("activations hold values that are not finite.")


def _chunks(
    sae: SAE[Any], batch: Float[torch.Tensor, "... d_in"]
) -> Iterator[Float[torch.Tensor, "rows d_in"]]:
    """The rows of a batch, as many at a time as encode in bounded memory."""
    _check_activations(batch, sae.cfg.d_in)
    for x in batch.reshape(-1, sae.cfg.d_in).split(max(1, _CHUNK_ELEMENTS // sae.cfg.d_sae)):
        yield x.to(sae.device, sae.dtype)


def _max_cosines(
    W_dec: Float[torch.Tensor, "d_sae d_in"], widths: list[int]
) -> Float[torch.Tensor, "levels d_sae"]:
    """For each latent, the largest cosine similarity with another latent of each level."""
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
