"""Which devices are accepted, and the warning of bfloat16 where a processor is slow in it."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from sae_lens import StandardTrainingSAEConfig

from sae_lens_matryoshka.activations.caching import Cache
from sae_lens_matryoshka.runs.dry_run import describe_run
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner
from sae_lens_matryoshka.util import devices
from tests.tiny import D_MODEL, runner_config, tiny_model, token_dataset


def slow_fields(monkeypatch: pytest.MonkeyPatch, is_fast: bool, device: str) -> list[str]:
    """The fields that are warned of."""
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: is_fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        devices.warn_of_slow_autocast(device, autocast=False, autocast_lm=True)
    return re.findall(r"(\w+)=True: this processor", " ".join(str(w.message) for w in caught))


def test_warns_of_bfloat16_on_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slow_fields(monkeypatch, is_fast=False, device="cpu") == ["autocast_lm"]
    assert slow_fields(monkeypatch, is_fast=False, device="cuda") == []
    assert slow_fields(monkeypatch, is_fast=True, device="cpu") == []


@pytest.mark.parametrize("field", ["autocast", "autocast_lm"])
def test_a_run_warns_before_it_loads_a_model(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: False)
    sae = StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=1)
    options: dict[str, Any] = {field: True, "model_name": "no such model"}
    cfg = runner_config(sae, tmp_path, **options)
    for start in (describe_run, MatryoshkaTrainingRunner):
        with (
            pytest.warns(UserWarning, match=f"^{field}=True: .* Give {field}: false"),
            pytest.raises(ValueError, match="no such model"),
        ):
            start(cfg)


def test_only_a_cache_of_a_model_warns_of_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: False)
    sae = StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=1)
    cfg = runner_config(sae, tmp_path / "run", autocast_lm=True, training_tokens=100)
    with pytest.warns(UserWarning, match="^autocast_lm=True"):
        cache = Cache(cfg, tmp_path / "acts")
    cache.write(override_model=tiny_model(), override_dataset=token_dataset())
    with warnings.catch_warnings():  # which runs no model
        warnings.filterwarnings("error", "autocast_lm")
        MatryoshkaTrainingRunner(cfg, activations=tmp_path / "acts")
