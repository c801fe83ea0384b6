"""What a launcher has told this process in its environment: which rank it is, and of how many."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from models.checks import ConfigError

LAUNCH_VARIABLE = "BUSWAY_LAUNCH"
"""Set for every rank that busway launched: the node's own folder of that launch (console, pids, exit codes)."""

RUN_VARIABLE = "BUSWAY_RUN"
"""Set beside it: the run directory."""

RANK_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    # Set by srun alone; SLURM_NTASKS would also be there in a batch script, which is no rank.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


LOCAL_SIZE_VARIABLES = (
    "MPI_LOCALNRANKS",  # Hydra's
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_STEP_TASKS_PER_NODE",  # of every node: 8(x2),4
    "SLURM_NTASKS_PER_NODE",
)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ask for an end after the current step; a terminal that closes sends the last."""


def heed(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Have `handler` called for the signals that ask for an end; what was there before, by signal.

    Where a hang-up is ignored already (nohup), it stays so.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {
        number: signal.signal(number, handler) for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)
    }


def world_from_environment(environ: Mapping[str, str]) -> tuple[int, int]:
    """(rank, size) that msrun, mpiexec or srun gave this process; (0, 1) without a launcher."""
    pairs = RANK_VARIABLES
    if environ.get("MS_ROLE") == "MS_WORKER":
        # msrun may itself stand under srun. Without MS_ROLE some platforms set RANK_SIZE for the whole job.
        pairs = (("RANK_ID", "RANK_SIZE"), *RANK_VARIABLES)
    for rank_name, size_name in pairs:
        if environ.get(rank_name) and environ.get(size_name):
            return _read(environ, rank_name, size_name)
    return 0, 1


def local_size(environ: Mapping[str, str], size: int) -> int:
    """Ranks on this machine, out of a world of `size`: as mpiexec or srun says, else all of them.

    Raises `ConfigError` where what they say is no number of ranks.
    """
    name = next((name for name in LOCAL_SIZE_VARIABLES if environ.get(name)), None)
    if name is None:
        return size
    counts = []
    for part in environ[name].split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"{name}={environ[name]} does not say how many ranks run on this machine; unset it")
        counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "")
    here = counts[int(node)] if node.isdecimal() and int(node) < len(counts) else max(counts)
    return min(here, size)  # a process alone in a batch script sees the script's tasks a node


def is_scheduler(environ: Mapping[str, str]) -> bool:
    """Whether msrun started this process as its rendezvous, which is no rank."""
    return environ.get("MS_ROLE") == "MS_SCHED"


def pid_file(launch_directory: Path, rank: int) -> Path:
    """Where a rank leaves its process id once it handles signals."""
    return launch_directory / f"rank-{rank:04d}.pid"


def exit_file(launch_directory: Path, rank: int) -> Path:
    """Where a rank leaves the exit code that it is about to end with."""
    return launch_directory / f"rank-{rank:04d}.exit"


def console_pipe(launch_directory: Path) -> Path:
    """The named pipe that carries rank 0's stdout to the launching process, past what launchers print there."""
    return launch_directory / "console"


def _read(environ: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = environ[rank_name], environ[size_name]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"{rank_name}={rank} and {size_name}={size} are no rank and size of a world; unset both")
    return int(rank), int(size)
