"""How often latents are active and how strongly: what a diagnosis goes by."""

import torch
from jaxtyping import Float, Int

_SAMPLE = 4096  # scores of a batch whose distribution is looked at
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class CodeStats:
    """Firing rates and the distribution of scores over batches, without waiting for a device."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._counts: torch.Tensor | None = None
        self._n_codes = 0
        self._means: torch.Tensor | None = None

    def add(
        self,
        scores: Float[torch.Tensor, " n"],
        latents: Int[torch.Tensor, " n"],
        n_tokens: int,
        d_sae: int,
    ) -> None:
        """Add the codes of a batch.

        Args:
            scores: Positive; 0 for padding.
            latents: Latents of the codes.
            n_tokens: Activations in the batch.
            d_sae: Width of the dictionary.
        """
        self.n_tokens += n_tokens
        if self._counts is None:
            self._counts = latents.new_zeros(d_sae)
        self._counts.index_add_(0, latents, (scores > 0).long())
        n_codes = len(scores)
        if n_codes == 0:
            return
        if n_codes > _SAMPLE:
            # evenly spread positions without a period: TopK has k codes in each row
            positions = torch.arange(_SAMPLE, device=scores.device, dtype=torch.float64)
            scores = scores[((positions * _GOLDEN_RATIO).frac() * n_codes).long()]
        sample = scores.float().sort().values
        n_valid = (sample > 0).sum()
        rank = torch.arange(len(sample), device=sample.device) - (len(sample) - n_valid)
        tenth = (sample * (rank == n_valid // 10)).sum()
        weaker_half = (sample * (rank < (n_valid + 1) // 2)).sum()
        n = n_valid.clamp(min=1)
        means = torch.stack([tenth, weaker_half / n, sample.sum() / n])
        self._n_codes += n_codes
        weight = n_codes / self._n_codes
        self._means = means if self._means is None else self._means.lerp(means, weight)

    @property
    def firing_rates(self) -> Float[torch.Tensor, " d_sae"]:
        """Share of the tokens on which each latent is active."""
        assert self._counts is not None
        return self._counts / self.n_tokens

    @property
    def weak_score(self) -> float:
        """See `diagnosis.Measured`; 0 if no code was active."""
        return self._share_of_mean(0)

    @property
    def weak_half(self) -> float:
        """See `diagnosis.Measured`; 0 if no code was active."""
        return self._share_of_mean(1)

    def _share_of_mean(self, index: int) -> float:
        if self._means is None or self._means[2] == 0:
            return 0.0
        return (self._means[index] / self._means[2]).item()
