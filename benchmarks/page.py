"""How fast the page of a tree opens, and shows a latent, in a real Chromium.

    python benchmarks/page.py --d_sae 16384

The page is made up: Zipfian firings on random texts, children with random evidence for every latent
of the levels before the last, and as many edges that were refused. Opening ends when the forest and
the guide are drawn, in a browser with nothing in its cache; a latent when it is painted, its file
not loaded before.
"""

import shutil
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from playwright.sync_api import Browser, sync_playwright
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast
from tree_pass import make_sae

from sae_lens_matryoshka.levels.slicing import widths_of
from sae_lens_matryoshka.tree import Tree
from sae_lens_matryoshka.tree.building import levels_of
from sae_lens_matryoshka.tree.examples import find_examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import gather
from sae_lens_matryoshka.tree.page import write_page
from sae_lens_matryoshka.tree.page.relations import COLUMNS
from sae_lens_matryoshka.tree.sources import Batch

D_IN, K, CONTEXT, N_WORDS, N_TOKENS = 64, 32, 128, 5000, 100_000
HOOK = "blocks.1.hook_resid_pre"
# resolves with the milliseconds until a latent is painted
SHOW = """(latent) => new Promise((resolve) => {
  const start = performance.now();
  new MutationObserver((_, observer) => {
    if (document.querySelector("h2").textContent.endsWith(`Latent ${latent}`)) {
      observer.disconnect();
      requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - start)));
    }
  }).observe(document.getElementById("right"), { childList: true, subtree: true });
  location.hash = `latent=${latent}`;
})"""


class RandomTexts:
    """Random words with random activations."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"dataset": "random words", "model": "random"}

    def batches(self, skip: int) -> Iterator[Batch]:
        generator = np.random.default_rng(skip)
        while True:
            tokens = generator.integers(0, N_WORDS, (64, CONTEXT), np.int32)
            x = torch.from_numpy(generator.standard_normal((tokens.size, D_IN), np.float32))
            yield Batch(x, tokens, np.arange(tokens.size, dtype=np.int32))


def random_model() -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_IN, d_head=32, n_ctx=CONTEXT, d_vocab=N_WORDS, act_fn="gelu"
    )
    model = HookedTransformer(cfg)
    words = WordLevel({f" word{i}": i for i in range(N_WORDS)}, unk_token=" word0")
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    return model


def made_up_tree(gathered: Gathered, sae: Any) -> Tree:
    """A tree whose every latent of an outer level has a random parent of an inner one."""
    generator = np.random.default_rng(0)
    level_of, _ = levels_of(sae)
    children = (level_of > 0).nonzero()[0]
    child = np.tile(children, 2)
    ends = np.searchsorted(level_of, level_of[child])  # of the levels within
    edges = pd.DataFrame({name: generator.random(len(child)) for name in COLUMNS})
    edges.insert(0, "child", child)
    edges.insert(0, "parent", (generator.random(len(child)) ** 2 * ends).astype(int))
    edges["n_both"] = gathered.counts[child]
    edges["direction_rank"] = generator.integers(1, 6, len(child))
    for name in ("passed", "strongest", "direct"):
        edges[name] = np.arange(len(child)) < len(children)
    parent = np.full(gathered.d_sae, -1)
    parent[children] = edges["parent"][: len(children)]
    latents = pd.DataFrame(
        {
            "level": level_of,
            "n_fired": gathered.counts,
            "mean_activation": generator.random(gathered.d_sae),
            "max_activation": 5.0,
            "parent": parent,
        }
    )
    n = len(children)
    summary = {"n_tokens": N_TOKENS, "n_latents": gathered.d_sae, "n_dead": 0, "n_rare": 0}
    summary |= {"n_looked_at": n**2, "n_tested": 2 * n, "n_passed": n}
    summary |= {"n_shifted_tested": n, "n_shifted_passed": 0}
    rules = {"edges": "tested", "min_coverage": 0.5, "min_excess": 0.5, "min_presence": 0.5}
    rules |= {"max_rank": 5, "alpha": 0.05, "min_firings": 20, "parents_by_level": True}
    widths = widths_of(sae)
    settings = {"sae": {"d_in": D_IN, "d_sae": gathered.d_sae, "widths": widths}, "rules": rules}
    return Tree(latents, edges, summary, {**settings, "source": gathered.index.settings})


def opened(browser: Browser, page: Path) -> tuple[Any, float]:
    """A page in a browser without cache, and the seconds until it is drawn."""
    tab = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    start = time.perf_counter()
    tab.goto(page.as_uri(), wait_until="commit")
    tab.wait_for_selector("#space .row")
    tab.wait_for_selector("#about h2")
    return tab, time.perf_counter() - start


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--d_sae", type=int, default=16_384)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of a Chromium")
    args = parser.parse_args()
    sae = make_sae(args.d_sae, D_IN, K)
    sae.cfg.metadata.hook_name = HOOK
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        gathered = gather(sae, RandomTexts(), Path(folder) / "gathered", N_TOKENS)
        examples = find_examples(gathered)
        tree = made_up_tree(gathered, sae)
        page = write_page(folder, tree, gathered, examples, sae, random_model(), "Random")
        size = sum(file.stat().st_size for file in (Path(folder) / "data").iterdir())
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.browser)
            seconds = [opened(browser, page)[1] for _ in range(5)]
            tab, _ = opened(browser, page)
            chosen = generator.permutation(args.d_sae // 64)[:20] * 64 + 5  # of 20 files
            shown = [tab.evaluate(SHOW, int(latent)) for latent in chosen]
            browser.close()
    print(f"{args.d_sae:,} latents, {size / 1e6:.0f} MB:")
    print(f"opens in {median(seconds):.2f} s (median of 5, at most {max(seconds):.2f})")
    print(f"shows a latent in {median(shown):.0f} ms (median of 20, at most {max(shown):.0f})")


if __name__ == "__main__":
    main()
