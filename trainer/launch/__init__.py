"""Starts the ranks of a run, or finds the world that this process already is a part of. No MindSpore here.

`busway train` asks `choose` how a run starts. Under `none` its own process is a rank (`world_from_environment`);
otherwise `compose` checks the machine and `supervise` runs the launcher (mpiexec or msrun, none for a rank alone), a
keeper for each rank (`keeper`), and the rank itself, which uses `rank.start`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.checks import ConfigError, check
from trainer.launch.cluster import resolve
from trainer.launch.command import (
    check_master_port,
    kept,
    launched_environment,
    local_ranks,
    mpi_command,
    msrun_command,
    rank_environment,
    worker_command,
)
from trainer.launch.settings import LauncherSettings
from trainer.launch.supervise import Launch, supervise
from trainer.launch.world import is_scheduler, local_size, world_from_environment

__all__ = [
    "choose",
    "compose",
    "is_scheduler",
    "local_size",
    "rank_environment",
    "resolve",
    "supervise",
    "worker_command",
    "world_from_environment",
]


def choose(settings: LauncherSettings, ranks: int, device: str, environ: Mapping[str, str] = os.environ) -> str:
    """`mpi`, `msrun`, `alone` or `none` for a run of `ranks` on `device` (`CPU` or `Ascend`).

    `alone` is one rank without a launcher, in a process of its own all the same: only a parent can answer a signal at
    once, and say how a rank ended that was killed. Raises `ConfigError` where the kind does not fit the device, or a
    launcher above gives another number of ranks.
    """
    size = world_from_environment(environ)[1]
    own = "msrun" if device == "Ascend" else "mpi"
    if settings.kind in ("mpi", "msrun"):
        check(
            settings.kind == own,
            "launcher.kind",
            f"{settings.kind} starts no ranks on {device}",
            f"set launcher.kind={own}, or auto",
        )
        return own
    if size == ranks:
        return "alone" if settings.kind == "auto" and ranks == 1 else "none"
    if settings.kind == "auto" and (size == 1 or (own == "msrun" and _one_task_a_node(environ))):
        return own
    if size == 1:
        raise ConfigError(
            f"launcher.kind none finds no launcher above this process, but the layout needs {ranks} ranks; "
            "start it under srun or mpiexec, or set launcher.kind=auto"
        )
    raise ConfigError(
        f"launcher.kind {settings.kind} finds a world of {size} ranks around this process, but the layout needs "
        f"{ranks}; start {ranks} ranks, or change the layout"
    )


def _one_task_a_node(environ: Mapping[str, str]) -> bool:
    """Under `srun --ntasks-per-node=1` each task is a node's launcher and no rank."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    return tasks is not None and tasks == environ.get("SLURM_STEP_NUM_NODES") and "MS_ROLE" not in environ


def compose(
    settings: LauncherSettings,
    ranks: int,
    run_directory: Path,
    device: str,
    environ: Mapping[str, str],
    worker: Sequence[str],
) -> Launch:
    """The command and environment for this node's share of `ranks`; `worker` is one rank's command.

    Raises `ConfigError` for what the recipe or the scheduler's variables have wrong, then `MachineError` where the
    launcher is missing or its port is taken.
    """
    run_directory = Path(run_directory).absolute()
    cores = len(os.sched_getaffinity(0))
    kind = choose(settings, ranks, device, environ)
    if kind == "none":
        raise ValueError("nothing to launch: this process is a rank itself")
    if kind == "alone":
        return Launch(kept(worker), launched_environment(environ, cores, device), run_directory, range(1))
    if kind == "mpi":
        check(
            (settings.nodes or 1) == 1,
            "launcher.nodes",
            f"must be 1 on CPU, where busway starts ranks on this machine alone, but is {settings.nodes}",
            f"for several nodes run: mpiexec -n {ranks} busway train … launcher.kind=none",
        )
        env = launched_environment(environ, cores // ranks, device)
        return Launch(mpi_command(ranks, worker), env, run_directory, range(ranks))
    cluster = resolve(settings, environ)
    local = local_ranks(cluster, ranks)
    command = msrun_command(cluster, ranks, run_directory / "logs" / "msrun", worker)
    check_master_port(cluster)
    env = launched_environment(environ, cores // len(local), device)
    return Launch(command, env, run_directory, local, cluster.nodes)
