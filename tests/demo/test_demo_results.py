"""The aggregation of `scripts/demo_results.py`, and the table that the documents show."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "docs" / "results"


@pytest.fixture(scope="module")
def script() -> Any:
    file = REPOSITORY / "scripts" / "demo_results.py"
    spec = importlib.util.spec_from_file_location("demo_results", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(*values: float) -> dict[str, Any]:
    return {
        "saes": [{"title": "a, first 3", "label": "a", "width": 3}],
        "scores": [
            {
                "evaluation": "core",
                "label": "L0",
                "sae": "a, first 3",
                "width": 3,
                "values": dict(enumerate(values)),
            }
        ],
    }


def test_two_spreads(script: Any) -> None:
    (row,) = script.rows_of([summary(1, 3), summary(4, 4)])
    assert row["mean"] == 3
    assert row["std_over_training"] == pytest.approx(2**0.5)  # of 2 and 4
    assert row["std_over_evaluation"] == pytest.approx(2**0.5 / 2)  # of (1, 3) and of (4, 4)
    assert "| a | 3 | 3.000 ± 1.414 (0.707) |" in script.table([row])


def test_the_documents_show_what_was_measured(script: Any) -> None:
    rows = json.loads((RESULTS / "demo.json").read_text())["rows"]
    assert len(rows[0]["runs"]) >= 3
    assert script.table(rows) in (RESULTS / "demo.md").read_text()
