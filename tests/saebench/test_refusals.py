"""What `eval` refuses, before any language model loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.saebench import evaluations, process, suite
from sae_lens_matryoshka.saebench.records import Job
from tests.saebench.conftest import MODEL, flags, run_eval

META = flags("meta_structure")


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process.subprocess, "Popen", refuse)


def refusal(tmp_path: Path, *words: str, code: int = 2) -> str:
    output = run_eval(tmp_path / "out", *words)
    assert output.code == code, output.text
    line = output.text.rpartition("\r")[2].strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trained", "--evals", "absorpton"], "'absorpton' is not an evaluation; accepted: absor"),
        (
            ["trained", "--evals", "core,tpp", "--scr.n_values=[2]"],
            "scr has settings but is not",
        ),
        (["trained", "--core.datset", "x"], "core.datset is not a setting of SAEBench; accepted: "),
        (["trained", "--core.datset", "x"], "verbose; did you mean dataset"),
        (["trained", "--core.context_size=lots"], "core.context_size='lots' is not accepted: Inp"),
        (["trained", "--core.model_name=gpt2"], "core.model_name can't be set: the SAE"),
        (["trained", "--scr.perform_scr=false"], "scr.perform_scr can't be set: scr and tpp"),
        (
            ["trained", "--tpp.dataset_names=[]"],
            "tpp.dataset_names=[] is not accepted: give a list",
        ),
        (["trained", "--scr.n_values=[-1]"], "scr.n_values=[-1] is not accepted: give positive"),
        (
            ["trained", "--core.llm_dtype=f8"],
            "core.llm_dtype='f8' is not accepted: give float32 or",
        ),
        (
            ["trained", "--evals=absorption", "--absorption.n_words=all"],
            "absorption.n_words='all' is not accepted: give 520 words or more",
        ),
        (
            ["trained", "--evals=absorption", "--absorption.n_words=519"],
            "absorption.n_words=519 is not accepted: give 520 words or more",
        ),
        (["trained", "--core.dataset=../x"], "core.dataset='../x' is not accepted: give an absolu"),
        (["trained", "--core.dataset=/no/x"], "core.dataset='/no/x' does not exist."),
        (["trained", "--device", "foo"], "device='foo' is not accepted: give cpu"),
        (
            ["trained", "--device", "cuda"],
            "device='cuda' is not accepted: give cpu: PyTorch",
        ),
        (["trained", "--model", "gpt99"], "TransformerLens does not know the model 'gpt99'"),
        (["trained", "--against", "trained"], "would be compared with itself: give another."),
        (["nothing", "--seeds", "0", "--dry-run"], "n_seeds=0 is not accepted"),
        (["nothing", "--model", "gpt99", "--dry-run"], "does not know the model 'gpt99'"),
        (["trained", "--core.dataset"], "--core.dataset needs a value."),
        (["trained", "--sedes", "3"], "--sedes is not an option of sae-matryoshka eval"),
        (["trained", "--core.dataset", "x", "y"], "'y' is not an option"),
        (
            ["trained", "--levels", "6"],
            "levels=6 is not accepted: trained has the levels 1 to 5, of",
        ),
        (["trained", "--levels", "one"], "'one' is not accepted: give all, or numbers"),
        (["random", "--levels", "1"], "has no level widths"),
        (["trained", "--seeds", "0"], "n_seeds=0 is not accepted: give a positive integer."),
        (
            ["traned"],
            "traned'; to load from the Hub, give an SAE's id as well; did you mean trained?",
        ),
        (["no-release:blocks.1"], "'no-release' is neither a release of SAELens nor a repository"),
        (
            ["gemma-2-2b-res-matryoshka-dc:blocks.99.hook_resid_post"],
            "has no SAE 'blocks.99.hook_resid_post'; did you mean",
        ),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in refusal(tmp_path, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hook_name": "blocks.7.hook_resid_post"}, "has the layers 0 to 2"),
        ({"hook_name": "model.layers.1"}, "hook_name='model.layers.1': give a hook in one"),
        ({"hook_name": "blocks.1.mlp.hook_post"}, "has d_in=128, and blocks.1.mlp.hook_post of "),
        ({"model_name": "pythia-70m-deduplicated"}, "did you mean pythia-70m-deduped"),
        ({"model_name": None}, "names no model: give --model."),
    ],
)
def test_an_sae_that_does_not_fit_its_model(
    tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    sae = load_sae("identity")
    for name, value in changes.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(tmp_path / "sae")
    assert said in refusal(tmp_path, str(tmp_path / "sae"), *META)


def test_a_folder_with_other_results(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "holds something other than evaluations" in refusal(tmp_path, "trained", *META)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_folder_with_results_of_another_sae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_results(job: Job, *args: object) -> tuple[dict[str, str], float]:
        job.out.mkdir(parents=True, exist_ok=True)
        metrics = {"meta_structure": {"decoder_fraction_variance_explained": 0.5}}
        for candidate in job.candidates:
            job.result(candidate.key).write_text(json.dumps({"eval_result_metrics": metrics}))
        return {}, 1.0

    monkeypatch.setattr(suite, "run_job", write_results)
    sae = load_sae("identity")
    sae.save_model(tmp_path / "one" / "sae")
    one = [str(tmp_path / "one" / "sae"), "--seeds", "1"]
    assert run_eval(tmp_path / "out", *one, *META).code == 0
    assert "with other settings (train_steps=100)" in refusal(
        tmp_path, *one, "--evals", "meta_structure"
    )
    model = tmp_path / "EleutherAI" / "pythia-70m-deduped"
    shutil.copytree(MODEL, model)
    monkeypatch.chdir(tmp_path)
    said = refusal(tmp_path, *one, *META)
    assert "holds results on another model named pythia-70m-deduped" in said
    shutil.rmtree(model)
    with torch.no_grad():
        sae.W_enc[0, 0] += 1
    sae.save_model(tmp_path / "one" / "sae")
    said = refusal(tmp_path, *one, *META)
    assert "holds results of another SAE named sae, with other weights" in said
    with torch.no_grad():
        sae.W_enc[0, 0] -= 1
    sae.cfg.apply_b_dec_to_input = False
    sae.save_model(tmp_path / "one" / "sae")
    assert "with other weights or settings: give another folder" in refusal(tmp_path, *one, *META)

    # One of the same name elsewhere gets a longer one.
    sae.save_model(tmp_path / "other" / "sae")
    both = run_eval(tmp_path / "out", str(tmp_path / "other" / "sae"), "--seeds", "1", *META)
    assert [row["label"] for row in both.summary["saes"]] == ["sae", "other/sae"]
    sae.cfg.metadata.model_name = "pythia-14m"
    sae.save_model(tmp_path / "third" / "model")
    said = refusal(tmp_path, str(tmp_path / "third" / "model"), *META)
    assert "is of the model pythia-14m, and others are of pythia-70m-deduped" in said


def test_settings_may_change_before_there_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "out" / ".saebench" / "core" / "seed_0" / "old"

    def fail(job: Job, *args: object) -> tuple[dict[str, str], float]:
        assert not kept.exists(), "what was made with the old settings is not used again"
        return {"identity_width_256": "no such data set"}, 1.0

    monkeypatch.setattr(suite, "run_job", fail)
    words = ["identity", "--seeds", "1", "--evals", "core"]
    assert run_eval(tmp_path / "out", *words, "--core.dataset=no/where").code == 1
    kept.mkdir(parents=True)
    again = run_eval(tmp_path / "out", *words, "--core.dataset=some/where")
    assert again.code == 1
    assert again.summary["settings"] == {"core": {"dataset": "some/where"}}


def test_widths_are_those_of_the_saes_and_not_of_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens_matryoshka.levels.slicing import truncate

    monkeypatch.setattr(suite, "run_job", lambda *args: ({}, 0.0))
    truncate(load_sae("trained"), 100).save_model(tmp_path / "narrow")
    words = ["identity", "--matryoshka-widths", "64,256", "--against", str(tmp_path / "narrow")]
    out = run_eval(tmp_path / "out", *words, *META)
    assert [(s["label"], s["width"]) for s in out.summary["saes"]] == [
        ("identity", 64),
        ("identity", 256),
        ("narrow", 100),
    ]


def test_a_result_without_numbers_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "run_job", lambda *args: ({}, 0.0))
    out = run_eval(tmp_path / "out", "random", "--seeds", "1", *META)
    assert out.code == 1
    assert [row["reason"] for row in out.summary["not_run"]] == [
        "the result has none of the numbers that tables show"
    ]


def test_two_runs_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert "is being written to by another run" in refusal(tmp_path, "random", *META)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for content in ('{"model_name": "m", "candi', '{"model_name": "m", "candidates": [], "x": 1}'):
        (tmp_path / "out" / "evaluated.json").write_text(content)
        assert "evaluated.json is not a record of evaluations: " in refusal(
            tmp_path, "random", *META
        )


def test_without_saebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations.importlib.util, "find_spec", lambda name: None)
    said = refusal(tmp_path, "trained", "--evals", "absorption")
    assert "pip install 'sae-lens-matryoshka[eval]'" in said


def test_dry_run_checks_what_is_here_and_names_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = "gemma-2-2b-res-matryoshka-dc:blocks.12.hook_resid_post"
    words = ["trained", "nothing-yet", "--against", "random", release, "--levels", "1,5"]
    assert cli.main(["eval", *words, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "nothing-yet: not there yet" in lines
    assert any(line.startswith(f"{release}: ") and "not downloaded" in line for line in lines)
    assert "trained, first 8: blocks.1.hook_resid_post, found" in lines
    assert "random: blocks.1.hook_resid_post, found" in lines
    assert not (tmp_path / "out").exists()
    assert "levels=9" in refusal(tmp_path, "trained", "--levels", "9", "--dry-run")
