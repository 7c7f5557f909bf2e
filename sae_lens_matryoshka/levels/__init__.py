"""One checkpoint seen as nested SAEs."""

from sae_lens_matryoshka.levels.slicing import (
    decode_levels,
    levels,
    set_widths,
    truncate,
    widths_of,
)

__all__ = ["decode_levels", "levels", "set_widths", "truncate", "widths_of"]
