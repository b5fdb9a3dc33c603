"""Data files as streams of bytes: compressed ones by their name or their first bytes, and what is no text at all."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from leyden.errors import UserError, first_line

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip"}
_NOT_TEXT = {
    b"\xd0\xcf\x11\xe0": "an old Excel or Office file; save it in Excel as 'CSV UTF-8'",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run git lfs pull",
    b"<!DOCTYPE": "a web page, not data; download the file itself",
    b"<!doctype": "a web page, not data; download the file itself",
    b"<html": "a web page, not data; download the file itself",
    b"{\\rtf": "a document of rich text; save it as plain text, UTF-8",
}
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods", ".numbers")


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressing it. Raises `UserError` for a zip that is not one file of data."""
    with open(path, "rb") as file:
        start = file.read(32)
    by_content = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    kind = path.suffix.lower() if path.suffix.lower() in COMPRESSED else by_content
    if kind == ".zip":
        archive = zipfile.ZipFile(path)
        return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, archive.open(_member(path, archive)))))
    if kind == ".zst":
        return _unpacked_zstd(path)
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(kind, open)
    return cast(IO[bytes], opener(path, "rb"))


def _unpacked_zstd(path: Path) -> IO[bytes]:
    """A temporary file of what a `.zst` holds: Arrow's stream, which has no way back, and Python's comes with 3.14."""
    import pyarrow

    file = tempfile.TemporaryFile()
    try:
        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd") as stream:
            while piece := stream.read(1 << 20):
                file.write(piece)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def inner_name(path: Path) -> str:
    """The name of what a file holds: that of the member of a zip, or its own without `.gz` and the like."""
    if path.suffix.lower() not in COMPRESSED:
        return path.name
    if path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
        return Path(members[0]).name if len(members) == 1 else path.stem
    return path.stem


def check_text(path: Path, start: bytes) -> None:
    """Raise `UserError` for a file whose first bytes are those of something else than text."""
    for magic, what in _NOT_TEXT.items():
        if start.lstrip()[:64].startswith(magic):
            raise UserError(f"{path}: {what}")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn what opening, decompressing and reading may raise into one line."""
    try:
        yield
    except (EOFError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise UserError(f"{path}: the compressed file is broken or cut off ({error}); copy it again") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, OSError) and error.errno is None:  # bz2 and Arrow say so of what they cannot decompress
            raise UserError(f"{path}: the compressed file is broken or cut off ({reason}); copy it again") from None
        raise UserError(f"{path}: cannot be read ({reason}); check the file and its permissions") from None


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]


def _member(path: Path, archive: zipfile.ZipFile) -> str:
    members = _members(archive)
    if "xl/workbook.xml" in members or "[Content_Types].xml" in members:
        raise UserError(f"{path}: an Excel file; save it in Excel as 'CSV UTF-8' and give that")
    if len(members) != 1:
        names = ", ".join(members[:5]) or "nothing"
        raise UserError(f"{path}: an archive of {len(members)} files ({names}); unpack it and give the folder")
    return members[0]
