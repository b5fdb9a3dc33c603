from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from leyden.datamodules.files import encodings
from leyden.datamodules.files.files import read_rows
from leyden.errors import UserError

ROW = {"질문": "안녕?", "답변": "네."}


def read(path: Path, **options: Any) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of every row; the places must name the file."""
    found = []
    for place, row in read_rows(path, **options):
        name, _, line = place.rpartition(":")
        assert name == str(path)
        found.append((int(line), row))
    return found


def problems(path: Path) -> list[str]:
    found: list[str] = []
    list(read_rows(path, lambda place, problem: found.append(f"{place.rpartition(':')[2]}: {problem}")))
    return found


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    line = json.dumps(ROW, ensure_ascii=False)
    table = "질문,답변\n안녕?,네.\n"
    files = {
        "한글 이름.jsonl": line + "\n",
        "no_line_end.jsonl": line,
        "windows.jsonl": f"\r\n{line}\r\n",
        "bom.jsonl": b"\xef\xbb\xbf" + line.encode(),
        "escaped.jsonl": json.dumps(ROW) + "\n",
        "array.json": f"[\n {line}\n]\n",
        "array_as_lines.jsonl": f"[{line}]",
        "lines.json": line + "\n",
        "utf16.jsonl": line.encode("utf-16"),
        "small.jsonl.gz": gzip.compress(line.encode(), mtime=0),
        "table.csv": table,
        "bom_table.csv": b"\xef\xbb\xbf" + table.encode(),
        "cp949.csv": table.encode("cp949"),
        "utf16_table.csv": table.encode("utf-16"),
        "excel.csv": table.replace(",", ";"),
        "piped.csv": table.replace(",", "|"),
        "tabs.tsv": table.replace(",", "\t"),
        "table.csv.gz": gzip.compress(table.encode(), mtime=0),
    }
    for name, data in files.items():
        assert [row for _, row in read(write(tmp_path / name, data))] == [ROW], name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), tmp_path / "table.parquet")
    assert read(tmp_path / "table.parquet") == [(1, ROW), (2, ROW)]
    assert len(list(read_rows(tmp_path))) == len(files) + 2
    assert len(list(read_rows(tmp_path / "*.tsv"))) == 1


def test_lines_are_those_a_row_starts_on(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '{"a": 1}\n\n\n{"a": 2}\n')
    assert read(lines) == [(1, {"a": 1}), (4, {"a": 2})]
    array = write(tmp_path / "a.json", '\n[\n{"a":\n1},\n\n\n{"a": [2,\n2]}, {"a": 3}\n]')
    assert [line for line, _ in read(array)] == [3, 7, 8]
    table = write(tmp_path / "a.csv", 'a,b\n"one\ntwo\nthree",x\n\n4,"say ""no"""\n')
    assert read(table) == [(2, {"a": "one\ntwo\nthree", "b": "x"}), (6, {"a": "4", "b": 'say "no"'})]


def test_bad_lines_are_reported_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps(ROW, ensure_ascii=False).encode()
    write(path, b'{"a": }\n' + good + b"\n[1]\nnull\n\xb0\xa1\xff\n" + "가나".encode("cp949") + b'\n{"a": "cut o')
    found = problems(path)
    assert [problem.partition(":")[0] for problem in found] == ["1", "3", "4", "5", "6", "7"]
    for text, problem in zip(
        ["broken JSON", "an array, not", "null, not", "byte 0xb0 at position 1", "looks like CP949", "cut off"],
        found,
        strict=True,
    ):
        assert text in problem
    assert read(path, on_bad=lambda place, problem: None) == [(2, ROW)]
    with pytest.raises(UserError, match=r"bad.jsonl:1: broken JSON"):
        list(read_rows(path))


