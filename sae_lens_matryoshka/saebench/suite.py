"""SAEBench over SAEs, their levels and seeds: what is to run, what has run, what could not."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError
from sae_lens import SAE, Transcoder
from tqdm.auto import tqdm
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.saebench.candidates import Candidate, fingerprint, labels, load_whole
from sae_lens_matryoshka.saebench.evaluations import (
    EVALUATIONS,
    Job,
    config_class,
    installed,
    obstacle,
    run_job,
    shown,
)
from sae_lens_matryoshka.util.files import atomic_file, check_writable
from sae_lens_matryoshka.util.hook_names import check_place, local_folder, short_model_name

DEFAULT_EVALUATIONS = ("absorption", "sparse_probing", "scr", "tpp", "core")
RECORD = "evaluated.json"
_LOCK = ".lock"
_KEPT = ".saebench"  # what SAEBench may use again, in the output folder
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_NOT_TO_BE_SET = {
    "random_seed": "give --seeds",
    "model_name": "the SAE says it, or --model",
    "perform_scr": "scr and tpp are two evaluations",
    **dict.fromkeys(("artifact_dir", "results_path", "model_cache_path"), "it is in --out"),
}
Settings = Mapping[str, Mapping[str, Any]]


@dataclass
class Record:
    """What an output folder holds results of; in it as `evaluated.json`.

    Attributes:
        model_name: The one model of all SAEs.
        model_sha256: Of its files, where the model is a folder; None where it is the Hub's.
        hook_names: Label → place in the model, of each SAE.
        fingerprints: Label → SHA-256 of the weights, of each SAE.
        candidates: SAEs and levels, in the order of tables.
        settings: Evaluation → fields of SAEBench's config that were set.
        not_run: Evaluation → key of a candidate → why it has no result.
        seconds: Evaluation → seconds of each process that was run for it.
    """

    model_name: str
    model_sha256: str | None = None
    hook_names: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> Record | None:
        """That of an output folder, None where it has none.

        Raises:
            ValueError: the folder holds something else.
        """
        file = out / RECORD
        if not file.exists():
            if out.exists() and (
                not out.is_dir() or {path.name for path in out.iterdir()} - {_LOCK}
            ):
                raise ValueError(
                    f"out={str(out)!r} holds something other than evaluations: give a new or an "
                    "empty folder."
                )
            return None
        try:
            content = json.loads(file.read_text())
            candidates = [Candidate(**candidate) for candidate in content.pop("candidates")]
            return cls(**content, candidates=candidates)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is no record of evaluations: {error}") from error

    def write(self, out: Path) -> None:
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["candidates"] = [candidate._asdict() for candidate in self.candidates]
        with atomic_file(out / RECORD) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n")

    def seeds(self, out: Path, evaluation: str) -> list[int]:
        """Those that an evaluation was run with."""
        names = [folder.name.removeprefix("seed_") for folder in (out / evaluation).glob("seed_*")]
        return sorted(int(name) for name in names if name.isdecimal())


@dataclass
class Plan:
    """What is to be run: see `plan_suite`."""

    record: Record
    candidates: list[Candidate]
    evaluations: list[str]
    n_seeds: int
    device: str
    out: Path
    outdated: list[str]  # evaluations whose settings changed before they had any result


def plan_suite(
    saes: Sequence[Sequence[str]],
    out: Path,
    *,
    against: Sequence[Sequence[str]] = (),
    levels: Sequence[int] | None = None,
    evaluations: Sequence[str] = DEFAULT_EVALUATIONS,
    n_seeds: int = 3,
    settings: Settings | None = None,
    matryoshka_widths: Sequence[int] | None = None,
    model_name: str | None = None,
    device: str = "cpu",
) -> Plan:
    """Check everything that is to be evaluated, before any language model loads.

    Args:
        saes: What to evaluate level by level, each as `load_sae` takes it: a folder, or a release
            and an SAE's id.
        out: Output folder; what it holds of the same SAEs is kept.
        against: Baselines, each evaluated whole.
        levels: Numbers of the levels of `saes` from 1 on; all where left out.
        evaluations: Keys of `saebench.EVALUATIONS`.
        n_seeds: Seeds 0 to n − 1; evaluations without chance in them run once.
        settings: Evaluation → fields of SAEBench's config that are to differ from what SAEBench's
            own scripts set.
        matryoshka_widths: Level widths, for SAEs that don't say their own.
        model_name: The model, for SAEs that don't say it.
        device: Where to compute.

    Raises:
        ValueError: SAEBench is not installed; an evaluation, a setting, an SAE or a level is
            unknown; an SAE does not fit its model; `out` holds results of other SAEs.
        OSError: the Hub or the disk failed.
    """
    installed()
    check_names(evaluations, settings or {})
    check_options(out, n_seeds, model_name, device)
    leveled, baselines = _resolved(saes), _resolved(against)
    if both := set(leveled) & set(baselines):
        raise ValueError(f"{':'.join(both.pop())} is to be evaluated against itself: give another.")
    sources = list(dict.fromkeys([*leveled, *baselines]))
    record = Record.read(out)
    candidates: list[Candidate] = []
    for source, label in zip(sources, _labels(sources, record), strict=True):
        is_leveled = source in leveled
        given_widths = matryoshka_widths if is_leveled else None
        sae = load_whole(source, given_widths, model_name)
        record = _admitted(record, label, sae, out)
        widths = _level_widths(sae, levels, label) if is_leveled else [sae.cfg.d_sae]
        candidates += [
            Candidate(
                label=label,
                source=source,
                width=width,
                d_sae=sae.cfg.d_sae,
                is_baseline=not is_leveled,
                matryoshka_widths=given_widths,
                model_name=model_name,
            )
            for width in widths
        ]
    if record is None:
        raise ValueError("there is no SAE to evaluate.")
    if record.model_sha256 != _local_model(record.model_name):
        raise ValueError(
            f"out={str(out)!r} holds results on another model named {record.model_name}: give "
            "another folder."
        )
    by_key = {candidate.key: candidate for candidate in record.candidates}
    for candidate in candidates:
        if by_key.setdefault(candidate.key, candidate).label != candidate.label:
            raise ValueError(
                f"{candidate.label} and {by_key[candidate.key].label} would have one name in "
                "SAEBench's files: rename a folder."
            )
    record.candidates = list({**by_key, **{c.key: c for c in candidates}}.values())
    for evaluation in [*record.settings]:
        if evaluation not in evaluations and not _has_results(out, evaluation):
            del record.settings[evaluation]  # what never worked is not told for ever
            record.not_run.pop(evaluation, None)
    outdated = []
    for evaluation in evaluations:
        values = json.loads(json.dumps((settings or {}).get(evaluation, {})))
        if record.settings.setdefault(evaluation, values) != values:
            _refuse_other_settings(record, evaluation, values, out)
            record.settings[evaluation] = values
            outdated.append(evaluation)
    return Plan(record, candidates, list(evaluations), n_seeds, device, out, outdated)


def run_suite(plan: Plan) -> Record:
    """Run what a plan asks for and `plan.out` has no result of yet.

    Each evaluation and seed is a process; what is finished survives the end of any of them.

    Returns:
        The record of `plan.out`, which tells what could not be run, and why.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.out / _LOCK)
    try:
        with lock.acquire(timeout=0):
            return _run_locked(plan)
    except Timeout as error:
        raise ValueError(f"out={str(plan.out)!r} is being written to by another run.") from error


