from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
import unicodedata
from collections.abc import Iterator
from itertools import product
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
    assume(delimiter != "\t" or not any("\t" in field and "\n" in field for row in rows for field in row))
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


# -- what other tools write --------------------------------------------------------------------------------------------

KOREAN = "질문,답변\n수도는?,서울입니다.\nGPU는?,A와 B가 다 됩니다 ㅋㅋ\n"
JAPANESE = "質問,答え\n首都はどこですか?,東京です。\nこれは何?,それはペンです。\n"
CHINESE = "问题,答案\n首都是哪里?,北京是中国的首都。\n你好吗?,我很好。\n"
WESTERN = "question,answer\nWhat’s the policy?,It’s simple and we don’t ask why.\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (WESTERN, "cp1252"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        (CHINESE, "gb18030"),
        ("a,é\nà,ö\n", "cp1252"),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_other_encodings_are_never_taken_for_korean(tmp_path: Path, text: str, encoding: str, lines: bool) -> None:
    """The command that the message names reads the text as it was written."""
    data = json.dumps({"a": text}, ensure_ascii=False) if lines else text
    path = write(tmp_path / ("a.jsonl" if lines else "a.csv"), data.encode(encoding))
    with pytest.raises(UserError) as caught:
        read(path)
    named = str(caught.value).rpartition("--encoding ")[2]
    assert named == encoding
    _, row = read(path, encoding=named)[0]
    assert row == {"a": text} if lines else ",".join(row.values()) == text.splitlines()[1]


@pytest.mark.parametrize(
    ("texts", "encoding"),
    [
        (["首都はどこですか", "東京です", "これは何ですか", "雨とは何ですか", "空から降る水です"], "euc_jp"),
        (["首都是哪里", "你好吗", "我很好", "今天天气怎么样", "猫喜欢吃鱼", "谢谢你的帮助", "天空是蓝色的"], "gb18030"),
    ],
)
def test_even_one_row_of_another_encoding_is_not_korean(tmp_path: Path, texts: list[str], encoding: str) -> None:
    for question, answer in product(texts, texts):
        data = f"question,answer\n{question},{answer}\n".encode(encoding)
        with pytest.raises(UserError, match="neither UTF-8 nor (Korean|CP949)"):
            read(write(tmp_path / "a.csv", data))


CHAT = [
    "그건 ㅋㅋㅋ 진짜 ㅠㅠ ㅇㅇ",
    "10시에 LG전자로 와 ㄱㄱ ㅇㅋ ㅡㅡ",
    "뷁스러운 맛의 펲시",
    "Thai똠얌꿍 먹자 ㅎㅎ",
    "하세ㅛ 뭐해",
    "PC방에서 Wi-Fi가 안 돼",
    "美 정부는 北核 문제를 논의했다",
    "ㅏㅑㅓㅕ 다음에 오는 모음은?",
    "아햏햏",
]


def test_korean_as_people_type_it_stays_korean(tmp_path: Path) -> None:
    """Each by itself, and all of them in one file."""
    for texts in (*([text] for text in CHAT), CHAT):
        path = write(tmp_path / "a.csv", ("q\n" + "".join(f"{text}\n" for text in texts)).encode("cp949"))
        assert [row["q"] for _, row in read(path)] == texts


@pytest.mark.parametrize(
    ("line", "encoding"), [("It’s here", "cp1252"), ("首都は東京です。雨とは空から降る水です", "euc_jp")]
)
def test_one_line_of_another_encoding_in_a_korean_file_is_named(tmp_path: Path, line: str, encoding: str) -> None:
    text = "".join(f"{text}\n" for text in CHAT)
    path = write(tmp_path / "a.csv", ("q\n" + text).encode("cp949") + line.encode(encoding) + b"\n")
    with pytest.raises(UserError, match=rf"a.csv:{len(CHAT) + 2}: the file is Korean in CP949, but this line"):
        read(path)
    assert len(read(path, encoding="cp949")) == len(CHAT) + 1


def test_korean_is_read_as_before_and_mixtures_are_named(tmp_path: Path) -> None:
    for encoding in ("cp949", "utf-16-le", "utf-16-be", "utf-16", "utf-8-sig"):
        rows = [row for _, row in read(write(tmp_path / "a.csv", KOREAN.encode(encoding)))]
        assert [row["답변"] for row in rows] == ["서울입니다.", "A와 B가 다 됩니다 ㅋㅋ"], encoding
    path = write(tmp_path / "b.csv", KOREAN.encode("cp949") + "산은?,한라산입니다.\n".encode())
    with pytest.raises(UserError, match=r"b.csv:4: line 4 is UTF-8 and line 1 is not"):
        read(path)


