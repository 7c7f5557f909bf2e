"""The options of step_time.py."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import records

from sae_lens_matryoshka.util.checks import checked_count, invalid_option
from sae_lens_matryoshka.util.devices import check_device

_LARGEST_SHRINK = 64  # leaves the smallest dictionary of a preset more latents than k
_FIXED_BY_PRESETS = ("d_in", "d_sae", "batch_size", "k", "dtype", "autocast", "variants")


@dataclass
class Options:
    """What is measured, and where."""

    d_in: int = 512  # width of the activations
    d_sae: int = 16384  # width of the dictionary; levels are the paper's five
    batch_size: int = 1024  # activations in a batch
    k: float = 32  # mean number of active latents per activation
    n_dead: int = 0  # latents that count as dead in every step
    skewed: bool = False  # Zipf's firing rates, and in each batch a row with thousands of codes
    threads: int = 1  # CPU threads
    device: str = "cpu"  # or cuda
    dtype: str = "float32"
    autocast: bool = False  # bfloat16 autocast, as SAELens' trainer does it
    variants: bool = False  # this package's options instead of the peers
    preset: Literal["gemma", "gemma_4096", "gpt2", "sweep"] | None = (
        None  # fixed shapes in every precision
    )
    shrink: int = 1  # divide a preset's d_in, d_sae and batch, to try it on a small machine
    rounds: int | None = None  # turns of each contestant after the warm-up; 9, with --preset 20
    out: str | None = None  # write OUT.md and OUT.json (with --preset sweep OUT.png, too)

    @property
    def n_rounds(self) -> int:
        return self.rounds if self.rounds is not None else 20 if self.preset else 9

    def check(self) -> None:
        """Check the options.

        Raises:
            ValueError: one is not accepted.
        """
        check_device("--device", self.device)
        checked_count("--rounds", self.n_rounds)
        if not 1 <= self.shrink <= _LARGEST_SHRINK:
            raise invalid_option("--shrink", self.shrink, f"1 to {_LARGEST_SHRINK}")
        if self.preset is None and self.shrink != 1:
            raise ValueError("--shrink needs a --preset")
        given = [
            f"--{name}"
            for name in _FIXED_BY_PRESETS
            if getattr(self, name) != getattr(Options, name)
        ]
        if self.preset is not None and given:
            raise ValueError(f"--preset {self.preset} leaves no choice of {', '.join(given)}")

    def record(self, **conditions: Any) -> dict[str, Any]:
        """The start of a record: the command and its conditions."""
        left_out = {"out", "preset", *(_FIXED_BY_PRESETS if self.preset else ["shrink"])}
        own = {name: value for name, value in asdict(self).items() if name not in left_out}
        conditions = {**own, "rounds": self.n_rounds, **conditions}
        return records.start("step_time.py", self, self.device, conditions)
