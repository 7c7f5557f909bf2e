"""Models and hook names, checked before a model loads."""

import re
from pathlib import Path

from transformer_lens.loading_from_pretrained import (
    get_official_model_name,
    get_pretrained_model_config,
)
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from sae_lens_matryoshka.util.suggest import did_you_mean


def short_model_name(name: str) -> str:
    """The name of a model in SAEBench's tables: without its owner, where that is unambiguous.

    Raises:
        ValueError: TransformerLens, which loads the model, does not know it.
    """
    try:
        official = get_official_model_name(name)
    except ValueError:
        names = [model.rpartition("/")[2] for model in OFFICIAL_MODEL_NAMES]
        hint = did_you_mean(name.rpartition("/")[2], names, cutoff=0.5)
        raise ValueError(f"TransformerLens does not know the model {name!r}{hint}") from None
    short = official.rpartition("/")[2]
    try:
        return short if get_official_model_name(short) == official else official
    except ValueError:  # some models have no name without the owner
        return official


def local_folder(model_name: str) -> Path | None:
    """The folder here that transformers loads the model from instead of the Hub, if any."""
    folder = Path(get_official_model_name(model_name))
    return folder if folder.is_dir() else None


def transformer_lens_hook_name(hook_name: str) -> str:
    """TransformerLens' name of a layer's output that is named as in transformers.

    SAELens names hooks so with `model_class_name="AutoModelForCausalLM"`: "model.layers.7" is
    "blocks.7.hook_resid_post". Other names are returned as they are.
    """
    layer = re.fullmatch(r"(?:model|gpt_neox|transformer)\.(?:layers|h)\.(\d+)", hook_name)
    return hook_name if layer is None else f"blocks.{layer[1]}.hook_resid_post"


def check_hook_name(hook_name: str | None, d_in: int, model_name: str, label: str) -> None:
    """Check an SAE's hook name and width against the configuration of its model.

    Args:
        hook_name: TransformerLens' name of the hook.
        d_in: Dimension of the activations that the SAE reads there.
        model_name: As TransformerLens knows it; only the model's configuration is loaded.
        label: What errors call the SAE.

    Raises:
        ValueError: the model has no such layer, or the hook has another width.
        OSError: the configuration can be neither read nor downloaded.
    """
    parts = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(hook_name))
    if parts is None:
        raise ValueError(
            f"{label} has hook_name={hook_name!r}: give a hook in one of TransformerLens' layers, "
            "blocks.N.…, such as blocks.1.hook_resid_post."
        )
    model = get_pretrained_model_config(model_name)
    if int(parts[1]) >= model.n_layers:
        raise ValueError(
            f"{label} has hook_name={hook_name!r}, and {model_name} has the layers 0 to "
            f"{model.n_layers - 1}."
        )
    width = {
        "attn.hook_z": model.n_heads * model.d_head,
        "mlp.hook_pre": model.d_mlp,
        "mlp.hook_post": model.d_mlp,
    }.get(parts[2], model.d_model)
    if d_in != width:
        raise ValueError(
            f"{label} has d_in={d_in}, and {hook_name} of {model_name} has width {width}."
        )
