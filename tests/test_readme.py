"""The README's examples of trained SAEs, run as they stand."""

import re
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig

from tests.loopback_hub import LoopbackHub

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_variants_are_configs_of_their_options() -> None:
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "level_weights" in code
    )
    made = []
    names: dict[str, Any] = {}
    for line in example.splitlines():
        if line.startswith("Matryoshka"):
            made.append(eval(line.partition("  #")[0], names))
        else:
            exec(line, names)
    assert len(made) == 5
    assert made[0].weights_at(0) == [0.75**4, 0.75**3, 0.75**2, 0.75, 1]
    assert (made[1].stop_gradient, made[1].latent_order) == ("inner", "frequency")
    assert (len(made[2].prefixes_at(0)), made[2].prefixes_at(0)[0] >= 64) == (10, True)
    assert made[3].k_at(2500) == 60
    assert (made[4].k_at(0), made[4].k_at(25_000), made[4].k_at(50_000)) == (80, 60, 40)


def test_second_level_of_a_published_sae(hub: LoopbackHub, tmp_path: Path) -> None:
    example, of_the_package = (
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

    exec(of_the_package, names)  # after the example, whose import of load_sae it takes
    assert names["sae"].cfg.d_sae == 4096
    assert names["sae"].cfg.metadata.hook_name == "model.layers.7"
