"""Runs a launcher until its ranks have ended: their console, signals and first failure, and nothing left over."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.errors import EXIT_DONE, EXIT_MACHINE, EXIT_STOPPED, EXIT_STOPPED_AT_ONCE, MachineError
from trainer.launch.failure import Failure, failure_file, read, tell
from trainer.launch.world import LAUNCH_VARIABLE, RUN_VARIABLE, console_pipe, exit_file, heed, pid_file
from trainer.machine import die_with_parent

FAILURE_SECONDS = 1.0
"""After the first failure: time for the failed rank to write its traceback before everything is killed."""
FINISH_SECONDS = 60.0
"""After the last rank has announced its end: time for MindSpore, MPI and the launcher to close down."""
POLL_SECONDS = 0.1
SHOW_CURSOR = b"\x1b[?25h"
ERASE_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class Launch:
    """A composed launch of this node's ranks."""

    command: list[str]
    env: dict[str, str]
    run_directory: Path
    ranks: range
    """The ranks of this node."""
    nodes: int = 1

    @property
    def log(self) -> Path:
        """What the launcher itself prints, and what ranks print before they have their own logs."""
        name = "launcher.log" if self.nodes == 1 else f"launcher-{self.ranks.start:04d}.log"
        return self.run_directory / "logs" / name


