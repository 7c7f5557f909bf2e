"""Small checkpoints of every format that `load_sae` reads: the files of a folder, by name."""

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig

Files = dict[str, bytes]
StateDict = dict[str, torch.Tensor]

D_IN, WIDTHS, GROUP_SIZES, K = 6, [3, 8, 20], [3, 5, 12], 4
D_SAE = WIDTHS[-1]

# The configurations as the libraries write them; the functions below fill in the rest.
SAELENS_5_CFG = """{"architecture": "jumprelu", "dtype": "float32", "device": "cuda",
"model_name": "gemma-2-2b", "hook_name": "blocks.0.hook_resid_post", "hook_layer": 0,
"hook_head_index": null, "activation_fn_str": "relu", "activation_fn_kwargs": {},
"apply_b_dec_to_input": true, "finetuning_scaling_factor": false, "prepend_bos": true,
"sae_lens_training_version": "5.11.0", "dataset_path": "monology/pile-uncopyrighted",
"context_size": 1024, "normalize_activations": "none", "neuronpedia_id": null}"""
DICTIONARY_LEARNING_CFG = """{"trainer": {"trainer_class": "MatryoshkaBatchTopKTrainer",
"dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": 6, "dict_size": 20, "k": 4, "layer": 12,
"device": "cuda:0", "lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_12"},
"buffer": {"d_submodule": 6, "io": "out", "n_ctxs": 16, "ctx_len": 128, "device": "cuda:0"}}"""
BARTBUSSMANN_CFG = """{"seq_len": 128, "dtype": "torch.float32", "model_name": "gpt2-small",
"layer": 8, "act_size": 6, "dict_size": 20, "dataset_path": "Skylion007/openwebtext", "top_k": 4,
"device": "cuda", "sae_type": "global-matryoshka-topk", "hook_point": "blocks.8.hook_resid_pre"}"""


def random_weights(d_in: int = D_IN, d_sae: int = D_SAE) -> StateDict:
    """Weights of which no tensor is zero and no decoder row of norm 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(d_in, d_sae, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator),
        "W_dec": torch.randn(d_sae, d_in, generator=generator),
        "b_dec": torch.randn(d_in, generator=generator),
        "threshold": torch.rand(d_sae, generator=generator) + 0.2,
    }


def one_threshold(threshold: float = 0.7) -> StateDict:
    """Weights with one threshold for all latents, as BatchTopK keeps it."""
    return {**random_weights(), "threshold": torch.tensor(threshold)}


def pickled(value: Any, **options: Any) -> bytes:
    """A PyTorch file."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


class CodeRunning:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def files_in(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def placed(files: Mapping[str, bytes], folder: Path) -> Path:
    """The folder, made and filled."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def under(folder: str, files: Mapping[str, bytes]) -> Files:
    """The files as a repository holds them."""
    return {f"{folder}/{name}": data for name, data in files.items()}


def saelens_6(weights: StateDict) -> Files:
    """As our training SAE with these weights is saved for inference."""
    cfg = MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, matryoshka_widths=WIDTHS)
    sae = MatryoshkaTrainingSAE(cfg)
    threshold = weights["threshold"].double()
    trained = {name: tensor for name, tensor in weights.items() if name != "threshold"}
    sae.load_state_dict({**trained, "topk_threshold": threshold})
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return files_in(Path(folder))


def saelens_5(weights: StateDict) -> Files:
    """As SAELens saved a JumpReLU SAE before 6.0: one flat cfg.json, no widths."""
    d_in, d_sae = weights["W_enc"].shape
    cfg = {"d_in": d_in, "d_sae": d_sae, **json.loads(SAELENS_5_CFG)}
    data = safetensors.torch.save(weights)
    return {"cfg.json": json.dumps(cfg).encode(), "sae_weights.safetensors": data}


def without_levels() -> Files:
    """An ordinary SAE of SAELens."""
    sae: SAE[Any] = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE))
    with tempfile.TemporaryDirectory() as folder:
        sae.save_model(folder)
        return files_in(Path(folder))


def dictionary_learning(
    weights: Mapping[str, Any], group_sizes: Any = GROUP_SIZES, **trainer: Any
) -> Files:
    """As dictionary_learning saves its `MatryoshkaBatchTopKSAE`, or what `trainer` says."""
    cfg = json.loads(DICTIONARY_LEARNING_CFG)
    cfg["trainer"].update({"group_sizes": group_sizes, **trainer})
    data = pickled({**weights, "k": torch.tensor(K)})
    return {"config.json": json.dumps(cfg).encode(), "ae.pt": data}


def topk_of_dictionary_learning(weights: Mapping[str, Any]) -> Files:
    """As dictionary_learning saves its `AutoEncoderTopK`."""
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
    renamed = {
        names.get(name, name): tensor.T.contiguous() if name in ("W_enc", "W_dec") else tensor
        for name, tensor in weights.items()
    }
    return dictionary_learning(renamed, group_sizes=None, dict_class="AutoEncoderTopK")


def bartbussmann(
    weights: Mapping[str, Any], group_sizes: Any = str(GROUP_SIZES), unit_norm: bool = True
) -> Files:
    """As the paper's own code logs its SAE: all but numbers and flags becomes text."""
    cfg = json.loads(BARTBUSSMANN_CFG)
    cfg |= {"input_unit_norm": unit_norm, "group_sizes": group_sizes}
    return {"config.json": json.dumps(cfg).encode(), "sae.pt": pickled(dict(weights))}


def gemma_scope_2(weights: StateDict, model_name: str = "gemma-v3-4b-pt", layer: int = 12) -> Files:
    cfg = {
        "architecture": "jump_relu",
        "model_name": model_name,
        "hf_hook_point_in": f"model.layers.{layer}.output",
    }
    renamed = {name.replace("W_", "w_"): tensor for name, tensor in weights.items()}
    data = safetensors.torch.save(renamed)
    return {"config.json": json.dumps(cfg).encode(), "params.safetensors": data}
