"""`busway data build` and `busway data inspect`, by their arguments."""

from __future__ import annotations

import argparse
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from trainer.data.build import build
from trainer.data.commands import register
from trainer.data.indexed import IndexedDataset
from trainer.data.packed import loss_mask_prefix
from trainer.data.tokenizer import END_OF_TEXT, load_tokenizer
from trainer.errors import InputError
from trainer.files import sha256_of


def busway_data(*words: object) -> int:
    parser = argparse.ArgumentParser()
    register(parser)
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


def lines(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """2,500 lines, enough for several pieces of work."""
    records = [{"text": f"stop {i} " + "bus " * (i % 7)} for i in range(2500)]
    return lines(tmp_path / "many.jsonl", *records)


def test_documents_become_tokens_that_end_in_the_end_of_document(tmp_path: Path, tokenizer_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("every ten minutes")
    source = lines(tmp_path / "b.jsonl", {"text": "the tram"}, {"text": ""})
    out = tmp_path / "made" / "set"
    assert busway_data("build", tmp_path / "a.txt", source, "--tokenizer", tokenizer_path, "--out", out) == 0
    tokenizer = load_tokenizer(tokenizer_path)
    end = tokenizer.token_to_id(END_OF_TEXT)
    data = IndexedDataset(out)
    texts = ["every ten minutes", "the tram", ""]
    assert [data[i].tolist() for i in range(3)] == [[*tokenizer.encode(text).ids, end] for text in texts]
    assert data.dtype == np.uint16
    assert json.loads(Path(f"{out}.json").read_text()) == {
        "tokenizer_sha256": sha256_of(tokenizer_path),
        "vocab": 280,
        "end_of_document": end,
        "documents": 3,
        "tokens": data.tokens,
        "sources": [str(tmp_path / "a.txt"), str(source)],
    }
    assert sorted(path.name for path in out.parent.iterdir()) == ["set.bin", "set.idx", "set.json"]
    said = capsys.readouterr().out
    assert f"3 documents, {data.tokens} tokens, " in said and "documents/s" in said


def test_processes_change_neither_order_nor_bytes(tmp_path: Path, tokenizer_path: Path, many: Path) -> None:
    for processes in (1, 2):
        build([str(many)], tokenizer_path, tmp_path / f"by{processes}", processes)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"by1.{suffix}").read_bytes() == (tmp_path / f"by2.{suffix}").read_bytes()
    assert len(IndexedDataset(tmp_path / "by1")) == 2500


def test_the_mask_covers_prompts_and_spares_everything_else(tmp_path: Path, tokenizer_path: Path) -> None:
    source = lines(
        tmp_path / "chat.jsonl",
        {"text": "the bus"},
        {"prompt": "when does it run?", "response": "every ten minutes"},
        {"prompt": "", "response": "the tram"},
        {"prompt": "and the tram?", "response": ""},
    )
    build([str(source)], tokenizer_path, tmp_path / "chat")
    tokenizer = load_tokenizer(tokenizer_path)
    prompts = [0, len(tokenizer.encode("when does it run?").ids), 0, len(tokenizer.encode("and the tram?").ids)]
    data = IndexedDataset(tmp_path / "chat")
    mask = IndexedDataset(loss_mask_prefix(tmp_path / "chat"))
    assert mask.dtype == np.uint8
    for document, prompt in enumerate(prompts):
        length = int(data.lengths[document])
        assert mask[document].tolist() == [0] * prompt + [1] * (length - prompt)
    assert tokenizer.decode(data[1].tolist()) == "when does it run?every ten minutes"


def test_building_again_without_prompts_removes_the_older_mask(tmp_path: Path, tokenizer_path: Path) -> None:
    first = lines(tmp_path / "first.jsonl", {"prompt": "p", "response": "r"})
    second = lines(tmp_path / "second.jsonl", {"text": "t"})
    for source in (first, second):
        build([str(source)], tokenizer_path, tmp_path / "set", overwrite=True)
    assert not list(tmp_path.glob("set.loss_mask*"))


def test_a_dataset_that_is_there_stays_unless_it_may_be_replaced(tmp_path: Path, tokenizer_path: Path) -> None:
    out = tmp_path / "set"
    words = ["build", tmp_path / "a.txt", "--tokenizer", tokenizer_path, "--out", out]
    (tmp_path / "a.txt").write_text("the bus")
    busway_data(*words)
    before = {path: path.read_bytes() for path in tmp_path.glob("set*")}
    (tmp_path / "a.txt").write_text("the tram")
    with pytest.raises(InputError) as error:
        busway_data(*words)
    assert str(error.value) == f"{out}.idx exists; name another --out, or add --overwrite to replace what is there"
    assert {path: path.read_bytes() for path in tmp_path.glob("set*")} == before
    busway_data(*words, "--overwrite")
    assert load_tokenizer(tokenizer_path).decode(IndexedDataset(out)[0].tolist()) == "the tram"


def test_a_file_that_a_dataset_would_overwrite_stays(tmp_path: Path, tokenizer_path: Path, many: Path) -> None:
    """The dataset's manifest would take the tokenizer's name."""
    tokenizer = Path(shutil.copy(tokenizer_path, tmp_path / "set.json"))
    with pytest.raises(InputError, match=r"set\.json exists; name another --out"):
        busway_data("build", many, "--tokenizer", tokenizer, "--out", tmp_path / "set")
    assert tokenizer.read_bytes() == tokenizer_path.read_bytes()


def test_a_pattern_without_a_directory_to_pick_from_is_an_error(
    tmp_path: Path, tokenizer_path: Path, many: Path
) -> None:
    words = ["--tokenizer", tokenizer_path, "--out", tmp_path / "set", "--glob", "*.txt"]
    with pytest.raises(InputError, match=r"--glob \*\.txt picks files of directories, and .*jsonl is none; leave it"):
        busway_data("build", many, *words)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("the bus")
    (tmp_path / "folder" / "b.md").write_text("the tram")
    busway_data("build", many, tmp_path / "folder", *words)
    assert len(IndexedDataset(tmp_path / "set")) == 2501


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_line_late_in_the_text_leaves_nothing(
    tmp_path: Path, tokenizer_path: Path, many: Path, processes: int
) -> None:
    with many.open("a") as file:
        file.write('{"prompt": "p", "response": "r"}\n{"text": \n')
    with pytest.raises(InputError, match=r"many\.jsonl: line 2502 is not JSON"):
        build([str(many)], tokenizer_path, tmp_path / "out" / "set", processes)
    assert list((tmp_path / "out").iterdir()) == []


def test_sources_without_text_are_an_error(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"there is no text in .*blank\.jsonl"):
        build([str(tmp_path / "blank.jsonl")], tokenizer_path, tmp_path / "set")
    assert not list(tmp_path.glob("set*"))


def test_a_builder_killed_half_way_leaves_nothing_valid_and_no_process(tmp_path: Path, tokenizer_path: Path) -> None:
    source = lines(tmp_path / "long.jsonl", *[{"prompt": "p", "response": f"the bus {i} " * 1000} for i in range(1000)])
    script = tmp_path / "builder.py"
    script.write_text(
        "import sys\n"
        "from trainer.data.build import build\n"
        "if __name__ == '__main__':\n"
        "    build(sys.argv[1:2], *sys.argv[2:4], 2)\n"
    )
    out = tmp_path / "set"
    builder = subprocess.Popen([sys.executable, "-P", script, source, tokenizer_path, out])
    try:
        partial = Path(f"{out}.bin.partial")
        while not (partial.exists() and partial.stat().st_size):
            assert builder.poll() is None
            time.sleep(0.01)
        children = psutil.Process(builder.pid).children(recursive=True)
        assert len(children) >= 2
    finally:
        builder.kill()
        builder.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not [path for path in tmp_path.glob("set*") if path.suffix != ".partial"]
    with pytest.raises(InputError, match=r"cannot read .*set\.idx"):
        IndexedDataset(out)


def test_a_terminal_shows_a_progress_bar_and_a_file_does_not(tmp_path: Path, tokenizer_path: Path, many: Path) -> None:
    program = "import sys; from trainer.data.build import build; build(sys.argv[1:2], *sys.argv[2:4])"
    words = [sys.executable, "-P", "-c", program, many, tokenizer_path]
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    subprocess.run(
        [*words, tmp_path / "shown"],
        stderr=secondary,
        stdout=subprocess.DEVNULL,
        env=environment,
        check=True,
        timeout=60,
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            shown += os.read(primary, 65536)
        except OSError:  # Linux's end of a pseudo-terminal
            break
    os.close(primary)
    assert b"tokenising" in shown and b"documents/s" in shown
    quiet = subprocess.run([*words, tmp_path / "quiet"], capture_output=True, check=True, timeout=60)
    assert quiet.stderr == b""


def test_inspect_prints_statistics_and_decoded_samples(tmp_path: Path, tokenizer_path: Path, capsys) -> None:
    source = lines(
        tmp_path / "chat.jsonl", {"text": "the bus runs"}, {"prompt": "the tram", "response": " every five minutes"}
    )
    build([str(source)], tokenizer_path, tmp_path / "set", report=lambda line: None)
    assert busway_data("inspect", tmp_path / "set", "--tokenizer", tokenizer_path, "--samples", 5) == 0
    said = capsys.readouterr().out
    data = IndexedDataset(tmp_path / "set")
    masked = len(load_tokenizer(tokenizer_path).encode("the tram").ids) / data.tokens
    assert f"documents         2\ntokens            {data.tokens} (uint16)" in said
    assert f"shortest {data.lengths.min()}, " in said and f"longest {data.lengths.max()}\n" in said
    assert f"largest token id  {data.flat.max()}\n" in said
    assert f"masked share      {masked:.2%}" in said
    assert "the bus runs<|endoftext|>" in said and "the tram every five minutes<|endoftext|>" in said


def test_inspect_with_the_wrong_tokenizer_is_an_error(write_dataset, tokenizer_path: Path) -> None:
    data = write_dataset([[1, 5000]])
    with pytest.raises(InputError, match=r"document 0 has the token id 5000, which .*tokenizer\.json does not know"):
        busway_data("inspect", data.prefix, "--tokenizer", tokenizer_path)


@pytest.mark.parametrize("words", [["build", "x"], ["inspect"], [], ["build", "x", "--processes", "0"]])
def test_wrong_arguments_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        busway_data(*words)
    assert exit_.value.code == 2
