"""The sparse activations that a step hands to SAELens' trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from sae_lens_matryoshka.kernels.codes import Codes, Layout


class FeatureActs(torch.Tensor):
    """A sparse COO tensor (B, d_sae) that knows how often each latent fires.

    SAELens' trainer counts firings as `acts.bool().float().sum(0)`, for which PyTorch would sort
    and merge the codes. The layout of the codes has the counts already.
    """

    _n_firings: torch.Tensor  # (d_sae,) int32
    _is_whether_fired = False

    @staticmethod
    def of(codes: Codes, layout: Layout, batch_size: int, is_sorted: bool) -> FeatureActs:
        """The activations of a batch of B; `is_sorted` if the codes ascend and have no padding."""
        acts = torch.sparse_coo_tensor(
            torch.stack([codes.rows, codes.latents]),
            codes.scores,
            (batch_size, len(layout.latent_starts) - 1),
            is_coalesced=is_sorted,
            check_invariants=False,
        )
        return _with_counts(acts, layout.latent_starts.diff(), is_whether_fired=False)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return copy.deepcopy(self.detach(), memo)  # a plain sparse tensor, as below

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        acts = args[0] if args else None
        if isinstance(acts, FeatureActs):
            counts_rows = func is torch.Tensor.sum and args[1:] in ((0,), (-2,)) and not kwargs
            if counts_rows and acts._is_whether_fired:
                return acts._n_firings.to(acts.dtype if acts.is_floating_point() else torch.int64)
            if func is torch.Tensor.bool or (func is torch.Tensor.float and acts._is_whether_fired):
                with torch._C.DisableTorchFunctionSubclass():
                    return _with_counts(func(acts), acts._n_firings, is_whether_fired=True)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _with_counts(
    acts: torch.Tensor, n_firings: torch.Tensor, is_whether_fired: bool
) -> FeatureActs:
    result = torch.Tensor._make_subclass(FeatureActs, acts)  # `as_subclass` needs dense storage
    result._n_firings, result._is_whether_fired = n_firings, is_whether_fired
    return result
