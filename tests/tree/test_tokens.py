"""The text of tokens that are parts of characters."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from sae_lens_matryoshka.tree.page.tokens import REST, TokenTexts, naming_words


def byte_level() -> PreTrainedTokenizerFast:
    """A token for every byte, as GPT-2's tokenizer and most others have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def byte_fallback() -> PreTrainedTokenizerFast:
    """A word, and the bytes of all else, as SentencePiece's."""
    pieces = ["▁fox", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


TOKENIZER = byte_level()


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@pytest.mark.parametrize("text", ["🦊", "שלום עולם", "naïve – “so”", "👩‍👩‍👧", "日本"])
def test_a_character_stands_at_its_first_token(text):
    shown = TokenTexts(TOKENIZER).of(ids(text))
    assert "".join(shown).replace(REST, "") == text
    expected = [part for c in text for part in [c] + [REST] * (len(c.encode()) - 1)]
    assert shown == expected


def test_bytes_of_a_character_that_is_cut():
    fox = ids("a🦊é")
    texts = TokenTexts(TOKENIZER)
    assert texts.of(fox[:3]) == ["a", "⟨F0⟩", "⟨9F⟩"]
    assert texts.of(fox[2:]) == ["⟨9F⟩", "⟨A6⟩", "⟨8A⟩", "é", REST]
    assert [texts(token) for token in fox[:2]] == ["a", "⟨F0⟩"]


def test_the_sign_for_unknown_characters_stays_where_a_text_has_it():
    assert TokenTexts(TOKENIZER).of(ids("�")) == ["�", REST, REST]


def test_bytes_of_sentencepiece():
    texts = TokenTexts(byte_fallback())
    assert texts.of([0, *(1 + byte for byte in "🦊".encode())]) == [" fox", "🦊", REST, REST, REST]
    assert texts(1 + 0xE2) == "⟨E2⟩"


@given(st.text(), st.integers(0, 20), st.integers(0, 20))
def test_no_part_of_any_text_is_lost(text, before, after):
    tokens = ids(text)[before : before + after]
    if tokens:
        shown = TokenTexts(TOKENIZER).of(tokens)
        assert len(shown) == len(tokens)
        joined = "".join(s for s in shown if s != REST or "·" in text)
        pieces = re.split("⟨([0-9A-F ]+)⟩", joined)
        if not set("⟨⟩·") & set(text):
            found = b"".join(
                bytes.fromhex(piece) if i % 2 else piece.encode() for i, piece in enumerate(pieces)
            )
            assert found == text.encode()[before : before + after]


def test_without_a_tokenizer():
    assert TokenTexts(None).of([3, 4]) == ["[3]", "[4]"]


def test_names_are_the_most_frequent_tokens():
    texts = {0: " fox", 1: "fox", 2: " ", 3: "the"}
    assert naming_words([0, 1, 3, 2, 2, 2], texts.__getitem__) == [" ", "fox", "the"]
