"""The aggregation of `scripts/demo_results.py`."""

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo_results.py"


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


def test_spreads_over_training_and_over_evaluation_seeds() -> None:
    rows_of = runpy.run_path(str(SCRIPT))["rows_of"]
    (row,) = rows_of([summary(1, 3), summary(4, 4)])
    assert row["mean"] == 3
    assert row["std_over_training"] == pytest.approx(2**0.5)  # of 2 and 4
    assert row["std_over_evaluation"] == pytest.approx(2**0.5 / 2)  # of (1, 3) and of (4, 4)