def _run_locked(plan: Plan) -> Record:
    record, out = plan.record, plan.out
    record.write(out)
    for evaluation in plan.outdated:
        shutil.rmtree(out / _KEPT / evaluation, ignore_errors=True)
    n_rounds = {e: plan.n_seeds if EVALUATIONS[e].is_random else 1 for e in plan.evaluations}
    asked = {candidate.key for candidate in plan.candidates}
    with tqdm(total=sum(n_rounds.values()) * len(asked), unit="result", mininterval=1) as progress:
        start = 0
        for evaluation, n_seeds in n_rounds.items():
            known = record.not_run.get(evaluation, {})
            reasons = {key: reason for key, reason in known.items() if key not in asked}
            for seed in range(n_seeds):
                progress.set_description(f"{evaluation}, seed {seed}")
                before = start + seed * len(asked)
                failed = _run_round(plan, evaluation, seed, partial(_show, progress, before))
                reasons |= failed
                record.not_run[evaluation] = reasons
                record.write(out)
                if asked <= failed.keys():
                    break  # what no SAE could do with one seed, none will with another
            start += n_seeds * len(asked)
            _show(progress, start, 0)
    return record


def _show(progress: tqdm, before: int, n: int) -> None:
    progress.n = before + n
    progress.update(0)  # at most once in mininterval


