"""Matryoshka checkpoints that other libraries wrote, read from files into SAELens' form."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import LLM_METADATA_KEYS, load_safetensors_weights
from sae_lens.util import dtype_to_str

_MATRYOSHKA_CLASS = "MatryoshkaBatchTopKSAE"

Config = dict[str, Any]
StateDict = dict[str, torch.Tensor]


class Format(NamedTuple):
    """One way to lay an SAE down in a folder.

    Attributes:
        name: The library it comes from.
        config: File name of the configuration.
        weights: File name of the weights.
        loader: The name of SAELens' own loader from the Hub, if it has one.
        read: From those two paths to a config and a state dict as SAELens' loaders return them;
            None where SAELens does all of it.
        reads: Whether `read` is for a checkpoint with this configuration; the others of its format
            are for SAELens' loader.
    """

    name: str
    config: str
    weights: str
    loader: str | None
    read: Callable[[Path, Path], tuple[Config, StateDict]] | None = None
    reads: Callable[[Config], bool] = lambda _: True


def read_json(path: Path) -> Config:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path.name} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds no JSON object.")
    return config


def read_pickle(path: Path) -> StateDict:
    """The tensors in a PyTorch file, which is never allowed to run code.

    Raises:
        ValueError: it is broken, holds something other than a state dict, or wants to run code.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {asked[1]}" if asked else "it is no file of weights"
        raise ValueError(f"{path.name} was refused unread: {reason}.") from error
    except Exception as error:  # there is no end to what bytes that are no pickle lead to
        reason = str(error).partition(".")[0] or "it ends too early"
        raise ValueError(f"{path.name} is broken: {reason}.") from error
    if isinstance(state_dict, torch.Tensor):
        return {"tensor": state_dict}
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in state_dict.values()
    ):
        raise ValueError(f"{path.name} holds no state dict.")
    return dict(state_dict)


def read_dictionary_learning(config: Path, weights: Path) -> tuple[Config, StateDict]:
    """dictionary_learning's `MatryoshkaBatchTopKSAE`, the format of SAEBench's suites.

    Raises:
        ValueError: the files are broken or hold another kind of SAE.
    """
    cfg = read_json(config)
    trainer, buffer = _section(config, cfg, "trainer"), _section(config, cfg, "buffer")
    dict_class = trainer.get("dict_class")
    if dict_class != _MATRYOSHKA_CLASS:
        raise ValueError(
            f"{config.name}: trainer.dict_class={dict_class!r} is not accepted from a folder: "
            f"only {_MATRYOSHKA_CLASS!r} is; other classes load from the Hub."
        )
    state_dict = read_pickle(weights)
    sizes = state_dict.pop("group_sizes", None)
    return _jumprelu(
        state_dict,
        source=weights,
        group_sizes=trainer.get("group_sizes") if sizes is None else sizes.tolist(),
        metadata={
            "model_name": str(trainer.get("lm_name")).split("/")[-1],
            "hook_name": f"blocks.{trainer.get('layer')}.hook_resid_post",
            "context_size": buffer.get("ctx_len"),
            "dataset_path": "monology/pile-uncopyrighted",  # as SAELens' own loader says
        },
        details={"k": trainer.get("k")},
    )


def read_bartbussmann(config: Path, weights: Path) -> tuple[Config, StateDict]:
    """`GlobalBatchTopKMatryoshkaSAE` of the paper's own code, bartbussmann/matryoshka_sae.

    Its encoder has no bias, whatever `b_enc` holds, and `input_unit_norm` is SAELens' "layer_norm".

    Raises:
        ValueError: the files are broken or hold another kind of SAE.
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
    return _jumprelu(
        state_dict,
        source=weights,
        group_sizes=sizes,
        normalize_activations="layer_norm" if cfg.get("input_unit_norm") else "none",
        metadata={
            "model_name": cfg.get("model_name"),
            "hook_name": cfg.get("hook_point"),
            "context_size": cfg.get("seq_len"),
            "dataset_path": cfg.get("dataset_path"),
        },
        details={"k": cfg.get("top_k")},
    )


def read_gemma_scope_2(config: Path, weights: Path) -> tuple[Config, StateDict]:
    """An SAE of Gemma Scope 2; its levels were never published.

    Raises:
        ValueError: the files are broken or hold a transcoder.
    """
    cfg = read_json(config)
    hook_name = _gemma_scope_2_hook(cfg)
    if hook_name is None:
        raise ValueError(
            f"{config.name}: hf_hook_point_in={cfg.get('hf_hook_point_in')!r} is not accepted from "
            "a folder: give an SAE of a layer's output, attention output or MLP output."
        )
    raw = load_safetensors_weights(weights)
    state_dict = {
        ours: raw[theirs]
        for theirs, ours in (("w_enc", "W_enc"), ("w_dec", "W_dec"))
        if theirs in raw
    } | {name: raw[name] for name in ("b_enc", "b_dec", "threshold") if name in raw}
    model_name = str(cfg.get("model_name")).replace("-v3", "-3")
    if "270m" in model_name:  # the one model of that family without the suffix
        model_name = model_name.replace("-pt", "")
    return _jumprelu(
        state_dict,
        source=weights,
        group_sizes=None,
        apply_b_dec_to_input=False,
        metadata={
            "model_name": model_name if "google" in model_name else f"google/{model_name}",
            "hook_name": hook_name,
            "hf_hook_name": cfg["hf_hook_point_in"],
            "context_size": 1024,  # these two as SAELens' own loader says
            "dataset_path": "monology/pile-uncopyrighted",
        },
        details={},
    )


def _gemma_scope_2_hook(cfg: Config) -> str | None:
    """TransformerLens' name of the place that an SAE reads and writes; None for a transcoder."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", str(cfg.get("hf_hook_point_in")))
    hooks = {
        "output": "hook_resid_post",
        "self_attn.o_proj.input": "attn.hook_z",
        "post_feedforward_layernorm.output": "hook_mlp_out",
    }
    if match is None or match[2] not in hooks or "hf_hook_point_out" in cfg:
        return None
    return f"blocks.{match[1]}.{hooks[match[2]]}"


