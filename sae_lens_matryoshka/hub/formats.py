"""The formats that `load_sae` knows, and readers for those that SAELens does not read from disk."""

import ast
import json
import pickle
import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_pre_6_0_config, load_safetensors_weights
from sae_lens.util import dtype_to_str

from sae_lens_matryoshka.util.checks import invalid_option

_MATRYOSHKA_CLASS = "MatryoshkaBatchTopKSAE"
_GEMMA_SCOPE_2_HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}

Config = dict[str, Any]
StateDict = dict[str, torch.Tensor]


class OnlyFromHubError(ValueError):
    """Only SAELens' loader for the Hub reads this kind of checkpoint."""


class Checkpoint(NamedTuple):
    """A JumpReLU SAE as another library saved it.

    Attributes:
        weights: Weights under SAELens' names.
        cfg: What differs from SAELens' defaults, as a flat dict, SAELens' form before 6.0.
        group_sizes: Number of latents that each level adds; None where not known.
        k: The k of its training.
    """

    weights: StateDict
    cfg: Config
    group_sizes: Any = None
    k: int | None = None


class Format(NamedTuple):
    """How a library saves an SAE in a folder.

    Attributes:
        name: The library.
        config: File name of the configuration.
        weights: File name of the weights.
        loader: Name of SAELens' loader for the Hub, if it has one.
        read: Reads the two files; None where SAELens does. Raises ValueError for broken files.
    """

    name: str
    config: str
    weights: str
    loader: str | None
    read: Callable[[Path, Path], Checkpoint] | None


