"""The error of the rank that failed first, as a file: written by ranks and keepers, read by the process above them."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from models.checks import ConfigError
from trainer.errors import (
    EXIT_INPUT,
    EXIT_MACHINE,
    EXIT_NOT_FINITE,
    EXIT_STOPPED,
    EXIT_STOPPED_AT_ONCE,
    EXIT_UNEXPECTED,
    BuswayError,
    exit_code_of,
)

MESSAGE_LENGTH = 400
KNOWN_CODES = (EXIT_INPUT, EXIT_MACHINE, EXIT_NOT_FINITE, EXIT_STOPPED, EXIT_STOPPED_AT_ONCE)


def rank_log(run_directory: Path, rank: int) -> Path:
    """Where a rank's stderr goes."""
    return run_directory / "logs" / f"rank-{rank:04d}.log"


def failure_file(run_directory: Path) -> Path:
    """The failure that came first among the ranks of all nodes."""
    return run_directory / "logs" / "failure.json"


@dataclass(frozen=True)
class Failure:
    """How one rank failed."""

    rank: int
    code: int
    """What busway exits with."""
    message: str
    """One line."""
    log: str = ""
    """The file to read on in; empty where the message says all."""

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}" + (f"\nrank {self.rank}'s log: {self.log}" if self.log else "")


def failure_of(error: BaseException, rank: int, log: Path) -> Failure:
    """`error` of `rank`: a known kind by its message, any other with its type and the log that has the traceback."""
    rank = getattr(error, "rank", rank)  # of an error that all ranks raise, the one that it came from
    text = " ".join(str(error).split())[:MESSAGE_LENGTH]
    if isinstance(error, BuswayError | ConfigError):
        return Failure(rank, exit_code_of(error), text)
    return Failure(rank, EXIT_UNEXPECTED, f"{type(error).__name__}: {text}", str(log))


def failure_of_exit(status: int, rank: int, log: Path) -> Failure:
    """A rank that ended with `status` (as of `Popen.returncode`) and had not said why."""
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
        memory = "; the kernel does this when memory runs out" if status == -signal.SIGKILL else ""
        return Failure(rank, EXIT_UNEXPECTED, f"was killed by signal {-status} ({name}){memory}", str(log))
    code = status if status in KNOWN_CODES else EXIT_UNEXPECTED
    return Failure(rank, code, f"ended with exit code {status} before the run was over and reported no error", str(log))


def claim(path: Path, failure: Failure) -> bool:
    """Write `failure` to `path` unless an earlier one is there; True if this one is the first.

    Creation is exclusive, so that no clocks need to agree. A full or read-only disk counts as first: better told twice.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(asdict(failure), file)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def record(failure: Failure, launch_directory: Path, run_directory: Path) -> None:
    """Leave `failure` for this node's launching process and for the other nodes', unless another came first."""
    claim(launch_directory / "failure.json", failure)
    claim(failure_file(run_directory), failure)


def tell(text: str) -> None:
    """Say on stderr why the run failed, as the command line says its own errors."""
    for line in text.splitlines():
        print(f"busway: {line}", file=sys.stderr, flush=True)


def read(path: Path) -> Failure | None:
    """The failure in `path`; None if there is none, or it is still being written."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    return None
