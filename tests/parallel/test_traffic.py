"""Wire formulas against the algorithms themselves, played with real chunks, and the rows of the account."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from models.config import ModelConfig
from parallel.dispatch import even, moves
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.traffic import Traffic, step_rows, step_traffic

CONFIG = ModelConfig(layers=2, hidden=8, ffn=12, heads=4, kv_heads=2, vocab=16)
STEP = (CONFIG, 8, 4, "float32")  # model, sequence length, global batch, dtype


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
    assert step_traffic(Mesh(Layout(dp=1, micro_batch=4), machine("any")), 0, *STEP).rows() == []


def test_the_maximum_over_ranks_counts_payload_once_and_wire_on_every_level(machine):
    rows = step_rows(Mesh(Layout(dp=4), machine(2, "any")), *STEP)
    key = {"axis": "dp", "collective": "all_reduce", "dtype": "float32"}
    # Ranks 0 and 2 have their next neighbour inside a, ranks 1 and 3 in b: each sends 2 * 3/4 of 1259 * 4 bytes.
    assert rows == [
        {**key, "level": "a", "payload_bytes": 0, "wire_bytes": 7554, "calls": 0},
        {**key, "level": "b", "payload_bytes": 5036, "wire_bytes": 7554, "calls": 1},
    ]


# Elements and calls, counted by hand for STEP: 1256 parameters; 8 tokens of hidden 8, so T H is 64; 4 micro-batches
# where dp is 1. Sums of loss, valid tokens and wishes to stop are 3, and with the gradients' square sum 4.
COUNTED = [
    (Layout(dp=2), {"dp all_reduce": (1259, 1)}),
    # 1 where the embedding leaves, 4 a layer, 1 where the head is entered; a log-sum-exp and a target a token.
    (Layout(dp=1, tp=2), {"tp all_reduce": (4 * 10 * 64 + 4, 41), "tp all_gather": (4 * 16, 4)}),
    (Layout(dp=1, tp=2, recompute="full"), {"tp all_reduce": (4 * 14 * 64 + 4, 57), "tp all_gather": (4 * 16, 4)}),
    # Two ranks have the same head of keys and of values, 4 rows of 8.
    (Layout(dp=1, tp=4), {"tp all_reduce": (4 * (10 * 64 + 2 * 32) + 4, 49), "tp all_gather": (4 * 16, 4)}),
    (
        Layout(dp=1, tp=2, sequence_parallel=True),
        {
            "tp reduce_scatter": (4 * 10 * 64, 40),
            "tp all_gather": (4 * (15 * 32 + 16), 64),
            "tp all_reduce": (5 * 8 + 4, 2),
        },
    ),
    # A block of keys and values is 4 tokens of 8: passed on forward, backward with its gradient, and that once more.
    (Layout(dp=1, cp=2), {"cp all_reduce": (1259, 1), "cp send": (4 * 2 * (32 + 64 + 32), 24)}),
    (Layout(dp=1, cp=2, recompute=(1,)), {"cp all_reduce": (1259, 1), "cp send": (1024 + 4 * 32, 28)}),
    (Layout(dp=2, cp=2, micro_batch=2), {"dp x cp all_reduce": (1259, 1), "cp send": (2 * 256, 6)}),
    # 4 tokens of 16 columns of qkv and 8 of the output, and back.
    (
        Layout(dp=1, cp=2, cp_method="ulysses"),
        {"cp all_reduce": (1259, 1), "cp all_to_all": (4 * 2 * (64 + 32) * 2, 32)},
    ),
    (Layout(dp=1, pp=2), {"pp send": (4 * 64, 4), "pp all_reduce": (4, 1)}),
    (Layout(dp=1, pp=2, stages=(0, 2), schedule="gpipe"), {"pp send": (4 * 64, 4), "pp all_reduce": (4, 1)}),
    # The turn of a V is no message.
    (Layout(dp=1, pp=2, schedule="zb_v"), {"pp send": (4 * 2 * 64, 8), "pp all_reduce": (4, 1)}),
    (Layout(dp=1, pp=2, vpp=2, schedule="interleaved"), {"pp send": (4 * 3 * 64, 12), "pp all_reduce": (4, 1)}),
    (
        Layout(dp=2, zero=1),
        {"dp reduce_scatter": (1256, 1), "dp all_gather": (628, 1), "dp all_reduce": (3 + 1, 2)},
    ),
    (
        Layout(dp=2, zero=2),
        {"dp reduce_scatter": (2 * 1256, 2), "dp all_gather": (628, 1), "dp all_reduce": (3 + 1, 2)},
    ),
    # Four segments, each gathered for a forward and a backward.
    (
        Layout(dp=2, zero=3),
        {"dp reduce_scatter": (2 * 1256, 8), "dp all_gather": (2 * 2 * 628, 16), "dp all_reduce": (3 + 1, 2)},
    ),
    # Two copies of two pieces each: pieces are summed across them.
    (
        Layout(dp=4, zero=1, zero_group=2),
        {"dp reduce_scatter": (1256, 1), "dp all_gather": (628, 1), "dp all_reduce": (628 + 3 + 1, 3)},
    ),
]


@pytest.mark.parametrize(("layout", "counted"), COUNTED)
def test_a_step_moves_what_was_counted_by_hand(machine, layout, counted):
    account = step_traffic(Mesh(layout, machine("any")), layout.world_size - 1, *STEP)
    found = {
        f"{axis} {collective}": (size / 4, calls) for (axis, collective, _), (size, calls) in account.payload.items()
    }
    assert found == counted


def test_linears_give_and_take_bfloat16_and_sums_of_gradients_stay_wide(machine):
    """Where forwards leave a layer and every gather of one, the head's two too; of the embedding all is float32."""
    layout = Layout(dp=1, tp=2, sequence_parallel=True, recompute="full")
    payload = step_traffic(Mesh(layout, machine("any")), 1, *STEP, linears="bfloat16").payload
    assert {key[1:]: value for key, value in payload.items() if key[1] != "all_reduce"} == {
        ("reduce_scatter", "bfloat16"): (2 * 4 * 8 * 64, 4 * 8),
        ("reduce_scatter", "float32"): (4 * 4 * 6 * 64, 4 * 6),
        ("all_gather", "bfloat16"): (2 * 4 * 18 * 32, 4 * 18),
        ("all_gather", "float32"): (4 * 4 * (32 + 16), 4 * 2),
    }


