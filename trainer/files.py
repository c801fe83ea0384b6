"""Small file habits: what is written is whole and on the disk, or not there at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from uuid import uuid4

from trainer.machine import writing_to

PARTIAL = ".partial"
"""Suffix of a file that is still being written; a reader never looks for it."""

DATASETS = "set --out (XDG_CACHE_HOME for the cache) to"
RUNS = "set train.out to"
"""For `machine.writing_to`: how a user has datasets, or runs, written elsewhere."""


def write_text(path: Path, text: str, set_to: str = DATASETS) -> None:
    """Write `text` to `path`, whole or not at all; of several writers at once the last one wins."""
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PARTIAL}")
    with writing_to(path, set_to):
        try:
            partial.write_text(text, encoding="utf-8")
            flush(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def flush(path: str | Path) -> None:
    """Have the disk hold what was written to a file or, of a folder, the names in it (fsync).

    Without it a crash soon after a rename can leave an empty file under the new name.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
