"""The SAE that comes with the package."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_lens_matryoshka import load_sae
from sae_lens_matryoshka.demo.real_text import SAE_FOLDER
from sae_lens_matryoshka.levels import levels

WIDTHS = [128, 384, 896, 1920, 4096]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in SAE_FOLDER.iterdir()) < 10_000_000


def test_it_loads_with_plain_saelens() -> None:
    plain, ours = SAE.load_from_disk(SAE_FOLDER), load_sae(SAE_FOLDER)
    assert plain.cfg.architecture() == "jumprelu"
    assert plain.dtype == torch.float16
    assert plain.cfg.metadata.model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert plain.cfg.metadata.hook_name == "model.layers.7"
    assert [level.cfg.d_sae for level in levels(ours)] == WIDTHS
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name])


def test_it_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, of_folder = load_sae("smollm2-135m-matryoshka"), load_sae(SAE_FOLDER)
    assert torch.equal(named.W_dec, of_folder.W_dec)
    with pytest.raises(ValueError, match="did you mean smollm2-135m-matryoshka"):
        load_sae("smollm2-135-matryoshka")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-matryoshka").mkdir()  # a folder of that name is what is meant
    with pytest.raises(ValueError, match="holds no SAE"):
        load_sae("smollm2-135m-matryoshka")


def test_its_card_shows_how_to_load_it() -> None:
    card = (SAE_FOLDER / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["sae"].cfg.d_sae == WIDTHS[-1]
    assert names["second_level"].cfg.d_sae == WIDTHS[1]
    assert all(f"| {width} |" in card for width in WIDTHS)
