"""`--vary FIELD=V,V,…`: the combinations of values, and the SAEs of a sweep that they give."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_matryoshka.runs.config import (
    build_run_config,
    field_types,
    sae_config_class,
    unknown_field,
)
from sae_lens_matryoshka.util.checks import invalid_option

_SEED = "seed"  # the only field outside `sae` that can vary: that of the initial weights
_ARCHITECTURE = "architecture"
# Fields of `sae` that say what the activations are, or how many are drawn before training
_SHARED = ("d_in", "device", "dtype", "metadata", "normalize_activations", "reshape_activations")


class Choice(NamedTuple):
    """One value of a varied field.

    Attributes:
        field: The field.
        text: The value as it was written, the entries of a list with slashes between them.
    """

    field: str
    text: str

    @property
    def words(self) -> list[str]:
        """The value as the words after a flag."""
        return self.text.split("/")

    @property
    def label(self) -> str:
        """What names the choice in a folder's name."""
        return f"{self.field}={self.text.replace('/', '-')}"


def read_vary(vary: Iterable[str]) -> dict[str, list[Choice]]:
    """The choices for each field, from texts such as "k=20,40" or "matryoshka_widths=5/20,10/20".

    Raises:
        ValueError: a text has another form, or two vary the same field.
    """
    axes: dict[str, list[Choice]] = {}
    for text in vary:
        field, equals, values = text.partition("=")
        if not field or not equals or not all(values.split(",")):
            accepted = f"{field or 'FIELD'}=value,value,…"
            raise ValueError(f"--vary {text!r} is not accepted: give {accepted}")
        if field in axes:
            raise ValueError(f"--vary {text!r} is not accepted: {field} is varied twice.")
        axes[field] = [Choice(field, value) for value in values.split(",")]
    return axes


def check_distinct(names: Iterable[str]) -> None:
    """Check that no two SAEs have the same name.

    Raises:
        ValueError: two have.
    """
    for name, n in Counter(names).items():
        if n > 1:
            raise ValueError(f"variant {name} is given twice.")


class Sweep(NamedTuple):
    """SAEs to train on the same activations.

    Attributes:
        cfg: What they share: the model, the texts, the optimizer. Its `sae` is that of the first.
        cfgs: For each SAE, by name, the config of a run that trains it alone; its folders are below
            those of `cfg`.
    """

    cfg: LanguageModelSAERunnerConfig[Any]
    cfgs: dict[str, LanguageModelSAERunnerConfig[Any]]


def plan_sweep(
    values: Mapping[str, Any], flags: Mapping[str, Sequence[str]], vary: Sequence[str]
) -> Sweep:
    """The SAEs of a sweep: all combinations of the varied values.

    Fields that one of several architectures lacks are left out for it, varied ones too.

    Args:
        values: As in `build_run_config`.
        flags: As in `build_run_config`.
        vary: Texts as in `read_vary`. The fields are those of `sae`, with or without "sae.", except
            what the activations decide (`d_in`, `dtype`, …), and `seed`, which here is that of the
            initial weights alone.

    Raises:
        ValueError: a field can't vary, a combination is not accepted or given twice, or the run has
            no `output_path` or starts from a trained SAE.
    """
    if not vary:
        raise ValueError("--vary lacks a value: give FIELD=value,value,…")
    combinations = list(_combinations(values, flags, vary))
    check_distinct(combination.name for combination in combinations)
    first = combinations[0]
    shared = {field: words for field, words in first.chosen.items() if field != _SEED}
    cfg = _built(first._replace(chosen=shared))
    if cfg.output_path is None:
        raise invalid_option("output_path", None, "the folder for the SAEs of --vary")
    if cfg.from_pretrained_path is not None:
        accepted = "none with --vary, whose SAEs start from weights of their own"
        raise invalid_option("from_pretrained_path", cfg.from_pretrained_path, accepted)
    checkpoint, cfg.resume_from_checkpoint = cfg.resume_from_checkpoint, None
    cfgs = {}
    for combination in combinations:
        name = combination.name
        cfgs[name] = alone = _built(combination, verbose=["false"])  # `cfg` has printed it all
        alone.verbose, alone.logger = cfg.verbose, cfg.logger
        alone.output_path = f"{cfg.output_path}/{name}"
        alone.checkpoint_path = cfg.checkpoint_path and f"{cfg.checkpoint_path}/{name}"
        alone.resume_from_checkpoint = checkpoint and f"{checkpoint}/{name}"
    return Sweep(cfg, cfgs)


class _Combination(NamedTuple):
    name: str
    values: dict[str, Any]
    flags: dict[str, Sequence[str]]
    chosen: dict[str, Sequence[str]]  # further flags, for the varied fields


def _combinations(
    values: Mapping[str, Any], flags: Mapping[str, Sequence[str]], vary: Sequence[str]
) -> Iterator[_Combination]:
    axes = read_vary(text.removeprefix("sae.") for text in vary)
    varied = axes.pop(_ARCHITECTURE, [])
    values_of = [{**values, f"sae.{choice.field}": choice.text} for choice in varied] or [values]
    types_of = [field_types(sae_config_class(each)) for each in values_of]
    known = {field for types in types_of for field in types}
    for field in axes:
        _check_can_vary(field, known)
    for i, types in enumerate(types_of):
        foreign = known - types.keys()
        own = [axes[field] for field in axes if field == _SEED or f"sae.{field}" in types]
        for choices in product(*own):
            yield _Combination(
                name="_".join(choice.label for choice in (*varied[i : i + 1], *choices)),
                values={field: v for field, v in values_of[i].items() if field not in foreign},
                flags={field: words for field, words in flags.items() if field not in foreign},
                chosen={
                    c.field if c.field == _SEED else f"sae.{c.field}": c.words for c in choices
                },
            )


def _check_can_vary(field: str, known: Iterable[str]) -> None:
    of_sae = [name.removeprefix("sae.") for name in known if name.startswith("sae.")]
    can_vary = [_SEED, *(name for name in of_sae if name not in _SHARED)]
    if field in can_vary:
        return
    if field in _SHARED or field in known:
        raise ValueError(
            f"--vary {field} is not accepted: the SAEs of a sweep share it. What can vary is "
            f"{', '.join(sorted(can_vary))}."
        )
    raise unknown_field(field, can_vary)


def _built(combination: _Combination, **flags: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    flags = {**combination.flags, **combination.chosen, **flags}
    try:
        return build_run_config(combination.values, flags)
    except ValueError as error:
        raise ValueError(f"{combination.name}: {error}") from error