def test_bad_table_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.csv", 'a,b\n1,2,3\n4\n5,6\n"7"x,8\n9,10\n"11,12\n13,14\n')
    found = problems(path)
    assert [problem.partition(":")[0] for problem in found] == ["2", "3", "5", "7"]
    assert "3 fields, but the header has 2" in found[0] and "1 fields" in found[1]
    assert "broken quotes" in found[2] and "never closed (up to line 8)" in found[3]
    assert [row["a"] for _, row in read(path, on_bad=lambda place, problem: None)] == ["5", "9"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", "", "file is empty"),
        ("a.csv", b"\xef\xbb\xbf\n", "file is empty"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: two columns are named 'a'"),
        ("a.csv", ",a\n1,2\n", "a.csv:1: column 1 of the header has no name"),
        ("a.csv", '"a,b\n1,2\n', "a.csv:1: a quote that opens here is never closed"),
        ("a.csv", b"a,b\n1,2\n\xff\xff,3\n", "a.csv:3: byte 0xff is neither UTF-8 nor CP949"),
        ("a.csv", b"a,b\n1,\xea", "a.csv:2: byte 0xea is neither UTF-8 nor CP949"),
        ("a.json", '[{"a": 1},\n{"a": 2}', "a.json:2: the array never ends"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json:2: broken JSON"),
        ("a.json", "[1]", "a number, not an object"),
        ("a.json", '[{"a": 1}]\n[]', "a.json:2: text after the end"),
        ("a.json", '{\n "a": {"0": "x"},\n "b": {"0": "y"}\n}', "a table by columns (a, b)"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "broken or cut off"),
        ("a.jsonl.gz", b"not compressed", "broken or cut off"),
        ("a.parquet", b"not parquet", "not a Parquet file"),
        ("a.txt", "x", "unknown kind of file '.txt'"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    write(tmp_path / name, data)
    with pytest.raises(UserError) as caught:
        list(read_rows(tmp_path / name, lambda place, problem: pytest.fail(problem)))
    assert message in str(caught.value) and "; " in str(caught.value) and "\n" not in str(caught.value)


def test_bad_bytes_are_placed_in_files_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", "é,à\nö,ü\n".encode() + b"\xff,\xff\n")
    for size in (1, 2, 5, 1000):
        monkeypatch.setattr(encodings, "_CHUNK", size)
        with pytest.raises(UserError, match="a.csv:3: byte 0xff"):
            list(read_rows(path))


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match="did you mean 'train.jsonl'"):
        list(read_rows(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="no folder"):
        list(read_rows(tmp_path / "nowhere" / "a.jsonl"))
    with pytest.raises(UserError, match="no file matches"):
        list(read_rows(tmp_path / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data file in this folder"):
        list(read_rows(tmp_path / "empty"))


def test_a_name_from_a_mac_is_found(tmp_path: Path) -> None:
    write(tmp_path / unicodedata.normalize("NFD", "질문.jsonl"), '{"a": 1}')
    assert [row for _, row in read_rows(tmp_path / "질문.jsonl")] == [{"a": 1}]


def test_notes_say_what_was_decided(tmp_path: Path) -> None:
    notes: list[str] = []
    read(write(tmp_path / "a.csv", "질문;답변\n가;나\n".encode("cp949")), on_note=notes.append)
    read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf[{"a": 1}]'), on_note=notes.append)
    assert "CP949, semicolon (not UTF-8" in notes[0]
    assert "byte order mark" in notes[1] and "array in a file named .jsonl" in notes[2]


def test_encoding_and_delimiter_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "이름:말\n가,나:다\n".encode("euc-kr"))
    assert read(path, encoding="cp949", delimiter=":") == [(2, {"이름": "가,나", "말": "다"})]
    with pytest.raises(UserError, match="not UTF-8 text; name another --encoding"):
        read(path, encoding="utf8")
    with pytest.raises(UserError, match="no such encoding"):
        read(path, encoding="utf-99")


@given(
    rows=st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=8), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=8,
    ),
    delimiter=st.sampled_from(",;\t|"),
)
def test_tables_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], delimiter: str
) -> None:
    """Whatever is in the fields: delimiters of all kinds, quotes, line ends. Records without any text are left out."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(header := ["하나", "둘", "셋"])
    writer.writerows(rows)
    path = write(tmp_path_factory.mktemp("table") / "a.csv", text.getvalue())
    expected = [dict(zip(header, row, strict=True)) for row in rows if any(row)]
    assume(expected)
    found = [row for _, row in read_rows(path, lambda place, problem: pytest.fail(problem))]
    assert found == expected


def test_lines_are_streamed(tmp_path: Path) -> None:
    def peak(rows: Iterator[Any]) -> int:
        tracemalloc.start()
        for _ in rows:
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    line = json.dumps({"prompt": "가" * 500, "response": "나" * 500}, ensure_ascii=False) + "\n"
    path = write(tmp_path / "big.jsonl", line * 5000)
    assert path.stat().st_size > 15_000_000
    assert peak(read_rows(path)) < 1_000_000
