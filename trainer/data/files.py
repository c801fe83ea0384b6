"""Small file habits of the data room: what the operating system refuses becomes one clear line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import MachineError

PARTIAL = ".partial"
"""Suffix of a file that is still being written; a reader never looks for it."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` (disk full, read-only, no permission) while writing `path` into a `MachineError`."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
