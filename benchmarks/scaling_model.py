"""How far training would scale over GPUs, by counting bytes: a model, not a measurement.

    python benchmarks/scaling_model.py

The shape is the paper's: d_in 2,304, d_sae 65,536, five levels. A step on one H100 is that of
docs/benchmarks/gpu_log.md, estimated there: 5.0 ms that grow with the rows (per 4,096 of them) and
5.1 ms that the parameters take, 3.4 ms of them Adam and clipping. Collectives run at a bus
bandwidth of 350 GB/s, within a machine of eight (NVLink) and between machines (eight network cards
of 400 Gb/s), and nothing overlaps with them. A message takes 20 µs for each doubling of the GPUs.
"""

import math

from sae_lens_matryoshka.util.markdown import markdown_table

D_IN, D_SAE, LEVELS = 2304, 65536, 5
ROWS_MS, GRADIENTS_MS, UPDATE_MS = 5.0, 1.7, 3.4  # on one GPU, of 4,096 rows
BUS_BYTES_PER_MS = 350e6
LATENCY_MS = 0.02
N_MESSAGES = 4  # of the selection
PARAMETER_BYTES = 2 * D_IN * D_SAE * 4
N_GPUS = (8, 64, 1024)
ROWS = (512, 4096, 16384)
PER_MACHINE = 8


def reduced_ms(n_bytes: float, n_gpus: int) -> float:
    """Time of a tensor's all-reduce."""
    latency = LATENCY_MS * math.log2(n_gpus)
    return 2 * (n_gpus - 1) / n_gpus * n_bytes / BUS_BYTES_PER_MS + latency


def messages_ms(n_gpus: int) -> float:
    return N_MESSAGES * LATENCY_MS * math.log2(n_gpus)


def data_parallel(n_gpus: int, rows: int) -> float:
    """Milliseconds of a step with `rows` on each GPU."""
    sent = reduced_ms(PARAMETER_BYTES, n_gpus) + messages_ms(n_gpus)
    return ROWS_MS * rows / 4096 + GRADIENTS_MS + UPDATE_MS + sent


def sharded_moments(n_gpus: int, rows: int) -> float:
    """As `data_parallel`, each GPU updating its share of the parameters (ZeRO, stage 1)."""
    return data_parallel(n_gpus, rows) - UPDATE_MS * (1 - 1 / n_gpus)


def sharded_latents(n_gpus: int, rows: int) -> float:
    """As `data_parallel`, each level's latents split over the GPUs of a machine.

    These share their rows: every GPU needs all of them, and the level sums of all of its latents.
    """
    n = min(n_gpus, PER_MACHINE)
    machines = n_gpus // n
    joined_bytes = n * rows * D_IN * 4
    shared = joined_bytes * (n - 1) / n / BUS_BYTES_PER_MS + reduced_ms(LEVELS * joined_bytes, n)
    sent = reduced_ms(PARAMETER_BYTES / n, machines) + messages_ms(n_gpus)
    return ROWS_MS * rows / 4096 + (GRADIENTS_MS + UPDATE_MS) / n + shared + sent


def main() -> None:
    ways = {
        "data parallel": data_parallel,
        "moments sharded": sharded_moments,
        "latents sharded in a machine": sharded_latents,
    }
    rows = [
        [f"{n:,}", f"{batch:,}"]
        + [f"{n * data_parallel(1, batch) / way(n, batch):,.1f}" for way in ways.values()]
        for batch in ROWS
        for n in N_GPUS
    ]
    print(markdown_table(["GPUs", "rows on each", *ways], rows, n_text=0))


if __name__ == "__main__":
    main()
