"""Records what a rank does when, while it is asked to; nothing otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import sub
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from parallel.collectives import World

STEPS, COMPUTE, COLLECTIVES, MESSAGES = THREADS = ("steps", "compute", "collectives", "messages")
BOOT = Path("/proc/sys/kernel/random/boot_id")
ROUNDS = 9


class Span(NamedTuple):
    """Something that took time."""

    thread: str
    """One of `THREADS`."""
    name: str
    start: float
    """Seconds of CLOCK_MONOTONIC, as `time.monotonic` counts them."""
    end: float
    details: dict[str, Any]


class Recorder:
    """Takes the time of what the host does while it is `on`."""

    def __init__(self) -> None:
        self.on = False
        self.spans: list[Span] = []

    def span(self, thread: str, name: str, **details: Any) -> AbstractContextManager[None]:
        """`with` it around what is to be recorded."""
        return self._timed(thread, name, details) if self.on else nullcontext()

    @contextmanager
    def _timed(self, thread: str, name: str, details: dict[str, Any]) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.spans.append(Span(thread, name, start, time.monotonic(), details))


def clock_offset(world: World) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's. All ranks call it.

    Ranks under one kernel share its clock. For the others it is what leaving a barrier together shows, the median of
    several: right to about a millisecond.
    """
    stamps = []
    for _ in range(ROUNDS):
        world.barrier()
        stamps.append(time.monotonic())
    clocks = world.all_gather((BOOT.read_text(), stamps))
    (boot, theirs), (own_boot, own) = clocks[0], clocks[world.rank]
    return 0.0 if own_boot == boot else median(map(sub, own, theirs))
