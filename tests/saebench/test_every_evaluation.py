"""SAEBench's own evaluations through `eval`: values that a broken SAE would not give."""

import importlib
import json
from pathlib import Path

import jsonschema
import pytest
from matplotlib import image
from pydantic import TypeAdapter

from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, installed, result_file
from tests.saebench.conftest import SETTINGS, Output, artifacts

LEVEL, TRAINED, RANDOM, IDENTITY = "trained, first 24", "trained", "random", "identity"
KEYS = {
    LEVEL: "trained_width_24",
    TRAINED: "trained_width_256",
    RANDOM: "random_width_256",
    IDENTITY: "identity_width_256",
}


def file_of(output: Output, evaluation: str, sae: str) -> Path:
    return result_file(output.out / evaluation / "seed_0", evaluation, KEYS[sae])


def test_core(everything: Output) -> None:
    for label in ("variance explained", "CE loss score"):
        scores = [everything.score(sae, label) for sae in (RANDOM, LEVEL, TRAINED, IDENTITY)]
        assert scores == sorted(scores)
        assert scores[3] == pytest.approx(1, abs=1e-3)
        assert scores[1] < scores[2] - 0.1
    assert everything.score(RANDOM, "variance explained") < 0
    assert everything.score(TRAINED, "L0") == pytest.approx(8, rel=0.1)  # k
    assert everything.score(LEVEL, "L0") < everything.score(TRAINED, "L0")
    assert everything.score(IDENTITY, "L0") == pytest.approx(128, abs=0.01)


def test_sparse_probing(everything: Output) -> None:
    top_1 = {sae: everything.score(sae, "sparse probing, top 1") for sae in KEYS}
    assert top_1[RANDOM] < top_1[LEVEL] < top_1[TRAINED] <= 1
    metrics = json.loads(file_of(everything, "sparse_probing", IDENTITY).read_text())
    whole = metrics["eval_result_metrics"]
    assert whole["sae"]["sae_test_accuracy"] == pytest.approx(
        whole["llm"]["llm_test_accuracy"], abs=0.02
    ), "all of the identity's latents say what the activation says"


def test_sae_probes(everything: Output) -> None:
    for sae, width in ((LEVEL, 24), (TRAINED, 256)):
        result = json.loads(file_of(everything, "sparse_probing_sae_probes", sae).read_text())
        assert 0.55 < everything.score(sae, "sae-probes, top 5 AUC") < 0.9
        assert result["eval_result_metrics"]["llm"]["llm_test_auc"] > 0.6
        (probes,) = everything.out.glob(
            f".saebench/sparse_probing_sae_probes/seed_0/artifacts/**/{KEYS[sae]}_custom_sae/**/*.json"
        )
        indices = [index for row in json.loads(probes.read_text()) for index in row["indices"]]
        assert max(indices) < width


def test_absorption(everything: Output) -> None:
    latents = {sae: everything.score(sae, "latents per first letter") for sae in KEYS}
    assert max(latents[LEVEL], latents[TRAINED]) < min(latents[RANDOM], latents[IDENTITY])
    details = json.loads(file_of(everything, "absorption", LEVEL).read_text())
    assert len(details["eval_result_details"]) == 26, "every letter's probe is good enough"
    assert details["eval_config"]["k_sparse_probe_batch_size"] < 1000, "more than one batch"


def test_erasure(everything: Output) -> None:
    for label in ("SCR, 5 latents", "TPP, 5 latents"):
        broken = max(everything.score(sae, label) for sae in (RANDOM, IDENTITY))
        assert everything.score(TRAINED, label) > broken + 0.05
    assert everything.score(LEVEL, "TPP, 5 latents") > everything.score(RANDOM, "TPP, 5 latents")


def test_ravel(everything: Output) -> None:
    scores = [
        everything.score(sae, "RAVEL, disentanglement")
        for sae in (RANDOM, LEVEL, TRAINED, IDENTITY)
    ]
    assert scores == sorted(scores)
    assert scores[0] + 0.2 < scores[2]
    # Of the two attributes, the one behind the entity can't be changed at the entity.
    assert everything.score(IDENTITY, "RAVEL, cause") == pytest.approx(0.5, abs=0.05)
    assert everything.score(IDENTITY, "RAVEL, isolation") == pytest.approx(1, abs=0.05)


def test_meta_structure(everything: Output) -> None:
    scores = [everything.score(sae, "meta-SAE variance") for sae in (IDENTITY, RANDOM, TRAINED)]
    assert scores == sorted(scores), "orthogonal rows have nothing in common, trained ones have"
    assert scores[0] < 0.1


def test_results_are_valid_under_the_schemas_of_saebench(everything: Output) -> None:
    for evaluation in SETTINGS:
        module = EVALUATIONS[evaluation].module or evaluation
        schemas = [
            json.loads(file.read_text())
            for file in (installed() / "evals" / module).glob("eval_output_schema_*.json")
        ]
        if not schemas:  # SAEBench ships none of this one
            output = importlib.import_module(f"sae_bench.evals.{module}.eval_output")
            schemas = [TypeAdapter(output.SparseProbingSaeProbesEvalOutput).json_schema()]
        for sae in KEYS:
            result = json.loads(file_of(everything, evaluation, sae).read_text())
            matching = [
                schema
                for schema in schemas
                if schema["properties"]["eval_type_id"]["default"] == result["eval_type_id"]
            ]
            assert len(matching) == 1
            jsonschema.validate(result, matching[0])


def test_summary_and_report_say_what_the_files_say(everything: Output) -> None:
    summary = everything.summary
    for score in summary["scores"]:
        result = json.loads(file_of(everything, score["evaluation"], score["sae"]).read_text())
        category, name = score["metric"].split(".")
        assert score["values"] == {"0": result["eval_result_metrics"][category][name]}
    assert [(sae["label"], sae["width"]) for sae in summary["saes"]] == [
        ("trained", 24),
        ("trained", 256),
        ("random", 256),
        ("identity", 256),
    ]
    assert all(sae["l0"] == everything.score(sae["title"], "L0") for sae in summary["saes"])
    table = (everything.out / "table.md").read_text()
    assert table in everything.text
    assert "varies too much from seed to seed" in table
    assert "One seed: no spread is known, so nothing is ranked." in table
    assert "is better" not in table
    page = (everything.out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page, "it needs no network"
    assert image.imread(everything.out / "scores.png").std() > 0.1


def test_what_needs_an_account_is_listed_as_not_run(everything: Output) -> None:
    assert everything.code == 1
    not_run = everything.summary["not_run"]
    assert [row["evaluation"] for row in not_run] == ["unlearning"] * 4 + ["autointerp"] * 4
    table = (everything.out / "table.md").read_text()
    assert "Not run: unlearning: needs an instruction-tuned model" in table
    assert "Not run: autointerp: needs an OpenAI account" in table


def test_levels_share_what_depends_on_the_model(
    installed_artifacts: dict[Path, int], everything: Output
) -> None:
    assert {
        evaluation: len(runs) for evaluation, runs in everything.summary["seconds"].items()
    } == dict.fromkeys(SETTINGS, 1)
    kept = everything.out / ".saebench"
    assert len(list(kept.glob("absorption/**/probe.pth"))) == 1
    assert len(list(kept.glob("sparse_probing/**/*_activations.pt"))) == 1
    assert artifacts(installed()) == installed_artifacts, "nothing is cached in the installation"
    assert not Path("artifacts").exists(), "nor in the current directory"
