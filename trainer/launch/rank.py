"""What a rank does with its streams, its signals and its end, launched or alone in the process of `busway train`."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import EXIT_DONE, EXIT_STOPPED, EXIT_STOPPED_AT_ONCE, EXIT_UNEXPECTED, MachineError, Stopped
from trainer.launch.failure import claim, failure_file, failure_of, rank_log, record, tell
from trainer.launch.world import (
    LAUNCH_VARIABLE,
    console_pipe,
    exit_file,
    heed,
    pid_file,
    world_from_environment,
)
from trainer.machine import writing_to

ABORT_SECONDS = 5.0
"""How long `MPI_Abort` may take before a failed rank leaves without it."""
SHARED_PATH_SECONDS = 10.0
"""How long a new file may take to be seen on every node (NFS caches directories for some seconds)."""
STDOUT, STDERR = 1, 2


class StopSignal:
    """SIGTERM, SIGINT or SIGHUP asks for an end after the current step: `requested` turns true.

    With `insist`, a second signal ends the process at once with 130. A launched rank has `insist` off: one request may
    reach it several times (from busway, from Slurm), and the launching process does the killing.
    """

    def __init__(self, insist: bool) -> None:
        self.requested = False
        self._insist = insist
        self._before = heed(self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and self._insist:
            os._exit(EXIT_STOPPED_AT_ONCE)
        self.requested = True

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class RankProcess:
    """A started rank; ends with exactly one of `finish` and `fail`."""

    run_directory: Path
    rank: int
    size: int
    stop: StopSignal
    launch_directory: Path | None
    """The node's folder of the launch; None where busway did not launch this process."""
    _streams: dict[int, int] = field(default_factory=dict)
    """Copies of the descriptors that were redirected."""

    @property
    def log(self) -> Path:
        """This rank's log."""
        return rank_log(self.run_directory, self.rank)

    def finish(self, code: int = EXIT_DONE) -> int:
        """The run is over (0) or was stopped after saving (75): announce it and return `code` to exit with.

        To be called last: whatever ends the process otherwise afterwards counts as a failure.
        """
        self._announce(code)
        self._restore()
        return code

    def fail(self, error: BaseException) -> int:
        """Record why this rank fails and return the code to abort the world and exit with; `Stopped` is no failure.

        Where busway launched the rank, the launching process tells the user. Elsewhere the first rank to fail does,
        on its own stderr. In a world of several the process is gone within `ABORT_SECONDS`, whatever abort does.
        """
        if isinstance(error, Stopped):
            return self.finish(EXIT_STOPPED)
        failure = failure_of(error, self.rank, self.log)
        if self.launch_directory:
            record(failure, self.launch_directory, self.run_directory)
            first = False
        else:
            first = claim(failure_file(self.run_directory), failure)
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        self._announce(failure.code)
        self._restore()
        if first:
            tell(str(failure) if self.size > 1 else str(failure).removeprefix("rank 0: "))
        if self.size > 1:
            watchdog = threading.Timer(ABORT_SECONDS, os._exit, [failure.code])
            watchdog.daemon = True
            watchdog.start()
        return failure.code

    def _announce(self, code: int) -> None:
        if self.launch_directory:
            exit_file(self.launch_directory, self.rank).write_text(str(code))

    def _restore(self) -> None:
        """Undo what `start` did to a process that goes on; a launched rank keeps its log to the end."""
        if self.launch_directory:
            return
        faulthandler.disable()
        for descriptor, copy in self._streams.items():
            _flush()
            os.dup2(copy, descriptor)
            os.close(copy)
        self._streams.clear()
        threading.excepthook = threading.__excepthook__
        if threading.current_thread() is threading.main_thread():
            self.stop.restore()

    def _fail_in_thread(self, args: Any) -> None:
        if args.exc_type is SystemExit:
            return
        code = EXIT_UNEXPECTED
        try:
            code = self.fail(args.exc_value)
        finally:
            os._exit(code)


