"""Where the planner believes groups to lie is where the mesh has them; which places a scheduler or a fault leaves."""

from __future__ import annotations

import numpy as np
import pytest
from problems import machine

from models.checks import ConfigError
from parallel.allocation import positions
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.planner.constants import Constants
from parallel.planner.machine import expert_factors, factors
from parallel.planner.machine import machine as priced
from parallel.planner.problem import usable
from parallel.planner.shape import candidate
from trainer.compose import compose_topology

SEED = 3


def groups_of(mesh: Mesh, layout: Layout):
    """(ranks of every group, factors that the planner has for it) by axes."""
    c = candidate(layout, layout.dp * layout.micro_batch)
    for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp")):
        yield mesh.groups(axes), factors(c, axes)
    yield mesh.groups(("ep", "etp")), expert_factors(c, "ep")
    yield mesh.groups("edp"), expert_factors(c, "edp")


def test_every_group_has_the_members_in_a_block_that_prices_count_on():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    exact = checked = 0
    for _ in range(60):
        dp, cp, tp, pp = (int(rng.choice([1, 2, 3, 4, 6])) for _ in range(4))
        stage = dp * cp * tp
        ep = int(rng.choice([e for e in range(1, stage + 1) if stage % e == 0]))
        layout = Layout(
            dp=dp, cp=cp, tp=tp, pp=pp, ep=ep, order=tuple(rng.permutation(["tp", "cp", "dp", "pp"]).tolist())
        )
        levels = priced(machine(int(rng.choice([2, 4, 8, 12]))), Constants())
        mesh = Mesh(layout, machine(4096))
        block = levels.blocks[0]
        for groups, where in groups_of(mesh, layout):
            inside = int(np.max(levels.members(where)[0]))
            size = len(groups[0])
            assert size % inside == 0
            for group in groups:  # it falls into parts of so many ranks, each in one block
                held = np.array(group) // block
                assert all(count % inside == 0 for count in np.unique(held, return_counts=True)[1])
            most = min(max(np.unique(np.array(group) // block, return_counts=True)[1]) for group in groups)
            exact, checked = exact + (inside == most), checked + 1
    assert exact > 0.8 * checked  # the rest straddle blocks, where less is counted on


@pytest.mark.parametrize("topology", [machine(4), compose_topology("cloudmatrix384_roce", [])], ids=lambda t: t.name)
def test_every_group_lies_whole_inside_the_level_that_holds_all_ranks(topology):
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(40):
        dp, tp, pp = (int(rng.choice([1, 2, 3, 5, 12])) for _ in range(3))
        ep = int(rng.choice([e for e in range(1, dp * tp + 1) if dp * tp % e == 0]))
        layout = Layout(dp=dp, tp=tp, pp=pp, ep=ep, order=tuple(rng.permutation(["tp", "cp", "dp", "pp"]).tolist()))
        places = range(layout.world_size)
        levels = priced(usable(topology, places), Constants())
        holds = next(i for i, level in enumerate(topology.levels) if (level.ranks or 4096) >= layout.world_size)
        for groups, where in groups_of(Mesh(layout, topology), layout):
            assert int(np.max(levels.members(where)[holds])) == len(groups[0]), (layout, where)


def test_no_order_puts_a_group_nearer_than_the_one_that_bounds_count_on():
    levels = priced(machine(8), Constants())
    for order in (("tp", "cp", "dp", "pp"), ("pp", "dp", "cp", "tp"), ("dp", "tp", "pp", "cp")):
        layout = Layout(dp=4, cp=3, tp=2, pp=2, ep=4, order=order)
        placed = candidate(layout, 4)
        free = placed.__class__(**vars(placed) | {"order": None})
        for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp")):
            for nearest, own in zip(
                levels.members(factors(free, axes)), levels.members(factors(placed, axes)), strict=True
            ):
                assert np.all(nearest >= own)


def test_a_lost_cabinet_leaves_the_others():
    topology = compose_topology("cloudmatrix384", [])
    places = positions(topology, without=["cabinet:3"])
    assert len(places) == 768 - 64
    assert places[191:193] == (191, 256)
    assert len(positions(topology, 704, without=["cabinet:3"])) == 704


def test_an_uneven_allocation_is_counted_on_by_what_its_supernodes_share():
    topology = compose_topology("cloudmatrix384_roce", [])
    places = positions(topology, nodes=[48, 40, [0, 2, 5, 7]])
    three = compose_topology("cloudmatrix384_roce", ["topology.cluster.members=3"])
    assert positions(three, nodes=[48, 40, [0, 2, 5, 7]]) == places
    assert len(places) == (48 + 40 + 4) * 16
    assert places[768] == 768
    assert places[-1] == 2 * 768 + 7 * 16 + 15
    by_name = {level.name: level.ranks for level in usable(topology, places).levels}
    assert by_name["node"] == 16
    assert by_name["supernode"] == 64  # of 768, 640 and 64


def test_fewer_ranks_than_are_free_lie_in_as_few_blocks_as_can_be():
    topology = compose_topology("cloudmatrix384_roce", [])
    assert set(np.array(positions(topology, 512, nodes=[8, 40])) // 768) == {1}
    assert positions(topology, 128, nodes=[40, 8]) == tuple(range(768, 768 + 128))  # and leave the larger one whole
    places = np.array(positions(topology, 1000, nodes=[8, 48, 20]))
    assert np.array_equal(np.bincount(places // 768), [0, 768, 232])
    assert positions(topology, 100) == tuple(range(100))


def test_blocks_give_equal_numbers_of_nodes_where_they_can():
    topology = compose_topology("cloudmatrix384_roce", [])

    def shares(ranks: int) -> list[int]:
        return np.bincount(np.array(positions(topology, ranks, nodes=[48, 40])) // 768).tolist()

    assert shares(80 * 16) == [640, 640]
    assert shares(84 * 16) == [48 * 16, 36 * 16]  # 42 each are more than the second has
    assert shares(79 * 16) == [48 * 16, 31 * 16]  # no whole nodes each
    assert np.bincount(np.array(positions(topology, 24, nodes=[1, 1])) // 768).tolist() == [16, 8]


def test_a_level_is_no_faster_than_its_plane():
    topology = compose_topology(
        "cloudmatrix384_roce", ["topology.unified_bus.injection=20", "topology.roce.injection=5"]
    )
    before, after = (priced(t, Constants()) for t in (compose_topology("cloudmatrix384_roce", []), topology))
    share = np.array(after.bandwidth) / before.bandwidth
    levels = {level.name: own for level, own in zip(topology.levels, share, strict=True)}
    bandwidths = {level.name: level.bandwidth for level in topology.levels}
    assert levels["package"] == 1
    assert levels["node"] == pytest.approx(20 / bandwidths["node"] * Constants().outer / Constants().inner)
    assert levels["cluster"] == pytest.approx(5 / bandwidths["cluster"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"nodes": [1, -1]}, "plan.nodes[1] -1 must name nodes below the 48 of a supernode"),
        ({"without": ["cabinet"]}, "plan.without 'cabinet' must be LEVEL:NUMBER"),
        ({"without": ["cabinett:3"]}, "is no level of a fixed size of cloudmatrix384; did you mean 'cabinet'?"),
        ({"without": ["cabinet:12"]}, "plan.without cabinet:12 must be below cabinet:12"),
        ({"ranks": 800}, "plan.ranks 800 must be 1 to the 768 that are free"),
        ({"nodes": [49]}, "plan.nodes[0] 49 must name nodes below the 48 of a supernode"),
        ({"nodes": [48, 48]}, "plan.nodes of 2 has more entries than cloudmatrix384 has blocks of supernode"),
    ],
)
def test_places_that_are_not_there_get_one_line(words, line):
    with pytest.raises(ConfigError) as caught:
        positions(compose_topology("cloudmatrix384", []), **words)
    assert line in str(caught.value)
