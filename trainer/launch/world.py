"""What a launcher has told this process in its environment: which rank it is, and of how many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