def start(run_directory: Path, rank: int, environ: Mapping[str, str] = os.environ) -> RankProcess:
    """Make this process rank `rank` of the run: before MindSpore and MPI are imported, whose noise it redirects.

    stderr goes to the rank's log, descriptor and all, and stdout too except on rank 0. An exception that a thread does
    not catch ends the rank. Raises `MachineError` where the log cannot be written.
    """
    run_directory = Path(run_directory).absolute()
    folder = environ.get(LAUNCH_VARIABLE)
    launch_directory = Path(folder) if folder else None
    size = world_from_environment(environ)[1]
    process = RankProcess(run_directory, rank, size, StopSignal(insist=not launch_directory), launch_directory)
    try:
        if not launch_directory and rank == 0:
            failure_file(run_directory).unlink(missing_ok=True)
        process._streams = _redirect(process.log, rank, launch_directory)
    except OSError as error:
        problem = MachineError(f"{error.filename} cannot be written: {error.strerror}; free space or change train.out")
        if launch_directory:
            record(failure_of(problem, rank, process.log), launch_directory, run_directory)
        raise problem from error
    print(f"--- rank {rank} of {size}, process {os.getpid()}, {datetime.datetime.now():%F %T}", file=sys.stderr)
    faulthandler.enable()
    threading.excepthook = process._fail_in_thread
    if launch_directory:
        pid_file(launch_directory, rank).write_text(str(os.getpid()))
    return process


def _redirect(log: Path, rank: int, launch_directory: Path | None) -> dict[int, int]:
    """Point stderr and stdout where they belong; copies of what they were, by descriptor."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    targets = {STDERR: target}
    if rank != 0:
        targets[STDOUT] = target
    elif launch_directory:
        targets[STDOUT] = os.open(console_pipe(launch_directory), os.O_WRONLY)
    _flush()
    copies = {descriptor: os.dup(descriptor) for descriptor in targets}
    for descriptor, source in targets.items():
        os.dup2(source, descriptor)
    for source in set(targets.values()):
        os.close(source)
    return copies


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


class World(Protocol):
    """What is needed here of the ranks' means of communication: small Python objects, every rank calls."""

    rank: int
    size: int

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """`root`'s value, on every rank."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""


def from_rank_0(world: World, attempt: Callable[[], Any]) -> Any:
    """What `attempt` gives on rank 0, or its error, on every rank."""
    return _settled([world.broadcast(_outcome(world, attempt) if world.rank == 0 else None)])[0]


def everywhere(world: World, attempt: Callable[[], Any]) -> list[Any]:
    """What `attempt` gives on every rank, by rank; an error of any, the first one's, is raised on all."""
    return _settled(world.all_gather(_outcome(world, attempt)))


def _outcome(world: World, attempt: Callable[[], Any]) -> Any:
    try:
        return attempt()
    except Exception as error:
        error.rank = world.rank  # whose error it is, wherever it is raised (`failure_of`)
        return error


def _settled(values: list[Any]) -> list[Any]:
    for value in values:
        if isinstance(value, Exception):
            raise value
    return values


def shared_path_check(path: Path, world: World) -> None:
    """Check that all ranks see the directory `path` of rank 0; every rank raises the same `MachineError` if not."""

    def leave_a_file() -> tuple[str, str]:
        file = path / f".busway-{uuid.uuid4().hex}"
        with writing_to(path):
            file.touch()
        return file.name, str(path)

    # Rank 0's spelling goes along for the message; each rank looks under its own.
    name, shown = from_rank_0(world, leave_a_file)
    blind = [rank for rank, seen in enumerate(world.all_gather(_appears(path / name))) if not seen]
    if world.rank == 0:
        (path / name).unlink(missing_ok=True)
    if blind:
        ranks = ", ".join(map(str, blind[:8])) + (f" and {len(blind) - 8} more" if len(blind) > 8 else "")
        raise MachineError(
            f"{shown} is not shared by all nodes: rank{'s' * (len(blind) > 1)} {ranks} cannot see what rank 0 writes "
            "there; name a path on a file system that every node mounts"
        )


def _appears(path: Path) -> bool:
    end = time.monotonic() + SHARED_PATH_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
