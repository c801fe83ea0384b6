"""What ranks measure of the machine that they stand on: messages by level, a matmul, a pass over memory.

Calls are made in series, inside a graph as in training. Where the host sees the messages of a graph, each is timed; a
device's series are timed whole. The slowest rank counts, and of several turns the median.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.collectives import Collectives, Group
from parallel.traffic import ALGORITHMS
from trainer import launch, machine
from trainer.errors import Stopped
from trainer.probe import KINDS, meetings

PRIMITIVES = dict(zip(KINDS, ("Shift", "AllReduce", "AllGather", "AllToAll"), strict=True))
SIZES = (4 << 10, 64 << 10, 512 << 10, 4 << 20, 16 << 20)
"""Bytes of whole tensors, float32."""
WARM, TURNS = 2, 5
"""Turns that do not count, in which graphs are compiled and memory is touched, and the least that do."""


class Series(nn.Cell):
    """A graph of so many calls: of a collective on the same tensor, else each on what the one before gave."""

    def __init__(self, call: nn.Cell, times: int) -> None:
        super().__init__(auto_prefix=False)
        self.call, self.times = call, times

    def construct(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(self.times):
            y = self.call(x, y)
        return y


class Talk(nn.Cell):
    """One collective."""

    def __init__(self, primitive: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.primitive = primitive

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        return self.primitive.forward(x)


class Probe:
    """Measures a world for about so many seconds, compilation included. Every rank makes one and calls alike."""

    def __init__(self, collectives: Collectives, stop: Any, seconds: float, say: Callable[[str], None]) -> None:
        self.collectives, self.world, self.stop, self.say = collectives, collectives.world, stop, say
        self.meetings = meetings(collectives.mesh.topology, self.world.size)
        self.share = seconds / (len(self.meetings) * len(KINDS) * len(SIZES) + 2)

    def measure(self) -> dict[str, Any]:
        """By level and kind the ranks of a group and [wire bytes of a rank, seconds] of each size, and a rank's rates.

        Raises `Stopped`, on all ranks alike, after a signal.
        """
        levels = {}
        for level, groups in self.meetings.items():
            self.say(f"measuring {level}: groups of {len(groups[0])} ranks")
            levels[level] = {kind: self._level(kind, groups) for kind in KINDS}
        self.say("measuring matmuls and memory")
        return {"ranks": self.world.size, "levels": levels, "rank": self._rank()}

    def _level(self, kind: str, groups: list[tuple[int, ...]]) -> dict[str, Any]:
        if kind == "point to point":
            groups = [group[i : i + 2] for group in groups for i in range(0, len(group) - 1, 2)]
        members = next((group for group in groups if self.world.rank in group), ())
        n, call, points = len(groups[0]), None, []
        if members:
            group = Group(("dp",), members, members.index(self.world.rank))
            call = Talk(getattr(self.collectives, PRIMITIVES[kind])(group))
            self.collectives.record(True)
        for size in SIZES:
            given = math.ceil(size / 4 / n) * (1 if kind == "all_gather" else n)
            wire = sum(ALGORITHMS[kind](4 * given, n, 0).values()) if kind in ALGORITHMS else 4 * given
            points.append([wire, self._seconds(call, Tensor(np.ones(given, np.float32)), 16)])
        return {"ranks": n, "points": points}

    def _rank(self) -> dict[str, Any]:
        """Of the slowest rank, with all at work: TFLOPS, GB/s read and written, and its part of the free memory."""
        ascend = machine.device() == "Ascend"
        kind, n, elements = (ms.bfloat16, 4096, 64 << 20) if ascend else (ms.float32, 1024, 16 << 20)
        flops = 2 * n**3 / self._seconds(ops.MatMul(), ops.full((n, n), 1 / n, dtype=kind), 8)
        moved = 3 * 4 * elements / self._seconds(ops.Add(), Tensor(np.ones(elements, np.float32)), 4)
        local = launch.local_size(os.environ, self.world.size)
        (taken,) = self.world.reduce_max([-machine.available_memory_gib() / local])
        return {
            "dtype": "bfloat16" if ascend else "float32",
            "tflops": flops / 1e12,
            "memory_bandwidth": moved / 1e9,
            "memory_gib": None if ascend else -taken,
        }

    def _seconds(self, call: Any, tensor: Tensor, times: int) -> float:
        """Of one call; a rank without one waits for the others."""
        graph = Series(call, times) if call else None
        end, taken, late = time.monotonic() + self.share, [], False
        while not late or len(taken) < WARM + TURNS:
            spent = self._turn(graph, tensor, times) if graph else 0.0
            stop, late, slowest = self.world.reduce_max([self.stop.requested, time.monotonic() > end, spent])
            if stop:
                raise Stopped("stopped by a signal")
            taken.append(slowest)
        return statistics.median(taken[WARM:])

    def _turn(self, graph: nn.Cell, tensor: Tensor, times: int) -> float:
        start = time.perf_counter()
        graph(tensor).asnumpy()
        whole = (time.perf_counter() - start) / times
        messages = [span.end - span.start for span in self.collectives.spans()]
        return statistics.median(messages) if messages else whole
