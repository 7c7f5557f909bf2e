"""What stands in, in the examples of the documentation, for the reader's files and large models.

A page's Python runs in a folder that `fill` has filled, with the names of `names`. The language
model is the demo's, the SAE a made-up one of it; a run that asks for a model of the Hub gets a
random one of the same width and a few steps.
"""

from pathlib import Path
from typing import Any

import networkx
import numpy as np
import torch
import yaml
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig, load_sae
from sae_lens_matryoshka.demo import corpus
from sae_lens_matryoshka.demo.run import MODEL_NAME
from sae_lens_matryoshka.levels import set_widths
from sae_lens_matryoshka.tree import build_tree
from tests.tiny import SHORT_RUN, runner_config, tiny_model, token_dataset

ROOT = Path(__file__).parents[2]
D_IN, HOOK, CONTEXT = 128, "blocks.1.hook_resid_post", 64  # of the demo's model
N_TEXTS = 60
PARENT, CHILDREN = 23, (147, 231)  # as on the pages about trees and steering
CACHED_WIDTH = 768  # of acts/: GPT-2 small's and Pythia-160M's
# Published SAEs that the pages load: their folder, repository and width
PUBLISHED = [
    (
        "standard/blocks.12.hook_resid_post",
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40",
        32768,
    )
]
CONFIG = {  # CONFIG.yaml
    "model_name": MODEL_NAME,
    "hook_name": HOOK,
    "dataset_path": "NAME",
    "streaming": False,
    "context_size": CONTEXT,
    "prepend_bos": True,
    "training_tokens": 256,
    "train_batch_size_tokens": 256,
    "n_batches_in_buffer": 4,
    "store_batch_size_prompts": 8,
    "lr": 1e-3,
    "lr_warm_up_steps": 0,
    "lr_decay_steps": 0,
    "logger": {"log_to_wandb": False},
    "checkpoint_path": "checkpoints",
    "output_path": "output",
    "sae": {
        "architecture": "matryoshka",
        "d_in": D_IN,
        "d_sae": 16384,
        "k": 8,
    },
}


def fill(folder: Path) -> None:
    """Write the files that the pages name: a data set, activations, an SAE, a config."""
    for name in ("configs", "benchmarks", "examples", "scripts", "tests", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "smollm2").mkdir()
    for where in (folder, folder / "demo_run"):
        (where / MODEL_NAME).parent.mkdir(parents=True)
        (where / MODEL_NAME).symlink_to(Path(corpus.__file__).with_name("model"))
    for name in ("NAME", "demo_run/corpus"):
        (folder / name).mkdir()
        texts = {"text": corpus.texts(N_TEXTS, seed=0)}
        Dataset.from_dict(texts).to_parquet(folder / name / "train.parquet")
    for name in ("acts", "smollm2/acts"):
        (folder / name).mkdir()
        rows = np.zeros((8192, CACHED_WIDTH if name == "acts" else 576), np.float16)
        np.save(folder / name / "rows.npy", rows)
    _sae().save_model(folder / "demo_run/matryoshka")
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump(CONFIG))


def names(folder: Path) -> dict[str, Any]:
    """What the pages use without defining it."""
    sae = load_sae(folder / "demo_run/matryoshka")
    model = HookedSAETransformer.from_pretrained_no_processing(MODEL_NAME)
    tokens = model.to_tokens(corpus.texts(4, seed=1))[:, :CONTEXT]
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    activations = cache[HOOK].reshape(-1, D_IN)
    own = MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=64, k=4)
    return {
        "sae": sae,
        "model": model,
        "tokens": tokens,
        "tree": build_tree(sae, model, "NAME", 4096),
        "activations": activations,
        "tensor": activations.repeat(8, 1),
        "x": activations[:5],
        "cfg": runner_config(own, folder),
        "networkx": networkx,
    }


def published(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of `PUBLISHED` by repository, with narrow activations."""
    repositories: dict[str, dict[str, bytes]] = {}
    for sae_folder, repository, d_sae in PUBLISHED:
        JumpReLUSAE(JumpReLUSAEConfig(d_in=4, d_sae=d_sae)).save_model(folder)
        files = {f"{sae_folder}/{path.name}": path.read_bytes() for path in folder.iterdir()}
        repositories.setdefault(repository, {}).update(files)
    return repositories


_start = LanguageModelSAETrainingRunner.__init__


def start_small(self: Any, cfg: Any, *args: Any, **options: Any) -> None:
    """`LanguageModelSAETrainingRunner.__init__`, with a stand-in for a model of the Hub."""
    if any(arg is not None for arg in (*args, *options.values())) or Path(cfg.model_name).exists():
        return _start(self, cfg, *args, **options)
    small = {**SHORT_RUN, "model_name": cfg.model_name, "is_dataset_tokenized": True}
    small |= {"training_tokens": 128, "lr_warm_up_steps": 0, "lr_decay_steps": 0}
    small |= {"device": "cpu", "act_store_device": "cpu"}
    for name, value in small.items():
        setattr(cfg, name, value)
    cfg.sae.device = "cpu"
    cfg.logger.log_to_wandb = False  # a second run of W&B in this process would be of the first
    layers = int(cfg.hook_name.split(".")[1]) + 1
    model = tiny_model(n_layers=layers, d_model=cfg.sae.d_in, d_head=8, d_mlp=16)
    return _start(self, cfg, override_model=model, override_dataset=token_dataset())


def _sae() -> SAE[Any]:
    """A random SAE, most of it dead; the children fire on the parent's largest activations."""
    metadata = SAEMetadata(
        model_name=MODEL_NAME,
        model_class_name="HookedTransformer",
        hook_name=HOOK,
        dataset_path="NAME",
        context_size=CONTEXT,
        prepend_bos=True,
        model_from_pretrained_kwargs={},
    )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=1024, metadata=metadata))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.threshold.fill_(12.0)
        sae.threshold[240:] = torch.inf
        for i, child in enumerate(CHILDREN):
            sae.W_enc[:, child] = sae.W_enc[:, PARENT]
            sae.threshold[child] += i + 1
        sae.W_dec.copy_(sae.W_enc.T / sae.W_enc.norm(dim=0)[:, None])
    set_widths(sae, [32, 96, 224, 480, 1024], k=8)
    return sae
