"""CITATION.cff names the version of the package."""

from pathlib import Path

import yaml

from sae_lens_matryoshka import __version__


def test_version() -> None:
    citation = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text())
    assert citation["version"] == __version__
