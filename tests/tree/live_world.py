"""A page and its server in a process of its own: python -m tests.tree.live_world FOLDER PORT."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.tree.building import tree_of
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.page import write_page
from sae_lens_matryoshka.tree.sources import Batch
from tests.tree.worlds import D_IN, exact_sae, small_world

N_WORDS, N_TOKENS, CONTEXT = 30, 3200, 16
SECONDS_PER_PASS = 0.02
HOOK = "blocks.1.hook_resid_pre"


class Texts:
    """The small world with random words."""

    settings: dict[str, Any] = {"dataset": "words", "model": "tiny"}  # noqa: RUF012

    def batches(self, skip: int) -> Iterator[Batch]:
        x = small_world(N_TOKENS)
        tokens = np.random.default_rng(0).integers(0, N_WORDS, N_TOKENS).astype(np.int32)
        for start in range(skip * 320, N_TOKENS, 320):
            own = tokens[start : start + 320].reshape(-1, CONTEXT)
            yield Batch(x[start : start + 320], own, np.arange(320, dtype=np.int32))


def sae() -> Any:
    made = exact_sae(8, [2, 5, 8])
    made.cfg.metadata.hook_name = HOOK
    made.cfg.metadata.model_name = "tiny"
    made.cfg.metadata.prepend_bos = True
    made.cfg.metadata.exclude_special_tokens = [N_WORDS]
    return made


def model() -> HookedTransformer:
    """A random model whose activations are large enough for the SAE, and which takes its time."""
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D_IN,
        n_heads=2,
        d_head=6,
        n_ctx=128,
        d_vocab=N_WORDS + 2,
        act_fn="gelu",
        seed=0,
        default_prepend_bos=False,
    )
    words = {f"w{i}": i for i in range(N_WORDS)} | {"<s>": N_WORDS, "<pad>": N_WORDS + 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = HookedTransformer(cfg)
    made.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>"
    )
    with torch.no_grad():
        made.W_E.mul_(4)
    made.embed.register_forward_pre_hook(lambda *_: time.sleep(SECONDS_PER_PASS))
    return made


def write(folder: Path) -> None:
    """An SAE and its page."""
    own, page = sae(), folder / "page"
    own.save_model(folder / "sae")
    gathered = gather(own, Texts(), page / "gathered", N_TOKENS)
    tree = tree_of(gathered, own)
    tree.save(page / "tree.json")
    write_page(page, tree, gathered, find_examples(gathered), own, model(), "words")


def start(folder: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    """The process that serves a written page, and the token that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.tree.live_world", str(folder), str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if found := re.search(rf"http://127.0.0.1:{port}/\?token=(\S+)", line):
            return process, found[1]
    raise AssertionError(process.stderr.read())


def main(folder: str, port: str) -> int:
    """The command, with the tiny model."""
    from sae_lens_matryoshka.cli import measuring

    measuring.load_model_of = lambda *_: model()
    words = ["tree", f"{folder}/sae", "--out", f"{folder}/page", "--serve", "--port", port]
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
