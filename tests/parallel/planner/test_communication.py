"""Seconds of collectives against the formulas of HCCL's guide (docs/zh/user_guide/coll_algo_intro in hicann/hccl)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parallel.planner.communication import ALGORITHMS, Network
from parallel.planner.constants import Constants
from parallel.planner.machine import Machine
from parallel.topology import Level, Plane, Rank, Topology

FAST, SLOW = 100e9, 10e9
BARE = Constants(call=0.0, call_far=0.0)


def network(
    *blocks: tuple[str, int, float, float], constants: Constants = BARE, one_plane: bool = False, mesh: bool = False
) -> Network:
    """Levels as (name, ranks of a block, bytes a second, seconds); the innermost may be a mesh."""
    planes = [Plane("all" if one_plane else name, 1.0) for name, *_ in blocks]
    levels = tuple(Level(b[0], i, b[1], b[1], 1.0, 1.0, planes[i]) for i, b in enumerate(blocks))
    topology = Topology("any", Rank("die", 1.0, 1.0, {}), tuple(dict.fromkeys(planes)), levels)
    _, ranks, bandwidth, latency = zip(*blocks, strict=True)
    link = bandwidth[0] / (ranks[0] - 1) if mesh else math.inf, *[math.inf] * (len(blocks) - 1)
    return Network(Machine(topology, levels, ranks, bandwidth, link, latency, 1.0, 1.0, 1.0), constants)


def half(network: Network, size: float, group: tuple[int, int], calls: int = 1) -> float:
    """A reduce-scatter over so many ranks at a stride."""
    return float(network.half(size, network.group([group]), calls))


@pytest.mark.parametrize("ranks", [2, 3, 8, 48, 384, 768])
def test_algorithms_are_the_guide_s(ranks):
    power = 2 ** int(np.log2(ranks))
    halving = 2 * np.log2(power) + 2 * (power < ranks)
    assert 2 * ALGORITHMS["ring"].steps(ranks) == 2 * (ranks - 1)
    assert 2 * ALGORITHMS["NHR"].steps(ranks) == 2 * np.ceil(np.log2(ranks))
    assert 2 * ALGORITHMS["H-D_R"].steps(ranks) == halving
    for name in ("mesh", "ring", "NHR"):
        assert 2 * ALGORITHMS[name].volume(ranks) == pytest.approx(2 * (ranks - 1) / ranks)
    beyond = 2 * (power < ranks)
    assert 2 * ALGORITHMS["H-D_R"].volume(ranks) == pytest.approx(2 * (power - 1) / power + beyond)


def test_an_all_reduce_crosses_a_level_with_what_the_inner_one_left():
    found = 2 * half(network(("node", 8, FAST, 1e-6), ("cluster", 64, SLOW, 1e-5)), 8e9, (64, 1))
    inside, between = 2 * (7 / 8 * 8e9 / FAST + 1e-6), 2 * (7 / 8 * 1e9 / SLOW + 3e-5)
    assert found == pytest.approx(inside + between)


def test_a_strided_group_finds_no_neighbour_in_its_node():
    found = 2 * half(network(("node", 8, FAST, 0.0), ("cluster", 64, SLOW, 0.0)), 8e9, (8, 8))
    assert found == pytest.approx(2 * 7 / 8 * 8e9 / SLOW)


@pytest.mark.parametrize("one_plane", [False, True])
def test_an_all_to_all_loads_levels_of_one_plane_together(one_plane):
    levels = ("node", 8, FAST, 0.0), ("cluster", 64, SLOW, 0.0)
    own = network(*levels, one_plane=one_plane)
    found = own.all_to_all(64e9, own.group([(64, 1)]))
    inside, between = 7e9 / FAST, 56e9 / SLOW
    assert found == pytest.approx(inside + between if one_plane else between)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_group_in_a_mesh_has_the_links_to_its_members(ranks):
    own = network(("node", 8, FAST, 0.0), ("cluster", 64, SLOW, 0.0), mesh=True)
    each = 8e9 / ranks / (FAST / 7)  # every link carries one part of the tensor
    assert half(own, 8e9, (ranks, 1)) == pytest.approx(each)
    assert float(own.all_to_all(8e9, own.group([(ranks, 1)]))) == pytest.approx(each)
    assert float(own.message(8e9, np.array(0))) == pytest.approx(8e9 / (FAST / 7))


def test_a_group_across_meshes_has_the_links_of_each():
    own = network(("node", 8, FAST, 0.0), ("cluster", 64, SLOW, 0.0), mesh=True)
    inside, between = 8e9 / 4 / (FAST / 7), 8e9 / 4 / 2 / SLOW  # of 8 ranks four lie in a node
    assert half(own, 8e9, (8, 2)) == pytest.approx(inside + between)


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("outer", [SLOW, FAST / 2, 0.9 * FAST, 2 * FAST])
def test_no_place_betters_the_least_that_the_nearest_ranks_may_take(outer, mesh):
    own = network(("package", 2, FAST, 0.0), ("node", 8, FAST, 0.0), ("cluster", 64, outer, 0.0), mesh=mesh)
    least = Network(own.machine, own.constants, least=True)
    for size in (2, 4, 8, 16, 32):
        bound = least.group([(size, 1)])
        for stride in (2**power for power in range(7) if size * 2**power <= 64):
            found = own.group([(size, stride)])
            assert bound.half_byte <= found.half_byte * (1 + 1e-12), (size, stride)
            assert bound.exchange_byte <= found.exchange_byte * (1 + 1e-12), (size, stride)
    for level in range(3):
        assert least.message(1e9, np.array(0)) <= own.message(1e9, np.array(level)) * (1 + 1e-12)


def test_each_rank_of_a_group_across_nodes_delays_its_collectives():
    slow = Constants(call=1e-5, call_far=1e-4, call_rank=1e-6)
    found = network(("node", 8, FAST, 0.0), ("cluster", 64, SLOW, 0.0), constants=slow)
    assert half(found, 0.0, (16, 1), 3) == pytest.approx(3 * (1e-5 + 16e-4))
    assert half(found, 0.0, (8, 1), 3) == pytest.approx(3 * (1e-5 + 8e-6))
    assert half(found, 0.0, (1, 1), 3) == 0


def test_messages_take_the_level_where_ranks_meet():
    found = network(("node", 8, FAST, 1e-6), ("cluster", 64, SLOW, 1e-5))
    level = found.level_between(np.array([[4]]), np.arange(3))
    assert level.tolist() == [[0, 1, 0]]
    seconds = found.message(np.full((1, 3), 1e9), level)
    assert seconds[0].tolist() == pytest.approx([0.01 + 1e-6, 0.1 + 1e-5, 0.01 + 1e-6])


@pytest.mark.parametrize("varied", [False, True], ids=["one machine", "a bandwidth for each layout"])
def test_many_groups_at_once_cost_what_each_does_alone(varied):
    print("seed 4")
    rng = np.random.default_rng(4)
    size, stride = (2 ** rng.integers(0, 5, 400) * 3 ** rng.integers(0, 2, 400) for _ in range(2))
    fast = rng.uniform(50.0, 100.0, 400)
    for strides in (stride, 1):
        own = [network(("node", 8, f if varied else 60.0, 2e-6), ("cluster", 4096, 5.0, 9e-6)) for f in fast]
        together = own[0]
        if varied:
            together = network(("node", 8, fast, 2e-6), ("cluster", 4096, 5.0, 9e-6))
        found = together.group([(size, strides)])
        for row in range(0, 400, 7):
            alone = own[row].group([(size[row], strides if np.ndim(strides) == 0 else strides[row])])
            assert [float(np.broadcast_to(f, 400)[row]) for f in found] == pytest.approx([float(a) for a in alone])