@pytest.mark.parametrize(
    ("data", "rows", "note"),
    [
        ("\ufeffsep=;\r\nq;a\r\nx;y,z\r\n", {3: ("x", "y,z")}, "semicolon"),
        ("q,a,,\nx,y,,\n,,,\nz,w\n", {2: ("x", "y"), 4: ("z", "w")}, ""),
        ("q,a\nx,y\n\ufeffq,a\nz,w\n", {2: ("x", "y"), 4: ("z", "w")}, "a.csv:3: the header once more"),
        ('q\ta\nx\t"one\ny\ttwo"\nz\tw\n', {2: ("x", '"one'), 3: ("y", 'two"'), 4: ("z", "w")}, "as they stand"),
        ('q\ta\nx\t"one\ntwo"\nz\t"a ""b"""\n', {2: ("x", "one\ntwo"), 4: ("z", 'a "b"')}, "tab"),
        (
            'q\ta\nx\t"one\ny\ttwo\nragged\tb\tc\t\nlast\tthree"\nz\tw\n',
            {2: ("x", '"one'), 3: ("y", "two"), 5: ("last", 'three"'), 6: ("z", "w")},
            "as they stand",
        ),
        ('q\ta\n"one\ntwo"\tx\nz\tw\n', {2: ("one\ntwo", "x"), 4: ("z", "w")}, "tab"),
        (
            'q,a\nx,"one\ny,two\nm,b,c\nn,three"\nz,w\n',
            {2: ("x", "one\ny,two\nm,b,c\nn,three"), 6: ("z", "w")},
            "a.csv:2: a quoted field runs over",
        ),
        ('q,a\nx,"one\ny,two"\nz,w\n', {2: ("x", "one\ny,two"), 4: ("z", "w")}, "a.csv:2: a quoted field runs over"),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, data: str, rows: dict[int, Any], note: str) -> None:
    notes: list[str] = []
    found = read(write(tmp_path / "a.csv", data), on_note=notes.append, on_bad=lambda place, problem: None)
    assert {line: tuple(row.values()) for line, row in found} == rows
    assert note in " | ".join(notes) and {name for _, row in found for name in row} == {"q", "a"}


@pytest.mark.parametrize(
    ("data", "places"),
    [
        ('[{"a": 1}, {"a": 2},\n{"a": 3}]', ["1", "1:12", "2"]),
        ('{\n"a": 1\n}\n{\n"a": 2\n}{"a": 3}', ["1", "4", "6"]),
        ('{"version": 1, "data": [{"a": 1},\n{"a": 2}, {"a": 3}]}', ["1", "2", "2:11"]),
        ('{"a": 1},\n{"a": 2},\n{"a": 3}', ["1", "2", "3"]),
        ('{"a": 1}{"a": 2}\n{"a": 3}\n', ["1", "1:9", "2"]),
    ],
)
def test_json_of_any_layout_has_a_place_for_each_row(tmp_path: Path, data: str, places: list[str]) -> None:
    path, notes = write(tmp_path / "a.json", data), list[str]()
    rows = list(read_rows(path, on_note=notes.append))
    assert rows == [(f"{path}:{place}", {"a": number}) for number, place in enumerate(places, start=1)]
    assert ("not read: version" in " ".join(notes)) == ("version" in data)


def test_keys_that_stand_twice_and_halves_of_characters_are_bad_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1, "a": 2}\n{"a": "\\ud83d"}\n{\'a\': 1}\n{"a": 3}\n')
    found = problems(path)
    assert "the key 'a' stands twice" in found[0] and "half a character" in found[1] and "json.dumps" in found[2]


def test_compressed_and_columnar_files(tmp_path: Path) -> None:
    import bz2
    import lzma
    import zipfile

    import pyarrow

    line = (json.dumps(ROW) + "\n").encode()
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(line)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("data/b.jsonl", line)
        archive.writestr("__MACOSX/._b.jsonl", "x")
    write(tmp_path / "c.jsonl.bz2", bz2.compress(line))
    write(tmp_path / "d.jsonl.xz", lzma.compress(line))
    write(tmp_path / "e.jsonl", gzip.compress(line))
    table = pyarrow.Table.from_pylist([ROW])
    for name, writer in (("f.arrow", pyarrow.ipc.new_file), ("g.arrow", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as sink, writer(sink, table.schema) as out:
            out.write_table(table)
    found = list(read_rows(tmp_path))
    assert [row for _, row in found] == [ROW] * 7 and len({place for place, _ in found}) == 7
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.jsonl", line)
        archive.writestr("b.jsonl", line)
    with pytest.raises(UserError, match="an archive of 2 files"):
        read(tmp_path / "two.zip")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.xlsx", b"PK", "save it as 'CSV UTF-8'"),
        ("a.csv", b"\xd0\xcf\x11\xe0", "save it in Excel"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.csv", b"<!DOCTYPE html>", "a web page"),
        ("a.json", b'{"a": ["x", "y"], "b": ["z", "w"]}', "a table by columns (a, b)"),
        ("a.jsonl.bz2", b"BZh9", "broken or cut off"),
    ],
)
def test_what_is_no_data_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / name, data))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_everything_of_a_folder_that_is_not_read_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".b.jsonl", "_c.jsonl", "d.txt", "e.rejected.jsonl", "f.csv.orig"):
        write(tmp_path / name, '{"a": 1}\n')
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "g.jsonl", '{"a": 2}\n')
    (tmp_path / "h.jsonl").symlink_to(tmp_path / "nowhere")
    notes: list[str] = []
    assert len(list(read_rows(tmp_path, on_note=notes.append))) == 1
    for name in {file.name for file in tmp_path.iterdir()} - {"a.jsonl"}:
        assert name in " ".join(notes), name
    notes.clear()
    list(read_rows(tmp_path / "[as]*", on_note=notes.append))
    assert "not read: sub" in " ".join(notes)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="of the folders in it give one"):
        list(read_rows(tmp_path))


def test_hub_configurations_and_splits(tmp_path: Path) -> None:
    configs = ""
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", json.dumps({"a": name}) + "\n")
        files = f"  data_files:\n  - split: train\n    path: {name}/train.jsonl\n"
        configs += f"- config_name: {name}\n{files}"
    write(tmp_path / "README.md", f"---\nconfigs:\n{configs}---\n")
    hub = f"hf:{tmp_path}"
    for name in (f"{hub}:main", f"{hub}:main:train", f"{hub}:main:train[:1]"):
        assert list(read_rows(name)) == [(f"{name}:1", {"a": "main"})]
    for name, message in (
        (hub, f"2 configurations; name one: {hub}:main, {hub}:socratic"),
        (f"{hub}:train", "2 configurations"),
        (f"{hub}:main:test", f"no split 'test'.*{hub}:main:train"),
        (f"{hub}:mian:train", "did you mean 'main'"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_rows(name))
