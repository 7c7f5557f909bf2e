"""SAEBench over SAEs, their levels and seeds: plan what to run, run it, record what failed."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sae_lens import SAE, Transcoder
from tqdm.auto import tqdm
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_matryoshka.levels.fingerprint import fingerprint
from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.saebench.candidates import labels, load_whole
from sae_lens_matryoshka.saebench.evaluations import (
    DEFAULT_EVALUATIONS,
    EVALUATIONS,
    installed,
    obstacle,
    read_metrics,
)
from sae_lens_matryoshka.saebench.process import run_job
from sae_lens_matryoshka.saebench.records import LOCK, Candidate, Job, Record, other_folder_needed
from sae_lens_matryoshka.saebench.settings import Settings, check_settings
from sae_lens_matryoshka.util.checks import checked_count
from sae_lens_matryoshka.util.devices import check_device
from sae_lens_matryoshka.util.files import check_writable
from sae_lens_matryoshka.util.hook_names import check_hook_name, local_folder, short_model_name

_CACHE = ".saebench"  # in the output folder: probes and activations that SAEBench reuses


@dataclass
class Plan:
    """What to run: see `plan_suite`."""

    record: Record
    candidates: list[Candidate]
    evaluations: Sequence[str]
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
    """Check everything that an evaluation needs, before any language model loads.

    Args:
        saes: SAEs to evaluate level by level, each as the arguments of `load_sae`: a folder, or a
            release and an SAE's id.
        out: Output folder; its results of the same SAEs are kept.
        against: Baselines, each evaluated whole.
        levels: Numbers of the levels of `saes`, from 1; None for all.
        evaluations: Keys of `EVALUATIONS`.
        n_seeds: Seeds 0 to n − 1; evaluations in which nothing is random run once.
        settings: Evaluation → fields of SAEBench's config that differ from what SAEBench's own
            scripts set.
        matryoshka_widths: Level widths, for SAEs whose config has none.
        model_name: The model, for SAEs whose config names none.
        device: Where to compute.

    Raises:
        ValueError: SAEBench is not installed; an evaluation, a setting, an SAE or a level is
            unknown; an SAE does not fit its model; `out` holds results of other SAEs.
        OSError: the Hub or the disk failed.
    """
    check_request(out, evaluations, n_seeds, settings or {}, model_name, device)
    leveled, baselines = _resolved(saes), _resolved(against)
    if both := set(leveled) & set(baselines):
        raise ValueError(f"{':'.join(both.pop())} would be compared with itself: give another.")
    sources = list(dict.fromkeys([*leveled, *baselines]))
    record = Record.read(out)
    label_of = {c.source: c.label for c in record.candidates} if record is not None else {}
    new = [source for source in sources if source not in label_of]
    label_of |= zip(new, labels(new, label_of.values()), strict=True)
    candidates: list[Candidate] = []
    for source in sources:
        label, is_baseline = label_of[source], source not in leveled
        given_widths = None if is_baseline else matryoshka_widths
        sae = load_whole(source, given_widths, model_name)
        record = _add_sae(record, label, sae, out)
        candidates += [
            Candidate(
                label=label,
                source=source,
                width=width,
                d_sae=sae.cfg.d_sae,
                is_baseline=is_baseline,
                matryoshka_widths=given_widths,
                model_name=model_name,
            )
            for width in ([sae.cfg.d_sae] if is_baseline else _level_widths(sae, levels, label))
        ]
    if record is None:
        raise ValueError("there is no SAE to evaluate.")
    if record.model_sha256 != _local_model_hash(record.model_name):
        raise other_folder_needed(out, f"results on another model named {record.model_name}")
    by_key = {candidate.key: candidate for candidate in record.candidates}
    for candidate in candidates:
        if (other := by_key.get(candidate.key, candidate).label) != candidate.label:
            raise ValueError(
                f"{candidate.label} and {other} would have the same name in SAEBench's files: "
                "rename a folder."
            )
        by_key[candidate.key] = candidate
    record.candidates = list(by_key.values())
    outdated = _merge_settings(record, evaluations, settings or {}, out)
    return Plan(record, candidates, evaluations, n_seeds, device, out, outdated)


def check_request(
    out: Path,
    evaluations: Sequence[str],
    n_seeds: int,
    settings: Settings,
    model_name: str | None,
    device: str,
) -> None:
    """Check what does not depend on the SAEs.

    Raises:
        ValueError: an option is not accepted, or SAEBench is not installed.
    """
    installed()
    check_settings(evaluations, settings)
    checked_count("n_seeds", n_seeds)
    if model_name is not None:
        short_model_name(model_name)
    check_writable("out", out)
    check_device("device", device)


def _resolved(sources: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return [
        (str(Path(source[0]).resolve()),) if len(source) == 1 else tuple(source)
        for source in sources
    ]


def _add_sae(record: Record | None, label: str, sae: SAE[Any], out: Path) -> Record:
    """Add an SAE to the record, if it fits the others and the model."""
    metadata = sae.cfg.metadata
    if metadata.model_name is None:
        raise ValueError(f"the config of {label} names no model: give --model.")
    model_name = short_model_name(metadata.model_name)
    if record is None:
        record = Record(model_name=model_name, model_sha256=_local_model_hash(model_name))
    if record.model_name != model_name:
        raise ValueError(
            f"{label} is of the model {model_name}, and others are of {record.model_name}: "
            "one folder holds SAEs of one model."
        )
    if isinstance(sae, Transcoder):
        raise ValueError(f"{label} is a {type(sae).__name__}, and SAEBench evaluates SAEs.")
    try:
        check_hook_name(metadata.hook_name, sae.cfg.d_in, model_name, label)
    except OSError as error:
        raise OSError(
            f"the model {model_name} of {label} is neither in the folder "
            f"{get_official_model_name(model_name)} here nor available from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    sha256 = fingerprint(sae)
    if record.fingerprints.setdefault(label, sha256) != sha256:
        content = f"results of another SAE named {label}, with other weights or settings"
        raise other_folder_needed(out, content)
    record.hook_names[label] = metadata.hook_name
    return record


def _local_model_hash(model_name: str) -> str | None:
    """SHA-256 of the files of a model that is a local folder: cached probes belong to one model."""
    folder = local_folder(model_name)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _level_widths(sae: SAE[Any], levels: Sequence[int] | None, label: str) -> list[int]:
    try:
        widths = widths_of(sae)
    except ValueError:
        if levels is not None:
            raise
        return [sae.cfg.d_sae]
    for level in levels or []:
        if not 1 <= level <= len(widths):
            raise ValueError(
                f"levels={level} is not accepted: {label} has the levels 1 to {len(widths)}, of "
                f"{', '.join(map(str, widths))} latents."
            )
    return widths if levels is None else sorted({widths[level - 1] for level in levels})


def _merge_settings(
    record: Record, evaluations: Sequence[str], settings: Settings, out: Path
) -> list[str]:
    """Record the settings, and return the evaluations without results whose settings changed."""

    def has_results(evaluation: str) -> bool:
        return any((out / evaluation).rglob("*_eval_results.json"))

    for evaluation in [*record.settings]:
        if evaluation not in evaluations and not has_results(evaluation):
            del record.settings[evaluation]  # forget what failed and is not tried again
            record.not_run.pop(evaluation, None)
    outdated = []
    for evaluation in evaluations:
        values = json.loads(json.dumps(settings.get(evaluation, {})))  # as the record reads them
        known = record.settings.setdefault(evaluation, values)
        if known == values:
            continue
        if has_results(evaluation):
            names = [n for n in sorted({*known, *values}) if known.get(n) != values.get(n)]
            changed = ", ".join(f"{n}={known[n]!r}" if n in known else n for n in names)
            content = f"results of {evaluation} with other settings ({changed})"
            raise other_folder_needed(out, content)
        record.settings[evaluation] = values
        outdated.append(evaluation)
    return outdated


def run_suite(plan: Plan) -> Record:
    """Run what a plan asks for and `plan.out` has no result of yet.

    Each evaluation and seed is a process. Finished results survive if any of them ends.

    Returns:
        The record of `plan.out`, with the reason of each missing result.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.out / LOCK, timeout=0):
            return _run_locked(plan)
    except Timeout as error:
        raise ValueError(f"out={str(plan.out)!r} is being written to by another run.") from error


