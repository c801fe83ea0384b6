"""Ranks under the real mpiexec: what the user sees and which code is returned when they fail, die, hang or are stopped.

The ranks run a small script in place of the trainer. Each rank does what its word in the plan says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import os, signal, sys, threading, time
from pathlib import Path
from models.checks import ConfigError
from trainer.errors import MachineError, NotFiniteError, Stopped
from trainer.launch.rank import start
from trainer.launch.world import world_from_environment

run_directory, plan = Path(sys.argv[1]), sys.argv[2].split(",")
rank, size = world_from_environment(os.environ)
word, *rest = plan[rank].split("=")
number = float(rest[0]) if rest else 0.0
if word == "early":
    raise ImportError("no such module")
process = start(run_directory, rank)
os.write(2, f"noise of rank {rank}\\n".encode())
os.write(1, f"stdout of rank {rank}\\n".encode())

def main():
    if word in ("mpi", "mpikill", "abort"):
        from mpi4py import MPI
        if word == "mpikill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "abort":
            code = process.fail(NotFiniteError("the loss is nan at step 3; lower optimizer.lr"))
            MPI.COMM_WORLD.Abort(code)
        MPI.COMM_WORLD.Barrier()
    if word == "raise":
        time.sleep(number)
        raise ValueError("bad\\nvalue")
    if word == "config":
        raise ConfigError("train.steps must be at least 1, but is 0; set train.steps=1 or more")
    if word == "thread":
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        time.sleep(60)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "exit":
        os._exit(int(number))
    if word == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        time.sleep(60)
    if word == "print":
        os.write(1, b"50%\\r\\xe2\\x96\\x88\\n" + f"{sys.stdout.isatty()} {os.environ.get('COLUMNS')}\\n".encode())
    if word == "step":
        (run_directory / f"step-{rank}").touch()
        while not process.stop.requested:
            time.sleep(0.01)
        time.sleep(number)
        (run_directory / f"saved-{rank}").touch()
        raise Stopped("stopped at step 3")

try:
    main()
except BaseException as error:
    sys.exit(process.fail(error))
sys.exit(process.finish())
"""

PARENT = """
import os, sys
from trainer.launch import compose, supervise
from trainer.launch.settings import LauncherSettings
run, worker, plan = sys.argv[1:]
command = [sys.executable, "-P", worker, run, plan]
sys.exit(supervise(compose(LauncherSettings(), len(plan.split(",")), run, "CPU", os.environ, command)))
"""


class Run:
    """`busway train`'s part of a launch, as a process of its own."""

    def __init__(self, folder: Path, plan: str, nohup: bool = False, **streams):
        self.directory = folder / "run"
        (self.directory / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "worker.py").write_text(WORKER)
        (folder / "parent.py").write_text(PARENT)
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
        environ.pop("COLUMNS", None)  # which a terminal, or what runs the tests, may have set
        self.process = subprocess.Popen(
            [sys.executable, "-P", folder / "parent.py", self.directory, folder / "worker.py", plan],
            env=environ,
            # What the tests themselves stand under (nohup) is not what is tested.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        )
        self.out = self.err = ""

    def end(self) -> int:
        """Wait for the end, check that nothing is left running, return the exit code."""
        out, err = self.process.communicate(timeout=45)
        self.out, self.err = (out or b"").decode(), (err or b"").decode()
        assert self.left() == []
        return self.process.returncode

    def left(self) -> list[str]:
        """Command lines of processes that name this run's directory."""
        lines = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if str(self.directory) in words and entry.name != str(self.process.pid):
                    lines.append(" ".join(words))
        return lines

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.directory / name).exists():
            assert time.monotonic() < deadline and self.process.poll() is None, f"{name} did not appear"
            time.sleep(0.02)

    def log(self, rank: int) -> Path:
        return self.directory / "logs" / f"rank-{rank:04d}.log"


def test_only_rank_0s_stdout_reaches_the_console_and_noise_goes_to_the_logs(tmp_path):
    run = Run(tmp_path, "print,print,print")
    assert run.end() == 0, run.err
    assert (run.out, run.err) == ("stdout of rank 0\n50%\r█\nFalse None\n", "")
    for rank in range(3):
        assert f"noise of rank {rank}" in run.log(rank).read_text()
    assert "stdout of rank 1" in run.log(1).read_text()
    assert (run.directory / "logs" / "launcher.log").read_text() == ""


