"""What `workarounds` changes in SAEBench's process, in this one."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformer_lens import HookedTransformer

from sae_lens_matryoshka.saebench import workarounds
from tests.saebench.conftest import Output, flags, run_eval
from tests.saebench.saes import MODEL_NAME


def test_absorption_runs_few_layers_and_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedTransformer.from_pretrained_no_processing(MODEL_NAME, device="cpu")
    prompts, hook_name = (
        ["The cat sat on a mat", "A dog ran to the cat"],
        "blocks.1.hook_resid_post",
    )
    _, cache = model.run_with_cache(prompts, names_filter=[hook_name])
    expected = cache[hook_name][:, -3]
    n_runs = [0, 0, 0]
    for layer, block in enumerate(model.blocks):

        def count(*_: object, layer: int = layer) -> None:
            n_runs[layer] += 1

        block.register_forward_pre_hook(count)

    monkeypatch.setattr(HookedTransformer, "run_with_cache", HookedTransformer.run_with_cache)
    for patch in (workarounds._stop_after_hook, workarounds._remember_activations):
        patch.cache_clear()
    workarounds._stop_after_hook()
    workarounds._remember_activations(-3)
    for _ in range(2):
        _, cache = model.run_with_cache(prompts, names_filter=[hook_name])
        torch.testing.assert_close(cache[hook_name][:, -3], expected)
    assert n_runs == [1, 1, 0]
    model.run_with_cache(prompts[:1], names_filter=[hook_name])
    assert n_runs == [2, 2, 0]


def test_absorption_of_some_words(tmp_path: Path) -> None:
    output = run_eval(
        tmp_path / "out",
        *("identity", "--seeds", "1", *flags("absorption", n_words=600, min_feats_for_eval=1)),
    )
    assert output.code == 0, output.text
    (folder,) = (file.parent for file in output.out.rglob("probe.pth"))
    n_words = [len(pd.read_csv(folder / f"{split}_df.csv")) for split in ("train", "test")]
    assert sum(n_words) == 600


def test_an_sae_of_transformers_own_model(everything: Output, saes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(saes / "trained", folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "gpt_neox.layers.1",
        "model_from_pretrained_kwargs": {"attn_implementation": "eager"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    output = run_eval(
        tmp_path / "out", str(folder), "--levels", "5", "--seeds", "1", *flags("core")
    )
    assert output.code == 0, output.text
    for label in ("variance explained", "CE loss score", "L0"):
        assert output.score("renamed", label) == everything.score("trained", label)
