"""Runs one rank as its child and says how it ended: `python -P -m trainer.launch.keeper COMMAND…`.

Launchers do not say it reliably (MPICH's mpiexec was seen to name a rank that it had killed itself), and only a parent
learns that a process was killed and by which signal. A keeper also ends its rank when it dies itself, so that
nothing outlives the launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from trainer.errors import EXIT_STOPPED, EXIT_UNEXPECTED
from trainer.launch.failure import failure_of_exit, rank_log, record
from trainer.launch.world import (
    LAUNCH_VARIABLE,
    RUN_VARIABLE,
    STOP_SIGNALS,
    exit_file,
    is_scheduler,
    world_from_environment,
)
from trainer.machine import die_with_parent


def _before_rank() -> None:
    die_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def keep(command: list[str]) -> int:
    """Run `command` to its end; 0 if it ended as it announced, else 1 after its failure is on record."""
    die_with_parent()
    if is_scheduler(os.environ):
        os.execvp(command[0], command)
    for number in STOP_SIGNALS:
        # Meant for the rank, which finishes its step first.
        signal.signal(number, signal.SIG_IGN)
    # The rank inherits every descriptor: MPICH talks to its launcher over one.
    status = subprocess.Popen(command, close_fds=False, preexec_fn=_before_rank).wait()
    rank, _ = world_from_environment(os.environ)
    launch_directory, run_directory = Path(os.environ[LAUNCH_VARIABLE]), Path(os.environ[RUN_VARIABLE])
    announced = exit_file(launch_directory, rank)
    if announced.exists() and int(announced.read_text()) == status:
        # 75 is a good end: to msrun any other code than 0 means to kill the ranks that are still saving.
        return 0 if status in (0, EXIT_STOPPED) else EXIT_UNEXPECTED
    record(failure_of_exit(status, rank, rank_log(run_directory, rank)), launch_directory, run_directory)
    return EXIT_UNEXPECTED


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
