"""The README's examples of trained SAEs, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig

from tests.loopback_hub import LoopbackHub

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_second_level_of_a_published_sae(hub: LoopbackHub, tmp_path: Path) -> None:
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_sae(" in code
    )
    assert len([line for line in example.splitlines() if line.strip()]) <= 5
    whole = JumpReLUSAE(JumpReLUSAEConfig(d_in=4, d_sae=32768))
    torch.nn.init.normal_(whole.b_enc)
    whole.save_model(tmp_path)
    folder = "standard/blocks.12.hook_resid_post"
    files = {f"{folder}/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    hub.add("chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40", files)

    names: dict[str, SAE] = {}
    exec(example, names)
    assert names["second"].cfg.d_sae == 512
    x = torch.randn(3, 4)
    torch.testing.assert_close(names["second"].encode(x), whole.encode(x)[:, :512])
