"""The text of tokens, also where a character is split over several of them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

TextOf = Callable[[int], str]
REST = "·"  # a token that only goes on with a character that began in the token before
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's
_BROKEN = re.compile("[\udc80-\udcff]+")  # bytes that are no part of a character


class TokenTexts:
    """Texts of a tokenizer's tokens.

    Args:
        tokenizer: Of transformers; without one the text of a token is `[id]`.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._token = cache(self._token_of)

    def __call__(self, token: int) -> str:
        """The text of a token alone; bytes that are no whole character as ⟨E2 80⟩."""
        return self.of([token])[0]

    def of(self, tokens: Iterable[int]) -> list[str]:
        """The texts of tokens that follow each other.

        A character that is split stands at its first token, `REST` at the others. Bytes of one
        whose other tokens are missing are shown as ⟨E2 80⟩.
        """
        pieces, texts = zip(*map(self._token, tokens), strict=True)
        whole = [text for text in texts if text is not None]
        return whole if len(whole) == len(texts) else _joined(pieces)

    def _token_of(self, token: int) -> tuple[bytes, str | None]:
        """The bytes of a token, and its text if they are whole characters."""
        piece = self._bytes_of(token)
        try:
            return piece, piece.decode()
        except UnicodeDecodeError:
            return piece, None

    def _bytes_of(self, token: int) -> bytes:
        if self._tokenizer is None:
            return f"[{token}]".encode()
        text = self._tokenizer.decode([token])
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str):
            if "\ufffd" in text:  # the decoder's sign for bytes that are no whole character
                byte = _BYTE_PIECE.fullmatch(piece)
                if byte:
                    return bytes.fromhex(byte[1])
                if all(character in _BYTE_OF for character in piece):
                    return bytes(_BYTE_OF[character] for character in piece)
            # SentencePiece's decoders drop the space at the start of a text
            if piece.startswith("▁") and not text.startswith(" "):
                text = " " + text
        return text.encode(errors="replace")


def naming_words(tokens: Sequence[int], text_of: TextOf, n_words: int = 5) -> list[str]:
    """The most frequent tokens among a latent's examples, without the spaces around them."""
    texts = (text_of(int(token)) for token in tokens)
    return [word for word, _ in Counter(t.strip(" ") or t for t in texts).most_common(n_words)]


def _joined(pieces: Sequence[bytes]) -> list[str]:
    texts = [""] * len(pieces)
    ends = list(accumulate(map(len, pieces)))
    place = at = 0
    for character in b"".join(pieces).decode(errors="surrogateescape"):
        while at >= ends[place]:
            place += 1
        texts[place] += character
        at += len(character.encode(errors="surrogateescape"))
    return [
        _BROKEN.sub(_as_bytes, text) or (REST if piece else "")
        for text, piece in zip(texts, pieces, strict=True)
    ]


def _as_bytes(match: re.Match[str]) -> str:
    return f"⟨{match[0].encode(errors='surrogateescape').hex(' ').upper()}⟩"
