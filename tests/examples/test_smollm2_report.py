"""What the report of examples/smollm2 makes of the files that the experiment writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from examples.smollm2.arms import Arm
from examples.smollm2.intervals import Value, difference, interpolated, mean
from examples.smollm2.report import (
    Results,
    absorbers_by_level,
    at_equal_variance,
    by_activations,
    cell,
    differences,
    letters_by_level,
    main,
    paired,
    picture,
    table,
    tables,
)

WIDTH = 4096


def write(folder: Path, arm: Arm, explained: float, full: tuple[int, int] | None = None) -> None:
    """The file of an SAE; `full` is the number of absorptions of two letters of 10 and 90 words."""
    saebench: dict[str, Any] = {}
    if full:
        letters = {
            letter: {
                "num_full_absorption": n,
                "num_probe_true_positives": words,
                "recall": recall,
                "precision": recall / 2,
                "latent": latent,
                "absorbing": absorbing[:n],
            }
            for letter, n, words, recall, latent, absorbing in (
                ("a", full[0], 10, 0.02, 127, [0, 127, 128, 4095]),
                ("b", full[1], 90, 0.7, 896, [895, 896, 1919, 1920]),
            )
        }
        losses = {"ce_loss_with_sae": 3.75, "ce_loss_without_sae": 3.5}
        core = {"model_performance_preservation": losses}
        saebench["core"] = {"widths": {WIDTH: core}}
        rate = (full[0] / 10 + full[1] / 90) / 2
        scores = {"mean_full_absorption_score": rate, "mean_num_split_features": 1.0}
        saebench["absorption"] = {"widths": {WIDTH: {"mean": scores, "letters": letters}}}
    measured = {"l0": float(arm.k), "explained_variance": explained, "n_dead": 5, "max_cosine": 0.2}
    levels = [{"width": WIDTH, **measured}]
    content = {"arm": arm._asdict(), "levels": levels, "saebench": saebench}
    (folder / f"{arm.name}.json").write_text(json.dumps(content))


def test_means_and_intervals() -> None:
    assert mean([]) is None
    assert mean([0.5]) == Value(0.5, None, 1)
    # 4.303: Student's t of 2 degrees of freedom; 1: the standard deviation
    assert mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5, 3), rel=1e-3)


def test_difference_is_welchs() -> None:
    a, b = [1.0, 2.0, 3.0], [2.0, 2.1, 2.6]
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    value = difference(a, b)
    assert value is not None
    assert value.half is not None
    assert value.mean - value.half == pytest.approx(interval.low)
    assert value.mean + value.half == pytest.approx(interval.high)
    assert difference([1.0], b) == pytest.approx((1.0 - 6.7 / 3, None, 1))
    assert difference([], b) is None


def test_interpolated() -> None:
    points = [(2.0, 20.0), (1.0, 10.0), (4.0, 0.0)]
    assert interpolated(points, 1.5) == 15.0
    assert interpolated(points, 3.0) == 10.0
    assert interpolated(points, 4.5) is None


def test_scores_that_are_made_of_saebenchs(tmp_path: Path) -> None:
    write(tmp_path, arm := Arm("batchtopk", 24, 0), 0.8, full=(5, 9))
    results = Results(tmp_path)
    assert results.value(arm, "absorption, full") == pytest.approx(0.3)
    assert results.value(arm, "full, by words") == pytest.approx(0.14)
    # the latent that was taken for "a" fires on 2 % of its words
    assert results.value(arm, "full, letters found") == pytest.approx(0.1)
    assert results.value(arm, "precision") == pytest.approx(0.18)  # the median of 0.01 and 0.35
    assert results.value(arm, "CE loss added") == 0.25
    assert results.value(arm, "probing, top 1") is None


def test_a_cell_with_fewer_seeds_says_so(tmp_path: Path) -> None:
    for seed in range(3):
        arm = Arm("matryoshka", 24, seed)
        write(tmp_path, arm, 0.8, full=(1, 9) if seed == 1 else None)
    rows = {"nested": (Arm("matryoshka", 24, 0), WIDTH)}
    results, columns = Results(tmp_path), ("L0", "absorption, full")
    row = table(results, "SAE", rows, columns).splitlines()[-1]
    assert row == "| nested | 24.0 ± 0.0 | 0.100 (n 1) | 3 |"
    row = table(results, "SAE", rows, columns, seed=1).splitlines()[-1]
    assert row == "| nested | 24.0 | 0.100 | 1 |"
    assert cell(Value(0.25, None, 1), 2, sign="+") == "+0.25"


def test_at_equal_variance_batchtopk_is_interpolated(tmp_path: Path) -> None:
    for k, explained, n in ((12, 0.7, 0), (24, 0.8, 10), (48, 0.9, 10)):
        write(tmp_path, Arm("batchtopk", k, 0), explained, full=(0, 9 * n))
    write(tmp_path, Arm("matryoshka", 24, 0), 0.75, full=(0, 9))
    results = Results(tmp_path)
    assert at_equal_variance(results, ("L0", "full, by words")).splitlines()[2:] == [
        # 24 − √(12 · 24) and 0.09 − 0.45
        "| matryoshka, k 24 | 0.750 | +7.0 | -0.360 |"
    ]
    arms = {"nested": Arm("matryoshka", 24, 0), "not trained": Arm("recommended", 24, 0)}
    assert differences(results, arms, ("full, by words",)).splitlines()[2:] == [
        "| nested | -0.810 |"
    ]


def test_recipes_are_compared_by_seed(tmp_path: Path) -> None:
    for seed, plain, faded in ((0, 0.5, 0.6), (1, 0.8, 0.9), (2, 0.1, None)):
        write(tmp_path, Arm("matryoshka", 24, seed), plain)
        if faded:
            write(tmp_path, Arm("faded", 24, seed), faded)
    arms = Arm("recommended", 24, 0), Arm("faded", 24, 0)
    rows = paired(Results(tmp_path), arms, ("variance expl.",)).splitlines()
    assert rows[2:] == ["| faded, k 24 | +0.100 ± 0.000 |"]


def test_the_same_saes_are_compared_on_other_activations(tmp_path: Path) -> None:
    (earlier := tmp_path / "bfloat16").mkdir()
    for seed, explained in enumerate((0.5, 0.7)):
        write(tmp_path, Arm("matryoshka", 6, seed), explained)
        write(earlier, Arm("matryoshka", 6, seed), explained - 0.2)
    write(tmp_path, Arm("batchtopk", 6, 0), 0.9)
    rows = by_activations(Results(tmp_path), Results(earlier), ("variance expl.",)).splitlines()
    # 4.3027: Student's t of Welch's 2 degrees of freedom; √0.02: the standard deviation of each
    assert rows[2:] == [f"| matryoshka, k 6 | +0.200 ± {4.3027 * 0.02**0.5:.3f} |"]


def test_letters_by_the_level_of_their_latent(tmp_path: Path) -> None:
    for seed, full in enumerate(((5, 9), (4, 18))):
        write(tmp_path, Arm("matryoshka", 12, seed), 0.8, full)
    rows = letters_by_level(Results(tmp_path), ("matryoshka",)).splitlines()
    assert rows[2:] == ["| matryoshka, k 12 | 50% | 0.450 | 0% |  | 50% | 0.150 |"]


def test_absorbing_latents_by_their_level(tmp_path: Path) -> None:
    for seed, full in enumerate(((4, 0), (0, 4), (1, 2))):
        write(tmp_path, Arm("matryoshka", 12, seed), 0.8, full)
    rows = absorbers_by_level(Results(tmp_path), ("matryoshka",)).splitlines()
    assert rows[2:] == [
        "| matryoshka, k 12 | first level | 30 | 0 | 3 | 2 |",  # 0, 127, 0; 128, 4095
        "| matryoshka, k 12 | other levels | 270 | 2 | 3 | 1 |",  # 895, 895; 896, 1919, 896; 1920
    ]


def test_the_picture_has_a_point_for_each_seed_and_a_line_through_the_means(tmp_path: Path) -> None:
    for k, seed, n in ((12, 0, 9), (12, 1, 18), (48, 0, 27)):
        write(tmp_path, Arm("matryoshka", k, seed), 0.8, full=(0, n))
    axis = picture(Results(tmp_path)).axes[0]
    assert axis.get_ylabel() == "absorption, full"
    line, *points = (xy.tolist() for each in axis.lines if len(xy := each.get_xydata()))
    assert line == [[12, pytest.approx(0.075)], [48, pytest.approx(0.15)]]
    assert points == [
        [[12, pytest.approx(0.05)], [12, pytest.approx(0.1)]],
        [[48, pytest.approx(0.15)]],
    ]


def test_a_report_of_other_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --results {tmp_path} has no JSON file: run.py writes them.\n"
    )
    write(tmp_path, Arm("matryoshka", 24, 0), 0.75)
    assert main(["--results", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "\n| matryoshka, k 24 | 24.0 | 0.750 |" in text
    assert "## tuning" not in text, "it has no rows"
    assert (tmp_path / "report.png").exists()


def test_the_page_has_a_place_for_each_table(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "results" / "smollm2.md"
    places = [line for line in page.read_text().splitlines() if line.startswith("<!-- table ")]
    empty = Results(tmp_path)
    assert sorted(places) == sorted(f"<!-- table {name} -->" for name in tables(empty, empty))
