"""Where groups of ranks lie on the levels of a machine, and what their messages cost there.

A group is given by its factors, each a size and a stride in ranks, innermost first. Placements that HCCL allows keep
the ranks of a server and the servers of a supernode together (rank_table_config_a3.md in hicann/hccl), so that nested
axes are all there is to choose: `Layout.order`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.checks import check
from parallel.planner.constants import Constants
from parallel.planner.shape import Candidates, Column
from parallel.topology import Level, Topology

Factors = Sequence[tuple[Column, Column]]
"""(size, stride) of the parts of a group, innermost first."""

ANYWHERE = 2**32
"""Ranks in a block that holds as many as there are."""


def factors(candidates: Candidates, axes: Sequence[str]) -> Factors:
    """The factors of a group along one or two dense `axes`, by the order in which axes nest.

    Without an order every group lies as near as can be, which no order can better.
    """
    if candidates.order is None:
        return [(math.prod(getattr(candidates, axis) for axis in axes), 1)]
    parts = [(getattr(candidates, axis), candidates.stride(axis)) for axis in axes]
    if len(parts) == 1:
        return parts
    (size, stride), (other, distance) = parts
    first = stride < distance
    inner = np.where(first, size, other), np.where(first, stride, distance)
    return [inner, (np.where(first, other, size), np.where(first, distance, stride))]


def expert_factors(candidates: Candidates, axis: str) -> Factors:
    """Of ``ep`` (with etp inside) or ``edp``, which count the ranks of one pipeline stage in their order.

    Ranks between which the stages of a pipeline lie are further apart.
    """
    group = candidates.ep * candidates.etp
    size, stride = (group, 1) if axis == "ep" else (candidates.edp, group)
    if candidates.order is None:
        return [(size, 1)]
    inside = candidates.stride("pp")
    # Members before the other stages of the pipeline come between, as groups may begin anywhere that both sizes allow.
    near = np.where(np.mod(inside, stride) == 0, np.gcd(size, np.maximum(inside // stride, 1)), 1)
    return [(near, stride), (size // near, np.maximum(stride, inside) * candidates.pp)]


def cut(group: Factors, count: Column) -> tuple[Factors, Factors]:
    """A group's parts of `count` neighbours, and the groups of those that have one place in each part."""
    near, across = [], []
    for size, stride in group:
        inside = np.gcd(size, count)
        near.append((inside, stride))
        across.append((size // inside, stride * inside))
        count = count // inside
    return near, across


@dataclass(frozen=True)
class Machine:
    """The levels of a machine as the planner prices them: bandwidth in bytes a second, latency in seconds."""

    topology: Topology
    levels: tuple[Level, ...]
    blocks: tuple[int, ...]
    """Ranks in a block of each level."""
    bandwidth: tuple[float, ...]
    link: tuple[float, ...]
    """Of a mesh, what goes to one other block at most; infinity: no less than to all."""
    latency: tuple[float, ...]
    flops: float
    memory_bandwidth: float
    memory: float
    """Bytes of a rank."""

    def rate(self, level: int, peers: Column) -> Column:
        """Bytes a second of a rank that talks to `peers` other blocks of a level at once."""
        return np.minimum(self.bandwidth[level], peers * self.link[level])

    def members(self, group: Factors) -> list[Column]:
        """Members of a group inside one block of each level, innermost first: of the group that lies worst.

        Of n ranks at stride s a block of R holds gcd(n, R / s), as blocks may cut a group wherever both sizes allow.
        The outermost block, and others that hold as many, have every group whole.
        """
        size = math.prod(size for size, _ in group)
        return [size if block == self.blocks[-1] else _inside(group, block) for block in self.blocks]


def _inside(group: Factors, block: int) -> Column:
    """Members in a block of `block` ranks. Factors that follow one another without a gap count as one run."""
    found, whole, size, stride = 1, True, 1, 1

    def own() -> Column:
        return np.where((stride <= block) & (np.mod(block, stride) == 0), np.gcd(size, block // stride), 1)

    for n, s in group:
        joined = (np.asarray(n) == 1) | (np.asarray(size) == 1) | (s == size * np.asarray(stride))
        closed = own()
        found = np.where(joined, found, np.where(whole, found * closed, found))
        whole = np.where(joined, whole, np.logical_and(whole, closed == size))
        stride = np.where(joined & ((np.asarray(size) > 1) | (np.asarray(n) == 1)), stride, s)
        size = np.where(joined, size * np.asarray(n), n)
    return np.where(whole, found * own(), found)


def machine(topology: Topology, constants: Constants, peak: str = "bfloat16") -> Machine:
    """`topology` with what `constants` leave of its promises.

    Raises `ConfigError` where it does not say how fast it is.
    """
    levels, remedy = topology.levels, "give it in the topology file, or measure it with `busway topology probe`"
    rank = topology.rank
    known: Mapping[str, float | None] = {
        f"rank.peak_tflops.{peak}": rank.peak_tflops.get(peak),
        "rank.memory_bandwidth": rank.memory_bandwidth,
        "rank.memory_gib": rank.memory_gib,
        **{f"levels.{level.name}.bandwidth": level.bandwidth for level in levels},
    }
    for name, value in known.items():
        check(value is not None, f"topology {topology.name}: {name}", "is not known, and a plan needs it", remedy)
    reached = [level.reach for level in levels]
    # A level is an outer one where those inside it are twice as fast: more bandwidth around it does not make it one.
    fastest = np.maximum.accumulate(reached)
    shares = [
        constants.outer if 2 * own <= inside else constants.inner
        for own, inside in zip(reached, fastest.tolist(), strict=True)
    ]
    return Machine(
        topology,
        levels,
        tuple(level.ranks or ANYWHERE for level in levels),
        tuple(own * 1e9 * share for own, share in zip(reached, shares, strict=True)),
        tuple(
            level.bandwidth * 1e9 * share if level.links == "mesh" else np.inf
            for level, share in zip(levels, shares, strict=True)
        ),
        tuple((level.latency or 0.0) * 1e-6 for level in levels),
        known[f"rank.peak_tflops.{peak}"] * 1e12,
        rank.memory_bandwidth * 1e9,
        rank.memory_gib * 2**30,
    )
