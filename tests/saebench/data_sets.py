"""Data sets in the shape that SAEBench's evaluations read, made of the demo's documents.

The demo's model knows these words, so what SAEBench asks of it can be answered: which domain a
document is of, which of two domains its second half is of, what a word's first letter is.
"""

import io
import json
import random
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from datasets import Dataset

from sae_lens_matryoshka.demo.corpus import documents, labelled_documents, texts, topics, vocabulary

# The classes of SAEBench's first set of professions, each a topic of the documents.
PROFESSIONS = dict(
    zip(
        (0, 1, 2, 6, 9),
        [names[0] for names in topics().values()] + [topics()["food"][1]],
        strict=True,
    )
)
WORDS_PER_LETTER = 12


def data_sets(n_train: int = 400, n_test: int = 200) -> dict[str, dict[str, bytes]]:
    """Repository → its files, for every evaluation that reads one."""
    splits = {"train": (n_train, 1), "test": (n_test, 2)}
    return {
        "fancyzhx/ag_news": {
            f"{split}.parquet": _parquet(labelled_documents(4 * n, seed))
            for split, (n, seed) in splits.items()
        },
        "LabHC/bias_in_bios": {
            f"{split}.parquet": _parquet(_two_labels(n, seed))
            for split, (n, seed) in splits.items()
        },
        "Skylion007/openwebtext": {"train.parquet": _parquet({"text": texts(600, seed=3)})},
        "adamkarvonen/ravel_prompts": _ravel(),
    }


def _parquet(columns: Mapping[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    Dataset.from_dict(dict(columns)).to_parquet(file)
    return file.getvalue()


def _two_labels(n: int, seed: int) -> dict[str, list[Any]]:
    """`n` texts for each profession and gender: the profession is the topic, and a text of gender 1
    begins with a list of words."""
    by_topic: dict[str, list[str]] = {}
    for document in documents(60 * n, seed):
        by_topic.setdefault(document.topic, []).append(document.text)
    rng = random.Random(seed)
    words = vocabulary()
    rows = [
        (by_topic[PROFESSIONS[profession]].pop(), profession, gender)
        for profession, gender, _ in product(PROFESSIONS, (0, 1), range(n))
    ]
    rng.shuffle(rows)
    return {
        "hard_text": [
            (f" {' '.join(rng.sample(words, 12))}\n" if gender else "") + text
            for text, _, gender in rows
        ],
        "profession": [profession for _, profession, _ in rows],
        "gender": [gender for _, _, gender in rows],
    }


def _ravel() -> dict[str, bytes]:
    """The entity "city": words, whose country is their own first letter and whose continent that of
    the word behind them, so the one can be changed at the entity and the other can't."""
    words = [word for letter in _by_letter() for word in letter]
    behind = {"R": "river", "G": "garden"}
    prompts = {
        "Country": ["\n %s has the first letter:"],
        "Continent": [f"\n %s {word} has the first letter:" for word in behind.values()],
    }
    files = {
        "attribute_to_prompts": prompts,
        "entity_attributes": {
            word: {"Country": word[0].upper(), "Continent": list(behind)[i % 2]}
            for i, word in enumerate(words)
        },
        "prompt_to_split": {prompt: "train" for group in prompts.values() for prompt in group},
        "entity_to_split": {word: ("train", "val")[i % 2] for i, word in enumerate(words)},
    }
    return {
        f"ravel_city_{name}.json": json.dumps(content).encode() for name, content in files.items()
    }


def _by_letter() -> Iterator[list[str]]:
    words = vocabulary()
    for letter in sorted({word[0] for word in words}):
        yield [word for word in words if word[0] == letter][:WORDS_PER_LETTER]