def test_rank_0_is_told_of_the_terminal_that_the_parent_holds(tmp_path):
    parent_end, child_end = pty.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 123, 0, 0))
    run = Run(tmp_path, "print,print", stdout=child_end)
    assert run.end() == 0, run.err
    os.close(child_end)
    assert b"False 123" in os.read(parent_end, 65536)
    os.close(parent_end)


def test_an_unexpected_error_is_shown_with_its_type_and_log_while_another_rank_hangs(tmp_path):
    run = Run(tmp_path, "hang,raise")
    assert run.end() == 1
    assert run.err.splitlines() == [
        "busway: rank 1: ValueError: bad value",
        f"busway: rank 1's log: {run.log(1)}",
    ]
    assert "Traceback" in run.log(1).read_text()


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        ("hang,config", 2, "rank 1: train.steps must be at least 1, but is 0; set train.steps=1 or more"),
        ("mpi,mpi,abort", 16, "rank 2: the loss is nan at step 3; lower optimizer.lr"),
    ],
    ids=["recipe error", "MPI abort"],
)
def test_a_known_error_is_one_line_and_its_code_is_returned(tmp_path, plan, code, message):
    run = Run(tmp_path, plan)
    assert run.end() == code
    assert run.err == f"busway: {message}\n"


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        ("mpi,mpikill,mpi", 1, "rank 1: was killed by signal 9 (SIGKILL); the kernel does this when memory runs out"),
        ("hang,segv", 1, "rank 1: was killed by signal 11 (SIGSEGV)"),
        ("hang,exit=5", 1, "rank 1: ended with exit code 5 before the run was over and reported no error"),
        ("hang,exit=0", 1, "rank 1: ended with exit code 0 before the run was over and reported no error"),
        ("hang,early", 1, "rank 1: ended with exit code 1 before the run was over and reported no error"),
        ("thread,hang", 1, "rank 0: ZeroDivisionError: division by zero"),
    ],
    ids=["SIGKILL", "segfault", "_exit", "early success", "import error", "thread"],
)
def test_a_rank_that_dies_is_named_and_the_others_are_stopped(tmp_path, plan, code, message):
    run = Run(tmp_path, plan)
    assert run.end() == code
    lines = run.err.splitlines()
    assert lines[0] == f"busway: {message}"
    assert lines[1].startswith(f"busway: {message[:6]}'s log: ") and len(lines) == 2


def test_the_failure_of_an_earlier_launch_is_not_shown_again(tmp_path):
    assert Run(tmp_path, "config,hang").end() == 2
    run = Run(tmp_path, "print,print")
    assert run.end() == 0
    assert run.err == ""


def test_a_full_disk_is_a_machine_error_before_any_rank_starts(tmp_path):
    (tmp_path / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path / "run"]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        (tmp_path / "run" / "logs").mkdir()
        with contextlib.suppress(OSError):
            (tmp_path / "run" / "full").write_bytes(bytes(2**17))
        run = Run(tmp_path, "print,print")
        assert run.end() == 1
        assert run.err.splitlines()[-1].startswith("trainer.errors.MachineError: ")
        assert "logs/launcher.log cannot be used: No space left on device" in run.err
        assert not run.log(0).exists()
    finally:
        subprocess.run(["umount", tmp_path / "run"], check=True)


