"""Streaming text from sampled tokens: no incomplete characters, and no text that a later token may change."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that stands for one byte, in vocabularies that spell rare characters by bytes (Llama 2, Gemma)."""
LOST = "\ufffd"
_PICTURE, _VARIANT = "[\u2190-\u2bff\U0001f000-\U0001faff]", "[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"
_OPEN = re.compile(
    "(?:[\u1100-\u115f\ua960-\ua97c]+[\u1160-\u11a7\ud7b0-\ud7c6]*[\u11a8-\u11ff\ud7cb-\ud7fb]*"  # letters of Hangul
    "|[\U0001f1e6-\U0001f1ff]+"  # a flag is two letters
    f"|{_PICTURE}{_VARIANT}*(?:\u200d{_PICTURE}{_VARIANT}*)*\u200d?)\\Z"
)
"""The end of a text that may continue: a syllable in separate letters, a flag, or a picture that others may join."""


class Spelling:
    """Incremental decoder: tokens in, and out the text that no later token can change.

    All tokens are decoded anew each time, and the text returned before is cut off. Only the whole text is exact, since
    tokenizers add or remove blanks before words depending on their neighbours. Text that the next token may still
    change is held back: a last character with missing bytes (a Hangul syllable has three), every character since the
    last whole-character token in vocabularies that fall back to bytes, and the matches of `_OPEN`.

    Args:
        decode: returns the text of token ids.
        word: returns the token of an id, as the vocabulary writes it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], word: Callable[[int], str | None]) -> None:
        self.decode, self.word = decode, word
        self.tokens: list[int] = []
        self._given = 0
        """Number of characters returned so far."""

    def add(self, token: int) -> str:
        """Add a token and return the new text that is final; often none, seldom more than a word."""
        self.tokens.append(token)
        if BYTE.fullmatch(self.word(token) or ""):  # decoders show a whole run of bytes as lost while one is missing
            return ""
        text = self.decode(self.tokens).rstrip(LOST)
        return self._emit(text, len(text) - len(match[0]) if (match := _OPEN.search(text)) else len(text))

    def end(self, whole: bool = True) -> str:
        """Return the rest of the text.

        Args:
            whole: False leaves off a last character whose bytes are incomplete.
        """
        tokens = list(self.tokens)
        text = self.decode(tokens)
        if not whole:
            while tokens and text.endswith(LOST) and BYTE.fullmatch(self.word(tokens[-1]) or ""):
                text = self.decode(tokens := tokens[:-1])
            text = text.rstrip(LOST)
        return self._emit(text, len(text))

    def _emit(self, text: str, to: int) -> str:
        piece = text[self._given : to]
        self._given = max(self._given, to)
        return piece
