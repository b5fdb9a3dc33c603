"""Decomposed Hangul, as file systems of Macs write it: it looks the same, but a tokenizer sees other letters."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_JAMO = re.compile("[\u1100-\u11ff]+")


def is_decomposed(text: str) -> bool:
    """Whether a text has decomposed Hangul: separate letters (jamo) instead of syllables, which look the same."""
    return _JAMO.search(text) is not None


def composed(value: Any) -> Any:
    """A JSON value with all Hangul composed to syllables; everything else stays as it is."""
    if isinstance(value, str):
        return _JAMO.sub(lambda match: unicodedata.normalize("NFC", match[0]), value)
    if isinstance(value, list):
        return [composed(item) for item in value]
    if isinstance(value, dict):
        return {composed(key): composed(item) for key, item in value.items()}
    return value
