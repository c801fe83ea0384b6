"""Raw text on disk as a sequence of documents: a directory, .txt, .jsonl, or Python's standard library."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from trainer.errors import InputError

STDLIB = "stdlib"
"""The source name that stands for the .py files of this machine's Python."""

_SURROGATE = re.compile("[\ud800-\udfff]")
STDLIB_WITHOUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "idle_test"}
)


class Document(NamedTuple):
    """One document: `prompt` and `text`, of which only `text` is to be learnt."""

    text: str
    prompt: str | None = None
    size: int = 0
    """Bytes that it took on disk, for a progress bar."""


@dataclass(frozen=True)
class TextFiles:
    """The files of one source, in the order in which they are read.

    Iterating gives the documents, and leaves the number of undecodable files in `skipped`. A file that the user
    named himself must decode; one that was found in a directory may be binary and is passed over.
    """

    name: str
    files: tuple[Path, ...]
    named: bool
    skipped: list[Path]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        for file in self.files:
            try:
                if file.suffix == ".jsonl":
                    yield from _json_lines(file)
                else:
                    yield from self._whole(file)
            except OSError as error:
                raise InputError(f"cannot read {file}: {error.strerror}; make it readable or leave it out") from error

    def _whole(self, file: Path) -> Iterator[Document]:
        raw = file.read_bytes()
        bad = raw.find(b"\0")
        text = ""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = error.start
        if bad >= 0 and self.named:
            raise InputError(f"{file}: byte {bad} is not UTF-8 text; convert the file to UTF-8")
        if bad >= 0:
            self.skipped.append(file)
        elif text:
            yield Document(text, size=len(raw))


def text_files(path: str, glob: str = "*") -> TextFiles:
    """The files of a source; `glob` picks names in a directory, and among the .py files of ``stdlib``.

    Raises:
        InputError: the path is missing, or there is no file in it.
    """
    place = Path(path).expanduser()
    if path == STDLIB:
        kind, files = ".py file", _walk(Path(sysconfig.get_path("stdlib")), "*.py", STDLIB_WITHOUT)
    elif place.is_dir():
        kind, files = "file", _walk(place)
    elif place.is_file():
        return TextFiles(path, (place,), True, [])
    else:
        raise InputError(
            f"{path} does not exist; give the prefix of a built dataset, a directory, a .txt or .jsonl file, "
            f"or {STDLIB}"
        )
    matching = tuple(file for file in files if fnmatch(file.name, glob))
    if not matching:
        raise InputError(
            f"{path} holds no {kind} that matches {glob}; give a directory with text in it, or another --glob"
        )
    return TextFiles(path, matching, False, [])


def _walk(root: Path, glob: str = "*", without: frozenset[str] = frozenset()) -> list[Path]:
    """Files under `root` whose name matches, sorted by path; hidden ones and links to directories are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in without and not name.startswith("."))
        found += [
            Path(folder, name)
            for name in names
            if fnmatch(name, glob) and not name.startswith(".") and os.path.isfile(os.path.join(folder, name))
        ]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _json_lines(file: Path) -> Iterator[Document]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_document(file, number, line)


def _json_document(file: Path, number: int, line: bytes) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: line {number} is not UTF-8 (byte {error.start} of the line); convert the file to UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}: line {number} is not JSON ({error.msg} at column {error.colno}); give one JSON object a line"
        ) from error
    keys = ("prompt", "response") if isinstance(record, dict) and "response" in record else ("text",)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        raise InputError(
            f"{file}: line {number} must be a JSON object with the string 'text', or with 'prompt' and 'response'; "
            "rename its keys"
        )
    # JSON can escape half a surrogate pair, which is no text and which no tokenizer takes.
    if any(_SURROGATE.search(record[key]) for key in keys):
        raise InputError(f"{file}: line {number} escapes half a surrogate pair; remove it")
    if keys == ("text",):
        return Document(record["text"], size=len(line))
    return Document(record["response"], record["prompt"], len(line))