def test_pieces_are_padded_weight_by_weight(machine):
    """Of the layer's 6 weights of 8, 128, 64, 8, 192 and 96 elements three ranks have 3, 43, 22, 3, 64 and 32 each."""
    account = step_traffic(Mesh(Layout(dp=3, zero=1), machine("any")), 0, CONFIG, 8, 3, "float64")
    pieces = 2 * (3 + 43 + 22 + 3 + 64 + 32) + 43 + 3 + 43
    assert account.payload["dp", "all_gather", "float64"] == (8 * pieces, 1)
    assert account.payload["dp", "reduce_scatter", "float64"] == (8 * 3 * pieces, 1)


def test_parts_of_gradients_are_summed_among_those_that_have_them(machine):
    """A tied embedding of 16 x 8 over the ends of the pipeline, q/k-norms of 2 each over tp; with ZeRO their pieces."""
    config = replace(CONFIG, tied_embeddings=True, qk_norm=True)
    for zero, tied, norms in ((0, 64, 4), (1, 32, 2)):
        layout = Layout(dp=2, pp=3, tp=2, stages=(1, 1, 0), zero=zero, order=("tp", "pp", "dp", "cp"))
        mesh = Mesh(layout, machine("any"))
        places = [step_traffic(mesh, 2 * place, config, 8, 2, "float32").payload for place in range(3)]
        ends = [payload.get(("pp", "all_reduce", "float32")) for payload in places]
        assert ends == [(4 * tied, 1), None, (4 * tied, 1)]
        blocks = [payload["tp", "all_reduce", "float32"] for payload in places]
        assert blocks == [(4 * (5 * 64 + norms), 6), (4 * (4 * 64 + norms), 5), (4 * 64, 1)]
        assert all(payload["pp x tp", "all_reduce", "float32"] == (16, 1) for payload in places)


def test_a_bucket_is_a_call_of_its_own(machine):
    """1 MiB is 262144 elements: the sums, the head, four weights of the layer, two, its first norm, the embedding. Less
    than an element makes a call of each of the nine weights and of the sums."""
    config = ModelConfig(layers=1, hidden=256, ffn=256, heads=4, kv_heads=4, vocab=1024)
    for mib, calls in ((1, 6), (2, 3), (0, 1), (64, 1), (1e-7, 10)):
        account = step_traffic(Mesh(Layout(dp=2, bucket_mib=mib), machine("any")), 0, config, 8, 2, "float32")
        assert account.payload["dp", "all_reduce", "float32"] == (4 * (config.parameter_count + 3), calls)


@pytest.mark.parametrize("top_k", [2, 4, 8])
@pytest.mark.parametrize(("ranks", "outer"), [(4, 2), (8, 4), (8, 2)])
def test_two_level_dispatch_of_experts_in_turn_moves_what_a_closed_form_says(ranks, outer, top_k):
    """Of G groups with E / G experts each, k experts in a row lie in max(1, k G / E) of them, if k and E / G divide
    each other; a token is sent to those of them that are not its own."""
    experts, tokens = 8, 64
    routed = [even(tokens, top_k, experts) for _ in range(ranks)]
    flat, two_level = (moves(routed, experts, 1, groups, 0) for groups in (1, outer))
    touched = max(1, top_k * outer // experts)
    assert two_level[0].places == tuple(range(0, ranks, ranks // outer))
    assert np.array_equal(two_level[0].rows, np.full((outer, outer), touched * tokens // outer))
    group = np.arange(ranks) * outer // ranks
    across = flat[0].rows[0][group != group[0]].sum()
    assert across == top_k * tokens * (outer - 1) // outer
    # What came over the outer level is spread inside: a token's row to each of its experts there.
    inside = ranks // outer
    assert two_level[1].rows.sum() == top_k * tokens * ranks // outer
    assert np.array_equal(two_level[1].rows, np.full((inside, inside), top_k * tokens // inside))
