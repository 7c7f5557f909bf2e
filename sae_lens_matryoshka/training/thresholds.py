"""JumpReLU thresholds that keep as many latents as BatchTopK did in training."""

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import SAE, JumpReLUSAE

from sae_lens_matryoshka.util.checks import checked_number

if TYPE_CHECKING:
    from sae_lens_matryoshka.training.joined_batch import JoinedBatch

_CHUNK_ELEMENTS = 2**24  # of the scores that are in memory at once
# What SAELens remembers of the last input, to undo its normalisation.
_INPUT_STATE = ("ln_mu", "ln_std", "x_norm_coeff", "d_head")


@torch.no_grad()
def calibrate_threshold(sae: SAE[Any], activations: torch.Tensor, l0: float | None = None) -> None:
    """Set `sae.threshold` so that `l0` latents are active per activation, on average.

    One threshold for all latents stays one; thresholds that differ, as after `fold_W_dec_norm`, are
    multiplied by one number. An SAE that shares its storage with this one, such as a level, keeps
    its own threshold.

    Args:
        sae: An SAE that was trained with BatchTopK and saved as JumpReLU, by any library.
        activations: (…, d_in), or (…, n_heads, d_head) for hook_z; as `sae` takes them. The
            relative error of the resulting L0 on other activations falls as 1 / sqrt(their number):
            32,768 tokens of mixed texts gave less than 1 % (docs/levels.md).
        l0: Mean number of active latents; defaults to the `k` of training; required for a level.

    Raises:
        ValueError: `l0` or `activations` is not accepted, or the thresholds are not BatchTopK's.
        TypeError: `sae` has no threshold, or `activations` is no tensor.
    """
    if not isinstance(activations, torch.Tensor):
        raise TypeError(f"activations must be a torch.Tensor; got {type(activations).__name__}.")
    if not isinstance(sae, JumpReLUSAE):
        raise TypeError(
            f"calibrate_threshold needs a JumpReLUSAE, which is what a BatchTopK SAE is saved as; "
            f"got {type(sae).__name__}."
        )
    if l0 is None:
        l0 = k_of_training(sae)
        if l0 is None:
            is_level = _is_level(sae)
            raise ValueError(
                "l0=None is not accepted for this SAE, because "
                + ("it is a level" if is_level else "its metadata holds no `k` of its training")
                + ": give the mean number of active latents."
            )
    d_sae = sae.cfg.d_sae
    accepted = f"a number above 0 and at most d_sae={d_sae}"
    l0 = checked_number("l0", l0, accepted, above=0, most=d_sae)
    shape = tuple(activations.shape)
    d_in = math.prod(shape[-2:] if sae.hook_z_reshaping_mode else shape[-1:])
    if d_in != sae.cfg.d_in or activations.numel() == 0:
        raise ValueError(
            f"activations of shape {shape} are not accepted: the last dimension, or for hook_z the "
            f"product of the last two, must be d_in={sae.cfg.d_in}, and no dimension may be 0."
        )
    if not activations.isfinite().all():
        raise ValueError("activations hold values that are not finite.")
    x = encoder_input(sae, activations).reshape(-1, sae.cfg.d_in)
    threshold = sae.threshold
    if (threshold == threshold[0]).all():
        cut = batch_threshold(x, sae.W_enc, sae.b_enc, l0)
        sae.threshold.data = torch.full_like(threshold, cut)
    elif (threshold > 0).all():
        factor = batch_threshold(x, sae.W_enc, sae.b_enc, l0, scales=1 / threshold)
        sae.threshold.data = threshold * factor
    else:
        raise ValueError(
            "sae.threshold holds different values, some of them 0 or less: these are not the "
            "thresholds of a BatchTopK SAE."
        )


def k_of_training(sae: SAE[Any]) -> float | None:
    """The `k` that an SAE was trained with; None where its metadata holds none, and for a level."""
    details = sae.cfg.metadata.training_architecture_details or {}
    return None if _is_level(sae) else details.get("k")


def _is_level(sae: SAE[Any]) -> bool:
    return (sae.cfg.metadata.matryoshka_level or {}).get("d_sae", sae.cfg.d_sae) != sae.cfg.d_sae


