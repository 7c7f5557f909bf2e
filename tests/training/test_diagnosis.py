"""Faults of Matryoshka SAEs are recognised, on runs that have them, and healthy runs are silent."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka import (
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
    cli,
)
from sae_lens_matryoshka.levels.slicing import levels
from sae_lens_matryoshka.levels.stats import measure_levels, measured_of, stats_from_weights
from sae_lens_matryoshka.training import monitoring
from sae_lens_matryoshka.training.code_stats import CodeStats
from sae_lens_matryoshka.training.diagnosis import Measured, diagnose
from sae_lens_matryoshka.training.monitoring import TrainingMonitor
from tests.steps import dense, outcome, run_step

Features = Callable[[int], torch.Tensor]  # (B, d_in) activations of orthonormal features


def tree(n: int) -> torch.Tensor:
    """Three parents (p 0.15) of three exclusive children each (p 0.2), and eight others (p 0.05).

    L0 is 1.12.
    """
    parents = torch.rand(n, 3, 1) < 0.15
    children = parents & (torch.randint(5, (n, 3, 1)) == torch.arange(3))
    others = torch.rand(n, 8) < 0.05
    return torch.cat([parents.flatten(1), children.flatten(1), others], dim=1).float()


def sparse(n: int) -> torch.Tensor:
    """Twenty features (p 0.08) of different strengths; L0 is 1.6."""
    return (torch.rand(n, 20) < 0.08) * (1 + 0.2 * torch.randn(n, 20))


def strong_and_rare(n: int) -> torch.Tensor:
    """Ten features (p 0.12) of strength 1 and ten (p 0.02) of strength 4; L0 is 1.4."""
    return torch.cat([(torch.rand(n, 10) < 0.12).float(), 4.0 * (torch.rand(n, 10) < 0.02)], dim=1)


def together(n: int) -> torch.Tensor:
    """Four features that come with a common cause (p 0.4, each 0.8 of the time), and 16 others.

    L0 is 2.1.
    """
    common = (torch.rand(n, 1) < 0.4) & (torch.rand(n, 4) < 0.8)
    return torch.cat([common, torch.rand(n, 16) < 0.05], dim=1).float()


def train(
    features: Features, monkeypatch: pytest.MonkeyPatch, rotate: bool = True, **options: Any
) -> tuple[MatryoshkaTrainingSAE, dict[str, str]]:
    """An SAE after two checks, and its warnings by the kinds that `diagnose` calls them."""
    monkeypatch.setattr(monitoring, "FIRST_CHECK", 500)
    monkeypatch.setattr(monitoring, "OBSERVED_EVERY", 1)
    kinds: list[str] = []

    def recorded(measured: Measured) -> Any:
        findings = diagnose(measured)
        kinds.extend(finding.kind for finding in findings if finding.kind not in kinds)
        return findings

    monkeypatch.setattr(monitoring, "diagnose", recorded)
    torch.manual_seed(0)
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(d_in=20, **options))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    rotation = torch.linalg.qr(torch.randn(20, 20)).Q if rotate else torch.eye(20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silent = torch.zeros(sae.cfg.d_sae)  # steps since each latent was active
        for step in range(1, 1001):
            output = run_step(sae, features(256) @ rotation, silent > 50, step)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            silent = torch.where(dense(output.feature_acts).any(0), 0, silent + 1)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(messages) == len(kinds), "each kind warns once"
    return sae, dict(zip(kinds, messages, strict=True))


@pytest.mark.parametrize(
    ("features", "options"),
    [
        (tree, {"d_sae": 20, "k": 1.2, "matryoshka_widths": [3, 20]}),
        (sparse, {"d_sae": 20, "k": 1.6, "matryoshka_widths": [5, 10, 20]}),
        (tree, {"d_sae": 20, "k": 1.2, "matryoshka_widths": [20]}),
    ],
)
def test_healthy_runs_are_silent(
    features: Features, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = train(features, monkeypatch, baseline_explained_variance=0.95, **options)
    assert found == {}


@pytest.mark.parametrize(
    ("kind", "message", "features", "options"),
    [
        (
            "baseline",
            "1,000 .* points less than the BatchTopK baseline's 99.0%. Try fewer or wider",
            tree,
            {"k": 0.8, "matryoshka_widths": [3, 20], "baseline_explained_variance": 0.99},
        ),
        (
            "close levels",
            "differ: 28 and 30 .* Try fewer levels",
            sparse,
            {"k": 1.6, "d_sae": 30, "matryoshka_widths": [10, 28, 30]},
        ),
        (
            "rare inner latents",
            r"\d+ of the 10 latents that level 10 adds .* Try latent_order",
            strong_and_rare,
            {"k": 1.4, "matryoshka_widths": [10, 20]},
        ),
        (
            "narrow level",
            r"0\.8. of 2 \(4.%\)\. .* Try a wider first level",
            together,
            {"k": 2.1, "matryoshka_widths": [2, 20]},
        ),
        (
            "k too small",
            r"the k=0\.4 active .* Try a larger k",
            tree,
            {"k": 0.4, "matryoshka_widths": [3, 20]},
        ),
        (
            "k too large",
            "the k=5 active latents .* Try a smaller k",
            tree,
            {"k": 5, "matryoshka_widths": [3, 20]},
        ),
    ],
)
def test_each_fault_is_found_alone(
    kind: str,
    message: str,
    features: Features,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, found = train(features, monkeypatch, **{"d_sae": 20, **options})
    assert list(found) == [kind]
    assert re.search(message, found[kind]), found[kind]


HEALTHY = Measured(
    widths=[4, 8, 16],
    explained_variance=[0.4, 0.6, 0.8],
    l0=[0.8, 1.4, 2.0],
    firing_rates=torch.tensor([0.2] * 4 + [0.15] * 4 + [0.075] * 8),
    n_tokens=100_000,
    weak_score=0.5,
    weak_half=0.35,
    k=2,
    baseline_explained_variance=0.82,
)


def kinds(**changes: Any) -> list[str]:
    return [finding.kind for finding in diagnose(replace(HEALTHY, **changes))]


def rates(changes: dict[int, float]) -> torch.Tensor:
    changed = HEALTHY.firing_rates.clone()
    for latent, rate in changes.items():
        changed[latent] = rate
    return changed


@pytest.mark.parametrize(
    ("kind", "silent", "found"),
    [
        (
            "baseline",
            {"baseline_explained_variance": 0.849},
            {"baseline_explained_variance": 0.851},
        ),
        (
            "baseline",
            {"baseline_explained_variance": 0.9, "expected_gain": 0.051},
            {"baseline_explained_variance": 0.9, "expected_gain": 0.049},
        ),
        (
            "close levels",
            {"explained_variance": [0.4, 0.795, 0.8]},  # L0 tells them apart
            {"explained_variance": [0.4, 0.795, 0.8], "l0": [0.8, 1.97, 2.0]},
        ),
        (
            "close levels",
            {"explained_variance": [0.589, 0.6, 0.8], "l0": [1.0, 1.0, 2.0]},
            {"explained_variance": [0.591, 0.6, 0.8], "l0": [1.0, 1.0, 2.0]},
        ),
        (
            "rare inner latents",
            {"firing_rates": rates({0: 0.0, 5: 0.03})},  # one of four in either level
            {"firing_rates": rates({0: 0.0, 1: 0.03})},
        ),
        (
            "rare inner latents",
            {"firing_rates": rates({6: 0.04, 7: 0.04})},
            {"firing_rates": rates({6: 0.037, 7: 0.037})},
        ),
        (
            "rare inner latents",
            {"firing_rates": rates({0: 0.0, 1: 0.0}), "n_tokens": 9_999},
            {"firing_rates": rates({0: 0.0, 1: 0.0}), "n_tokens": 10_000},
        ),
        (
            "rare inner latents",
            {"firing_rates": rates(dict.fromkeys(range(8, 16), 0.0))},
            {"firing_rates": rates(dict.fromkeys([0, 1, *range(8, 16)], 0.0))},
        ),
        ("narrow level", {"l0": [0.99, 1.4, 2.0]}, {"l0": [1.01, 1.4, 2.0]}),
        ("k too large", {"k": 2.2}, {"k": 2.3}),
        (
            "k too large",
            {"weak_half": 0.201, "explained_variance": [0.4, 0.6, 0.91]},
            {"weak_half": 0.199, "explained_variance": [0.4, 0.6, 0.91]},
        ),
        (
            "k too large",
            {"weak_half": 0.1, "explained_variance": [0.4, 0.6, 0.89]},
            {"weak_half": 0.1, "explained_variance": [0.4, 0.6, 0.91]},
        ),
        (
            "k too large",
            {"firing_rates": torch.tensor([0.2] * 10)},
            {"firing_rates": torch.tensor([0.21] * 5 + [0.19] * 5)},
        ),
        ("k too small", {"weak_score": 0.99}, {"weak_score": 1.01}),
        (
            "k too small",
            {"weak_score": 0.97, "explained_variance": [0.4, 0.6, 0.79]},
            {"weak_score": 0.98, "explained_variance": [0.4, 0.6, 0.79]},
        ),
        ("k too small", {}, {"l0": [0.0] * 3, "firing_rates": torch.zeros(16)}),
        (
            "undertrained",
            {
                "explained_variance": [-0.5, -0.2, 0.01],
                "baseline_explained_variance": None,
                "weak_score": 0.0,
            },
            {"explained_variance": [-0.5, -0.2, 0.0]},
        ),
    ],
)
def test_thresholds(kind: str, silent: dict[str, Any], found: dict[str, Any]) -> None:
    assert kinds(**silent) == []
    assert kinds(**found) == [kind]


@given(
    weak_score=st.floats(0, 1),
    weak_half=st.floats(0, 0.5),
    k=st.floats(0.1, 10),
    first_l0=st.floats(0.1, 2),
    dead=st.sets(st.integers(0, 7)),
)
def test_a_k_far_off_is_found_instead_of_its_effect_on_levels(
    weak_score: float, weak_half: float, k: float, first_l0: float, dead: set[int]
) -> None:
    found = kinds(
        weak_score=weak_score,
        weak_half=weak_half,
        k=k,
        l0=[first_l0, 2.0, 2.0],
        firing_rates=rates(dict.fromkeys(dead, 0.0)),
    )
    assert len(found) == len(set(found))
    if found and found[-1].startswith("k too"):
        assert not {"narrow level", "rare inner latents"} & set(found)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.integers(1, 5))
def test_code_stats_are_those_of_sorted_scores(scores: list[float], n_repeats: int) -> None:
    values = torch.tensor(scores)
    codes = CodeStats()
    for _ in range(n_repeats):
        codes.add(values, torch.arange(len(values)) % 7, n_tokens=30, d_sae=8)
        codes.add(values[:0], torch.arange(0), n_tokens=10, d_sae=8)
    ascending, n = sorted(values.tolist()), len(values)
    assert codes.weak_score == pytest.approx(ascending[n // 10] / (sum(ascending) / n), rel=1e-4)
    half = sum(ascending[: (n + 1) // 2])
    assert codes.weak_half == pytest.approx(half / sum(ascending), rel=1e-4)
    assert codes.n_tokens == 40 * n_repeats
    counts = [sum(i % 7 == latent for i in range(n)) for latent in range(8)]
    assert codes.firing_rates.tolist() == pytest.approx([count / 40 for count in counts])


def test_code_stats_sample_every_code_of_a_row() -> None:
    """Of a TopK SAE each row has k codes, and their strength may depend on the latent."""
    scores = torch.linspace(2, 1, 32).repeat(4096) ** 2
    codes = CodeStats()
    codes.add(scores, torch.arange(len(scores)) % 32, n_tokens=4096, d_sae=32)
    ascending = scores.sort().values
    exact = ascending[len(scores) // 10] / ascending.mean(), ascending[: len(scores) // 2].sum()
    assert codes.weak_score == pytest.approx(exact[0].item(), rel=0.02)
    assert codes.weak_half == pytest.approx((exact[1] / ascending.sum()).item(), rel=0.02)


def test_padding_is_no_weak_score() -> None:
    values = torch.linspace(1, 2, 100)
    alone, padded = CodeStats(), CodeStats()
    alone.add(values, torch.arange(100) % 7, n_tokens=30, d_sae=8)
    zeros = torch.zeros(100)
    latents = torch.cat([torch.arange(100) % 7, torch.full((100,), 7)])
    padded.add(torch.cat([values, zeros]), latents, n_tokens=30, d_sae=8)
    assert torch.equal(padded.firing_rates, alone.firing_rates)
    assert padded.weak_score >= alone.weak_score
    assert padded.weak_half >= alone.weak_half


def test_checks_after_doubling_steps_and_warns_of_each_kind_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Measured] = []
    monkeypatch.setattr(monitoring, "FIRST_CHECK", 4)
    monkeypatch.setattr(monitoring, "OBSERVED_EVERY", 1)
    monkeypatch.setattr(
        monitoring, "diagnose", lambda measured: seen.append(measured) or diagnose(measured)
    )
    monitor = TrainingMonitor(
        MatryoshkaTrainingSAEConfig(
            d_in=3, d_sae=8, k=2, matryoshka_widths=[2, 8], baseline_explained_variance=0.9
        )
    )
    x = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])  # of variance 1
    checks, warned = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 20):
            before = len(caught), len(seen)
            loss = 0.5 if step <= 4 else 0.25
            scores, latents = torch.ones(2) * step, torch.tensor([1, 7])
            if monitor.is_due(step - 1):
                monitor.observe(torch.tensor([0.75, loss]), scores, latents, x, step - 1)
            checks += [step] * (len(seen) - before[1])
            warned += [step] * (len(caught) - before[0])
    assert checks == [4, 8, 16]
    assert [measured.n_tokens for measured in seen] == [4, 8, 16]
    assert [measured.explained_variance for measured in seen] == [
        pytest.approx([0.25, 0.5]),
        pytest.approx([0.25, 0.75]),
        pytest.approx([0.25, 0.75]),
    ]
    assert [measured.l0 for measured in seen] == [[0.5, 1.0]] * 3
    assert [measured.baseline_explained_variance for measured in seen] == [None, 0.9, 0.9]
    assert [measured.expected_gain for measured in seen] == pytest.approx([0, 0.25, 0])
    assert warned == [4, 16], "k too large at once, the baseline when nothing is gained any more"
    assert all(str(warning.message).startswith("After ") for warning in caught)


@pytest.mark.parametrize(
    ("options", "first_step", "checks"),
    [
        ({}, 0, [4, 8, 16]),
        ({"k_start": 4, "k_anneal_steps": 3}, 0, [8, 16]),
        ({"inner_weight_end": 0.1, "inner_fade_start": 2, "inner_fade_steps": 3}, 0, [16]),
        ({}, 9, [16]),
        ({"k_start": 4, "k_anneal_steps": 3}, 9, [16]),
    ],
)
def test_counts_the_steps_of_the_run_and_waits_for_schedules(
    monkeypatch: pytest.MonkeyPatch, options: Any, first_step: int, checks: list[int]
) -> None:
    monkeypatch.setattr(monitoring, "FIRST_CHECK", 4)
    monkeypatch.setattr(monitoring, "OBSERVED_EVERY", 1)
    seen: list[Measured] = []
    monkeypatch.setattr(monitoring, "diagnose", lambda measured: seen.append(measured) or [])
    cfg = MatryoshkaTrainingSAEConfig(d_in=3, d_sae=8, k=2, matryoshka_widths=[2, 8], **options)
    monitor = TrainingMonitor(cfg)
    x, done = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), []
    for step in range(first_step, 20):
        before = len(seen)
        if monitor.is_due(step):
            monitor.observe(torch.ones(2), torch.ones(2), torch.tensor([1, 7]), x, step)
        done += [step + 1] * (len(seen) - before)
    assert done == checks
    assert {measured.k for measured in seen} == {2}


def test_one_step_in_sixteen_of_the_latter_half_is_due() -> None:
    cfg = MatryoshkaTrainingSAEConfig(d_in=3, d_sae=8, k=2, matryoshka_widths=[2, 8])
    monitor = TrainingMonitor(cfg)
    assert [step for step in range(4000) if monitor.is_due(step)] == list(range(2015, 4000, 16))


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
def test_changes_no_number(implementation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "FIRST_CHECK", 2)
    monkeypatch.setattr(monitoring, "OBSERVED_EVERY", 1)
    results = []
    for observes in (True, False):
        torch.manual_seed(0)
        sae = MatryoshkaTrainingSAE(
            MatryoshkaTrainingSAEConfig(
                d_in=8, d_sae=32, k=3, matryoshka_widths=[4, 32], implementation=implementation
            )
        )
        if not observes:
            monkeypatch.setattr(sae._monitor, "observe", lambda *_: None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(
                [outcome(sae, run_step(sae, torch.randn(20, 8), None, step)) for step in range(4)]
            )
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    x = tree(20_000)
    np.save("x.npy", x.numpy())
    for name, k in (("good", 0.9), ("large", 5.0)):
        sae, _ = train(
            lambda n: x[torch.randint(len(x), (n,))],
            monkeypatch,
            rotate=False,
            d_sae=20,
            k=k,
            matryoshka_widths=[3, 20],
        )
        sae.save_inference_model(name)

    def levels_of(*words: str) -> tuple[str, dict[str, Any]]:
        words = ("--activations", "x.npy", "--json", "levels.json", *words)
        assert cli.main(["levels", *words]) == 0
        return capsys.readouterr().out, json.loads(Path("levels.json").read_text())

    printed, report = levels_of("good", "--diagnose")
    assert printed.endswith("\n\nNothing stands out.\n")
    assert report["findings"] == []
    good = report["levels"][-1]["explained_variance"]
    assert good < 0.93
    printed, report = levels_of("large", "--diagnose")
    (finding,) = report["findings"]
    assert finding["kind"] == "k too large"
    assert printed.endswith(f"\n\n- k too large: {finding['message']}\n")
    large = report["levels"][-1]["explained_variance"]
    assert large > 0.98
    assert "findings" not in levels_of("good")[1]

    share = "--baseline-explained-variance"
    assert levels_of("good", "--diagnose", share, str(good + 0.049))[1]["findings"] == []
    by_number = levels_of("good", "--diagnose", share, str(large))[1]["findings"]
    by_folder = levels_of("good", "--diagnose", "--baseline", "large")[1]["findings"]
    assert by_number == by_folder
    assert [finding["kind"] for finding in by_folder] == ["baseline"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--diagnose", "give --activations or --dataset"),
        ("--activations . --baseline .", "a baseline is for --diagnose"),
        ("--activations . --diagnose --baseline . --baseline-explained-variance 0.8", "give one"),
        ("--activations . --diagnose --baseline nowhere", "'nowhere' is not a folder"),
        ("--activations . --diagnose --baseline-explained-variance 78", "=78.0 is not accepted"),
    ],
)
def test_bad_options_of_the_command(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["levels", "sae", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, 1.01, 78, float("nan"), True, "0.8"])
def test_baselines_that_are_no_share(value: Any) -> None:
    with pytest.raises(ValueError, match=r"baseline_explained_variance=.* such as 0\.78"):
        MatryoshkaTrainingSAEConfig(d_in=8, d_sae=32, k=3, baseline_explained_variance=value)


def test_k_of_an_sae(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its training, and for a level, which was asked for none, its L0."""
    torch.manual_seed(0)
    sae = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(d_in=8, d_sae=32, k=3, matryoshka_widths=[4, 32])
    )
    sae.topk_threshold.fill_(0.01)
    for level, has_k in zip(levels(sae), (False, True), strict=True):
        codes = CodeStats()
        rows = measure_levels(level, torch.randn(100, 8), codes=codes)
        measured = measured_of(level, rows, codes)
        assert measured.k == (3 if has_k else rows[-1].l0)
        assert measured.firing_rates.sum().item() == pytest.approx(rows[-1].l0)
    with pytest.raises(ValueError, match="measure them on activations"):
        measured_of(sae, stats_from_weights(sae), CodeStats())
