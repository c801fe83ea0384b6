"""A rank alone in its process: its log, its signals, its end; and the check that a path is shared."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

from trainer.errors import MachineError
from trainer.launch import rank as rank_module
from trainer.launch.rank import shared_path_check

ROOT = Path(__file__).resolve().parents[2]

PREAMBLE = """
import os, sys, threading, time
from pathlib import Path
from trainer.errors import MachineError, Stopped
from trainer.launch.rank import start
process = start(Path(sys.argv[1]), int(os.environ.get("PMI_RANK", 0)))
os.write(2, b"noise\\n")
"""


def run(tmp_path: Path, code: str, environ: dict[str, str] | None = None) -> subprocess.Popen:
    (tmp_path / "logs").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PREAMBLE + code, tmp_path],
        env={"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (environ or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def log(tmp_path: Path) -> str:
    return (tmp_path / "logs" / "rank-0000.log").read_text()


def test_a_rank_alone_keeps_its_stdout_and_gets_its_stderr_back(tmp_path):
    code = "print('loss 1.0'); code = process.finish(); print('after', file=sys.stderr); sys.exit(code)"
    assert ended(run(tmp_path, code)) == (0, "loss 1.0\n", "after\n")
    assert "noise" in log(tmp_path) and "after" not in log(tmp_path)


def test_a_known_error_is_one_line_and_its_traceback_is_in_the_log(tmp_path):
    code = "sys.exit(process.fail(MachineError('no memory; take less')))"
    assert ended(run(tmp_path, code)) == (3, "", "busway: no memory; take less\n")
    assert "MachineError: no memory" in log(tmp_path)


def test_an_error_that_a_thread_does_not_catch_ends_the_rank(tmp_path):
    returncode, _, err = ended(run(tmp_path, "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)"))
    assert returncode == 1
    assert err == (
        f"busway: ZeroDivisionError: division by zero\nbusway: rank 0's log: {tmp_path}/logs/rank-0000.log\n"
    )


def test_in_a_foreign_world_only_the_first_rank_to_fail_speaks_and_none_hangs_in_abort(tmp_path):
    code = """
from trainer.launch import rank
rank.ABORT_SECONDS = 0.2
process.fail(MachineError("disk full; free some"))
time.sleep(60)
"""
    first = ended(run(tmp_path, code, {"PMI_RANK": "0", "PMI_SIZE": "2"}))
    assert first == (3, "", "busway: rank 0: disk full; free some\n")
    assert ended(run(tmp_path, code, {"PMI_RANK": "1", "PMI_SIZE": "2"})) == (3, "", "")
    assert "disk full" in (tmp_path / "logs" / "rank-0001.log").read_text()


def test_one_signal_sets_the_flag_and_a_second_ends_at_once(tmp_path):
    code = """
print("ready")
while not process.stop.requested:
    time.sleep(0.01)
print("requested")
time.sleep(60 if os.environ.get("TWICE") else 0)
sys.exit(process.fail(Stopped("at step 3")))
"""
    once = run(tmp_path, code)
    assert once.stdout.readline() == "ready\n"
    once.send_signal(signal.SIGTERM)
    assert ended(once) == (75, "requested\n", "")
    twice = run(tmp_path, code, {"TWICE": "1"})
    assert twice.stdout.readline() == "ready\n"
    twice.send_signal(signal.SIGINT)
    assert twice.stdout.readline() == "requested\n"
    twice.send_signal(signal.SIGINT)
    assert ended(twice)[0] == 130


def test_a_log_that_cannot_be_written_is_a_machine_error(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PREAMBLE, tmp_path / "missing"],
        env={"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "MachineError: " in ended(process)[2].splitlines()[-1]


class ThreadWorld:
    """A world of threads, for one collective at a time."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, values: list) -> None:
        self.rank, self.size, self._barrier, self._values = rank, size, barrier, values

    def all_gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def broadcast(self, value, root=0):
        return self.all_gather(value)[root]


def check_on(paths: list[Path]) -> list[str | None]:
    """The error message of each rank, whose view of the path is `paths[rank]`."""
    barrier, values, messages = threading.Barrier(len(paths)), [None] * len(paths), [None] * len(paths)

    def check(rank: int) -> None:
        try:
            shared_path_check(paths[rank], ThreadWorld(rank, len(paths), barrier, values))
        except MachineError as error:
            messages[rank] = str(error)

    threads = [threading.Thread(target=check, args=[rank]) for rank in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return messages


def test_a_path_that_some_ranks_do_not_share_is_the_same_error_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_module, "SHARED_PATH_SECONDS", 0.3)
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    messages = check_on([shared, other, shared, other])
    assert len(set(messages)) == 1
    assert "is not shared by all nodes: ranks 1, 3 cannot see" in messages[0]
    assert check_on([shared, shared]) == [None, None]
    assert list(shared.iterdir()) == []


def test_a_path_that_rank_0_cannot_write_is_an_error_on_every_rank(tmp_path):
    messages = check_on([tmp_path / "missing", tmp_path])
    assert len(set(messages)) == 1
    assert "missing: No such file or directory; set train.out to another folder" in messages[0]