def read_json(path: Path) -> Config:
    """The JSON object in a file; ValueError if it holds none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path.name} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds no JSON object.")
    return config


def read_pickle(path: Path) -> StateDict:
    """The tensors in a PyTorch file; ValueError if it is broken, has none, or would run code."""
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {code[1]}" if code else "it is not a file of weights"
        raise ValueError(f"{path.name} was not unpickled: {reason}.") from error
    except Exception as error:  # a broken pickle can raise anything
        reason = str(error).partition(".")[0] or "it ends too early"
        raise ValueError(f"{path.name} is broken: {reason}.") from error
    if isinstance(state_dict, torch.Tensor):
        return {"tensor": state_dict}
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in state_dict.values()
    ):
        raise ValueError(f"{path.name} holds no state dict.")
    return dict(state_dict)


def read_dictionary_learning(config: Path, weights: Path) -> Checkpoint:
    """dictionary_learning's `MatryoshkaBatchTopKSAE`, the format of SAEBench's suites."""
    cfg = read_json(config)
    trainer, buffer = _section(config, cfg, "trainer"), _section(config, cfg, "buffer")
    dict_class = trainer.get("dict_class")
    if dict_class != _MATRYOSHKA_CLASS:
        # without a class SAELens can't load it from the Hub either
        kind = OnlyFromHubError if dict_class else ValueError
        raise kind(
            f"{config.name}: trainer.dict_class={dict_class!r} is not accepted from a folder: "
            f"only {_MATRYOSHKA_CLASS!r} is; other classes load from the Hub."
        )
    state_dict = read_pickle(weights)
    sizes = state_dict.pop("group_sizes", None)
    metadata = {
        "model_name": str(trainer.get("lm_name")).split("/")[-1],
        "hook_name": f"blocks.{trainer.get('layer')}.hook_resid_post",
        "context_size": buffer.get("ctx_len"),
        "dataset_path": "monology/pile-uncopyrighted",  # as in SAELens' loader
    }
    sizes = trainer.get("group_sizes") if sizes is None else sizes.tolist()
    return Checkpoint(state_dict, metadata, sizes, trainer.get("k"))


def read_bartbussmann(config: Path, weights: Path) -> Checkpoint:
    """`GlobalBatchTopKMatryoshkaSAE` of the paper's own code, bartbussmann/matryoshka_sae.

    Its encoder has no bias, whatever `b_enc` holds, and `input_unit_norm` is SAELens' "layer_norm".
    """
    cfg = read_json(config)
    sizes = cfg.get("group_sizes")
    if isinstance(sizes, str):  # its logger writes lists as text
        try:
            sizes = ast.literal_eval(sizes)
        except (ValueError, SyntaxError):
            raise ValueError(f"{config.name}: group_sizes={sizes!r} is not a list.") from None
    state_dict = read_pickle(weights)
    if "b_enc" in state_dict:
        state_dict["b_enc"] = torch.zeros_like(state_dict["b_enc"])
    options = {
        "normalize_activations": "layer_norm" if cfg.get("input_unit_norm") else "none",
        "model_name": cfg.get("model_name"),
        "hook_name": cfg.get("hook_point"),
        "context_size": cfg.get("seq_len"),
        "dataset_path": cfg.get("dataset_path"),
    }
    return Checkpoint(state_dict, options, sizes, cfg.get("top_k"))


def read_gemma_scope_2(config: Path, weights: Path) -> Checkpoint:
    """An SAE of Gemma Scope 2, whose level widths were never published."""
    cfg = read_json(config)
    hook_point = cfg.get("hf_hook_point_in")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", str(hook_point))
    if match is None or match[2] not in _GEMMA_SCOPE_2_HOOKS or "hf_hook_point_out" in cfg:
        raise OnlyFromHubError(
            f"{config.name}: hf_hook_point_in={hook_point!r} is not accepted from a folder: give "
            "an SAE of a layer's output, attention output or MLP output."
        )
    model_name = str(cfg.get("model_name")).replace("-v3", "-3")
    if "270m" in model_name:  # the one model of that family without the suffix
        model_name = model_name.replace("-pt", "")
    raw = load_safetensors_weights(weights)
    state_dict = {name.replace("w_", "W_"): tensor for name, tensor in raw.items()}
    options = {
        "apply_b_dec_to_input": False,
        "model_name": model_name if "google" in model_name else f"google/{model_name}",
        "hook_name": f"blocks.{match[1]}.{_GEMMA_SCOPE_2_HOOKS[match[2]]}",
        "hf_hook_name": hook_point,
        "context_size": 1024,  # these two as in SAELens' loader
        "dataset_path": "monology/pile-uncopyrighted",
    }
    return Checkpoint(state_dict, options)


SAELENS = Format("SAELens", SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, "sae_lens", None)
FORMATS = (
    SAELENS,
    Format(
        "dictionary_learning",
        "config.json",
        "ae.pt",
        "dictionary_learning_1",
        read_dictionary_learning,
    ),
    Format("bartbussmann/matryoshka_sae", "config.json", "sae.pt", None, read_bartbussmann),
    Format("Gemma Scope 2", "config.json", "params.safetensors", "gemma_3", read_gemma_scope_2),
)


def read_checkpoint(
    layout: Format, config: Path, weights: Path, overrides: Config
) -> tuple[Config, StateDict]:
    """Config and state dict as SAELens' loaders return them, for any format but SAELens' own.

    Args:
        layout: Reads the two files.
        config: File of the configuration.
        weights: File of the weights.
        overrides: Fields of the config to replace, such as those in SAELens' table of releases.

    Raises:
        ValueError: the files are broken, or hold another kind of SAE.
    """
    assert layout.read is not None
    raw, options, group_sizes, k = layout.read(config, weights)
    missing = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} - raw.keys()
    if missing:
        raise ValueError(f"{weights.name} lacks {', '.join(sorted(missing))}.")
    d_in, d_sae = raw["W_enc"].shape if raw["W_enc"].ndim == 2 else (0, 0)
    if raw["threshold"].ndim == 0:
        raw["threshold"] = raw["threshold"].repeat(d_sae)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {"b_enc": (d_sae,), "threshold": (d_sae,)}
    for name, shape in shapes.items():
        if tuple(raw[name].shape) != shape or 0 in shape:
            raise ValueError(
                f"{weights.name}: {name} has the shape {tuple(raw[name].shape)}, beside W_enc of "
                f"{tuple(raw['W_enc'].shape)}."
            )
    details: Config = {} if k is None else {"k": k}
    if group_sizes is not None:
        is_list = isinstance(group_sizes, list) and all(type(size) is int for size in group_sizes)
        if not is_list or min(group_sizes, default=0) < 1 or sum(group_sizes) != d_sae:
            accepted = f"positive integers that sum to d_sae={d_sae}"
            raise invalid_option("group_sizes", group_sizes, accepted)
        details["matryoshka_widths"] = list(accumulate(group_sizes))
    cfg = handle_pre_6_0_config(
        {
            "architecture": "jumprelu",
            "d_in": d_in,
            "d_sae": d_sae,
            "dtype": dtype_to_str(raw["W_enc"].dtype),
            "reshape_activations": "none",
            **{name: value for name, value in options.items() if value is not None},
            **overrides,
            "sae_lens_version": sae_lens.__version__,
        }
    )
    cfg["metadata"]["training_architecture_details"] = details
    return cfg, {name: raw[name] for name in shapes}


def _section(path: Path, cfg: Config, name: str) -> Config:
    section = cfg.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{path.name} lacks the section {name!r}.")
    return section
