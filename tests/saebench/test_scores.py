"""Means, intervals and rankings."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.fingerprint import fingerprint
from sae_lens_matryoshka.saebench.candidates import labels
from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS
from sae_lens_matryoshka.saebench.records import Candidate, Record
from sae_lens_matryoshka.saebench.scores import (
    Score,
    are_apart,
    comparisons,
    l0_by_key,
    read_scores,
    write_summary,
)

OURS = Candidate(label="ours", source=("ours",), width=64, d_sae=64)
LEVEL = OURS.model_copy(update={"width": 16})
BASE = Candidate(label="base", source=("base",), width=64, d_sae=64, is_baseline=True)
WRITTEN_BEFORE = Path(__file__).parents[1] / "written_before" / "eval"
RAVEL = EVALUATIONS["ravel"].metrics[0]
seeds_of_values = st.lists(st.floats(-1, 1), min_size=2, max_size=6).map(
    lambda values: dict(enumerate(values))
)


def score(candidate: Candidate, *values: float, evaluation: str = "scr") -> Score:
    metric = EVALUATIONS[evaluation].metrics[0]
    return Score(evaluation, metric, candidate, dict(enumerate(values)))


def test_interval_is_students() -> None:
    # t(0.975, 2) = 4.302653, from a table
    own = score(OURS, 0.1, 0.2, 0.3)
    assert own.mean == pytest.approx(0.2)
    assert own.std == pytest.approx(0.1)
    assert own.interval == pytest.approx((0.2 - 0.248414, 0.2 + 0.248414), abs=1e-5)
    assert score(OURS, 0.1).interval is None


@given(seeds_of_values, seeds_of_values)
def test_apart_means_that_no_number_is_in_both_intervals(
    a: dict[int, float], b: dict[int, float]
) -> None:
    ours, base = Score("ravel", RAVEL, OURS, a), Score("ravel", RAVEL, BASE, b)
    assert ours.interval is not None
    assert base.interval is not None
    low, high = max(ours.interval[0], base.interval[0]), min(ours.interval[1], base.interval[1])
    assert are_apart(ours, base) == are_apart(base, ours) == (low > high)
    (sentence,) = comparisons([ours, base])
    assert ("is better" in sentence) == (low > high)
    assert not are_apart(ours, ours)


def test_only_what_is_apart_is_ranked() -> None:
    level = score(LEVEL, 9, 9, 9)
    assert comparisons([score(OURS, 0.1, 0.2, 0.3), level, score(BASE, 0.2, 0.3, 0.4)]) == [
        "SCR, 20 latents: ours 0.200 ± 0.100 (L0 not measured), base 0.300 ± 0.100 (L0 not "
        "measured): not ranked, read it as a range."
    ]
    apart = comparisons([score(OURS, 0.10, 0.11, 0.12), score(BASE, 0.4, 0.41, 0.42)])
    assert apart[0].endswith("not ranked, read it as a range."), "SCR is never ranked"
    close = [score(OURS, 1, 2, 3, evaluation="ravel"), score(BASE, 2, 3, 4, evaluation="ravel")]
    assert comparisons(close)[0].endswith("the 95% intervals of the means overlap.")
    lower = [score(OURS, 0.10, 0.11, 0.12, evaluation="absorption")]
    lower += [score(BASE, 0.4, 0.41, 0.42, evaluation="absorption")]
    assert comparisons(lower)[0].endswith("ours is better, the 95% intervals are apart.")
    one = [score(OURS, 0.1, evaluation="ravel"), score(BASE, 0.9, evaluation="ravel")]
    assert "not ranked, from one seed" in comparisons(one)[0]
    core = [score(OURS, 0.1, evaluation="core"), score(BASE, 0.9, evaluation="core")]
    assert "not ranked, it has no spread" in comparisons(core)[0]


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    record = Record(
        model_name="m",
        fingerprints={"ours": "f"},
        candidates=[OURS],
        settings={"absorption": {}, "core": {}},
    )
    metrics = {"mean": {"mean_absorption_fraction_score": float("nan")}}
    for evaluation, seed, content in (
        ("absorption", 0, metrics),
        ("absorption", 1, {"mean": {"mean_absorption_fraction_score": 0.5}}),
        ("core", 0, {"sparsity": {"l0": 12.5}}),
    ):
        folder = tmp_path / evaluation / f"seed_{seed}"
        folder.mkdir(parents=True)
        file = folder / "ours_width_64_custom_sae_eval_results.json"
        file.write_text(json.dumps({"eval_result_metrics": content}))
    scores = read_scores(record, tmp_path)
    assert [(s.evaluation, dict(s.values)) for s in scores] == [
        ("absorption", {1: 0.5}),
        ("core", {0: 12.5}),
    ]
    assert l0_by_key(scores) == {OURS.key: 12.5}
    write_summary(record, scores, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["saes"][0]["l0"] == 12.5


def test_a_folder_that_an_earlier_version_wrote(tmp_path: Path) -> None:
    """Made by version 746ea28, except for the details that were cut from SAEBench's files."""
    record = Record.read(WRITTEN_BEFORE)
    assert record is not None
    record.write(tmp_path)
    before, after = (
        json.loads((folder / "evaluated.json").read_text()) for folder in (WRITTEN_BEFORE, tmp_path)
    )
    assert after == before
    write_summary(record, read_scores(record, WRITTEN_BEFORE), tmp_path)
    before, after = (
        json.loads((folder / "summary.json").read_text()) for folder in (WRITTEN_BEFORE, tmp_path)
    )
    assert after == before


def test_labels_are_short_and_unique(tmp_path: Path) -> None:
    folders = [[str(tmp_path / name / "sae")] for name in ("k20", "k40")]
    assert labels([*folders, [str(tmp_path / "other")], ["release", "id/x"]]) == [
        "k20/sae",
        "k40/sae",
        "other",
        "release:id/x",
    ]
    assert labels([[str(tmp_path / "new" / "sae")]], taken=["sae"]) == ["new/sae"]
    hub = Candidate(label="release:id/x", source=("release", "id/x"), width=8, d_sae=64)
    assert hub.key == "release_id_x_width_8"


def test_fingerprint_is_of_the_weights(saes: Path) -> None:
    one, two = load_sae("random"), load_sae("random")
    assert fingerprint(one) == fingerprint(two)
    two.b_dec.data[3] = 1e-7
    assert fingerprint(one) != fingerprint(two)
