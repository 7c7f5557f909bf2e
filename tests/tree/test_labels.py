"""Labels from files."""

import json
from pathlib import Path

import pytest

from sae_lens_matryoshka.tree.page.labels import read_labels

AUTOINTERP = {  # as sae_bench.evals.autointerp writes it, cut to what matters here
    "eval_type_id": "autointerp",
    "eval_config": {"model_name": "tiny", "n_latents": 2},
    "eval_result_metrics": {"autointerp": {"autointerp_score": 0.9}},
    "eval_result_unstructured": {
        "3": {"latent": 3, "explanation": "names of foxes", "score": 1.0, "logs": "…"},
        "5": {"latent": 5, "explanation": "numbers", "score": 0.8, "logs": "…"},
    },
}


def read(values: object, tmp_path: Path) -> dict[int, str]:
    file = tmp_path / "labels.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return read_labels(file, 8, "abc")


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({"3": "weather", "5": " שלום "}, {3: "weather", 5: "שלום"}),
        ({"format_version": 1, "weights": "abc", "labels": {"0": "x", "1": " "}}, {0: "x"}),
        (AUTOINTERP, {3: "names of foxes", 5: "numbers"}),
        ({}, {}),
    ],
)
def test_what_is_read(values, labels, tmp_path):
    assert read(values, tmp_path) == labels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", r"labels\.json can't be read .*: labels are JSON such as"),
        ([1], r"labels\.json holds no labels: labels are JSON such as"),
        ({"x": "weather"}, "holds no labels"),
        ({"3": 4}, "holds no labels"),
        ({"eval_type_id": "core"}, "holds no labels"),
        ({**AUTOINTERP, "eval_result_unstructured": {"3": {"latent": 3}}}, "holds no labels"),
        ({"8": "far"}, "has a label of latent 8, and this SAE has latents 0 to 7"),
        ({"weights": "other", "sae": "fox", "labels": {}}, "has labels of another SAE, 'fox'"),
    ],
)
def test_mistakes(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(values, tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="none can't be read"):
        read_labels(tmp_path / "none", 8, "abc")
