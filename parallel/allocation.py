"""Which places of a machine ranks may run on: all, or what a scheduler gave and faults left.

Places are positions along the machine (`parallel.topology`), ascending, so that ranks of a server stay together and
servers of a supernode too, as HCCL asks of rank tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from models.checks import check, nearest
from parallel.topology import Level, Topology


def positions(
    topology: Topology, ranks: int | None = None, without: Sequence[str] = (), nodes: Sequence[Any] = ()
) -> tuple[int, ...]:
    """`ranks` places (None: all) of `topology` that are free, in as few of its blocks as can be; else the first.

    `without` names blocks that are lost, as ``cabinet:3``, counted from 0 along the machine. `nodes` says what is free
    in each block of the level around nodes, in order: a number of nodes, or their numbers inside the block. Raises
    `models.checks.ConfigError`.
    """
    lost = [_block(topology, name) for name in without]
    if nodes:
        free = _free(topology, nodes)
    else:
        total = topology.capacity
        if total is None:
            spared = max((stop for _, stop in lost), default=0)
            given = ranks is not None
            check(given, f"topology {topology.name}", "holds any number of ranks", "set plan.ranks")
            block = max(level.ranks or 1 for level in topology.levels)
            total = -(-(spared + ranks) // block) * block
        free = list(range(total))
    left = [place for place in free if not any(start <= place < stop for start, stop in lost)]
    check(bool(left), "plan.without and plan.nodes", f"leave no place of {topology.name} free", "name fewer blocks")
    wanted = len(left) if ranks is None else ranks
    check(
        0 < wanted <= len(left), f"plan.ranks {wanted}", f"must be 1 to the {len(left)} that are free", "choose fewer"
    )
    return together(left, wanted, topology)


def together(left: Sequence[int], wanted: int, topology: Topology) -> tuple[int, ...]:
    """`wanted` of the places that are left, ascending: of the smallest block that has as many, else of the fullest.
    These give equal numbers of nodes where they can, as groups lie in equal parts then; HCCL advises so too."""
    return tuple(sorted(_together(list(left), wanted, topology.levels)))


def _together(left: list[int], wanted: int, levels: Sequence[Level]) -> list[int]:
    if not levels or len(left) == wanted:
        return left[:wanted]
    *inside, level = levels
    if level.ranks is None:
        return _together(left, wanted, inside)
    blocks: dict[int, list[int]] = {}
    for place in left:
        blocks.setdefault(place // level.ranks, []).append(place)
    enough = [block for block in blocks.values() if len(block) >= wanted]
    if enough:
        return _together(min(enough, key=len), wanted, inside)
    fullest, found = sorted(blocks.values(), key=len, reverse=True), []
    share = _even(fullest, wanted, inside)
    for block in fullest:
        found += _together(block, min(share or len(block), wanted - len(found)), inside)
    return found


def _even(blocks: list[list[int]], wanted: int, inside: Sequence[Level]) -> int | None:
    """How many places each of as few of some blocks as can be gives, the fullest first, if that is whole nodes."""
    count = next(n for n in range(1, len(blocks) + 1) if sum(map(len, blocks[:n])) >= wanted)
    share = wanted // count
    node = next((own.ranks for own in inside if own.name == "node"), None)
    even = node and wanted % count == 0 and share % node == 0 and len(blocks[count - 1]) >= share
    return share if even else None


def _level(topology: Topology, name: str, field: str) -> Level:
    known = {level.name: level for level in topology.levels if level.ranks is not None}
    check(name in known, f"{field}: {name!r}", f"is no level of a fixed size of {topology.name}", nearest(name, known))
    return known[name]


def _block(topology: Topology, name: str) -> tuple[int, int]:
    """(first place, place behind the last) of ``cabinet:3``."""
    match = re.fullmatch(r"(\w+):(\d+)", str(name))
    check(match is not None, f"plan.without {name!r}", "must be LEVEL:NUMBER", "write it as cabinet:3, counted from 0")
    size, number = _level(topology, match[1], "plan.without").ranks, int(match[2])
    capacity = topology.capacity
    if capacity is not None:
        count = capacity // size
        check(number < count, f"plan.without {name}", f"must be below {match[1]}:{count}", "blocks are counted from 0")
    return number * size, (number + 1) * size


def _free(topology: Topology, nodes: Sequence[Any]) -> list[int]:
    """Places of the nodes that are free in each block around them."""
    node = _level(topology, "node", "plan.nodes")
    around = [level for level in topology.levels[node.index + 1 :] if level.ranks is not None]
    check(bool(around), "plan.nodes", f"needs a level around nodes, which {topology.name} has not", "set plan.ranks")
    outer = next((level for level in around if level.name == "supernode"), around[-1])
    block = outer.ranks
    free = []
    for number, entry in enumerate(nodes):
        counted = type(entry) is int and entry >= 0
        own = list(range(entry)) if counted else list(entry) if isinstance(entry, Sequence) else [None]
        legal = all(type(i) is int and 0 <= i < block // node.ranks for i in own) and own == sorted(set(own))
        rule = f"must name nodes below the {block // node.ranks} of a {outer.name}, ascending"
        check(legal, f"plan.nodes[{number}] {entry}", rule, "give a number of nodes, or a list of their numbers")
        for i in own:
            start = number * block + i * node.ranks
            free += range(start, start + node.ranks)
    if topology.capacity is not None:
        whole = len(nodes) * block <= topology.capacity
        rule = f"has more entries than {topology.name} has blocks of {outer.name}"
        check(whole, f"plan.nodes of {len(nodes)}", rule, "leave some out, or choose a larger topology")
    return free
