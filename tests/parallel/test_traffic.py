"""Wire formulas against the algorithms themselves, played with real chunks, and the rows of the account."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.traffic import Traffic, data_parallel, maximum


class Wire:
    """Ranks that hold arrays; every transfer is counted by (sender, receiver), in bytes."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.sent: Counter[tuple[int, int]] = Counter()

    def move(self, sender: int, receiver: int, data: np.ndarray) -> np.ndarray:
        self.sent[sender, receiver] += data.nbytes
        return data.copy()

    def reduce_scatter(self, values: list[np.ndarray]) -> list[np.ndarray]:
        chunks = [np.split(value.copy(), self.n) for value in values]
        for step in range(self.n - 1):
            moved = [self.move(r, (r + 1) % self.n, chunks[r][(r - step) % self.n]) for r in range(self.n)]
            for r in range(self.n):
                chunks[(r + 1) % self.n][(r - step) % self.n] += moved[r]
        return [chunks[r][(r + 1) % self.n] for r in range(self.n)]

    def all_gather(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        held = [{r: parts[r]} for r in range(self.n)]
        for step in range(self.n - 1):
            moved = [self.move(r, (r + 1) % self.n, held[r][(r - step) % self.n]) for r in range(self.n)]
            for r in range(self.n):
                held[(r + 1) % self.n][(r - step) % self.n] = moved[r]
        return [np.concatenate([table[r] for r in range(self.n)]) for table in held]

    def all_reduce(self, values: list[np.ndarray]) -> list[np.ndarray]:
        gathered = self.all_gather(self.reduce_scatter(values))
        return [np.roll(total, total.size // self.n) for total in gathered]  # rank r summed chunk r + 1

    def all_to_all(self, values: list[np.ndarray]) -> list[np.ndarray]:
        chunks = [np.split(value, self.n) for value in values]
        return [
            np.concatenate([chunks[s][r] if s == r else self.move(s, r, chunks[s][r]) for s in range(self.n)])
            for r in range(self.n)
        ]

    def broadcast(self, values: list[np.ndarray]) -> list[np.ndarray]:
        held = [values[0]]
        for r in range(1, self.n):
            held.append(self.move(r - 1, r, held[-1]))
        return held


EXPECTED = {
    "all_reduce": lambda values: [sum(values) for _ in values],
    # Played as a ring, rank r ends with chunk r + 1; primitives renumber the chunks.
    "reduce_scatter": lambda values: list(np.roll(np.split(sum(values), len(values)), -1, axis=0)),
    "all_gather": lambda values: [np.concatenate(values) for _ in values],
    "all_to_all": lambda values: [
        np.concatenate([np.split(value, len(values))[r] for value in values]) for r in range(len(values))
    ],
    "broadcast": lambda values: [values[0] for _ in values],
}


@pytest.mark.parametrize("collective", EXPECTED)
@pytest.mark.parametrize("seed", range(6))
def test_wire_bytes_by_level_are_those_of_the_algorithm_played_out(machine, collective, seed):
    draw = random.Random(seed)
    layout = Layout(dp=draw.choice((2, 3, 4)), tp=draw.choice((1, 2)), pp=draw.choice((1, 2)))
    mesh = Mesh(layout, machine(2, 3, "any"), placement=draw.sample(range(24), layout.world_size))
    print("seed", seed, layout, mesh.placement)
    for group in mesh.groups("dp"):
        wire = Wire(len(group))
        values = [np.arange(12.0 * len(group), dtype=np.float64) + rank for rank in group]
        results = getattr(wire, collective)(values)
        for result, expected in zip(results, EXPECTED[collective](values), strict=True):
            np.testing.assert_array_equal(result, expected)
        for index, rank in enumerate(group):
            account = Traffic()
            account.add(mesh, rank, "dp", collective, "float64", values[index].nbytes)
            by_level: Counter[str] = Counter()
            for (sender, receiver), size in wire.sent.items():
                if sender == index:
                    by_level[mesh.level_of(rank, group[receiver]).name] += size
            counted = {row["level"]: row["wire_bytes"] for row in account.rows() if row["wire_bytes"]}
            assert counted == dict(by_level)
            assert sum(row["payload_bytes"] for row in account.rows()) == values[index].nbytes


def test_a_send_crosses_the_level_of_its_two_ranks(machine):
    mesh = Mesh(Layout(dp=1, pp=4), machine(2, "any"))
    account = Traffic()
    account.add(mesh, 1, "pp", "send", "float32", 100, peer=2)
    account.add(mesh, 1, "pp", "send", "float32", 60, peer=0)
    assert account.rows() == [
        {"axis": "pp", "collective": "send", "dtype": "float32", "level": "a",
         "payload_bytes": 0, "wire_bytes": 60, "calls": 0},
        {"axis": "pp", "collective": "send", "dtype": "float32", "level": "b",
         "payload_bytes": 160, "wire_bytes": 100, "calls": 2},
    ]  # fmt: skip


def test_a_group_of_one_rank_has_no_row(machine):
    account = data_parallel(Mesh(Layout(dp=1, tp=2), machine("any")), 0, 1000, "float32")
    assert account.rows() == []


def test_the_maximum_over_ranks_counts_payload_once_and_wire_on_every_level(machine):
    mesh = Mesh(Layout(dp=4), machine(2, "any"))
    accounts = [data_parallel(mesh, rank, 1000, "float32", scalars=2) for rank in range(4)]
    rows = maximum(accounts).rows()
    key = {"axis": "dp", "collective": "all_reduce", "dtype": "float32"}
    # Ranks 0 and 2 have their next neighbour inside a, ranks 1 and 3 in b: each sends 2 * 3/4 of 1002 * 4 bytes.
    assert rows == [
        {**key, "level": "a", "payload_bytes": 0, "wire_bytes": 6012, "calls": 0},
        {**key, "level": "b", "payload_bytes": 4008, "wire_bytes": 6012, "calls": 1},
    ]


def test_data_parallel_reduces_over_replicas_and_context_ranks_together(machine):
    mesh = Mesh(Layout(dp=2, cp=2, tp=2), machine("any"))
    (row,) = data_parallel(mesh, 5, 10, "float64").rows()
    assert row["axis"] == "dp x cp" and row["payload_bytes"] == 80 and row["wire_bytes"] == 120
