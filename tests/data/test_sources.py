"""Raw text: which files are read, in which order, and what a bad line is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.sources import text_files
from trainer.errors import InputError


def test_a_directory_is_read_recursively_in_order_without_binary_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "deep" / "z.md").write_text("three")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "two"}\n\n{"prompt": "p", "response": "r"}\n')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".git" / "config").write_text("hidden")
    files = text_files(str(tmp_path))
    found = [(document.prompt, document.text) for document in files]
    assert found == [(None, "one"), (None, "two"), ("p", "r"), (None, "three")]
    assert [file.name for file in files.skipped] == ["latin.txt", "photo.png"]
    assert [document.text for document in text_files(str(tmp_path), "*.md")] == ["three"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "is not JSON .*give one JSON object a line"),
        ("[1]", "must be a JSON object with the string 'text'"),
        ('{"content": "x"}', "must be a JSON object.*rename its keys"),
        ('{"text": 3}', "must be a JSON object"),
        ('{"response": "x"}', "must be a JSON object"),
        ('{"text": "\\ud800"}', "escapes half a surrogate pair"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=rf"lines\.jsonl: line 3 {said}"):
        list(text_files(str(path)))


def test_a_line_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2 is not UTF-8 \(byte 10 of the line\)"):
        list(text_files(str(path)))


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [document.text for document in text_files(str(path))] == ["a\u2028b\x85c"]


def test_a_named_file_that_is_not_text_is_an_error_that_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"notes\.txt: byte 3 is not UTF-8 text"):
        list(text_files(str(path)))


def test_a_missing_path_and_an_empty_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; give the prefix"):
        text_files(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds no file that matches"):
        text_files(str(tmp_path))


def test_stdlib_is_pythons_own_source_without_its_tests() -> None:
    files = text_files("stdlib").files
    names = {file.name for file in files}
    assert {"argparse.py", "typing.py", "decoder.py"} <= names
    assert all(file.suffix == ".py" for file in files)
    assert not any({"test", "tests", "site-packages", "dist-packages", "idlelib"} & set(file.parts) for file in files)
    assert list(files) == list(text_files("stdlib").files)


def test_a_pattern_picks_among_the_files_of_stdlib() -> None:
    assert {file.name for file in text_files("stdlib", "arg*").files} == {"argparse.py"}
    with pytest.raises(InputError, match=r"^stdlib holds no \.py file that matches \*\.txt; .* or another --glob$"):
        text_files("stdlib", "*.txt")
