"""Text from tokens that are still coming: never half a character, and never what a later token may change."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token that stands for one byte, where a vocabulary spells rare characters by bytes (Llama 2, Gemma)."""
LOST = "\ufffd"
_PICTURE, _VARIANT = "[\u2190-\u2bff\U0001f000-\U0001faff]", "[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"
_OPEN = re.compile(
    "(?:[\u1100-\u115f\ua960-\ua97c]+[\u1160-\u11a7\ud7b0-\ud7c6]*[\u11a8-\u11ff\ud7cb-\ud7fb]*"  # letters of Hangul
    "|[\U0001f1e6-\U0001f1ff]+"  # a flag is two letters
    f"|{_PICTURE}{_VARIANT}*(?:\u200d{_PICTURE}{_VARIANT}*)*\u200d?)\\Z"
)
"""What may go on at the end of a text: a syllable in separate letters, a flag, a picture that others may be joined to.
"""


class Spelling:
    """Tokens one after the other, and the text that each of them settles.

    All tokens are decoded anew each time and what was given out before is left off: only the whole text is exact, since
    tokenizers put blanks before words or take them away by what stands beside. Held back is what the next token may
    still change: the last character of which bytes are missing (a Hangul syllable has three), every character since the
    last whole-character token where a vocabulary falls back to bytes, and what `_OPEN` matches.

    Args:
        decode: the text of token ids.
        word: the token of an id, as the vocabulary writes it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], word: Callable[[int], str | None]) -> None:
        self.decode, self.word = decode, word
        self.tokens: list[int] = []
        self._given = 0
        """Characters that were given out."""

    def add(self, token: int) -> str:
        """The text that is settled by one more token; often none, seldom more than a word."""
        self.tokens.append(token)
        if BYTE.fullmatch(self.word(token) or ""):  # decoders show all bytes of a run as lost while one is missing
            return ""
        text = self.decode(self.tokens).rstrip(LOST)
        return self._give(text, len(text) - len(found[0]) if (found := _OPEN.search(text)) else len(text))

    def end(self, whole: bool = True) -> str:
        """The rest of the text.

        Args:
            whole: False leaves off a last character that the end has cut.
        """
        tokens = list(self.tokens)
        text = self.decode(tokens)
        if not whole:
            while tokens and text.endswith(LOST) and BYTE.fullmatch(self.word(tokens[-1]) or ""):
                text = self.decode(tokens := tokens[:-1])
            text = text.rstrip(LOST)
        return self._give(text, len(text))

    def _give(self, text: str, to: int) -> str:
        piece = text[self._given : to]
        self._given = max(self._given, to)
        return piece
