"""Writing: whole or not at all, and what the operating system refuses becomes one clear line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trainer.errors import MachineError
from trainer.files import write_text
from trainer.machine import writing_to


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space or set train.out to another disk"),
        (errno.EROFS, "set train.out to a folder that can be written"),
        (errno.ENOTDIR, "set train.out to a folder"),
        (errno.ENAMETOOLONG, "set train.out to another folder"),
        (errno.EIO, "see to the disk or set train.out to another one"),
    ],
)
def test_an_error_of_the_disk_or_the_path_says_what_to_do(number: int, remedy: str) -> None:
    with pytest.raises(MachineError) as error, writing_to("runs/x"):
        raise OSError(number, "whatever the caller said")
    assert str(error.value) == f"cannot write runs/x: {os.strerror(number)}; {remedy}"


def test_an_error_of_the_program_stays_what_it_is() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), writing_to("runs/x"):
        os.write(-1, b"")


def test_a_text_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "first")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError, match=r"cannot write .*folder: Is a directory; set --out"):
        write_text(tmp_path / "folder", "second")
    write_text(tmp_path / "a", "third")
    assert (tmp_path / "a").read_text() == "third"
    assert sorted(os.listdir(tmp_path)) == ["a", "folder"]
