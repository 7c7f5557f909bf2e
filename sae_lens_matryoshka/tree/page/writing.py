"""`write_page`: the tree as a folder to open in a browser.

    index.html         the page
    data/index.js      of every latent what the forest needs, by column
    data/latents-N.js  the details of latents 64 N to 64 N + 63
    data/text-N.js     a text and its latents
    data/*.js, *.css   the page's own code

Scripts and not JSON, because a page that is opened from a disk may load scripts beside it and not
read files. With `single_file` all of it is in index.html, the data as JSON.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from jinja2 import StrictUndefined, Template
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_matryoshka.tree.examples import Examples
from sae_lens_matryoshka.tree.families import distinct_children
from sae_lens_matryoshka.tree.gathered import Gathered
from sae_lens_matryoshka.tree.gathering import as_inference
from sae_lens_matryoshka.tree.page.corpus import Corpus, words_of_latents
from sae_lens_matryoshka.tree.page.details import CHUNK, Details
from sae_lens_matryoshka.tree.page.numbers import rounded
from sae_lens_matryoshka.tree.page.relations import COLUMNS
from sae_lens_matryoshka.tree.page.texts import texts_for_page
from sae_lens_matryoshka.tree.page.tokens import TokenTexts
from sae_lens_matryoshka.tree.page.weights import logit_lens, neighbours
from sae_lens_matryoshka.tree.tree import Tree
from sae_lens_matryoshka.util.files import atomic_file, atomic_folder

_ASSETS = Path(__file__).with_name("assets")
_SCRIPTS = ("base", "forest", "evidence", "latent", "text", "about", "page")


def write_page(
    folder: Path | str,
    tree: Tree,
    gathered: Gathered,
    examples: Examples,
    sae: SAE[Any],
    model: Any = None,
    name: str = "An SAE",
    *,
    labels: Mapping[int, str] | None = None,
    ablation: Float[np.ndarray, " d_sae"] | None = None,
    single_file: bool = False,
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
        labels: Of latents; see `tree.page.labels`.
        ablation: `tree.ablation.ablation_of(gathered, sae, model)`.
        single_file: Write all into `index.html`, without `data/`. A browser then reads all before
            it shows anything.

    Returns:
        The path of `index.html`.

    Raises:
        OSError: a file can't be written; an earlier page stays.
    """
    folder = Path(folder)
    sae = as_inference(sae)
    text_of = TokenTexts(getattr(model, "tokenizer", None))
    corpus = Corpus(gathered) if gathered.has_tokens() else None
    lens = logit_lens(sae, model) if model is not None else None
    details = Details(
        tree, gathered, examples, neighbours(sae.W_dec), lens, corpus, text_of, ablation
    )
    texts = []
    if corpus is not None and model is not None:
        mean = torch.from_numpy(gathered.sums["total"] / gathered.n_tokens).float()
        texts = texts_for_page(sae, model, corpus, mean, tree.settings["sae"]["widths"], text_of)
    index = {
        **_index(tree, examples, corpus, text_of),
        "name": name,
        "labels": labels or {},
        "texts": ["".join(text["tokens"])[:120] for text in texts],
        "has_words": corpus is not None,
        "has_logits": lens is not None,
    }

    def files() -> Iterator[tuple[str, str]]:
        yield "index", _json(index)
        yield from ((f"text-{i}", _json(text)) for i, text in enumerate(texts))
        n_files = -(-len(tree.latents) // CHUNK)
        for i, file in enumerate(tqdm(details.files(), "Page", n_files, leave=False)):
            yield f"latents-{i}", _json(file)

    data, path = folder / "data", folder / "index.html"
    if single_file:
        _write_html(path, tree, sae, name, dict(files()))
        shutil.rmtree(data, ignore_errors=True)
        return path
    with atomic_folder(data) as unfinished:
        for asset in (*_ASSETS.glob("*.js"), *_ASSETS.glob("*.css")):
            shutil.copy(asset, unfinished)
        for file, text in files():
            (unfinished / f"{file}.js").write_text(f'receive("{file}",{text})\n', encoding="ascii")
    _write_html(path, tree, sae, name)
    return path


def _write_html(
    path: Path, tree: Tree, sae: SAE[Any], name: str, data: Mapping[str, str] | None = None
) -> None:
    """Write the page, with its data and its own code within if `data` is given."""
    template = Template(
        (_ASSETS / "index.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
    )

    def asset(file: str) -> str:
        return (_ASSETS / file).read_text(encoding="utf-8")

    model, hook = (sae.cfg.metadata[key] for key in ("model_name", "hook_name"))
    page = template.render(
        name=name,
        place=f"{model}, {hook}" if model and hook else None,
        summary=tree.summary,
        scripts=_SCRIPTS,
        data=data,
        asset=asset,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        unfinished.write_text(page + "\n", encoding="utf-8")


def _index(
    tree: Tree, examples: Examples, corpus: Corpus | None, text_of: TokenTexts
) -> dict[str, Any]:
    drawn = tree.edges[tree.edges["strongest"].astype(bool)].set_index("child")
    by_latent = {
        name: [rounded(v, 4) for v in values.reindex(tree.latents.index, fill_value=0).tolist()]
        for name, values in drawn[["coverage", "information"]].items()
    }
    words = [] if corpus is None else words_of_latents(corpus, examples, text_of)  # [] if unknown
    return {
        "settings": tree.settings,
        "summary": tree.summary,
        "chunk": CHUNK,
        "edge_columns": ["other", *COLUMNS],
        "fired": tree.latents["n_fired"].tolist(),
        "parent": tree.latents["parent"].astype(int).tolist(),
        **by_latent,
        "words": words,
        "distinct": distinct_children(tree, words).astype(int).tolist(),
    }


def _json(value: Any) -> str:
    # "<" as an escape, so that no text of a token can end a script, wherever the file is put
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