@pytest.mark.parametrize("plan", ["step=0.1,step=1", "step=0.1"], ids=["two ranks", "one rank"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_signal_lets_every_rank_end_its_step_and_save(tmp_path, plan, number):
    run = Run(tmp_path, plan)
    ranks = range(len(plan.split(",")))
    for rank in ranks:
        run.wait_for(f"step-{rank}")
    run.process.send_signal(number)
    assert run.end() == 75
    assert all((run.directory / f"saved-{rank}").exists() for rank in ranks)
    assert run.err == "stopping after the current step; once more stops at once, without saving\n"


def test_under_nohup_a_terminal_that_closes_stops_nothing(tmp_path):
    run = Run(tmp_path, "step=0.1", nohup=True)
    run.wait_for("step-0")
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert not (run.directory / "saved-0").exists()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75


def test_a_signal_before_the_ranks_are_ready_is_kept_for_them(tmp_path):
    run = Run(tmp_path, "step,step")
    run.wait_for("logs/launcher.log")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 75


def test_a_second_signal_stops_everything_at_once(tmp_path):
    run = Run(tmp_path, "step=60,step=60")
    run.wait_for("step-0")
    run.wait_for("step-1")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert not (run.directory / "saved-0").exists()
    assert run.err.splitlines()[-1] == "stopped at once; what was not saved is lost"


def test_ranks_do_not_outlive_a_parent_that_is_killed(tmp_path):
    run = Run(tmp_path, "hang,hang")
    while not (run.log(1).exists() and "noise" in run.log(1).read_text()):
        time.sleep(0.02)
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 10
    while run.left():
        assert time.monotonic() < deadline, run.left()
        time.sleep(0.05)


MSRUN = '''#!{python}
"""Stands in for msrun: records its arguments, starts a scheduler and workers as msrun does."""
import json, os, subprocess, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
command = [word for word in sys.argv[1:] if not word.startswith("--")]
os.makedirs(options["log_dir"])
json.dump(dict(options=options, command=command), open("{record}", "w"))
print("Start scheduler process", flush=True)
local, first = int(options["local_worker_num"]), int(options["node_rank"]) * int(options["local_worker_num"])
env = dict(os.environ, RANK_SIZE=options["worker_num"], RANK_ID="0")
scheduler = subprocess.Popen(command, env=dict(env, MS_ROLE="MS_SCHED"))
workers = []
for rank in range(first, first + local):
    log = open(options["log_dir"] + f"/worker_{{rank}}.log", "w")
    workers.append(subprocess.Popen(command, env=dict(env, MS_ROLE="MS_WORKER", RANK_ID=str(rank)), stdout=log,
                                    stderr=log, preexec_fn=os.setsid))
while any(worker.poll() is None for worker in workers):
    if any(worker.poll() for worker in workers):
        for worker in workers:
            worker.kill()
    time.sleep(0.2)
scheduler.kill()
sys.exit(any(worker.returncode for worker in workers))
'''

MSRUN_PARENT = """
import os, sys
sys.executable = sys.argv[1]
from trainer.launch import compose, supervise
from trainer.launch.settings import LauncherSettings
worker = [sys.executable, "-P", *sys.argv[2:]]
settings = LauncherSettings(master_port=int(os.environ["PORT"]))
sys.exit(supervise(compose(settings, 2, sys.argv[3], "Ascend", os.environ, worker)))
"""


def test_under_msrun_a_rank_that_stops_early_does_not_cost_another_its_save(tmp_path, free_port):
    folder = tmp_path / "bin"
    folder.mkdir()
    # Not a link, which would lead away from the environment's packages.
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    (folder / "msrun").write_text(MSRUN.format(python=sys.executable, record=tmp_path / "record.json"))
    (folder / "msrun").chmod(0o755)
    run_directory = tmp_path / "run"
    (run_directory / "logs").mkdir(parents=True)
    worker = WORKER.replace(
        "process = start", "if os.environ['MS_ROLE'] == 'MS_SCHED': time.sleep(60)\nprocess = start"
    )
    (tmp_path / "worker.py").write_text(worker)
    (tmp_path / "parent.py").write_text(MSRUN_PARENT)
    command = [sys.executable, "-P", tmp_path / "parent.py", folder / "python", tmp_path / "worker.py", run_directory]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PORT": str(free_port)}
    process = subprocess.Popen([*command, "step=1,step=0.1"], env=environ, stdout=subprocess.PIPE)
    while not ((run_directory / "step-0").exists() and (run_directory / "step-1").exists()):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (75, b"stdout of rank 0\n")
    assert (run_directory / "saved-0").exists() and (run_directory / "saved-1").exists()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["command"][:2] == ["python", "-P"]
    assert record["options"]["worker_num"] == "2"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
