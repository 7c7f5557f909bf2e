"""The example on digits, run as a user would, with few training steps."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE

from sae_lens_matryoshka.levels import widths_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision.py"


def test_levels_of_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--out", str(out), "--steps", "150"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")

    assert {path.name for path in out.iterdir()} == {"activations.npy", "sae", "digits_levels.png"}
    activations = np.load(out / "activations.npy")
    assert (activations.shape, activations.dtype) == ((1347, 9, 64), np.float32)
    assert (out / "digits_levels.png").read_bytes().startswith(b"\x89PNG")

    sae = SAE.load_from_disk(out / "sae")
    assert type(sae) is JumpReLUSAE
    assert widths_of(sae) == [8, 24, 64]
    l0 = (sae.encode(torch.from_numpy(activations)) > 0).sum(-1).float().mean().item()
    assert l0 == pytest.approx(4, rel=0.02)

    printed = capsys.readouterr().out
    accuracy = float(printed.split("right on ")[1].split("%")[0])
    assert accuracy > 90
    rows = re.findall(r"^\| (\d+) \| \d+ \| ([\d.]+) \| ([\d.]+) \|", printed, re.M)
    assert [int(width) for width, *_ in rows] == [8, 24, 64]
    l0s, explained = ([float(row[column]) for row in rows] for column in (1, 2))
    assert l0s == sorted(l0s)
    assert l0s[-1] == pytest.approx(4, rel=0.1)  # of held-out images
    assert 0 < explained[0] < explained[1] < explained[2] < 1
