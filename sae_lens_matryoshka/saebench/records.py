"""The records of `eval` as pydantic models: an SAE or level, a job, what an output folder holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sae_lens_matryoshka.saebench.evaluations import read_result, result_file
from sae_lens_matryoshka.util.files import atomic_file

RECORD = "evaluated.json"
LOCK = ".lock"


def other_folder_needed(out: Path, content: str) -> ValueError:
    """The error for an output folder whose content does not fit."""
    return ValueError(f"out={str(out)!r} holds {content}: give another folder.")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")


class Candidate(_Model):
    """One SAE, or one level of one."""

    label: str  # in tables and plots
    source: tuple[str, ...]  # arguments of `load_sae`: a folder, or a release and an SAE's id
    width: int  # latents of the level; d_sae for the whole SAE
    d_sae: int  # latents of the whole SAE
    is_baseline: bool = False  # whether other SAEs are compared against it
    matryoshka_widths: Sequence[int] | None = None  # level widths, if the SAE's config has none
    model_name: str | None = None  # the model, if the SAE's config names none

    @property
    def is_whole(self) -> bool:
        return self.width == self.d_sae

    @property
    def title(self) -> str:
        return self.label if self.is_whole else f"{self.label}, first {self.width}"

    @property
    def key(self) -> str:
        """Name in SAEBench's files."""
        return re.sub(r"[^\w.-]+", "_", f"{self.label}_width_{self.width}")


class Job(_Model):
    """One process: one evaluation with one seed."""

    evaluation: str  # a key of `EVALUATIONS`
    candidates: list[Candidate]  # all of one model
    model_name: str  # as TransformerLens knows it
    seed: int  # of everything random, the same for each SAE
    device: str
    settings: dict[str, Any]  # fields of SAEBench's config, else as SAEBench's own scripts set them
    out: Path  # folder of the results
    shared: Path  # folder that the processes of other seeds use as well

    @property
    def failures_file(self) -> Path:
        return self.out / "failures.json"

    def result(self, key: str) -> Path:
        """SAEBench's file on the candidate of that key."""
        return result_file(self.out, self.evaluation, key)

    def unfinished(self) -> list[Candidate]:
        """The candidates without a complete result."""
        return [c for c in self.candidates if read_result(self.result(c.key)) is None]


class Record(_Model):
    """What an output folder holds results of; saved in it as `evaluated.json`."""

    model_name: str  # as TransformerLens knows it, the same for all SAEs
    model_sha256: str | None = None  # of the model's files, if it is a local folder
    hook_names: dict[str, str] = {}  # label → where the SAE reads the model
    fingerprints: dict[str, str] = {}  # label → `levels.fingerprint` of the SAE
    candidates: list[Candidate] = []  # in the order of tables
    settings: dict[str, dict[str, Any]] = {}  # evaluation → fields of SAEBench's config
    not_run: dict[str, dict[str, str]] = {}  # evaluation → candidate's key → why it has no result
    seconds: dict[str, list[float]] = {}  # evaluation → seconds of each of its processes

    @classmethod
    def read(cls, out: Path) -> Record | None:
        """The record of an output folder; None if the folder is new or empty.

        Raises:
            ValueError: the folder holds something else, or its record can't be read.
        """
        file = out / RECORD
        if file.exists():
            try:
                return cls.model_validate_json(file.read_bytes())
            except ValidationError as error:
                problem = error.errors()[0]
                field = "".join(f"{part}: " for part in problem["loc"])
                raise ValueError(
                    f"{file} is not a record of evaluations: {field}{problem['msg']}"
                ) from error
        if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {LOCK}):
            raise other_folder_needed(out, "something other than evaluations")
        return None

    def write(self, out: Path) -> None:
        with atomic_file(out / RECORD) as unfinished:
            unfinished.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
