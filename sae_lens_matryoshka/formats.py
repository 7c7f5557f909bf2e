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

Config = dict[str, Any]
StateDict = dict[str, torch.Tensor]


class Format(NamedTuple):
    """One way to lay an SAE down in a folder.

    Attributes:
        name: The library it comes from.
        config: File name of the configuration.
        weights: File name of the weights.
        read: From those two paths to a config and a state dict as SAELens' loaders return them;
            None where SAELens reads the format itself.
    """

    name: str
    config: str
    weights: str
    read: Callable[[Path, Path], tuple[Config, StateDict]] | None


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
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
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
    trainer, buffer = _section(config, cfg, "trainer"), cfg.get("buffer", {})
    dict_class = trainer.get("dict_class")
    if dict_class != "MatryoshkaBatchTopKSAE":
        raise ValueError(
            f"{config.name}: trainer.dict_class={dict_class!r} is not accepted from a folder: "
            "only 'MatryoshkaBatchTopKSAE' is; other classes load from the Hub."
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
    point = str(cfg.get("hf_hook_point_in"))
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", point)
    hooks = {
        "output": "hook_resid_post",
        "self_attn.o_proj.input": "attn.hook_z",
        "post_feedforward_layernorm.output": "hook_mlp_out",
    }
    if match is None or match[2] not in hooks or "hf_hook_point_out" in cfg:
        raise ValueError(
            f"{config.name}: hf_hook_point_in={point!r} is not accepted from a folder: give an SAE "
            "of a layer's output, attention output or MLP output."
        )
    raw = load_safetensors_weights(weights)
    state_dict = {
        ours: raw[theirs]
        for theirs, ours in (("w_enc", "W_enc"), ("w_dec", "W_dec"))
        if theirs in raw
    } | {name: raw[name] for name in ("b_enc", "b_dec", "threshold") if name in raw}
    model_name = str(cfg.get("model_name")).replace("-v3", "-3")
    return _jumprelu(
        state_dict,
        source=weights,
        group_sizes=None,
        apply_b_dec_to_input=False,
        metadata={
            "model_name": model_name if "google" in model_name else f"google/{model_name}",
            "hook_name": f"blocks.{match[1]}.{hooks[match[2]]}",
            "hf_hook_name": point,
            "context_size": 1024,  # these two as SAELens' own loader says
            "dataset_path": "monology/pile-uncopyrighted",
        },
        details={},
    )


SAELENS = Format("SAELens", SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, None)
DICTIONARY_LEARNING = Format(
    "dictionary_learning", "config.json", "ae.pt", read_dictionary_learning
)
BARTBUSSMANN = Format("bartbussmann/matryoshka_sae", "config.json", "sae.pt", read_bartbussmann)
GEMMA_SCOPE_2 = Format("Gemma Scope 2", "config.json", "params.safetensors", read_gemma_scope_2)
FORMATS = (SAELENS, DICTIONARY_LEARNING, BARTBUSSMANN, GEMMA_SCOPE_2)


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
        "dtype": "float32",
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": normalize_activations,
        "metadata": {
            **metadata,
            "prepend_bos": True,
            "training_architecture_details": details,
            "sae_lens_version": sae_lens.__version__,  # the form of this config
        },
    }
    return cfg, state_dict


def overridden(cfg: Config, overrides: Mapping[str, Any]) -> Config:
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