def _run_locked(plan: Plan) -> Record:
    record = plan.record
    record.write(plan.out)
    for evaluation in plan.outdated:
        shutil.rmtree(plan.out / _CACHE / evaluation, ignore_errors=True)
    n_seeds = {e: plan.n_seeds if EVALUATIONS[e].is_random else 1 for e in plan.evaluations}
    asked = {candidate.key for candidate in plan.candidates}
    n_done = 0
    with tqdm(total=sum(n_seeds.values()) * len(asked), unit="result", mininterval=1) as progress:

        def show(n: int) -> None:
            progress.n = n_done + n
            progress.update(0)  # redraws at most once per mininterval

        for evaluation in plan.evaluations:
            reasons = record.not_run.get(evaluation, {})
            reasons = {key: reason for key, reason in reasons.items() if key not in asked}
            is_hopeless = False
            for seed in range(n_seeds[evaluation]):
                if not is_hopeless:
                    progress.set_description(f"{evaluation}, seed {seed}")
                    failed = _run_round(plan, evaluation, seed, show)
                    reasons |= failed
                    record.not_run[evaluation] = reasons
                    record.write(plan.out)
                    is_hopeless = asked <= failed.keys()  # another seed would not help
                n_done += len(asked)
                show(0)
    return record


def _run_round(
    plan: Plan, evaluation: str, seed: int, finished: Callable[[int], None]
) -> dict[str, str]:
    """Run one evaluation with one seed: key → reason, of the candidates without a result."""
    record = plan.record
    settings = record.settings[evaluation]
    failures: dict[str, str] = {}
    possible: list[Candidate] = []
    for candidate in plan.candidates:
        hook_name = record.hook_names[candidate.label]
        if reason := obstacle(evaluation, candidate.width, hook_name, settings):
            failures[candidate.key] = reason
        else:
            possible.append(candidate)
    if not possible:
        return failures
    cache = (plan.out / _CACHE / evaluation).resolve()
    job = Job(
        evaluation=evaluation,
        candidates=possible,
        model_name=record.model_name,
        seed=seed,
        device=plan.device,
        settings=settings,
        out=(plan.out / evaluation / f"seed_{seed}").resolve(),
        shared=cache / "shared",
    )
    failed, seconds = run_job(job, cache / f"seed_{seed}", finished)
    if seconds:
        record.seconds.setdefault(evaluation, []).append(round(seconds, 1))
    for candidate in possible:
        if not (failed.get(candidate.key) or read_metrics(job.result(candidate.key), evaluation)):
            failed[candidate.key] = "the result has none of the numbers that tables show"
    return failures | failed