def supervise(launch: Launch, console: int = 1) -> int:
    """Run `launch` to its end and return the exit code, after telling stderr why, if it failed.

    Rank 0's stdout goes to the descriptor `console` byte by byte. SIGINT, SIGTERM and, unless it is ignored (nohup),
    SIGHUP reach every rank once, which then stop after their step; a second one kills everything (130). Must be called
    from the main thread. Raises `MachineError` where the launcher cannot be started.
    """
    with _machine_errors():
        folder = Path(tempfile.mkdtemp(prefix="busway-"))
    try:
        return _Supervisor(launch, folder, console).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _machine_errors() -> Iterator[None]:
    """Turn what the operating system refuses into a `MachineError`."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename} cannot be used: {error.strerror}" if error.filename else str(error.strerror)
        raise MachineError(f"{reason}; see to its rights and to the space on its disk") from error


class _Supervisor:
    def __init__(self, launch: Launch, folder: Path, console: int) -> None:
        self.launch, self.folder, self.console = launch, folder, console
        self.shared = failure_file(launch.run_directory)
        self.signals = 0
        self.stopping = False
        self.told: set[int] = set()
        with _machine_errors():
            os.mkfifo(console_pipe(folder))
            # Open for writing too, so that there is never an end of file before rank 0 has opened it.
            self.pipe = os.open(console_pipe(folder), os.O_RDWR | os.O_NONBLOCK)
            if 0 in launch.ranks:
                self.shared.unlink(missing_ok=True)
        # Of an earlier launch, until node 0 has removed it.
        self.stale = _identity(self.shared)

    def run(self) -> int:
        before = heed(self._on_signal)
        try:
            with self._started() as launcher:
                self._watch(launcher)
            while self._relay(0):
                pass
            return self._verdict(launcher)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self.pipe)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signals += 1

    @contextlib.contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The launcher, in a session of its own; on leaving, it and all that it started are gone."""
        env = self.launch.env | {
            LAUNCH_VARIABLE: str(self.folder),
            RUN_VARIABLE: str(self.launch.run_directory),
            **_terminal(self.console),
        }
        with contextlib.ExitStack() as stack:
            with _machine_errors():
                log = stack.enter_context(_log_with_room(self.launch.log))
                launcher = subprocess.Popen(
                    self.launch.command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            try:
                yield launcher
            finally:
                self._kill_all()
                launcher.wait()

    def _watch(self, launcher: subprocess.Popen[bytes]) -> None:
        """Until the launcher has ended, or has to be ended."""
        failed_at = finished_at = None
        while launcher.poll() is None and self.signals < 2:
            self._relay(POLL_SECONDS)
            self._forward_stop()
            now = time.monotonic()
            if failed_at is None and self._failure():
                failed_at = now
            if finished_at is None and all(exit_file(self.folder, rank).exists() for rank in self.launch.ranks):
                finished_at = now
            if failed_at and now > failed_at + FAILURE_SECONDS or finished_at and now > finished_at + FINISH_SECONDS:
                return

    def _relay(self, seconds: float) -> bool:
        """Pass on what rank 0 has printed, waiting up to `seconds` for it; False if there was nothing."""
        ready, _, _ = select.select([self.pipe], [], [], seconds)
        if ready:
            _write(self.console, os.read(self.pipe, 65536))
        return bool(ready)

    def _forward_stop(self) -> None:
        """Tell every rank that is ready to hear it and was not told; a rank that is still starting is told later."""
        if not self.signals:
            return
        if not self.stopping:
            self.stopping = True
            _say("stopping after the current step; once more stops at once, without saving")
        for rank in self.launch.ranks:
            if rank in self.told or exit_file(self.folder, rank).exists():
                continue
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                os.kill(int(pid_file(self.folder, rank).read_text()), signal.SIGTERM)
                self.told.add(rank)

    def _failure(self) -> Failure | None:
        """The first failure of the run; where the shared disk has none or is full, the first of this node."""
        fresh = _identity(self.shared) not in (None, self.stale)
        return (read(self.shared) if fresh else None) or read(self.folder / "failure.json")

    def _verdict(self, launcher: subprocess.Popen[bytes]) -> int:
        if os.isatty(self.console):
            # A killed rank 0 may have left its progress bar without one.
            _write(self.console, SHOW_CURSOR)
        if self.signals > 1:
            _say("stopped at once; what was not saved is lost")
            return EXIT_STOPPED_AT_ONCE
        if failure := self._failure():
            tell(str(failure))
            return failure.code
        codes = [self._exit_code(rank) for rank in self.launch.ranks]
        if None not in codes:
            return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_DONE
        tell(
            f"{Path(self.launch.command[0]).name} ended with {launcher.returncode} before the ranks had, and no rank "
            f"said why\nits log: {self.launch.log}"
        )
        return EXIT_MACHINE

    def _exit_code(self, rank: int) -> int | None:
        path = exit_file(self.folder, rank)
        return int(path.read_text()) if path.exists() else None

    def _kill_all(self) -> None:
        """Kill whatever carries this launch's mark in its environment: sessions and re-parenting hide none of it."""
        mark = f"{LAUNCH_VARIABLE}={self.folder}\0".encode()
        while marked := list(_processes_with(mark)):
            for pid in marked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _log_with_room(path: Path) -> BinaryIO:
    """`path`, empty, on a disk that takes at least a page: on a full one launchers end without a word."""
    log = path.open("wb", buffering=0)
    try:
        log.write(bytes(os.sysconf("SC_PAGE_SIZE")))
        os.fsync(log.fileno())
        log.truncate(0)
        log.seek(0)
    except OSError as error:
        log.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return log


def _processes_with(mark: bytes) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{entry}/environ").read_bytes():
                    yield int(entry)


def _identity(path: Path) -> Sequence[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _terminal(descriptor: int) -> dict[str, str]:
    """What tells rank 0's console (rich) about the terminal that it does not hold itself."""
    if not os.isatty(descriptor):
        return {}
    size = os.get_terminal_size(descriptor)
    # Some pseudo-terminals have no size: 0 would leave the progress bar no room.
    sizes = {"COLUMNS": size.columns, "LINES": size.lines}
    return {name: str(value) for name, value in sizes.items() if value} | {
        "TTY_COMPATIBLE": "1",
        "TTY_INTERACTIVE": "1",
    }


def _write(descriptor: int, data: bytes) -> None:
    """A reader or a terminal that has gone (`busway train | head`, a closed window) is no reason to lose the run."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise


def _say(text: str) -> None:
    """On stderr; on a terminal over the progress bar and what the key that stops the run has left there."""
    erase = ERASE_LINE if os.isatty(sys.stderr.fileno()) else ""
    _write(sys.stderr.fileno(), f"{erase}{text}\n".encode())
