"""The configs that SAEBench gets."""

from pathlib import Path
from typing import Any

import pytest

from sae_lens_matryoshka.saebench import worker
from sae_lens_matryoshka.saebench.records import Job


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "settings", "autocast"),
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
    has_bfloat16: bool,
    settings: dict[str, Any],
    autocast: bool,
) -> None:
    monkeypatch.setattr(worker, "multiplies_bfloat16", lambda: has_bfloat16)
    job = Job(
        evaluation="meta_structure",
        candidates=[],
        seed=0,
        device=device,
        settings=settings,
        model_name="pythia-70m-deduped",
        out=tmp_path,
        shared=tmp_path,
    )
    assert worker.make_config(job).autocast == autocast
