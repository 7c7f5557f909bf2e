"""The demo's corpus: texts generated from word lists, reproducible by seed.

There are three kinds of text. *Spelling prompts* follow SAEBench's absorption evaluation, so that a
model trained on them can name a word's first letter. *Word lists* have lines of words with the same
first letter, so that the model represents the letter at the word's own token. *Documents* have a
topic within a domain, so that activations have a hierarchy: general words of the domain, and
specific words of the topic.
"""

import json
import random
from functools import cache
from pathlib import Path
from string import ascii_letters, ascii_uppercase
from typing import Any, NamedTuple

WORDS_PER_PROMPT = 11  # the evaluation solves ten words and asks for one more
OPENERS = ("Each", "Every", "One", "That", "The", "This")
DETERMINERS = ("the", "this", "that", "every", "each", "one")
SENTENCES = (
    "{opener} {adjectives} {nouns} {verbs} {prepositions} the {nouns}",
    "{opener} {nouns} {verbs} {prepositions} {determiner} {adjectives} {nouns}",
    "{opener} {nouns} {verbs} {adverbs} while the {nouns} {verbs}",
    "{opener} {nouns} was {adjectives} but the {nouns} {verbs} {adverbs}",
    "{opener} {nouns} of the {nouns} {verbs} {prepositions} {determiner} {nouns} and {verbs}",
)
# Probabilities that a word comes from the topic, its domain, a sibling topic or the neutral words.
# With the last two, no single token determines the topic.
SOURCE_WEIGHTS = (0.40, 0.22, 0.05, 0.33)


class Document(NamedTuple):
    """A short text and the class that its words come from."""

    text: str
    domain: str
    topic: str


@cache
def _words() -> dict[str, Any]:
    """The word lists of `words.json`, where words stand in lines."""

    def split(node: Any) -> Any:
        if isinstance(node, list):
            return " ".join(node).split()
        return {key: split(child) for key, child in node.items()}

    return split(json.loads(Path(__file__).with_name("words.json").read_text()))


def topics() -> dict[str, list[str]]:
    """Topics of each domain."""
    return {name: list(domain["topics"]) for name, domain in _words()["domains"].items()}


def vocabulary() -> list[str]:
    """Every word of the corpus in lower case, sorted: 35 or more for each first letter.

    The rarest letters have some invented words, because English has too few to train a probe on
    some and test it on others.
    """

    def flatten(node: Any) -> list[str]:
        if isinstance(node, list):
            return node
        return [word for child in node.values() for word in flatten(child)]

    return sorted(set(flatten(_words())))


def spelling_words() -> list[str]:
    """All strings that spelling prompts ask about, with their leading space where they have one.

    SAEBench asks about every alphabetic token, so these are all alphabetic tokens of the tokenizer:
    the vocabulary, the capitalised openers, the answers (" A") and single letters.
    """
    spaced = [*vocabulary(), *OPENERS, *ascii_uppercase]
    return [f" {word}" for word in spaced] + [*OPENERS, *ascii_letters]


def spelling_prompts(n: int, seed: int) -> list[str]:
    """`n` first-letter prompts of eleven lines, in the format of SAEBench's absorption evaluation.

    Each ends with its answer, two characters (" B"); the rest is what SAEBench asks.
    """
    rng = random.Random(f"spelling {seed}")
    words = spelling_words()

    def line(word: str) -> str:
        return f"\n{word} has the first letter: {word.strip()[0].upper()}"

    return ["".join(map(line, rng.sample(words, WORDS_PER_PROMPT))) for _ in range(n)]


def word_lists(n: int, seed: int) -> list[str]:
    """`n` lists of four lines, each of six to twelve words with the same first letter.

    Trained on spelling prompts alone, a small model finds the answer at a later token, and linear
    probes at the word's own token find few of the letters.
    """
    rng = random.Random(f"lists {seed}")
    by_letter: dict[str, list[str]] = {}
    for word in vocabulary():
        by_letter.setdefault(word[0], []).append(word)

    def line() -> str:
        words = rng.choice(list(by_letter.values()))
        return "\n " + " ".join(rng.sample(words, rng.randint(6, 12)))

    return ["".join(line() for _ in range(4)) for _ in range(n)]


def documents(n: int, seed: int) -> list[Document]:
    """`n` documents of four to seven sentences, their topics drawn uniformly."""
    rng = random.Random(f"documents {seed}")
    classes = [(domain, topic) for domain, names in topics().items() for topic in names]
    return [_document(*rng.choice(classes), rng) for _ in range(n)]


def labelled_documents(n: int, seed: int) -> dict[str, list[Any]]:
    """`n` documents in the columns of AG News: `text` and `label`, the index of the domain."""
    domains = list(topics())
    rows = [(document.text, domains.index(document.domain)) for document in documents(n, seed)]
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


def texts(n: int, seed: int) -> list[str]:
    """`n` shuffled texts: half documents, a quarter spelling prompts, a quarter word lists."""
    share = n // 4
    mixed = spelling_prompts(share, seed) + word_lists(share, seed)
    mixed += [document.text for document in documents(n - 2 * share, seed)]
    random.Random(f"texts {seed}").shuffle(mixed)
    return mixed


def _document(domain: str, topic: str, rng: random.Random) -> Document:
    words = _words()
    sources = words["domains"][domain]
    siblings = [name for name in sources["topics"] if name != topic]
    fixed = {"opener": OPENERS, "determiner": DETERMINERS}

    def fill(slot: str) -> str:
        if slot not in ("adjectives", "nouns", "verbs"):
            return rng.choice(fixed.get(slot) or words[slot])
        sibling = sources["topics"][rng.choice(siblings)]
        choices = (sources["topics"][topic], sources, sibling, words)
        source = rng.choices(choices, SOURCE_WEIGHTS)[0]
        return rng.choice(source.get(slot, words[slot]))  # topics have no adjectives of their own

    def sentence() -> str:
        parts = rng.choice(SENTENCES).split()
        return " ".join(fill(p[1:-1]) if p[0] == "{" else p for p in parts) + "."

    return Document(" ".join(sentence() for _ in range(rng.randint(4, 7))), domain, topic)
