"""The traffic account: what collectives move, by axis, collective, dtype and level of the machine.

Two columns. *Payload* is the bytes that a rank hands to a primitive. *Wire* is the bytes that a rank sends, computed
from payload, the placement of the group and one algorithm per collective (`ALGORITHMS`). The collectives measure with
this account and the planner predicts with it.

Algorithms, with B the payload of a rank, n the ranks of a group, in ascending order around the ring; cost formulas as
in Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1), 2005,
and for the all-reduce Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
JPDC 69(2), 2009:

- ``all_reduce``: ring; a rank sends 2 (n-1)/n B to its next neighbour.
- ``reduce_scatter``: ring; (n-1)/n B to its next neighbour.
- ``all_gather``: ring; B is the rank's own part, and (n-1) B go to its next neighbour.
- ``all_to_all``: pairwise exchange; B/n to each of the others.
- ``broadcast``: pipelined chain along the ring from the first rank; B to the next, nothing from the last.
- ``send``: B to the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from parallel.mesh import Axes, Mesh

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "int32": 4}


def _ring(factor: Callable[[int], float]) -> Callable[[int, int, int], dict[int, float]]:
    return lambda payload, n, index: {(index + 1) % n: factor(n) * payload}


def _chain(payload: int, n: int, index: int) -> dict[int, float]:
    return {index + 1: payload} if index + 1 < n else {}


# collective -> (payload, ranks of the group, index of the sender) -> bytes sent, by index of the receiver.
ALGORITHMS: dict[str, Callable[[int, int, int], dict[int, float]]] = {
    "all_reduce": _ring(lambda n: 2 * (n - 1) / n),
    "reduce_scatter": _ring(lambda n: (n - 1) / n),
    "all_gather": _ring(lambda n: n - 1),
    "all_to_all": lambda payload, n, index: {peer: payload / n for peer in range(n) if peer != index},
    "broadcast": _chain,
}


class Key(NamedTuple):
    """What a row of the account is about."""

    axis: str
    """As `Mesh.label` writes it: ``dp``, ``dp x cp``."""
    collective: str
    dtype: str


class Traffic:
    """The account of one rank, or the maximum over several."""

    def __init__(self) -> None:
        self.payload: dict[Key, tuple[int, int]] = {}
        """Payload bytes and calls."""
        self.wire: dict[Key, dict[tuple[int, str], float]] = {}
        """Bytes sent, by (index, name) of the level."""

    def add(
        self, mesh: Mesh, rank: int, axes: Axes, collective: str, dtype: str, payload: int, calls: int = 1,
        peer: int | None = None, ranks: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        """Count `calls` of one primitive over the group of `axes`, `payload` bytes in all, handed in by `rank`.

        ``send`` names the rank that receives as `peer`; `ranks` are those of a part of the group where it is one. A
        group of one rank moves nothing and has no row.
        """
        group = ranks or mesh.group(axes, rank)
        if len(group) == 1:
            return
        if collective == "send":
            sent = {group.index(peer): float(payload)}
        else:
            sent = ALGORITHMS[collective](payload, len(group), group.index(rank))
        key = Key(mesh.label(axes), collective, dtype)
        before, calls_before = self.payload.get(key, (0, 0))
        self.payload[key] = (before + payload, calls_before + calls)
        span = mesh.span(group)
        levels = self.wire.setdefault(key, {})
        levels.setdefault((span.index, span.name), 0.0)
        for receiver, size in sent.items():
            level = mesh.level_of(rank, group[receiver])
            levels[level.index, level.name] = levels.get((level.index, level.name), 0.0) + size

    def rows(self) -> list[dict[str, str | int]]:
        """The account as `summary.json` holds it, one row for each key and level.

        Payload and calls belong to the key, not to a level: they stand in the row of its outermost level and are 0
        in the others, so that a sum over rows counts nothing twice.
        """
        rows = []
        for key in sorted(self.payload):
            payload, calls = self.payload[key]
            outermost = max(self.wire[key])
            for level, wire in sorted(self.wire[key].items()):
                counted = (payload, calls) if level == outermost else (0, 0)
                rows.append(
                    {
                        **key._asdict(),
                        "level": level[1],
                        "payload_bytes": counted[0],
                        "wire_bytes": round(wire),
                        "calls": counted[1],
                    }
                )
        return rows


def maximum(accounts: Iterable[Traffic]) -> Traffic:
    """The largest of every figure over the accounts of several ranks."""
    result = Traffic()
    for account in accounts:
        for key, (payload, calls) in account.payload.items():
            largest = result.payload.get(key, (0, 0))
            result.payload[key] = (max(payload, largest[0]), max(calls, largest[1]))
            levels = result.wire.setdefault(key, {})
            for level, wire in account.wire[key].items():
                levels[level] = max(wire, levels.get(level, 0.0))
    return result


def data_parallel(mesh: Mesh, rank: int, parameters: int, dtype: str, scalars: int = 0) -> Traffic:
    """The gradient reduction of one step without ZeRO, as `rank` accounts for it.

    One all-reduce over dp x cp: payload = (`parameters` that the rank holds + `scalars` that ride along) x bytes of
    `dtype`, the dtype of gradients.
    """
    account = Traffic()
    account.add(mesh, rank, "loss", "all_reduce", dtype, (parameters + scalars) * DTYPE_BYTES[dtype])
    return account
