"""How several ranks answer one driver, `benchmarks/layouts.py`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from mpi4py import MPI

WORLD = MPI.COMM_WORLD


def serve(step: Callable[[], float]) -> None:
    """As `timing.serve`, by all ranks of the world, and without warming up: rank 0 answers, with the ranks' mean.

    `step` does one step and returns its loss.
    """
    WORLD.Barrier()
    if WORLD.rank == 0:
        print("READY", flush=True)
    while count := _next():
        WORLD.Barrier()
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            value = step()
            times.append(time.perf_counter() - begin)
        medians = WORLD.gather(statistics.median(times))
        if WORLD.rank == 0:
            print(f"T {statistics.mean(medians):.6f} {value:.9f}", flush=True)


def _next() -> int:
    """Steps that rank 0 was asked for; 0 at the end. The others sleep meanwhile: another world has the cores."""
    line = sys.stdin.readline() if WORLD.rank == 0 else ""
    meeting = WORLD.Ibarrier()
    while not meeting.Test():
        time.sleep(0.01)
    return WORLD.bcast(int(line.split()[1]) if line else 0)
