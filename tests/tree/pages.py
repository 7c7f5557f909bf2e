"""Pages of small worlds: one with odd texts, one of a thousand latents, one without an edge."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from sae_lens_matryoshka.tree.building import tree_of
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.page import write_page
from sae_lens_matryoshka.tree.sources import Batch
from tests.tiny import tiny_model
from tests.tree.worlds import D_IN, GRANDCHILD, small_world

CONTEXT, N_TOKENS = 16, 6400
ODD = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"quotes'`",
    " &amp;",
    " 🦊👩‍👩‍👧",
    " שלום",
    "\u202eoverride",
    "\n",
    "\u2028",
    "${x}{{ y }}",
]
VOCABULARY = [*ODD, *(f" word{i}" for i in range(30))]
FOX = VOCABULARY.index(" 🦊👩‍👩‍👧")
HOOK = "blocks.1.hook_resid_pre"


class World:
    """The small world as a source of texts; the fox stands wherever the grandchild fires."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"dataset": "odd <b>texts</b>", "model": "tiny"}

    def batches(self, skip: int) -> Iterator[Batch]:
        x = small_world(N_TOKENS)
        tokens = np.random.default_rng(0).integers(0, len(VOCABULARY), N_TOKENS)
        tokens[tokens == FOX] += 1
        tokens[x[:, GRANDCHILD] > 0.5] = FOX
        for start in range(skip * 320, N_TOKENS, 320):
            own = tokens[start : start + 320].reshape(-1, CONTEXT).astype(np.int32)
            # the SAE is not run on the first token of a context
            positions = np.arange(320).reshape(-1, CONTEXT)[:, 1:].reshape(-1).astype(np.int32)
            yield Batch(x[start : start + 320][positions], own, positions)


def model() -> HookedTransformer:
    made = tiny_model(d_model=D_IN, d_head=6, d_vocab=len(VOCABULARY))
    words = {word: i for i, word in enumerate(VOCABULARY)}
    made.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=VOCABULARY[-1])),
        clean_up_tokenization_spaces=False,
    )
    return made


def written(folder: Path, sae: Any, source: Any, n_tokens: int, **options: Any) -> Path:
    gathered = gather(sae, source, folder / "gathered", n_tokens)
    tree = tree_of(gathered, sae)
    tree.save(folder / "tree.json")
    return write_page(folder, tree, gathered, find_examples(gathered), sae, **options)


class Arrays:
    """Activations from memory, without texts."""

    def __init__(self, x: torch.Tensor):
        self.settings: dict[str, Any] = {"activations": "x"}
        self._x = x

    def batches(self, skip: int) -> Iterator[Batch]:
        yield from map(Batch, self._x.split(256)[skip:])


def families(n: int, n_parents: int, n_tokens: int = 2560) -> torch.Tensor:
    """Of `n` latents the first are parents, whose children share their tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(n_tokens, n)
    parents = torch.rand(n_tokens, n_parents, generator=generator) < 0.2
    x[:, :n_parents] = parents * 1.0
    for latent in range(n_parents, n):
        on = parents[:, latent % n_parents] & (torch.rand(n_tokens, generator=generator) < 0.2)
        x[:, latent] = on * 1.0
    return x
