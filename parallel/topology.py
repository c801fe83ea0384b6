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
KEYS = ("name", "rank", "planes", "levels")
OPTIONAL = ("capacity", "notes")
PLANE_KEYS = ("injection",)
LEVEL_KEYS = ("members", "bandwidth", "latency", "plane")
LEVEL_OPTIONAL = ("of", "links")
LINKS = ("switch", "mesh")


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
    device: str | None = None
    """Whose constants the planner takes (`parallel.planner.constants`); None: unknown, and nothing can be planned."""


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
    """GB/s of one rank in one direction, in a mesh of one of its links; None: unknown."""
    latency: float | None
    """Microseconds for a small message; None: unknown."""
    plane: Plane
    links: str = "switch"
    """``switch``: a rank has the bandwidth whomever it talks to; ``mesh``: it has a link to each other block."""

    @property
    def reach(self) -> float | None:
        """GB/s of one rank that talks to all other blocks at once, as far as its plane's injection lets it."""
        if self.bandwidth is None:
            return None
        links = self.members - 1 if self.links == "mesh" else 1
        return min(max(links, 1) * self.bandwidth, self.plane.injection or math.inf)


@dataclass(frozen=True)
class Topology:
    """A machine: `levels` from innermost to outermost, over ranks numbered in the order of the hardware."""

    name: str
    rank: Rank
    planes: tuple[Plane, ...]
    levels: tuple[Level, ...]
    limit: int | None = None
    """Ranks that there are where the last block of each level need not be full; None: all blocks are."""
    notes: tuple[str, ...] = ()
    """What to know of its numbers, a line each."""

    @property
    def capacity(self) -> int | None:
        """Ranks that the machine holds; None: any number."""
        return self.limit or self.levels[-1].ranks

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

    A level or a plane may be changed under its name: `supernode: {members: 64}` beside `levels`.
    Raises `models.checks.ConfigError` naming the key, the rule and the remedy; an unknown key names the nearest.
    """
    if any(key not in source for key in KEYS):
        _check_keys("topology", source, KEYS, OPTIONAL)
    planes = _mapping("topology.planes", source["planes"])
    entries = _entries(source["levels"])
    named = [str(entry["name"]) for entry in entries]
    for name in (*planes, *named):
        taken = name in (*KEYS, *OPTIONAL)
        check(not taken, f"topology: {name!r}", "is a key and names no level or plane", "choose another name")
    whole = f"key, level or plane of {source['name']}"
    _check_keys("topology", source, KEYS, (*OPTIONAL, *planes, *named), whole)
    level_keys = (*LEVEL_KEYS, *LEVEL_OPTIONAL)
    for name in {*planes, *named} & {*source}:
        _check_keys(f"topology.{name}", source[name], (), PLANE_KEYS * (name in planes) + level_keys * (name in named))

    rank = _rank(source["rank"])
    networks = {name: _plane(name, plane, source.get(name, {})) for name, plane in planes.items()}
    changed = [_changed(entry, source.get(name, {}), level_keys) for name, entry in zip(named, entries, strict=True)]
    levels = _levels(changed, networks, rank.name)
    limit, notes = source.get("capacity"), source.get("notes") or ()
    if limit is not None:
        _check_count("topology.capacity", limit)
        most = levels[-1].ranks or limit
        check(limit <= most, "topology.capacity", f"is {limit}, but the levels hold {most}", "lower it or leave it out")
    check(isinstance(notes, list | tuple), "topology.notes", f"must be a list, but is {notes!r}", "write - LINE")
    return Topology(str(source["name"]), rank, tuple(networks.values()), levels, limit, tuple(map(str, notes)))


def _rank(source: Any) -> Rank:
    _check_keys("topology.rank", source, ("name", "memory_gib", "memory_bandwidth", "peak_tflops"), ("device",))
    peaks = _mapping("topology.rank.peak_tflops", source["peak_tflops"] or {})
    for dtype in peaks:
        check_choice("topology.rank.peak_tflops key", dtype, DTYPES)
    known = {dtype: _number(f"topology.rank.peak_tflops.{dtype}", peak) for dtype, peak in peaks.items()}
    return Rank(
        name=str(source["name"]),
        memory_gib=_number("topology.rank.memory_gib", source["memory_gib"]),
        memory_bandwidth=_number("topology.rank.memory_bandwidth", source["memory_bandwidth"]),
        peak_tflops={dtype: peak for dtype, peak in known.items() if peak is not None},
        device=source.get("device"),
    )


def _plane(name: str, source: Any, changes: Mapping[str, Any]) -> Plane:
    _check_keys(f"topology.{name}", source, PLANE_KEYS)
    return Plane(name, _number(f"topology.{name}.injection", _changed(source, changes, PLANE_KEYS)["injection"]))


def _entries(entries: Any) -> list[Mapping[str, Any]]:
    is_list = isinstance(entries, list | tuple)
    check(is_list and len(entries) > 0, "topology.levels", "must list at least one level", "list them innermost first")
    for index, entry in enumerate(entries):
        _check_keys(f"topology.levels[{index}]", entry, ("name", *LEVEL_KEYS), LEVEL_OPTIONAL)
    names = [str(entry["name"]) for entry in entries]
    repeated = next((name for name in names if names.count(name) > 1), None)
    check(repeated is None, "topology.levels", f"names {repeated!r} more than once", "give each level its own name")
    return list(entries)


def _levels(entries: list[Mapping[str, Any]], planes: Mapping[str, Plane], rank: str) -> tuple[Level, ...]:
    levels: list[Level] = []
    sizes: dict[str, int | None] = {rank: 1}  # ranks of a block, of the levels that dropped out too
    for entry in entries:
        name, where = str(entry["name"]), f"topology.{entry['name']}"
        check_choice(f"{where}.plane", str(entry["plane"]), planes)
        sizes[name] = ranks = _block(where, entry, sizes, name == entries[-1]["name"])
        levels = [level for level in levels if ranks is None or level.ranks <= ranks]  # too large for half a cabinet
        inner = levels[-1].ranks if levels else 1
        if ranks is not None and ranks % inner:
            step = math.lcm(inner, ranks // entry["members"]) // (ranks // entry["members"])
            rule = f"{entry['members']} makes {ranks} ranks, no whole number of blocks of {levels[-1].name} ({inner})"
            check(False, f"{where}.members", rule, f"set {where}.members to a multiple of {step}")
        levels.append(
            Level(
                name=name,
                index=len(levels),
                members=None if ranks is None else ranks // inner,
                ranks=ranks,
                bandwidth=_number(f"{where}.bandwidth", entry["bandwidth"]),
                latency=_number(f"{where}.latency", entry["latency"]),
                plane=planes[str(entry["plane"])],
                links=_links(where, entry),
            )
        )
    return tuple(levels)


def _block(where: str, entry: Mapping[str, Any], sizes: Mapping[str, int | None], outermost: bool) -> int | None:
    """Ranks of one block of a level: `members` blocks of the level that `of` names, by default the next inner one."""
    of = str(entry.get("of") or [*sizes][-1])
    check_choice(f"{where}.of", of, sizes)
    if entry["members"] == ANY:
        check(outermost, f"{where}.members", f"is {ANY} below the outermost level", "give a number")
        return None
    _check_count(f"{where}.members", entry["members"], f" or {ANY}")
    return entry["members"] * sizes[of]


def _links(where: str, entry: Mapping[str, Any]) -> str:
    links = str(entry.get("links", LINKS[0]))
    check_choice(f"{where}.links", links, LINKS)
    counted = links != "mesh" or entry["members"] != ANY
    check(counted, f"{where}.members", f"is {ANY} in a mesh, whose links it counts", "give a number")
    return links


def _changed(entry: Mapping[str, Any], changes: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {**entry, **{key: changes[key] for key in keys if key in changes}}


def _check_count(where: str, value: Any, otherwise: str = "") -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(whole, where, f"must be a whole number{otherwise}, but is {value!r}", "give a number")
    check_at_least(where, value, 1)


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    check(isinstance(value, Mapping), where, f"must be a mapping, but is {value!r}", "write it as key: value")
    return value


def _check_keys(
    where: str,
    value: Any,
    keys: tuple[str, ...],
    optional: tuple[str, ...] = (),
    what: str = "key of a topology file",
) -> None:
    known = (*keys, *optional)
    for key in _mapping(where, value):
        check(key in known, f"{where}.{key}", f"is no {what}", nearest(str(key), known))
    for key in keys:
        check(key in value, f"{where}.{key}", "is missing", "add it (null where the value is not known)")


def _number(where: str, value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    check(number, where, f"must be a number or null, but is {value!r}", "write a plain number")
    check_above(where, value, 0)
    return float(value)
