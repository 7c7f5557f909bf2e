"""Checks of what the user asks of SAEBench, before any SAE or language model loads."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae_lens_matryoshka.saebench.evaluations import EVALUATIONS, config_class
from sae_lens_matryoshka.util.checks import invalid_option
from sae_lens_matryoshka.util.suggest import did_you_mean

Settings = Mapping[str, Mapping[str, Any]]  # evaluation → field of SAEBench's config → value

# Settings that SAEBench does not have, read by `workarounds`
_OWN = {"absorption": ("n_words",)}
WORDS_PER_LETTER = 20  # that `n_words` includes
_FEWEST_WORDS = 26 * WORDS_PER_LETTER
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_RESERVED = {
    "random_seed": "use --seeds",
    "model_name": "the SAE's config names it, or --model",
    "perform_scr": "scr and tpp are two evaluations",
    **dict.fromkeys(("artifact_dir", "results_path", "model_cache_path"), "it is in --out"),
}


def check_settings(evaluations: Sequence[str], settings: Settings) -> None:
    """Check the names of evaluations, and the settings against SAEBench's configs.

    Raises:
        ValueError: SAEBench has no such evaluation or setting, or does not accept the value.
    """
    for evaluation in [*evaluations, *settings]:
        if evaluation not in EVALUATIONS:
            raise ValueError(
                f"{evaluation!r} is not an evaluation; accepted: {', '.join(EVALUATIONS)}"
                f"{did_you_mean(evaluation, EVALUATIONS)}"
            )
        if evaluation not in evaluations:
            raise ValueError(f"{evaluation} has settings but is not run: add it to --evals.")
    for evaluation, values in settings.items():
        config = config_class(evaluation)
        own = _OWN.get(evaluation, ())
        known = [*own, *(f.name for f in fields(config) if f.name not in _RESERVED)]
        for field, value in values.items():
            name = f"{evaluation}.{field}"
            if field in _RESERVED:
                raise ValueError(f"{name} can't be set: {_RESERVED[field]}.")
            if field not in known:
                raise ValueError(
                    f"{name} is not a setting of SAEBench; accepted: {', '.join(known)}"
                    f"{did_you_mean(field, known)}"
                )
            _check_value(name, field, value)
        try:
            config(**{field: value for field, value in values.items() if field not in own})
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, (evaluation, *problem["loc"])))
            example = ", such as [a, b]" if problem["type"] == "list_type" else ""
            raise ValueError(
                f"{name}={problem['input']!r} is not accepted: {problem['msg']}{example}."
            ) from error


def _check_value(name: str, field: str, value: Any) -> None:
    """Check what SAEBench's types accept and its evaluations don't."""
    if field in ("llm_dtype", "dtype") and value not in _DTYPES:
        raise invalid_option(name, value, " or ".join(_DTYPES))
    if field == "n_words" and not (isinstance(value, int) and value >= _FEWEST_WORDS):
        accepted = f"{_FEWEST_WORDS} words or more, {WORDS_PER_LETTER} for each letter"
        raise invalid_option(name, value, accepted)
    if value == []:
        raise invalid_option(name, value, "a list that is not empty")
    numbers = value if isinstance(value, list) else [value]
    if field != "prompt_token_pos":  # which counts from the end
        for number in numbers:
            if isinstance(number, int) and not isinstance(number, bool) and number < 1:
                raise invalid_option(name, value, "positive integers")
    if isinstance(value, str) and value.startswith(("./", "../", "/", "~")):
        path = Path(value).expanduser()
        if not path.is_absolute():
            raise invalid_option(name, value, "an absolute path")
        if not path.exists():
            raise ValueError(f"{name}={value!r} does not exist.")