def _run_round(
    plan: Plan, evaluation: str, seed: int, finished: Callable[[int], None]
) -> dict[str, str]:
    """One evaluation with one seed: key → reason, of the candidates without a result."""
    record = plan.record
    settings = record.settings[evaluation]
    obstacles = {
        candidate.key: reason
        for candidate in plan.candidates
        if (reason := obstacle(evaluation, candidate, record.hook_names[candidate.label], settings))
    }
    possible = [candidate for candidate in plan.candidates if candidate.key not in obstacles]
    if not possible:
        return obstacles

    kept = (plan.out / _KEPT / evaluation).resolve()
    job = Job(
        evaluation=evaluation,
        candidates=[candidate._asdict() for candidate in possible],
        model_name=record.model_name,
        seed=seed,
        device=plan.device,
        out=(plan.out / evaluation / f"seed_{seed}").resolve(),
        shared=kept / "shared",
        settings=settings,
    )
    failures, seconds = run_job(job, kept / f"seed_{seed}", finished)
    if seconds:
        record.seconds.setdefault(evaluation, []).append(round(seconds, 1))
    for candidate in possible:
        if candidate.key not in failures and not shown(job.result(candidate.key), evaluation):
            failures[candidate.key] = "the result has none of the numbers that are shown"
    return {**obstacles, **failures}


def check_options(out: Path, n_seeds: int, model_name: str | None, device: str) -> None:
    """Raises: ValueError: one of these can't be, whatever is evaluated."""
    if n_seeds < 1:
        raise ValueError(f"n_seeds={n_seeds} is not accepted: give 1 or more.")
    if model_name is not None:
        short_model_name(model_name)
    check_writable("out", out)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not accepted: give cpu, cuda or cuda:N.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} is not accepted: PyTorch sees no CUDA here.")


