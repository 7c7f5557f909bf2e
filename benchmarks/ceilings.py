"""The machine's measured rates, and the least time of a training step that they allow."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from measuring import seconds
from precisions import Precision

ADAM_PASSES = 7  # reads parameter, gradient and two moments, writes parameter and two moments
_WARM_UP, _ROUNDS = 5, 20


@dataclass(frozen=True)
class Floor:
    """The encode product at the measured matrix rate, then Adam at the measured bandwidth.

    Included: 2 · batch · d_in · d_sae floating-point operations, and seven passes over float32
    parameters, which every step needs that computes all pre-activations and runs Adam on all
    parameters. Not included: selecting the latents, decoding, both weight gradients, clipping, the
    auxiliary loss and SAELens' statistics.
    """

    flops: int
    flops_per_second: float
    optimizer_bytes: int
    bytes_per_second: float

    @property
    def encode_seconds(self) -> float:
        return self.flops / self.flops_per_second

    @property
    def optimizer_seconds(self) -> float:
        return self.optimizer_bytes / self.bytes_per_second

    @property
    def seconds(self) -> float:
        return self.encode_seconds + self.optimizer_seconds


def floor(
    d_in: int, d_sae: int, batch_size: int, flops_per_second: float, bytes_per_second: float
) -> Floor:
    n_parameters = 2 * d_in * d_sae + d_sae + d_in
    return Floor(
        flops=2 * batch_size * d_in * d_sae,
        flops_per_second=flops_per_second,
        optimizer_bytes=ADAM_PASSES * 4 * n_parameters,
        bytes_per_second=bytes_per_second,
    )


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
