"""The precisions in which a training step is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Parameters are float32 in all of them; this is what matrix products are computed in."""

    name: str
    tf32: bool = False
    autocast: bool = False  # bfloat16 autocast, as SAELens' trainer does it

    @property
    def matrix_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else torch.float32

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


FLOAT32 = Precision("float32")
TF32 = Precision("float32 with TF32", tf32=True)
BFLOAT16 = Precision("bfloat16 autocast", autocast=True)


def precisions(device: str) -> list[Precision]:
    """Those that make sense on `device`: only GPUs have TF32."""
    if torch.device(device).type == "cuda":
        return [FLOAT32, TF32, BFLOAT16]
    return [FLOAT32, BFLOAT16]
