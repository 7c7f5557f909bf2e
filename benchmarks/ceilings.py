"""Precisions, the rates that the machine reaches in them, and the least time of a step."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from measuring import seconds

_ADAM_PASSES = 7  # reads parameter, gradient and two moments, writes parameter and two moments
_WARM_UP, _ROUNDS = 5, 20


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


def floor(
    d_in: int, d_sae: int, batch_size: int, flops_per_second: float, bytes_per_second: float
) -> dict[str, float]:
    """The encode product at the measured matrix rate, then Adam at the measured bandwidth.

    Included: 2 · batch · d_in · d_sae floating-point operations, and seven passes over float32
    parameters, which every step needs that computes all pre-activations and runs Adam on all
    parameters. Not included: selecting the latents, decoding, both weight gradients, clipping, the
    auxiliary loss and SAELens' statistics.
    """
    flops = 2 * batch_size * d_in * d_sae
    optimizer_bytes = _ADAM_PASSES * 4 * (2 * d_in * d_sae + d_sae + d_in)
    return {
        "flops": flops,
        "flops_per_second": flops_per_second,
        "encode_seconds": flops / flops_per_second,
        "optimizer_bytes": optimizer_bytes,
        "bytes_per_second": bytes_per_second,
        "optimizer_seconds": optimizer_bytes / bytes_per_second,
    }


def matrix_rate(precision: Precision, device: str) -> float:
    """Floating-point operations per second in a large square product of random matrices."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(precision.matrix_dtype) for _ in range(2))
    product = torch.empty_like(a)
    with precision.applied():
        times = [
            seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(_WARM_UP + _ROUNDS)
        ]
    return 2 * size**3 / statistics.median(times[_WARM_UP:])


def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.ones(2**26 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(_WARM_UP + _ROUNDS)]
    return 2 * source.numel() * source.element_size() / statistics.median(times[_WARM_UP:])
