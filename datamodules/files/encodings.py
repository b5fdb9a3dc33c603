"""The encoding of a text file: UTF-8, UTF-16 with or without a byte order mark, or CP949, or a guess to name."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

from leyden.errors import UserError

Open = Callable[[], IO[bytes]]

START = 4096
"""Bytes at the start of a file that tell UTF-16."""
_CHUNK = 1 << 20
_OTHER = re.compile("[^\x00-\x7f]+")
_WORD = re.compile(r"[^\W\d_]*[^\W\d_\x00-\x7f][^\W\d_]*")
_SYLLABLE = re.compile("[가-힣]")
_JAMO = re.compile("[ㄱ-ㆎ]+")
_CHAT = re.compile("[ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎㅠㅜㅡㅗ]+|([ㅏ-ㅣ])\\1*")
"""Letters that people type by themselves: ㅋㅋ, ㅎㅎ, ㅠㅠ, ㅇㅇ, ㄱㅅ, ㅡㅡ, and a vowel drawn out."""
_COMMON = frozenset(
    "다니이는습에가을로은지하를나의요세어모수고서답변학그기프보있대없행으아도한것스입면리더정일치상만시개인합마터않거과주토파음데쓰크"
    "장중대자큰때알른같값저점전든체라드들와여할바래비내문두번부포무실화구해작표위운읽함게까남미확반또적러따오질며계좋쓸설름끝제메사되웃"
    "처선못채형우즘록식된울야발책교각본호맞차유명올느직새산네안녕뭐왜응식물국말먹람랑생날신영양용원월집저친감연공너싫잘했겠았었였했근"
    "강경관금김단달당동둘들디떤떻럼려례론료르린망매먼몇민방배버별복분비빠살색성소속술쉬심씨얼업에역열외움육은임작잡재쟁조종준진찾초최추출"
    "코태통특팀편평피필한향현회후히힘"
)
"""The syllables that most of any Korean text is made of. Other encodings become any of the 2,350 of KS X 1001."""
_AMONG_LATIN = re.compile("(?<=[A-Za-z])([가-힣])(?![가-힣])|(?<![가-힣])([가-힣])(?=[A-Za-z])")
_FEW, _ENOUGH = 5, 10
"""Syllables from which on it is no chance that half of them are common, or none."""
_UTF8_HANGUL = re.compile(b"[\xea-\xed][\x80-\xbf][\x80-\xbf]")
_EAST_ASIAN = {
    "shift_jis": ("[\u3041-\u30fe]", 0.2),
    "euc_jp": ("[\u3041-\u30fe]", 0.2),
    "gb18030": ("[\u4e00-\u9fff]", 0.6),
}
"""Encoding -> characters that its texts have, and the least share of them among those that are not ASCII."""


def detect_encoding(path: Path, open_: Open) -> str:
    """The encoding of a whole file. Raises `UserError`, with a guess, where it is none of those that are known."""
    with open_() as file:
        encoding = utf16(file.read(START))
    if encoding:
        return encoding
    bad = first_bad_byte(open_, "utf-8")
    if bad is None:
        return "utf-8"
    line, byte = bad
    korean = first_bad_byte(open_, "cp949") is None
    text, sample = _other_lines(path, open_), f"byte 0x{byte:02x} is neither UTF-8 nor CP949"
    if korean and is_korean(text.decode("cp949", "ignore")):
        _check_every_line(path, open_)
        return "cp949"
    if korean:
        shown = next(words for words in text.decode("cp949", "ignore").splitlines() if not words.isascii())
        sample = f"neither UTF-8 nor Korean in CP949, as which it would read {shown[:40]!r}"
    raise UserError(f"{path}:{line}: {sample}; write it as UTF-8 with: {advice(path, text)}")


def utf16(start: bytes) -> str | None:
    """UTF-16 by its byte order mark or, without one, by the zeros of its ASCII characters; None for other text."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    low, high = start[1::2].count(0), start[::2].count(0)
    if max(low, high) < 2 or max(low, high) < 4 * min(low, high):
        return None
    return "utf-16-le" if low > high else "utf-16-be"


def first_bad_byte(open_: Open, encoding: str) -> tuple[int, int] | None:
    """(line, byte) of the first byte that is not `encoding`, or None; reads the file in pieces."""
    decoder, line = codecs.getincrementaldecoder(encoding)("strict"), 1
    with open_() as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return line + error.object.count(b"\n", 0, error.start), error.object[error.start]
            if not chunk:
                return None
            line += chunk.count(b"\n")


def is_korean(text: str) -> bool:
    """Whether text that was decoded as CP949 reads as Korean.

    Nearly any pair of bytes is a character there. What other encodings become is words with Chinese characters
    (Chinese, Russian) or with single letters of syllables (the kana of EUC-JP), or with syllables that KS X 1001 leaves
    out, since hardly any word has them (Shift-JIS); and what are syllables of KS X 1001 is seldom a common one.
    """
    words = _WORD.findall(text)
    common, syllables = _common_syllables(text)
    foreign = sum(map(_is_foreign, words))
    if syllables >= _FEW and 2 * common >= syllables:  # Korean with Chinese characters in it
        return 2 * foreign <= len(words)
    return 3 * foreign <= len(words) and (syllables < 2 or 4 * common >= syllables)


