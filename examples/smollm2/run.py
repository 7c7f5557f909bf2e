"""The experiment on SmolLM2: train each SAE, measure its levels, build its tree, run SAEBench.

    python -m examples.smollm2.run [--arms PATTERN …] [--steps train tree evaluate]

It runs the commands of `sae-matryoshka` in the folder that `make smollm2` fills, and writes a JSON
file for each SAE to its folder `results`. What a file holds is not computed again; a stopped
training resumes from its last checkpoint, a stopped evaluation after its last result. To use two
cores, run `--steps train` in one terminal and, once SAEs are there, `--steps evaluate` in another;
it evaluates those that are trained when it starts.
`arms.py` lists the SAEs, `report.py` compares them.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pandas as pd
import yaml

from examples.smollm2.arms import (
    BATCH_SIZE,
    D_IN,
    Arm,
    all_arms,
    evaluated_widths,
    tuning_arms,
)
from examples.smollm2.trees import count_edges
from sae_lens_matryoshka.activations.index import Index
from sae_lens_matryoshka.saebench.evaluations import read_result, result_file
from sae_lens_matryoshka.saebench.records import Candidate, Record
from sae_lens_matryoshka.util.devices import multiplies_bfloat16
from sae_lens_matryoshka.util.files import atomic_file

CACHE = Path(__file__).with_name("cache.yaml").resolve()
CONFIG = Path(__file__).with_name("matryoshka.yaml").resolve()
# the 44 of sae-probes' 113 data sets with the fewest characters: 1M tokens of 35M
PROBED = Path(__file__).with_name("probed.txt").read_text().splitlines()
SETTINGS: dict[str, dict[str, Any]] = {
    # 3,750 steps of the probe that looks for each letter's latents. In larger batches, the default,
    # so few words make 200, and it misses the latents of some letters.
    "absorption": {"n_words": 12_000, "k_sparse_probe_batch_size": 128},
    "meta_structure": {},
    "core": {
        "dataset": "texts/held_out",
        "n_eval_reconstruction_batches": 8,  # of 16 contexts of 128 tokens
        "n_eval_sparsity_variance_batches": 8,
    },
    "sparse_probing_sae_probes": {"dataset_names": PROBED},  # last, since it takes longest
}
N_HELD_OUT = 200_000  # activations that L0 and variance explained are measured on
_SHARE_OF_DECAY = 0.2  # of the steps, at whose end the learning rate falls to 0
# glibc returns memory to Linux after each batch, and asks for it anew page by page
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "20000000000"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing.

    Returns:
        The exit code: 0; 2 if an argument or a folder is not accepted; 1 if a command failed; 130
        after SIGINT or SIGTERM.
    """
    parser = argparse.ArgumentParser(description="Train and evaluate the SAEs of arms.py.")
    parser.add_argument("--data", type=Path, default=Path("smollm2"), help="default: smollm2")
    parser.add_argument("--results", type=Path, help="of the JSON files; default: DATA/results")
    parser.add_argument("--arms", nargs="+", default=["*"], metavar="PATTERN", help="default: '*'")
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=("train", "tree", "evaluate"),
        default=["train", "tree", "evaluate"],
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    arms = [
        arm
        for arm in [*all_arms(), *tuning_arms()]
        if any(fnmatch(arm.name, each) for each in args.arms)
    ]
    try:
        if not arms:
            raise ValueError(f"--arms {' '.join(args.arms)} matches none of the SAEs of arms.py.")
        results = args.results or args.data / "results"
        experiment = Experiment(args.data.resolve(), results.resolve())
        if "train" in args.steps:
            for arm in arms:
                experiment.train(arm)
        if "tree" in args.steps:
            for arm in arms:
                experiment.build_tree(arm)
        is_evaluated = "evaluate" not in args.steps or experiment.evaluate(arms)
        if missing := experiment.not_here(arms, args.steps):
            print(f"left out, because {experiment.saes} does not hold them: {', '.join(missing)}")
        if not is_evaluated:
            print("error: some evaluations gave no result; see above.", file=sys.stderr)
            return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd))} failed.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped. The same command resumes.", file=sys.stderr)
        return 130
    tables = f"python -m examples.smollm2.report --results {results}"
    print(f"{results} has what was found; for tables: {tables}")
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which reaches this process alone; Ctrl-C reaches the command that it runs too."""


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


class Experiment:
    """The folders of the experiment, and what is in them.

    Args:
        data: What `make smollm2` has written; the SAEs go to its folder `experiment`.
        results: Folder of the JSON files.

    Raises:
        ValueError: `data` holds no model and texts.
    """

    def __init__(self, data: Path, results: Path):
        for needed in ("HuggingFaceTB/SmolLM2-135M-Instruct", "texts/train", "texts/held_out"):
            if not (data / needed).is_dir():
                raise ValueError(f"{data / needed} is missing: run make smollm2 first.")
        self.data, self.results = data, results
        self.work = data / "experiment"
        self.saes = self.work / "saes"
        self.work.mkdir(exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)

    def result(self, arm: Arm) -> dict[str, Any]:
        """What is known of an SAE; empty if nothing is.

        Raises:
            ValueError: The file is about an SAE that was trained in another way.
        """
        file = self.results / f"{arm.name}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("arm", arm._asdict()) != arm._asdict():
            raise ValueError(f"{file} is of {known['arm']}, and arms.py now has {arm._asdict()}.")
        return known

    def train(self, arm: Arm) -> None:
        """Train an SAE and measure its levels on held-out activations, unless that is done."""
        if "levels" in self.result(arm):
            return
        activations = self._cached(arm.layer, "train", arm.n_rows)
        held_out = self._cached(arm.layer, "held_out", N_HELD_OUT)
        if not self._is_trained(arm):
            self._run("train", self._config(arm), "--activations", activations, *self._resume(arm))
            shutil.rmtree(self._checkpoints(arm), ignore_errors=True)
        measured = self.work / f"levels_{arm.name}.json"
        self._run("levels", self._sae(arm), "--activations", held_out, "--json", measured)
        levels = json.loads(measured.read_text())["levels"]
        measured.unlink()
        index = Index.read(activations)
        trained_on = {"n_rows": index.n_rows, "autocast_lm": index.settings["autocast_lm"]}
        self._add(arm, {"activations": trained_on, "levels": levels})

    def build_tree(self, arm: Arm) -> None:
        """Count the edges of an SAE's tree on held-out texts, if it is trained."""
        if self._is_trained(arm) and "tree" not in self.result(arm):
            # on texts and not on cached activations, which are shuffled: the tests look at which
            # tokens are near each other
            page = self.work / f"tree_{arm.name}"
            texts = ("--dataset", "texts/held_out", "--tokens", N_HELD_OUT)
            self._run("tree", self._sae(arm), *texts, "--out", page)
            self._add(arm, {"tree": count_edges(self._sae(arm), page)})
            shutil.rmtree(page)

    def evaluate(self, arms: Iterable[Arm]) -> bool:
        """Run SAEBench on those SAEs that are trained, where results are missing.

        Returns:
            Whether each of them now has all results.
        """
        trained = [arm for arm in arms if self._is_trained(arm)]
        for evaluation in SETTINGS:
            for layer in dict.fromkeys(arm.layer for arm in trained):
                missing = [
                    arm
                    for arm in trained
                    if arm.layer == layer and not self._is_evaluated(arm, evaluation)
                ]
                levels_of = {arm: _levels(arm, evaluation) for arm in missing}
                for levels in dict.fromkeys(levels_of.values()):
                    of_them = [arm for arm in missing if levels_of[arm] == levels]
                    self._evaluate(evaluation, layer, of_them, levels)
        return all(self._is_evaluated(arm, each) for arm in trained for each in SETTINGS)

    def not_here(self, arms: Iterable[Arm], steps: Sequence[str]) -> list[str]:
        """The names of SAEs that are not in `saes` and lack results of these steps."""
        names = []
        for arm in arms:
            lacks_tree = "tree" in steps and "tree" not in self.result(arm)
            evaluated = all(self._is_evaluated(arm, each) for each in SETTINGS)
            lacks_evaluation = "evaluate" in steps and not evaluated
            if (lacks_tree or lacks_evaluation) and not self._is_trained(arm):
                names.append(arm.name)
        return names

    def _is_trained(self, arm: Arm) -> bool:
        return (self._sae(arm) / "runner_cfg.json").exists()  # which SAELens writes last

    def _is_evaluated(self, arm: Arm, evaluation: str) -> bool:
        known = self.result(arm).get("saebench", {}).get(evaluation, {})
        return known.get("settings") == SETTINGS[evaluation]

    def _evaluate(self, evaluation: str, layer: int, arms: list[Arm], levels: str) -> None:
        out = self.work / f"saebench_layer_{layer}"
        settings = SETTINGS[evaluation].items()
        try:
            self._run(
                *("eval", *map(self._sae, arms), "--levels", levels, "--evals", evaluation),
                *("--seeds", 1, "--out", out),
                *(f"--{evaluation}.{name}={value}" for name, value in settings),
                accepted=(0, 1),  # 1: an SAE without a result, which does not stop the others
            )
        finally:
            # `eval` has refused a folder whose results were made with other settings
            record = Record.read(out)
            if record and record.settings.get(evaluation) == SETTINGS[evaluation]:
                for arm in arms:
                    self._collect(out, evaluation, arm)

    def _collect(self, out: Path, evaluation: str, arm: Arm) -> None:
        """Add SAEBench's results on an SAE, if all of its levels have one."""
        results = {}
        for width in evaluated_widths(arm, evaluation):
            key = Candidate(label=arm.name, source=(), width=width, d_sae=arm.d_sae).key
            metrics = read_result(result_file(out / evaluation / "seed_0", evaluation, key))
            if metrics is None:
                return
            is_absorption = evaluation == "absorption"
            results[width] = metrics | ({"letters": _letters(out, key)} if is_absorption else {})
        evaluated = {"settings": SETTINGS[evaluation], "widths": results}
        self._add(arm, {"saebench": {evaluation: evaluated}})

    def _add(self, arm: Arm, values: dict[str, Any]) -> None:
        known = self.result(arm)
        saebench = known.get("saebench", {}) | values.get("saebench", {})
        with atomic_file(self.results / f"{arm.name}.json") as unfinished:
            content = {"arm": arm._asdict(), **known, **values, "saebench": saebench}
            unfinished.write_text(json.dumps(content, indent=1) + "\n")

    def _cached(self, layer: int, texts: str, n_rows: int) -> Path:
        """The folder of a layer's activations, written unless it is complete."""
        folder = self.work / cached_name(texts, layer, n_rows)
        # float32 where bfloat16 would take a day; activations differ by 0.6 % (median)
        precision = () if multiplies_bfloat16() else ("--autocast_lm", "false")
        self._run(
            *("cache", CACHE, "--out", folder, "--hook_name", f"model.layers.{layer}"),
            *("--dataset_path", f"texts/{texts}", "--training_tokens", n_rows, *precision),
        )
        return folder

    def _config(self, arm: Arm) -> Path:
        """The config that trains an SAE: that of the example, with the arm's values."""
        config = yaml.safe_load(CONFIG.read_text())
        of_all = {"d_in": D_IN, "normalize_activations": config["sae"]["normalize_activations"]}
        config |= {
            "training_tokens": arm.n_steps * BATCH_SIZE,
            "seed": arm.seed,
            "lr": arm.lr,
            "lr_warm_up_steps": min(config["lr_warm_up_steps"], arm.n_steps // 10),
            "lr_decay_steps": int(_SHARE_OF_DECAY * arm.n_steps),
            "n_checkpoints": 3,
            "checkpoint_path": str(self._checkpoints(arm)),
            "output_path": str(self._sae(arm)),
            "sae": {**of_all, **arm.options()},
        }
        file = self.work / "configs" / f"{arm.name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return file

    def _resume(self, arm: Arm) -> list[str]:
        states = self._checkpoints(arm).glob("*/[!.]*/trainer_state.pt")  # not those half-written
        newest = max(states, key=lambda file: file.stat().st_mtime, default=None)
        return [] if newest is None else ["--resume_from_checkpoint", str(newest.parent)]

    def _sae(self, arm: Arm) -> Path:
        return self.saes / arm.name

    def _checkpoints(self, arm: Arm) -> Path:
        return self.work / "checkpoints" / arm.name

    def _run(self, *command: object, accepted: Sequence[int] = (0,)) -> None:
        """A command of `sae-matryoshka`, in the folder with the model and the texts.

        A stopped command has the time that it needs to save what it has.
        """
        words = list(map(str, command))
        print(shlex.join(["sae-matryoshka", *words]), flush=True)
        program = [sys.executable, "-m", "sae_lens_matryoshka"]
        environment = {**os.environ, **_KEEP_MEMORY, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*program, *words], cwd=self.data, env=environment)
        try:
            code = process.wait()
        except KeyboardInterrupt as stopped:
            if isinstance(stopped, _Terminated):
                process.terminate()
            process.wait()
            raise
        if code not in accepted:
            raise subprocess.CalledProcessError(code, words)


