"""The configs that SAEBench gets."""

from pathlib import Path
from typing import Any

import pytest

from sae_lens_matryoshka.saebench import worker
from sae_lens_matryoshka.saebench.records import Job


@pytest.mark.parametrize(
    ("device", "instructions", "settings", "autocast"),
    [
        ("cpu", True, {}, True),
        ("cpu", False, {}, False),
        ("cpu", False, {"autocast": True}, True),
        ("cuda", False, {}, True),
    ],
)
def test_meta_saes_in_bfloat16_only_where_it_is_fast(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    instructions: bool,
    settings: dict[str, Any],
    autocast: bool,
) -> None:
    monkeypatch.setattr(worker, "multiplies_bfloat16", lambda: instructions)
    job = Job(
        evaluation="meta_structure",
        candidates=[],
        seed=3,
        device=device,
        settings=settings,
        model_name="pythia-70m-deduped",
        out=tmp_path,
        shared=tmp_path,
    )
    config = worker.make_config(job)
    assert (config.autocast, config.random_seed) == (autocast, 3)