def _is_foreign(word: str) -> bool:
    """Whether a word has letters that Korean words do not have, or mostly syllables that hardly any has."""
    syllables = _SYLLABLE.findall(word)
    rest = _SYLLABLE.sub(" ", word).split()
    if any(not (part.isascii() or _CHAT.fullmatch(part)) for letters in rest for part in _split_latin(letters)):
        return True
    return 2 * len(_rare().intersection(syllables)) > len(set(syllables))


def _split_latin(letters: str) -> list[str]:
    """Letters, cut where Latin ones and others meet."""
    return re.findall("[\x00-\x7f]+|[^\x00-\x7f]+", letters)


def _common_syllables(text: str) -> tuple[int, int]:
    """How many common syllables a text has, and how many in all, with what EUC-JP's kana become."""
    odd = sum(len(run) for run in _JAMO.findall(text) if not _CHAT.fullmatch(run))
    syllables = _SYLLABLE.findall(text)
    return sum(map(_COMMON.__contains__, syllables)), len(syllables) + odd


def _strays(line: str) -> bool:
    """Whether a line of a file in CP949 is of another encoding: a syllable that hardly any word has stands by itself
    among Latin letters (`It뭩`, the apostrophe of Windows), or there are many syllables, and hardly a common one."""
    if any(one in _rare() for pair in _AMONG_LATIN.findall(line) for one in pair if one):
        return True
    common, syllables = _common_syllables(line)
    return syllables >= _ENOUGH and 8 * common < syllables


@cache
def _rare() -> frozenset[str]:
    """The syllables that CP949 has and KS X 1001 leaves out."""
    return frozenset(one for one in map(chr, range(0xAC00, 0xD7A4)) if len(one.encode("euc_kr")) != 2)


def _other_lines(path: Path, open_: Open) -> bytes:
    """The first lines that are not ASCII. Raises `UserError` where some lines are UTF-8 and others are not."""
    lines: list[bytes] = []
    wide = narrow = size = 0
    with open_() as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            if _is_utf8_hangul(line):
                wide = wide or number
            else:
                narrow = narrow or number
            if wide and narrow:
                raise UserError(
                    f"{path}:{max(wide, narrow)}: line {wide} is UTF-8 and line {narrow} is not; write the whole file "
                    "in one encoding, best in UTF-8"
                )
            if size < _CHUNK:
                lines.append(line)
                size += len(line)
    return b"".join(lines)


def _check_every_line(path: Path, open_: Open) -> None:
    """Raise `UserError` where a line of a file in CP949 is of another encoding."""
    with open_() as file:
        for number, line in enumerate(file, start=1):
            if not line.isascii() and _strays(text := line.decode("cp949")):
                shown = next((word for word in _WORD.findall(text) if _is_foreign(word)), text.strip())
                raise UserError(
                    f"{path}:{number}: the file is Korean in CP949, but this line would read {shown[:40]!r}; mend it, "
                    f"best in a file in UTF-8, or take it so: leyden data convert {path} NEW.jsonl --encoding cp949"
                )


def _is_utf8_hangul(line: bytes) -> bool:
    if not _UTF8_HANGUL.search(line):
        return False
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def advice(path: Path, data: bytes) -> str:
    """The command that converts a file whose text is not UTF-8, with the encoding that `data` of it looks like."""
    command = f"leyden data convert {path} NEW.jsonl --encoding"
    return f"{command} {found}" if (found := guess(data)) else f"{command} NAME (its own: cp1252, cp1251, big5 …)"


def guess(data: bytes) -> str | None:
    """The encoding that some text which is not UTF-8 most likely has; None where nothing speaks for one."""
    if _decodes(data, "cp949") and is_korean(data.decode("cp949", "ignore")):
        return "cp949"
    for encoding, (own, least) in _EAST_ASIAN.items():
        runs = _OTHER.findall(data.decode(encoding, "ignore"))
        characters = "".join(runs)
        words = len(characters) > 1.5 * len(runs)  # a lone one is a letter of Latin-1 and its neighbour
        if _decodes(data, encoding) and words and len(re.findall(own, characters)) > least * len(characters):
            return encoding
    runs = _OTHER.findall(data.decode("cp1252", "ignore"))
    lone = len("".join(runs)) <= 1.5 * len(runs)  # accents and curly quotes among ASCII letters
    return "cp1252" if lone and _decodes(data, "cp1252") else None


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)("strict").decode(data)
    except UnicodeDecodeError:
        return False
    return True


def known_encoding(encoding: str) -> str:
    """The canonical name of an encoding; raises `UserError` for a name that Python does not know."""
    try:
        return {"utf-8-sig": "utf-8"}.get(name := codecs.lookup(encoding).name, name)
    except LookupError:
        raise UserError(f"--encoding {encoding}: no such encoding; type utf-8, cp949, cp1252 or utf-16") from None


def codec(encoding: str) -> str:
    """The codec to read with: the one that drops a byte order mark."""
    return "utf-8-sig" if encoding == "utf-8" else encoding
