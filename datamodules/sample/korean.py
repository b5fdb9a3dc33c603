"""Korean grammar that generated text needs: particles and the copula after any word."""

from __future__ import annotations

import re

_PARTICLES = {
    "은": ("은", "는"),
    "이": ("이", "가"),
    "을": ("을", "를"),
    "과": ("과", "와"),
    "이라고": ("이라고", "라고"),
    "이에요": ("이에요", "예요"),
    "입니다": ("입니다", "입니다"),
    "이야": ("이야", "야"),
    "이다": ("이다", "다"),
    "인지": ("인지", "인지"),
    "일까": ("일까", "일까"),
    "인가": ("인가", "인가"),
    "이었지": ("이었지", "였지"),
    "이더라": ("이더라", "더라"),
    "으로": ("으로", "로"),
}
_DIGIT_FINALS = {"0": "ㅇ", "1": "ㄹ", "3": "ㅁ", "6": "ㄱ", "7": "ㄹ", "8": "ㄹ"}
"""The final consonant of a number's last spoken syllable: 영·십, 일, 삼, 육, 칠, 팔. The others end in a vowel."""
_LATIN_CONSONANT = re.compile(r"(le?|me?|n|ng|c|ok|ot|at)$", re.IGNORECASE)
"""Endings of English words that Korean speakers say with a final consonant, roughly: 애플, 타임, 송, 뮤직, 북, 캣."""
_FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"


def final(word: str) -> str:
    """The final consonant of the last sound of `word`, or an empty string after a vowel. Quotes are ignored.

    >>> final("산"), final("바다"), final("'3'")
    ('ㄴ', '', 'ㅁ')
    """
    letters = re.sub(r"[^가-힣0-9A-Za-z]", "", word)
    if not letters:
        return ""
    last = letters[-1]
    if last.isdigit():
        return _DIGIT_FINALS.get(last, "")
    if last.isascii():
        return "ㄴ" if _LATIN_CONSONANT.search(letters) else ""
    return _FINALS[(ord(last) - ord("가")) % 28].strip()


def particle(word: str, kind: str) -> str:
    """`word` with a particle or a form of the copula, chosen by its last sound. `kind` is the form after a consonant.

    >>> particle("산", "은"), particle("바다", "은"), particle("서울", "으로")
    ('산은', '바다는', '서울로')
    """
    after_consonant, after_vowel = _PARTICLES[kind]
    consonant = final(word)
    if kind == "으로" and consonant == "ㄹ":
        consonant = ""
    return word + (after_consonant if consonant else after_vowel)


def fill(template: str, **words: str) -> str:
    """`template` with `{name}` replaced by a word and `{name:은}` by the word and the particle that fits it.

    >>> fill("{s:은} {a:이에요}.", s="하늘", a="바다")
    '하늘은 바다예요.'
    """

    def put(match: re.Match[str]) -> str:
        word = words[match[1]]
        return particle(word, match[2]) if match[2] else word

    return re.sub(r"\{(\w+)(?::([가-힣]+))?\}", put, template)
