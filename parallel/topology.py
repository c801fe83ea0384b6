"""The machine as levels, read from a file of `recipes/topology`.

A machine is a row of ranks. Levels cut it into ever larger blocks of consecutive ranks: two dies make a package,
eight packages a node. Each level says how fast two ranks talk that meet first inside it, and which plane (network)
carries it. Every number about a machine is in its file; the code knows none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.checks import check, check_above, check_at_least, check_choice, nearest

ANY = "any"
DTYPES = ("float64", "float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True)
class Rank:
    """What one rank runs on."""

    name: str
    """What the hardware calls it (die, process); the innermost level counts its members in these."""
    memory_gib: float | None
    """Memory of a rank in GiB; None: whatever the machine turns out to have."""
    memory_bandwidth: float | None
    """GB/s between a rank and its memory; None: unknown."""
    peak_tflops: Mapping[str, float]
    """Dense peak in TFLOPS by dtype; a dtype that is absent has no known peak, and its MFU is null."""


@dataclass(frozen=True)
class Plane:
    """A network. Levels on one plane share its injection limit."""

    name: str
    injection: float | None
    """GB/s that one rank can put into the plane, in one direction, over all levels together; None: unknown."""


@dataclass(frozen=True)
class Level:
    """Blocks of consecutive ranks, and how two ranks talk that meet first inside such a block."""

    name: str
    index: int
    """0 is the innermost."""
    members: int | None
    """Blocks of the next inner level (ranks, for the innermost); None: as many as there are."""
    ranks: int | None
    """Ranks in one block: the product of members from the innermost level; None: as many as there are."""
    bandwidth: float | None
    """GB/s of one rank in one direction; None: unknown."""
    latency: float | None
    """Microseconds for a small message; None: unknown."""
    plane: Plane


@dataclass(frozen=True)
class Topology:
    """A machine: `levels` from innermost to outermost, over ranks numbered in the order of the hardware."""

    name: str
    rank: Rank
    planes: tuple[Plane, ...]
    levels: tuple[Level, ...]

    @property
    def capacity(self) -> int | None:
        """Ranks that the machine holds; None: any number."""
        return self.levels[-1].ranks

    def level_of(self, a: int, b: int) -> Level:
        """The innermost level that holds both positions `a` and `b`, which count ranks from 0 along the machine."""
        for position in (a, b):
            if position < 0 or (self.capacity is not None and position >= self.capacity):
                raise ValueError(f"position {position} is outside {self.name}, which holds {self.capacity} ranks")
        return next(level for level in self.levels if level.ranks is None or a // level.ranks == b // level.ranks)

    def check_fits(self, ranks: int) -> None:
        """Raise `ConfigError` unless the machine holds `ranks` ranks."""
        check(
            self.capacity is None or ranks <= self.capacity,
            f"topology {self.name}",
            f"holds {self.capacity} ranks, but the layout needs {ranks}",
            f"choose a larger topology or axes with a product of at most {self.capacity}",
        )


def load(source: Mapping[str, Any]) -> Topology:
    """A topology from the mapping of its file (plain mappings, lists, strings and numbers).

    Raises `models.checks.ConfigError` naming the key, the rule and the remedy; an unknown key names the nearest.
    """
    _check_keys("topology", source, ("name", "rank", "planes", "levels"))
    planes = {name: _plane(name, plane) for name, plane in _mapping("topology.planes", source["planes"]).items()}
    return Topology(str(source["name"]), _rank(source["rank"]), tuple(planes.values()), _levels(source, planes))


def _rank(source: Any) -> Rank:
    _check_keys("topology.rank", source, ("name", "memory_gib", "memory_bandwidth", "peak_tflops"))
    peaks = _mapping("topology.rank.peak_tflops", source["peak_tflops"] or {})
    for dtype in peaks:
        check_choice("topology.rank.peak_tflops key", dtype, DTYPES)
    known = {dtype: _number(f"topology.rank.peak_tflops.{dtype}", peak) for dtype, peak in peaks.items()}
    return Rank(
        name=str(source["name"]),
        memory_gib=_number("topology.rank.memory_gib", source["memory_gib"]),
        memory_bandwidth=_number("topology.rank.memory_bandwidth", source["memory_bandwidth"]),
        peak_tflops={dtype: peak for dtype, peak in known.items() if peak is not None},
    )


def _plane(name: str, source: Any) -> Plane:
    _check_keys(f"topology.planes.{name}", source, ("injection",))
    return Plane(name, _number(f"topology.planes.{name}.injection", source["injection"]))


def _levels(source: Mapping[str, Any], planes: Mapping[str, Plane]) -> tuple[Level, ...]:
    entries = source["levels"]
    is_list = isinstance(entries, list | tuple)
    check(is_list and len(entries) > 0, "topology.levels", "must list at least one level", "list them innermost first")
    levels: list[Level] = []
    for index, entry in enumerate(entries):
        where = f"topology.levels[{index}]"
        _check_keys(where, entry, ("name", "members", "bandwidth", "latency", "plane"))
        check_choice(f"{where}.plane", str(entry["plane"]), planes)
        members = None if entry["members"] == ANY else entry["members"]
        if members is None:
            last = len(entries) - 1
            check(index == last, f"{where}.members", f"is {ANY} below the outermost level", "give a number")
        else:
            whole = isinstance(members, int) and not isinstance(members, bool)
            check(whole, f"{where}.members", f"must be a whole number or {ANY}, but is {members!r}", "give a number")
            check_at_least(f"{where}.members", members, 1)
        levels.append(
            Level(
                name=str(entry["name"]),
                index=index,
                members=members,
                ranks=None if members is None else math.prod(level.members for level in levels) * members,
                bandwidth=_number(f"{where}.bandwidth", entry["bandwidth"]),
                latency=_number(f"{where}.latency", entry["latency"]),
                plane=planes[str(entry["plane"])],
            )
        )
    names = [level.name for level in levels]
    repeated = next((name for name in names if names.count(name) > 1), None)
    check(repeated is None, "topology.levels", f"names {repeated!r} more than once", "give each level its own name")
    return tuple(levels)


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    check(isinstance(value, Mapping), where, f"must be a mapping, but is {value!r}", "write it as key: value")
    return value


def _check_keys(where: str, value: Any, keys: tuple[str, ...]) -> None:
    for key in _mapping(where, value):
        check(key in keys, f"{where}.{key}", "is no key of a topology file", nearest(str(key), keys))
    for key in keys:
        check(key in value, f"{where}.{key}", "is missing", "add it (null where the value is not known)")


def _number(where: str, value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    check(number, where, f"must be a number or null, but is {value!r}", "write a plain number")
    check_above(where, value, 0)
    return float(value)
