"""Checkpoints of other libraries load, and their levels compute what those libraries do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import decode_levels, levels, widths_of
from tests.checkpoints import files_in, under
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".peers" / "site"
WIDTHS = [4, 16, 64]


def run_peers(script: str, out: Path) -> Path:
    """Let the peers' own packages write to `out`, by a script of tests/peers."""
    if not SITE.is_dir():
        pytest.fail(f"{SITE}, which holds the peers' packages, is missing: `make test` makes it.")
    subprocess.run(
        [sys.executable, ROOT / "tests" / "peers" / script, out],
        env={**os.environ, "PYTHONPATH": str(SITE)},
        check=True,
        timeout=300,
    )
    return out


@pytest.fixture(scope="session")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the peers' own packages wrote their checkpoints."""
    return run_peers("make_checkpoints.py", tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("source", ["folder", "Hub"])
@pytest.mark.parametrize(
    ("name", "given"),
    [("saelens_5", {"matryoshka_widths": WIDTHS}), ("dictionary_learning", {})],
)
def test_computes_what_the_peer_computed(
    hub: LoopbackHub,
    peers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    given: dict[str, Any],
    source: str,
) -> None:
    folder = peers / name
    if source == "folder":
        sae = load_sae(folder, **given)
    else:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        hub.add("ann/peers", under(f"one/{name}", files_in(folder)))
        sae = load_sae("ann/peers", f"one/{name}", **given)
    x, feature_acts, reconstructions = (
        torch.from_numpy(np.load(folder / f"{file}.npy"))
        for file in ("activations", "feature_acts", "reconstructions")
    )
    assert widths_of(sae) == WIDTHS
    assert (sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name) == (
        "gemma-2-2b",
        "blocks.12.hook_resid_post",
    )
    acts = sae.encode(x)
    assert 0 < (feature_acts > 0).float().mean() < 1
    torch.testing.assert_close(acts, feature_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode_levels(sae, acts), reconstructions, rtol=1e-5, atol=1e-5)
    for level, expected in zip(levels(sae), reconstructions, strict=True):
        torch.testing.assert_close(level(x), expected, rtol=1e-5, atol=1e-5)
