"""Megatron's indexed format: peers' files read here, ours are theirs, and nothing broken is believed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from trainer.errors import InputError, MachineError

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "data"
WRITTEN_BY_MEGATRON = json.loads((FIXTURES / "megatron.json").read_text())
READ_BY_MEGATRON = json.loads((FIXTURES / "megatron_read.json").read_text())["datasets"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The prefix of a copy of a dataset by Megatron, to be spoilt."""
    for suffix in (".bin", ".idx"):
        shutil.copy(FIXTURES / f"megatron_uint16{suffix}", tmp_path / f"copy{suffix}")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", WRITTEN_BY_MEGATRON)
def test_a_dataset_by_megatrons_writer_reads_to_the_last_token(name: str) -> None:
    data = IndexedDataset(FIXTURES / name)
    expected = [sum(document, []) for document in WRITTEN_BY_MEGATRON[name]]
    assert data.dtype.name == name.removeprefix("megatron_").replace("modes", "int32")
    assert [data[i].tolist() for i in range(len(data))] == expected
    assert data.lengths.tolist() == [len(document) for document in expected]
    assert data.tokens == sum(map(len, expected))


@pytest.mark.parametrize("name", READ_BY_MEGATRON)
def test_our_writer_still_makes_the_bytes_that_megatron_read(name: str, tmp_path: Path) -> None:
    recorded = READ_BY_MEGATRON[name]
    with IndexedWriter(tmp_path / "ours", name.removeprefix("busway_")) as writer:
        for document in recorded["documents"]:
            writer.add(np.asarray(document, np.int64))
    for kind in ("bin", "idx"):
        assert sha256(tmp_path / f"ours.{kind}") == recorded[f"{kind}_sha256"]
        assert sha256(FIXTURES / f"{name}.{kind}") == recorded[f"{kind}_sha256"]


@pytest.mark.parametrize("document", [4, -1])
def test_a_document_that_is_not_there_is_an_index_error(document: int) -> None:
    with pytest.raises(IndexError, match=f"document {document} of 4"):
        IndexedDataset(FIXTURES / "megatron_int32")[document]


def test_an_index_truncated_at_any_byte_is_an_error_that_names_the_byte(copy: Path) -> None:
    path = Path(f"{copy}.idx")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: byte {size} ends.*; remove it and"):
            IndexedDataset(copy)


def test_an_index_with_any_byte_inverted_is_an_error_that_names_the_file(copy: Path) -> None:
    path = Path(f"{copy}.idx")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(InputError, match=rf"^{re.escape(str(copy))}.(idx|bin): byte \d+ .*; "):
            IndexedDataset(copy)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, 0x50, "byte 0 is not Megatron's MMIDIDX"),
        (9, 2, "byte 9 has version 2"),
        (17, 9, "byte 17 has the dtype code 9"),
        (17, 0, "byte 17 has the dtype code 0"),
        (37, 0x80, "byte 34 says that sequence 0 has -"),
        (34 + 4 * 6 + 8 * 2, 3, "byte 74 says that sequence 2 starts at byte 3"),
        (34 + 12 * 6, 1, "byte 106 must say that document 0"),
        (34 + 12 * 6 + 8 * 2, 9, "byte 122 says that document 2 starts with sequence 9"),
        (34 + 12 * 6 + 8 * 4, 5, "byte 138 ends the last document at sequence 5 of 6"),
    ],
)
def test_a_corrupted_field_is_named_by_its_byte(copy: Path, place: int, value: int, said: str) -> None:
    path = Path(f"{copy}.idx")
    raw = bytearray(path.read_bytes())
    raw[place] = value
    path.write_bytes(raw)
    with pytest.raises(InputError, match=re.escape(f"{path}: {said}")):
        IndexedDataset(copy)


def test_tokens_that_are_missing_or_too_many_are_an_error_that_names_the_byte(copy: Path) -> None:
    path = Path(f"{copy}.bin")
    whole = path.read_bytes()
    for size in (0, 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"copy\.bin: byte {size} ends, where its index needs {len(whole)} bytes"):
            IndexedDataset(copy)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match=rf"copy\.bin: byte {len(whole)} is followed by 1 bytes"):
        IndexedDataset(copy)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*copy\.bin"):
        IndexedDataset(copy)


def test_bytes_after_the_index_are_an_error(copy: Path) -> None:
    path = Path(f"{copy}.idx")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"byte 146 is followed by 1 bytes that belong to nothing"):
        IndexedDataset(copy)


def test_a_missing_dataset_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nothing\.idx: No such file"):
        IndexedDataset(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    seed = 11
    print("seed", seed)
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, np.iinfo(dtype).max, rng.integers(0, 50), endpoint=True) for _ in range(100)]
    with IndexedWriter(tmp_path / "there", dtype) as writer:
        for document in documents:
            writer.add(document)
    data = IndexedDataset(tmp_path / "there")
    assert len(data) == 100
    assert all(np.array_equal(data[i], documents[i]) for i in range(100))


def test_a_dataset_without_documents_reads_as_such(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "empty", "<u2"):
        pass
    assert (len(IndexedDataset(tmp_path / "empty")), IndexedDataset(tmp_path / "empty").tokens) == (0, 0)


def test_the_dtype_follows_megatrons_bound() -> None:
    assert [dtype_for(vocab).name for vocab in (256, 65_499, 65_500, 128_256)] == ["uint16", "uint16", "int32", "int32"]


def test_a_token_that_does_not_fit_is_an_error_that_names_the_document(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="document 1 has token ids from 3 to 65536"),
        IndexedWriter(tmp_path / "small", "<u2") as writer,
    ):
        writer.add([1, 2])
        writer.add([3, 65_536])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_half_way_leaves_the_older_dataset_as_it_was(tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    with IndexedWriter(prefix, "<i4") as writer:
        writer.add([1, 2, 3])
    program = (
        "import os, signal, sys\n"
        "from trainer.data.indexed import IndexedWriter\n"
        "writer = IndexedWriter(sys.argv[1], '<i4')\n"
        "writer.add(list(range(100_000)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program, prefix]).returncode == -signal.SIGKILL
    data = IndexedDataset(prefix)
    assert [data[i].tolist() for i in range(len(data))] == [[1, 2, 3]]


def test_a_full_disk_is_an_error_of_the_machine_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from trainer.data.indexed import IndexedWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "with IndexedWriter(sys.argv[1], '<i4') as writer:\n"
        "    for _ in range(100):\n"
        "        writer.add(list(range(1_000)))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, tmp_path / "data"], capture_output=True, text=True)
    assert re.search(
        r"MachineError: cannot write .*data\.bin\.partial: File too large; raise the limit .* or set --out .*disk\n$",
        done.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot write .*Not a directory|cannot write .*File exists"):
        IndexedWriter(tmp_path / "file" / "data", "<i4")