@torch.no_grad()
def batch_threshold(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    l0: float,
    scales: torch.Tensor | None = None,
) -> float:
    """The number that `l0` scores per activation exceed, on average: BatchTopK's cut, exactly.

    Args:
        x: (N, d_in) encoder inputs, b_dec already subtracted.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        l0: Mean number of scores per activation above the result.
        scales: (d_sae,) factor of each latent's pre-activation; 1 where left out.

    Returns:
        The largest score that is not kept, and 0 where no more than `l0 * N` are positive.
    """
    n_rows = max(1, _CHUNK_ELEMENTS // W_enc.shape[1])
    n_keep = int(l0 * len(x))
    floor = None
    while True:
        found = x.new_empty(0, dtype=W_enc.dtype)
        for rows in x.split(n_rows):
            scores = rows @ W_enc + b_enc
            scores = (scores if scales is None else scores * scales).relu_().flatten()
            if floor is None:  # a guess from the first chunk, which costs time where it is wrong
                n_likely = min(int(l0 * len(rows)) + 1, len(scores))
                floor = torch.topk(scores, n_likely).values[-1].item() / 2
            found = torch.cat([found, scores[scores > floor]])
            if len(found) > 2 * n_keep + 1:
                found = torch.topk(found, n_keep + 1).values
                floor = found[-1].item()
        if len(found) > n_keep:
            return torch.topk(found, n_keep + 1).values[-1].item()
        if floor == 0:
            return 0.0
        floor = 0.0


def encoder_input(sae: SAE[Any], activations: torch.Tensor) -> torch.Tensor:
    """What `sae` multiplies with W_enc: `process_sae_in` without side effects. No hook fires, and
    `decode` still undoes the normalisation of the previous input.
    """
    before = {name: vars(sae)[name] for name in _INPUT_STATE if name in vars(sae)}
    reshape = sae.reshape_fn_in
    x = sae.reshape_fn_in(activations.to(sae.device, sae.dtype))
    x = sae.run_time_activation_norm_fn_in(x)
    sae.reshape_fn_in = reshape
    for name in _INPUT_STATE:
        vars(sae).pop(name, None)
    vars(sae).update(before)
    return x - sae.b_dec * sae.cfg.apply_b_dec_to_input


class ActivationSample:
    """A sample of a run's activations, on which the trained SAE's threshold is calibrated.

    Fills up with whole batches, and from then on each batch replaces the oldest few rows, so that
    it soon spans many steps: neighbouring batches come from the same texts.
    """

    MAX_ROWS = 2**15
    MAX_ELEMENTS = 2**25
    N_REFRESHED = 32

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None
        self._n_filled = 0
        self._oldest = 0
        self._offset = 0
        self._is_joined = True

    @property
    def rows(self) -> torch.Tensor | None:
        """(N, d_in), those of this process before `join`; None before the first batch."""
        if self._rows is None:
            return None
        rows = self._rows[: self._n_filled]
        return rows if self._is_joined else rows[rows.ne(0).any(-1)]

    def add(self, batch: torch.Tensor, joined_batch: "JoinedBatch") -> None:
        """Take rows of a joined batch, of which this process has `batch` (B, d_in).

        Rows of other processes are 0 here until `join`.
        """
        if self._rows is None:
            d_in = batch.shape[1]
            n_rows = max(1, min(self.MAX_ROWS, self.MAX_ELEMENTS // d_in))
            self._rows = batch.new_empty(n_rows, d_in)
        size, n_joined = len(self._rows), joined_batch.size(len(batch))
        if self._n_filled < size:
            start = self._n_filled
            taken = range(min(n_joined, size - start))
            self._n_filled += len(taken)
        else:
            # Spread over the batch, from another row each time: it may be texts in their order.
            stride = max(1, n_joined // self.N_REFRESHED)
            start, self._offset = self._oldest, (self._offset + 1) % stride
            taken = range(self._offset, n_joined, stride)
            taken = taken[: min(self.N_REFRESHED, size - start)]
            self._oldest = (start + len(taken)) % size
        self._is_joined = joined_batch.group is None
        slots = self._rows[start : start + len(taken)]
        if not self._is_joined:
            slots.zero_()
        first = joined_batch.rank * len(batch)
        begin, end = bisect_left(taken, first), bisect_left(taken, first + len(batch))
        if begin < end:
            own = taken[begin:end]
            slots[begin:end] = batch[own.start - first : own.stop - first : own.step]

    def replace(self, rows: torch.Tensor) -> None:
        """Put `rows` (N, d_in) in the place of the present ones."""
        assert self._rows is not None
        self._rows[: self._n_filled] = rows

    def join(self, joined_batch: "JoinedBatch") -> None:
        """Give every process the rows of all of them."""
        if self._rows is not None and not self._is_joined:
            self._rows = joined_batch.sum(self._rows)
            self._is_joined = True
