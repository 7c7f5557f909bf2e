"""The demo corpus, and what the demo model has learned of it."""

import random
from collections import Counter
from pathlib import Path
from string import ascii_letters, ascii_lowercase

import pytest
import torch
from torch.nn import functional as F
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_matryoshka.demo import corpus
from sae_lens_matryoshka.demo.run import MODEL_NAME
from sae_lens_matryoshka.util.hook_names import short_model_name

MODEL_DIR = Path(corpus.__file__).with_name("model")
LAYER = 1  # the layer whose residual stream the demo's SAEs read
WORD_POSITION = -6  # of the asked word's token in a first-letter prompt that ends at the colon
UNSEEN = 2_000_003  # a seed of texts that the model was not trained on


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


@torch.no_grad()
def residuals(model, ids: torch.Tensor, layer: int = LAYER) -> torch.Tensor:
    """The residual stream after `layer`: (batch, seq) token ids to (batch, seq, width)."""
    rows = []
    block = model.gpt_neox.layers[layer]
    handle = block.register_forward_hook(
        lambda _module, _args, out: rows.append(out[0] if isinstance(out, tuple) else out)
    )
    for batch in ids.split(128):
        model.gpt_neox(batch)
    handle.remove()
    return torch.cat(rows)


def letter_of(word: str) -> int:
    return ascii_lowercase.index(word.strip()[0].lower())


def first_letter_prompts(words: list[str], rng: random.Random) -> list[str]:
    """One prompt per word, its ten examples drawn from the same words, as the evaluation does."""
    prompts = []
    for word in words:
        examples = rng.sample([other for other in words if other != word], 10)
        solved = (f"\n{w} has the first letter: {w.strip()[0].upper()}" for w in examples)
        prompts.append("".join(solved) + f"\n{word} has the first letter:")
    return prompts


def fit_probe(x: torch.Tensor, y: torch.Tensor) -> torch.nn.Linear:
    """One-vs-rest logistic probes with the evaluation's settings: (n, width) and labels (n,)."""
    targets = F.one_hot(y).float()
    positive = targets.sum(0)
    probe = torch.nn.Linear(x.shape[1], targets.shape[1])
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-3 ** (1 / 50))
    pos_weight = (len(x) - positive) / positive
    for _ in range(50):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(
                probe(x[batch]), targets[batch], pos_weight=pos_weight
            ).backward()
            optimizer.step()
        schedule.step()
    return probe


def test_folder_fits_in_six_megabytes():
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 6_000_000


def test_every_word_is_one_token(tokenizer):
    words = corpus.spelling_words()
    assert [word for word in words if len(tokenizer(word)["input_ids"]) != 1] == []
    assert set(words) >= {f" {word}" for word in corpus.vocabulary()}


def test_alphabetic_tokens_are_the_spelling_words(tokenizer):
    decoded = [tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab()]
    bare = {text: text.removeprefix(" ") for text in decoded}
    alphabetic = {text for text in decoded if bare[text] and set(bare[text]) <= set(ascii_letters)}
    assert alphabetic == set(corpus.spelling_words())


def test_documents_are_whole_words(tokenizer):
    documents = [doc.text for doc in corpus.documents(200, UNSEEN)]
    pieces = {t for ids in tokenizer(documents)["input_ids"] for t in tokenizer.decode(ids).split()}
    assert {piece.rstrip(".").lower() for piece in pieces} <= set(corpus.vocabulary())
    lengths = [len(ids) for ids in tokenizer(documents)["input_ids"]]
    assert lengths == [len(text.replace(".", " .").split()) for text in documents]


def test_spelling_prompts_have_the_evaluations_format(tokenizer):
    for prompt in corpus.spelling_prompts(50, UNSEEN):
        question, answer = prompt[:-2], prompt[-2:]
        *_, last = question.split("\n")
        word = last.removesuffix(" has the first letter:")
        assert answer == f" {word.strip()[0].upper()}"
        assert tokenizer.decode(tokenizer(question)["input_ids"][WORD_POSITION]) == word
        assert question.count("\n") == 11


def test_vocabulary_has_enough_words_for_every_letter():
    counts = Counter(word[0] for word in corpus.vocabulary())
    assert set(counts) == set(ascii_lowercase)
    assert min(counts.values()) >= 35


def test_corpus_depends_on_the_seed_alone():
    assert corpus.texts(40, 3) == corpus.texts(40, 3)
    assert not set(corpus.texts(40, 3)) & set(corpus.texts(40, 4))
    # the same in every process and on every machine
    assert corpus.word_lists(1, 0)[0].startswith("\n rapid rapids rowed ranger rain rotted reader")
    assert corpus.spelling_prompts(1, 0)[0].startswith("\n effect has the first letter: E\n waltz ")
    first = corpus.documents(1, 0)[0]
    assert first[1:] == ("arts", "painting")
    assert first.text.startswith(
        "Every double texture varnished over the fresco. Every mural dabbed"
    )


