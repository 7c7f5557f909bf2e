"""The last part of the demo: SAEBench on both of its SAEs, offline, in its folder."""

import json
from pathlib import Path


def test_both_saes_and_every_level(demo_run: Path) -> None:
    summary = json.loads((demo_run / "saebench" / "summary.json").read_text())
    assert summary["not_run"] == []
    widths = (32, 96, 224, 480)
    levels = [*(f"matryoshka, first {width}" for width in widths), "matryoshka"]
    assert [sae["title"] for sae in summary["saes"]] == [*levels, "batchtopk"]
    assert [sae["width"] for sae in summary["saes"]] == [*widths, 1024, 1024]
    scores = {(s["sae"], s["label"]): s["mean"] for s in summary["scores"]}
    explained = [scores[title, "variance explained"] for title in levels]
    assert explained == sorted(explained)
    top_1 = "sparse probing, top 1"
    assert scores[levels[0], top_1] < scores["matryoshka", top_1]
    assert (demo_run / "saebench" / "report.html").exists()
