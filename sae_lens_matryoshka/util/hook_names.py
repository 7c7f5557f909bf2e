"""Places in a language model, checked by their names before the model loads."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
)
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES


def short_model_name(name: str) -> str:
    """The name of a model as SAEBench's tables have it: without its owner, where that is a name.

    Raises:
        ValueError: TransformerLens, which loads the model, does not know it.
    """
    try:
        official = get_official_model_name(name)
    except ValueError:
        names = [model.rpartition("/")[2] for model in OFFICIAL_MODEL_NAMES]
        near = difflib.get_close_matches(name.rpartition("/")[2], names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"TransformerLens does not know the model {name!r}{hint}") from None
    short = official.rpartition("/")[2]
    try:
        return short if get_official_model_name(short) == official else official
    except ValueError:  # not every model has a name without its owner
        return official


def local_folder(model_name: str) -> Path | None:
    """The folder that transformers takes a model from instead of the Hub, if there is one here."""
    folder = Path(get_official_model_name(model_name))
    return folder if folder.is_dir() else None


def check_place(hook_name: str | None, d_in: int, model_name: str, label: str) -> None:
    """Check where an SAE belongs against the shape of its model.

    Args:
        hook_name: TransformerLens' name of the place.
        d_in: Dimension of the activations that the SAE reads there.
        model_name: As TransformerLens knows it; of the model only its configuration is read.
        label: What to call the SAE in an error.

    Raises:
        ValueError: there is no such place in the model, or it has another width.
        OSError: the configuration can't be had.
    """
    place = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(hook_name))
    if place is None:
        raise ValueError(
            f"{label} is of hook_name={hook_name!r}, and not of a place in one of TransformerLens' "
            "layers, blocks.N.…, such as blocks.1.hook_resid_post."
        )
    model = get_pretrained_model_config(model_name)
    if int(place[1]) >= model.n_layers:
        raise ValueError(
            f"{label} is of {hook_name}, and {model_name} has the layers 0 to {model.n_layers - 1}."
        )
    width = {
        "attn.hook_z": model.n_heads * model.d_head,
        "mlp.hook_pre": model.d_mlp,
        "mlp.hook_post": model.d_mlp,
    }.get(place[2], model.d_model)
    if d_in != width:
        raise ValueError(
            f"{label} has d_in={d_in}, and {hook_name} of {model_name} is {width} wide."
        )