def cached_name(texts: str, layer: int, n_rows: int) -> str:
    """What the folder of a layer's activations is called."""
    return f"{texts}_layer_{layer}_rows_{n_rows}"


def _letters(out: Path, key: str) -> dict[str, dict[str, Any]]:
    """What absorption found for each letter.

    With how well the letter's best latent finds its words, and the latents that absorb them, one
    for each word. Letters that the model's own probe does not find are left out, as in SAEBench's
    means.
    """
    file = result_file(out / "absorption" / "seed_0", "absorption", key)
    found = {
        row.pop("first_letter"): row for row in json.loads(file.read_text())["eval_result_details"]
    }
    cache, name = out / ".saebench" / "absorption" / "seed_0", f"{key}_custom_sae"
    probes = cache / "artifacts" / "absorption" / f"{name}_k_sparse_probing.json"
    # the cache of an evaluation that was killed is gone
    for row in json.loads(probes.read_text()) if probes.exists() else []:
        if row["letter"] in found:
            found[row["letter"]] |= {
                "latent": row["sparse_sae_k_1_feats"][0],
                "recall": row["recall_sum_sparse_sae_1"],
                "precision": row["precision_sum_sparse_sae_1"],
            }
    absorbed = cache / "sae_bench" / "artifacts" / "absorption" / "feature_absorption" / name
    for file in absorbed.glob("*.parquet"):
        for letter, words in pd.read_parquet(file).groupby("letter"):
            if letter in found:
                latents = words["top_projection_feat"][words["is_full_absorption"]]
                found[str(letter)]["absorbing"] = latents.tolist()
    return found


def _levels(arm: Arm, evaluation: str) -> str:
    """What `eval --levels` takes."""
    levels, evaluated = arm.options()["matryoshka_widths"], evaluated_widths(arm, evaluation)
    return ",".join(str(levels.index(width) + 1) for width in evaluated)


if __name__ == "__main__":
    sys.exit(main())
