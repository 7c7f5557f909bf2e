"""How often latents are active and how strongly: what a diagnosis goes by."""

from __future__ import annotations

import torch


class CodeStats:
    """How often latents are active and how strongly, over batches, without waiting for a device."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._counts: torch.Tensor | None = None
        self._n_codes = 0
        self._means: torch.Tensor | None = None

    def add(self, scores: torch.Tensor, latents: torch.Tensor, n_tokens: int, d_sae: int) -> None:
        """Take the active codes of a batch.

        Args:
            scores: (n,) 0 where a code only fills up (see `selection.Codes`), else above.
            latents: (n,) int64.
            n_tokens: B.
            d_sae: Width of the dictionary.
        """
        self.n_tokens += n_tokens
        if self._counts is None:
            self._counts = latents.new_zeros(d_sae)
        self._counts.index_add_(0, latents, (scores > 0).long())
        n = len(scores)
        if n == 0:
            return
        scores = scores.float()
        # what only fills up is neither weak nor strong; leaving it out would need its number
        mean = scores.sum() / (scores > 0).sum().clamp(min=1)
        scores = torch.where(scores > 0, scores, mean)
        weaker = scores.topk((n + 1) // 2, largest=False, sorted=False).values  # sorting is slow
        tenth = weaker.topk(n // 10 + 1, largest=False, sorted=False).values.max()
        means = torch.stack([tenth, weaker.sum() / n, scores.mean()])
        self._n_codes += n
        self._means = means if self._means is None else self._means.lerp(means, n / self._n_codes)

    @property
    def firing_rates(self) -> torch.Tensor:
        """(d_sae,) share of the tokens on which each latent is active."""
        assert self._counts is not None
        return self._counts / self.n_tokens

    @property
    def weak_score(self) -> float:
        """See `Measured`; 0 where no code was active."""
        return 0.0 if self._means is None else (self._means[0] / self._means[2]).item()

    @property
    def weak_half(self) -> float:
        """See `Measured`; 0 where no code was active."""
        return 0.0 if self._means is None else (self._means[1] / self._means[2]).item()