def test_word_lists_have_lines_of_one_letter():
    lines = [line for text in corpus.word_lists(50, UNSEEN) for line in text[1:].split("\n")]
    assert len(lines) == 200
    assert {len({word[0] for word in line.split()}) for line in lines} == {1}
    assert {word for line in lines for word in line.split()} <= set(corpus.vocabulary())


def test_labels_match_the_text():
    documents = corpus.documents(800, UNSEEN)
    classes = [(domain, topic) for domain, names in corpus.topics().items() for topic in names]
    assert {(doc.domain, doc.topic) for doc in documents} == set(classes)
    hits = 0
    for doc in documents:
        words = doc.text.lower().replace(".", "").split()
        count = {c: sum(word in words_of(c[1]) for word in words) for c in classes}
        hits += max(count.values()) == count[doc.domain, doc.topic]
    assert hits / len(documents) > 0.95


def test_no_single_token_determines_a_topic():
    documents = [(set(d.text.lower().split()), d.topic) for d in corpus.documents(4000, UNSEEN)]
    for topic in {topic for _, topic in documents}:
        own = [words for words, label in documents if label == topic]
        document_frequency = Counter(w for words in own for w in words & words_of(topic))
        assert document_frequency.most_common(1)[0][1] / len(own) < 0.3


def words_of(topic: str) -> set[str]:
    """Words that are specific to a topic; a few of them (`bass`, `bank`) belong to two topics."""
    domain = next(name for name, names in corpus.topics().items() if topic in names)
    by_kind = corpus._words()["domains"][domain]["topics"][topic]
    return {word for words in by_kind.values() for word in words}


@pytest.mark.parametrize("name", [MODEL_NAME, short_model_name(MODEL_NAME)])
def test_transformer_lens_loads_the_same_model(model, tokenizer, tmp_path, monkeypatch, name):
    assert name.rpartition("/")[2] == "tiny-gpt-neox"
    (tmp_path / MODEL_NAME).parent.mkdir()
    (tmp_path / MODEL_NAME).symlink_to(MODEL_DIR)
    monkeypatch.chdir(tmp_path)
    hooked = HookedTransformer.from_pretrained_no_processing(name, center_writing_weights=False)
    prompt = corpus.spelling_prompts(1, UNSEEN)[0]
    ids = hooked.to_tokens(prompt)
    assert ids[0].tolist() == tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits, cache = hooked.run_with_cache(ids)
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    here = cache[f"blocks.{LAYER}.hook_resid_post"]
    torch.testing.assert_close(here, residuals(model, ids), atol=1e-3, rtol=1e-3)


def test_model_names_first_letters(model, tokenizer):
    prompts = corpus.spelling_prompts(300, UNSEEN)
    plain = torch.tensor(tokenizer(prompts)["input_ids"])
    after_bos = F.pad(plain, (1, 0), value=tokenizer.bos_token_id)
    for ids in (plain, after_bos):  # by default TransformerLens gives this model name no BOS
        with torch.no_grad():
            predicted = model(ids[:, :-1]).logits[:, -1].argmax(-1)
        assert (predicted == ids[:, -1]).float().mean() > 0.98


def test_every_letter_has_a_probe_on_held_out_words(model, tokenizer):
    torch.manual_seed(0)
    rng = random.Random(0)
    words = rng.sample(corpus.spelling_words(), len(corpus.spelling_words()))
    cut = int(0.8 * len(words))
    x, y = {}, {}
    for split, part in {"train": words[:cut], "test": words[cut:]}.items():
        ids = torch.tensor(tokenizer(first_letter_prompts(part, rng))["input_ids"])
        x[split] = residuals(model, ids)[:, WORD_POSITION]
        y[split] = torch.tensor([letter_of(word) for word in part])
    predicted = fit_probe(x["train"], y["train"])(x["test"]) > 0
    true = F.one_hot(y["test"], 26).bool()
    f1 = 2 * (predicted & true).sum(0) / (predicted.sum(0) + true.sum(0))
    assert f1.min() > 0.6, dict(zip(ascii_lowercase, f1.tolist(), strict=True))
    assert f1.mean() > 0.9


def test_domain_and_topic_can_be_probed_from_mean_residuals(model, tokenizer):
    torch.manual_seed(0)
    documents = corpus.documents(2000, UNSEEN)
    ids = tokenizer([doc.text for doc in documents])["input_ids"]
    length = max(map(len, ids))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    inside = torch.tensor([[i < len(row) for i in range(length)] for row in ids]).unsqueeze(-1)
    pooled = (residuals(model, padded) * inside).sum(1) / inside.sum(1)
    pooled = (pooled - pooled.mean(0)) / pooled.std(0)
    for field, bar in {"domain": 0.97, "topic": 0.65}.items():
        labels = [getattr(doc, field) for doc in documents]
        y = torch.tensor([sorted(set(labels)).index(label) for label in labels])
        probe = torch.nn.Linear(pooled.shape[1], len(set(labels)))
        optimizer = torch.optim.Adam(probe.parameters(), lr=0.02, weight_decay=1e-3)
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(probe(pooled[:1600]), y[:1600]).backward()
            optimizer.step()
        assert (probe(pooled[1600:]).argmax(1) == y[1600:]).float().mean() > bar
