"""Which SAE it is, by its weights and config."""

import hashlib
import json
from typing import Any

import torch
from sae_lens import SAE


def fingerprint(sae: SAE[Any]) -> str:
    """SHA-256 of an SAE's weights, its config and where it reads which model."""
    config = sae.cfg.to_dict()
    metadata = config.pop("metadata", {})
    config.pop("device", None)
    where = {name: metadata.get(name) for name in ("model_name", "hook_name", "prepend_bos")}
    described = json.dumps([config, where], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
