"""`write_page`: the tree as a folder to open in a browser.

    index.html         the page
    data/index.js      of every latent what the forest needs, by column
    data/latents-N.js  the details of latents 64 N to 64 N + 63
    data/text-N.js     a text and its latents
    data/*.js, *.css   the page's own code

Scripts and not JSON, because a page that is opened from a disk may load scripts beside it and not
read files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import StrictUndefined, Template
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_matryoshka.tree.examples import Examples
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import as_inference
from sae_lens_matryoshka.tree.page.corpus import Corpus, TextOf, naming_words, text_of_tokens
from sae_lens_matryoshka.tree.page.details import CHUNK, Details
from sae_lens_matryoshka.tree.page.numbers import rounded
from sae_lens_matryoshka.tree.page.relations import COLUMNS
from sae_lens_matryoshka.tree.page.texts import texts_for_page
from sae_lens_matryoshka.tree.page.weights import logit_lens, neighbours
from sae_lens_matryoshka.tree.tree import Tree
from sae_lens_matryoshka.util.files import atomic_file, atomic_folder

_ASSETS = Path(__file__).with_name("assets")


def write_page(
    folder: Path | str,
    tree: Tree,
    gathered: Gathered,
    examples: Examples,
    sae: SAE[Any],
    model: Any = None,
    name: str = "An SAE",
) -> Path:
    """Write `index.html`, which opens by a double click, and `data/`, which it reads.

    Args:
        folder: Where to; other files in it stay.
        tree: The tree.
        gathered: What it was built from.
        examples: `find_examples(gathered)`.
        sae: The SAE, on the device to compute on.
        model: The model that was run, for the text of tokens, the tokens that latents promote
            and a few texts.
        name: What the SAE is called.

    Returns:
        The path of `index.html`.

    Raises:
        OSError: a file can't be written; an earlier page stays.
    """
    folder = Path(folder)
    sae = as_inference(sae)
    text_of = text_of_tokens(getattr(model, "tokenizer", None))
    corpus = Corpus(gathered) if gathered.has_tokens() else None
    lens = logit_lens(sae, model) if model is not None else None
    details = Details(tree, gathered, examples, neighbours(sae.W_dec), lens, corpus, text_of)
    texts = []
    if corpus is not None and model is not None:
        mean = torch.from_numpy(gathered.sums["total"] / gathered.n_tokens).float()
        texts = texts_for_page(sae, model, corpus, mean, tree.settings["sae"]["widths"], text_of)
    index = {
        **_index(tree, examples, corpus, text_of),
        "name": name,
        "texts": ["".join(text["tokens"])[:120] for text in texts],
        "has_words": corpus is not None,
        "has_logits": lens is not None,
    }
    with atomic_folder(folder / "data") as data:
        for asset in (*_ASSETS.glob("*.js"), *_ASSETS.glob("*.css")):
            shutil.copy(asset, data)
        _write_script(data, "index", index)
        for i, text in enumerate(texts):
            _write_script(data, f"text-{i}", text)
        n_files = -(-len(tree.latents) // CHUNK)
        for i, file in enumerate(tqdm(details.files(), "Page", n_files, leave=False)):
            _write_script(data, f"latents-{i}", file)
    template = Template(
        (_ASSETS / "index.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    path = folder / "index.html"
    with atomic_file(path) as unfinished:
        page = template.render(name=name, summary=tree.summary)
        unfinished.write_text(page + "\n", encoding="utf-8")
    return path


def _index(
    tree: Tree, examples: Examples, corpus: Corpus | None, text_of: TextOf
) -> dict[str, Any]:
    drawn = tree.edges[tree.edges["strongest"].astype(bool)].set_index("child")
    by_latent = {
        name: [rounded(v) for v in drawn[name].reindex(tree.latents.index, fill_value=0).tolist()]
        for name in ("coverage", "information")
    }
    words: list[list[str]] = []
    if corpus is not None:
        for latent in range(len(tree.latents)):
            quantiles = examples.quantile_tokens[latent].reshape(-1)
            rows = np.concatenate([examples.top_tokens[latent], quantiles])
            words.append(naming_words(corpus.ids(rows[rows >= 0]), text_of))
    return {
        "settings": tree.settings,
        "summary": tree.summary,
        "chunk": CHUNK,
        "edge_columns": ["other", *COLUMNS],
        "fired": tree.latents["n_fired"].tolist(),
        "parent": tree.latents["parent"].astype(int).tolist(),
        **by_latent,
        "words": words,
    }


def _write_script(folder: Path, name: str, value: Any) -> None:
    # "<" as an escape, so that no text of a token can end a script, wherever the file is put
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    (folder / f"{name}.js").write_text(f'receive("{name}",{text})\n', encoding="ascii")