def _is_matryoshka(cfg: Config) -> bool:
    trainer = cfg.get("trainer")
    # What lacks a class is for `read` to refuse.
    return not isinstance(trainer, dict) or trainer.get("dict_class") in (None, _MATRYOSHKA_CLASS)


SAELENS = Format("SAELens", SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, "sae_lens")
FORMATS = (
    SAELENS,
    Format(
        "dictionary_learning",
        "config.json",
        "ae.pt",
        "dictionary_learning_1",
        read_dictionary_learning,
        _is_matryoshka,
    ),
    Format("bartbussmann/matryoshka_sae", "config.json", "sae.pt", None, read_bartbussmann),
    Format(
        "Gemma Scope 2",
        "config.json",
        "params.safetensors",
        "gemma_3",
        read_gemma_scope_2,
        lambda cfg: _gemma_scope_2_hook(cfg) is not None,
    ),
)


def _section(path: Path, cfg: Config, name: str) -> Config:
    section = cfg.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{path.name} lacks the section {name!r}.")
    return section


def _jumprelu(
    raw: StateDict,
    source: Path,
    group_sizes: Sequence[int] | None,
    metadata: Config,
    details: Config,
    normalize_activations: str = "none",
    apply_b_dec_to_input: bool = True,
) -> tuple[Config, StateDict]:
    """Config and state dict of SAELens' JumpReLU SAE with these weights, checked."""
    missing = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} - raw.keys()
    if missing:
        raise ValueError(f"{source.name} lacks {', '.join(sorted(missing))}.")
    d_in, d_sae = raw["W_enc"].shape if raw["W_enc"].ndim == 2 else (0, 0)
    threshold = raw["threshold"]
    state_dict = {
        "W_enc": raw["W_enc"],
        "b_enc": raw["b_enc"],
        "W_dec": raw["W_dec"],
        "b_dec": raw["b_dec"],
        "threshold": threshold.expand(d_sae).clone() if threshold.ndim == 0 else threshold,
    }
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    for name, shape in shapes.items():
        if tuple(state_dict[name].shape) != shape or 0 in shape:
            raise ValueError(
                f"{source.name}: {name} has the shape {tuple(state_dict[name].shape)}, beside "
                f"W_enc of {tuple(raw['W_enc'].shape)}."
            )
    if group_sizes is not None:
        _check_group_sizes(group_sizes, d_sae)
        details = {**details, "matryoshka_widths": list(accumulate(group_sizes))}
    cfg = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": dtype_to_str(raw["W_enc"].dtype),
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": normalize_activations,
        "metadata": {
            **metadata,
            "prepend_bos": True,
            "training_architecture_details": details,
            "sae_lens_training_version": None,
            "sae_lens_version": sae_lens.__version__,  # the form of this config
        },
    }
    return cfg, state_dict


def with_overrides(cfg: Config, overrides: Mapping[str, Any]) -> Config:
    """`cfg` with what SAELens' table of releases says of it, each value in its place."""
    metadata = {name: value for name, value in overrides.items() if name in LLM_METADATA_KEYS}
    others = {name: value for name, value in overrides.items() if name not in LLM_METADATA_KEYS}
    return {**cfg, **others, "metadata": {**cfg["metadata"], **metadata}}


def _check_group_sizes(sizes: Any, d_sae: int) -> None:
    accepted = f"give positive integers that sum to the {d_sae} latents of the dictionary"
    if not isinstance(sizes, list) or not all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes
    ):
        raise ValueError(f"group_sizes={sizes!r} is not accepted: {accepted}.")
    if sum(sizes) != d_sae:
        raise ValueError(
            f"group_sizes={sizes} is not accepted, its sum is {sum(sizes)}: {accepted}."
        )