def check_names(evaluations: Sequence[str], settings: Settings) -> None:
    """Raises: ValueError: an evaluation or a setting that SAEBench does not have."""
    for evaluation in [*evaluations, *settings]:
        if evaluation not in EVALUATIONS:
            near = difflib.get_close_matches(evaluation, EVALUATIONS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{evaluation!r} is not an evaluation; accepted: {', '.join(EVALUATIONS)}.{hint}"
            )
        if evaluation not in evaluations:
            raise ValueError(f"{evaluation} has settings and is not to be run: add it to --evals.")
    for evaluation, values in settings.items():
        config = config_class(evaluation)
        names = [f.name for f in fields(config)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise ValueError(
                    f"{evaluation}.{name} is not a setting of SAEBench; {hint}accepted: "
                    f"{', '.join(n for n in names if n not in _NOT_TO_BE_SET)}."
                )
            if name in _NOT_TO_BE_SET:
                raise ValueError(f"{evaluation}.{name} is not to be set: {_NOT_TO_BE_SET[name]}.")
            _check_value(f"{evaluation}.{name}", values[name])
        try:
            config(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{evaluation}.{name}={first['input']!r} is not accepted: {first['msg']}"
                f"{', such as [a, b].' if first['type'] == 'list_type' else '.'}"
            ) from error


def _check_value(name: str, value: Any) -> None:
    """What SAEBench's types let pass and its evaluations don't."""
    field = name.rpartition(".")[2]
    if field in ("llm_dtype", "dtype") and value not in _DTYPES:
        raise ValueError(f"{name}={value!r} is not accepted: give {' or '.join(_DTYPES)}.")
    numbers = value if isinstance(value, list) else [value]
    if not numbers:
        raise ValueError(f"{name}=[] is not accepted: give a list that is not empty.")
    for number in numbers:
        if field == "prompt_token_pos" or isinstance(number, bool):  # which counts from the end
            continue
        if isinstance(number, int) and number < 1:
            raise ValueError(f"{name}={value!r} is not accepted: give positive integers.")
    if isinstance(value, str) and value.startswith(("./", "../", "/", "~")):
        if not Path(value).expanduser().is_absolute():
            raise ValueError(f"{name}={value!r} is not accepted: give an absolute path.")
        if not Path(value).expanduser().exists():
            raise ValueError(f"{name}={value!r} does not exist.")


def _resolved(sources: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return [
        (str(Path(source[0]).resolve()),) if len(source) == 1 else tuple(source)
        for source in sources
    ]


def _labels(sources: Sequence[tuple[str, ...]], record: Record | None) -> list[str]:
    """Labels of the sources: what the record calls those that it knows, new ones for the others."""
    known = {tuple(c.source): c.label for c in record.candidates} if record is not None else {}
    fresh = [source for source in sources if source not in known]
    named = dict(zip(fresh, labels(fresh, known.values()), strict=True))
    return [{**known, **named}[source] for source in sources]


def _level_widths(sae: SAE[Any], levels: Sequence[int] | None, label: str) -> list[int]:
    if levels is None:
        try:
            return widths_of(sae)
        except ValueError:
            return [sae.cfg.d_sae]  # no levels are known of it
    widths = widths_of(sae)
    for level in levels:
        if not 1 <= level <= len(widths):
            raise ValueError(
                f"levels={level} is not accepted: {label} has the levels 1 to {len(widths)}, of "
                f"{', '.join(map(str, widths))} latents."
            )
    return sorted({widths[level - 1] for level in levels})


def _admitted(record: Record | None, label: str, sae: SAE[Any], out: Path) -> Record:
    """The record with one more SAE, if that fits."""
    metadata = sae.cfg.metadata
    if metadata.model_name is None:
        raise ValueError(f"{label} does not say its model: give --model.")
    model_name = short_model_name(metadata.model_name)
    record = record or Record(model_name, _local_model(model_name))
    if record.model_name != model_name:
        raise ValueError(
            f"{label} is of the model {model_name}, and others are of {record.model_name}: "
            "SAEs of one model are evaluated together, in a folder of their own."
        )
    if isinstance(sae, Transcoder):
        raise ValueError(f"{label} is a {type(sae).__name__}, and SAEBench evaluates SAEs.")
    try:
        check_place(metadata.hook_name, sae.cfg.d_in, model_name, label)
    except OSError as error:
        raise OSError(
            f"the model {model_name} of {label} is neither in the folder "
            f"{get_official_model_name(model_name)} here nor to be had from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    weights = fingerprint(sae)
    if record.fingerprints.setdefault(label, weights) != weights:
        raise ValueError(
            f"out={str(out)!r} holds results of another SAE named {label}, with other weights or "
            "settings: give another folder."
        )
    record.hook_names[label] = metadata.hook_name
    return record


def _local_model(model_name: str) -> str | None:
    """SHA-256 of the files of a model that is a folder here; the probes in `out` are of one."""
    folder = local_folder(model_name)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _refuse_other_settings(
    record: Record, evaluation: str, values: dict[str, Any], out: Path
) -> None:
    """Raises: ValueError: there are results with the settings of the record."""
    known = record.settings[evaluation]
    if _has_results(out, evaluation):
        changed = [n for n in sorted({*known, *values}) if known.get(n) != values.get(n)]
        raise ValueError(
            f"out={str(out)!r} holds results of {evaluation} with other settings "
            f"({', '.join(f'{n}={known[n]!r}' if n in known else n for n in changed)}): give "
            "another folder."
        )


def _has_results(out: Path, evaluation: str) -> bool:
    return any((out / evaluation).rglob("*_eval_results.json"))
