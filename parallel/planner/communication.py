"""What collectives cost on the levels of a machine, by HCCL's own algorithms.

Formulas are Hockney's alpha + bytes / bandwidth as HCCL's guide gives them (hicann/hccl
docs/zh/user_guide/coll_algo_intro): a collective over several levels runs one algorithm on each. A reduce-scatter takes
the inner level first, so that of S bytes S / m reach a level inside whose blocks m members lie; an all-gather is its
mirror and costs the same, an all-reduce is one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parallel.mesh import Mesh
from parallel.planner.constants import Constants
from parallel.planner.machine import ANYWHERE, Factors, Machine
from parallel.planner.shape import Column, distinct
from parallel.topology import Level
from parallel.traffic import Traffic


class Algorithm(NamedTuple):
    """One half of an all-reduce over p ranks of one level: reduce-scatter or all-gather."""

    steps: Callable[[Column], Column]
    """Messages in a row, each of which waits for the latency."""
    volume: Callable[[Column], Column]
    """Bytes that a rank sends, over those of the whole tensor."""


def _log2(p: Column) -> Column:
    return np.ceil(np.log2(np.maximum(p, 1)) - 1e-9)


def _ring_volume(p: Column) -> Column:
    return (p - 1) / p


def _halving_volume(p: Column) -> Column:
    """Ranks beyond a power of two hand all they have to a neighbour before and take it back behind."""
    power = 2.0 ** np.floor(np.log2(np.maximum(p, 1)) + 1e-9)
    return (power - 1) / power + (power < p)


ALGORITHMS: Mapping[str, Algorithm] = {
    "mesh": Algorithm(lambda p: np.minimum(p - 1, 1), _ring_volume),
    "ring": Algorithm(lambda p: p - 1, _ring_volume),
    "H-D_R": Algorithm(_log2, _halving_volume),
    "NHR": Algorithm(_log2, _ring_volume),
}
"""By the name that `HCCL_ALGO` knows; NB costs what NHR does."""

ALIKE = 8
"""Layouts from which on it is worth while to look for those that lie alike."""
INSIDE, BETWEEN = "mesh", "NHR"
"""What runs inside a server (level 0), and between servers or supernodes (levels 1 and 2): of what may run there
(`HCCL_ALGO` takes ring, and between servers H-D_R, too) no other moves fewer bytes or takes fewer steps."""


def server(levels: Sequence[Level]) -> int:
    """Index of the level of servers."""
    return next((i for i, level in enumerate(levels) if level.name in ("node", "machine")), 0)


def best(levels: Sequence[Level], level: int) -> Algorithm:
    """What runs at a level."""
    return ALGORITHMS[INSIDE if level <= server(levels) else BETWEEN]


class LevelTraffic(Traffic):
    """The account with reductions and gathers as they are priced here, one algorithm at each level.

    `Traffic` has one ring over all of a group, whatever lies between its ranks.
    """

    def by_level(
        self, mesh: Mesh, rank: int, group: Sequence[int], collective: str, payload: int, sent: dict[int, float] | None
    ) -> Iterable[tuple[Level, float]]:  # fmt: skip
        """See `Traffic.by_level`."""
        if collective not in ("all_reduce", "reduce_scatter", "all_gather"):
            yield from super().by_level(mesh, rank, group, collective, payload, sent)
            return
        whole = payload * {"all_reduce": 2, "all_gather": len(group)}.get(collective, 1)
        levels, before = mesh.topology.levels, 1
        members = _members(tuple(mesh.placement[other] for other in group), levels)
        for level, inside in zip(levels, members, strict=True):
            if inside > before:
                yield level, best(levels, level.index).volume(inside / before) / before * whole
            before = inside


@lru_cache(maxsize=4096)
def _members(places: tuple[int, ...], levels: Sequence[Level]) -> list[int]:
    """Of a group's places, how many every block of a level that has any has at least, evenly: see `Machine.members`."""
    found = []
    for level in levels:
        counts = np.unique(np.array(places) // level.ranks, return_counts=True)[1] if level.ranks else [len(places)]
        found.append(int(np.gcd.reduce(counts)))
    return found


class Group(NamedTuple):
    """Prices of one group's collectives, numbers or columns."""

    half_byte: Column
    """Seconds for each byte of a whole tensor that is reduce-scattered or gathered."""
    half_call: Column
    """Seconds for each reduce-scatter or gather beside its bytes."""
    exchange_byte: Column
    """Seconds for each byte that a rank hands to an all-to-all."""
    exchange_call: Column


class Network:
    """Prices messages of groups of ranks in seconds, by the best of HCCL's algorithms at each level.

    With `least` they are what no nesting of the axes betters, of groups that lie as near as can be: further away the
    links may be faster (than those between a few ranks of a mesh), or two planes share what one has to carry.
    """

    def __init__(self, machine: Machine, constants: Constants, least: bool = False) -> None:
        self.machine, self.constants, self.least = machine, constants, least
        k = constants
        numbers = (*machine.bandwidth, *machine.latency, k.call, k.call_rank, k.call_far)
        self.uniform = not any(map(np.ndim, numbers))  # the same for all layouts
        self.server = server(machine.levels)
        self._known: dict[int, tuple[float, ...]] = {}
        """Prices of groups that consist of one factor, by `ANYWHERE` x size + stride."""

    def group(self, factors: Factors) -> Group:
        """Of ranks that lie as `factors` say. Where there are many layouts, those that lie alike are priced once."""
        columns = [np.asarray(column) for factor in factors for column in factor]
        if not self.uniform or len(factors) > 1 or max(column.size for column in columns) < ALIKE:
            return self._group(factors)
        (sizes, size), (strides, stride) = map(distinct, np.broadcast_arrays(*columns))
        pairs, alike = distinct(size * len(strides) + stride)
        size, stride = sizes[pairs // len(strides)], strides[pairs % len(strides)]
        keys = size * ANYWHERE + stride
        new = np.array([i for i, key in enumerate(keys.tolist()) if key not in self._known], int)
        if len(new):
            found = self._group([(size[new], stride[new])])
            rows = np.stack([np.broadcast_to(column, len(new)) for column in found], 1)
            self._known.update(zip(keys[new].tolist(), rows, strict=True))
        return Group(*np.stack([self._known[key] for key in keys.tolist()], 1)[:, alike])

    def _group(self, factors: Factors) -> Group:
        """One of each.

        What goes in an all-to-all to ranks that meet first at a level crosses it; levels of one plane share its
        injection, planes run side by side.
        """
        machine = self.machine
        members = machine.members(factors)
        n, before, half, waits, exchange_waits = members[-1], 1, 0.0, 0.0, 0.0
        planes: dict[str, tuple[Column, Column, Column]] = {}  # seconds, shares of the bytes, the most a second
        for level, inside in enumerate(members):
            p = inside / before
            algorithm = best(machine.levels, level)
            rate = self._rate(level, np.maximum(p - 1, 1))
            half = half + algorithm.volume(p) / before / rate
            waits = waits + algorithm.steps(p) * machine.latency[level]
            plane = machine.levels[level].plane.name
            seconds, shares, fastest = planes.get(plane, (0.0, 0.0, 0.0))
            share = (inside - before) / n
            all_at_once = machine.rate(level, np.maximum(n - 1, 1))
            planes[plane] = seconds + share / rate, shares + share, np.maximum(fastest, all_at_once)
            exchange_waits = np.where(
                inside > before, np.maximum(exchange_waits, machine.latency[level]), exchange_waits
            )
            before = inside
        exchange = self._exchange(n, list(planes.values()))
        k = self.constants
        hop = np.where(n > members[self.server], k.call_far, k.call_rank)  # rings wait for every hop
        call = np.where(n > 1, k.call + hop * n, 0.0)
        return Group(half, waits + call, exchange, exchange_waits * _log2(n) + call)

    def _rate(self, level: int, peers: Column) -> Column:
        """Bytes a second of a rank that talks to `peers` others at a level."""
        rate = self.machine.rate(level, peers)
        return np.maximum(rate, max(self.machine.bandwidth[level + 1 :], default=0.0)) if self.least else rate

    def _exchange(self, n: Column, planes: Sequence[tuple[Column, Column, Column]]) -> Column:
        """Seconds for each byte of an all-to-all of `n` ranks whose planes, innermost first, run side by side. At
        `least`, what a plane has to carry goes over those around it, too."""
        if not self.least:
            return np.maximum.reduce(np.broadcast_arrays(*(seconds for seconds, _, _ in planes), 0.0))
        (found, shares, rates), *inner = reversed(planes)
        for _, share, rate in inner:
            shares = shares + share
            rates = np.where(n > 2, rates + rate, np.maximum(rates, rate))  # one peer is met on one plane
            found = np.maximum(found, shares / rates)
        return found

    def half(self, size: Column, group: Group, calls: Column = 1) -> Column:
        """`calls` reduce-scatters or all-gathers of tensors with `size` bytes in all, whole."""
        return size * group.half_byte + calls * group.half_call

    def all_to_all(self, size: Column, group: Group, calls: Column = 1) -> Column:
        """Each rank sends `size` bytes in all in equal parts to all of its group, itself included."""
        return size * group.exchange_byte + calls * group.exchange_call

    def nearest(self, size: Column) -> Column:
        """`size` [N] bytes from one rank to another at the level that costs least."""
        levels = range(len(self.machine.levels))
        return np.min([self.message(size, np.full(np.shape(size), level)) for level in levels], 0)

    def factor(self, ranks: Column, spread: Column) -> Column:
        """By which a step of so many ranks is longer: each doubling of the ranks above one server's adds `spread`."""
        return 1 + spread * np.log2(np.maximum(ranks / self.machine.blocks[self.server], 1))

    def level_between(self, distance: Column, boundary: Column) -> Column:
        """Index of the level at which ranks `boundary` and `boundary` + 1 of a line meet, `distance` ranks apart."""
        here, there = boundary * distance, (boundary + 1) * distance
        return sum(np.asarray(here // block != there // block, int) for block in self.machine.blocks[:-1])

    def level_of_ends(self, distance: Column, ranks: int) -> Column:
        """Index of the level at which the first and the last of a line of `ranks` meet."""
        return sum(np.asarray((ranks - 1) * distance // block != 0, int) for block in self.machine.blocks[:-1])

    def message(self, size: Column, level: Column) -> Column:
        """`size` bytes from one rank to another that it meets at `level`; both [N] or both [N, boundaries]."""
        m, k = self.machine, self.constants
        seconds, axes = 0.0, np.ndim(level)
        for index, latency in enumerate(m.latency):
            fixed = latency + k.call + (k.message if index > self.server else 0.0)
            seconds = seconds + (level == index) * (size / _aligned(self._rate(index, 1), axes) + _aligned(fixed, axes))
        return seconds


def _aligned(value: Column, axes: int) -> Column:
    """A constant that differs by layout, beside arrays with further axes."""
    return value[:, None] if np.ndim(value) == 1 and axes == 2 else value
