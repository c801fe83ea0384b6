"""Rank arithmetic against brute force, over random layouts."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest

from models.checks import ConfigError
from parallel.layout import ORDER, Layout
from parallel.mesh import DENSE, EXPERT, VIEWS, Mesh
from parallel.topology import Topology, load


def draw_layout(seed: int) -> Layout:
    draw = random.Random(seed)
    sizes = {axis: draw.choice((1, 1, 2, 3, 4)) for axis in ("dp", "cp", "tp", "pp")}
    stage = sizes["dp"] * sizes["cp"] * sizes["tp"]
    ep = draw.choice([n for n in range(1, stage + 1) if stage % n == 0])
    etp = draw.choice([n for n in range(1, stage // ep + 1) if stage // ep % n == 0])
    layout = Layout(**sizes, ep=ep, etp=etp, order=tuple(draw.sample(ORDER, 4)))
    print("seed", seed, layout)
    return layout


def brute_coordinates(layout: Layout) -> list[dict[str, int]]:
    """Coordinates of all ranks by counting, one digit at a time."""
    coordinates = []
    seen_in_stage: dict[int, int] = {}
    for rank in range(layout.world_size):
        rest, at = rank, {}
        for axis in layout.order:
            rest, at[axis] = divmod(rest, getattr(layout, axis))
        place = seen_in_stage.get(at["pp"], 0)
        seen_in_stage[at["pp"]] = place + 1
        rest, at["etp"] = divmod(place, layout.etp)
        at["edp"], at["ep"] = divmod(rest, layout.ep)
        coordinates.append(at)
    return coordinates


@pytest.mark.parametrize("seed", range(30))
def test_coordinates_groups_and_indices_equal_those_counted_by_hand(machine, seed):
    layout = draw_layout(seed)
    mesh = Mesh(layout, machine("any"))
    expected = brute_coordinates(layout)
    assert [mesh.coordinates(rank) for rank in range(mesh.world_size)] == expected
    for view in (DENSE, EXPERT):
        for axes in itertools.chain.from_iterable(itertools.combinations(view, n) for n in range(5)):
            others = [axis for axis in view if axis not in axes]
            groups: dict[tuple[int, ...], list[int]] = {}
            for rank, at in enumerate(expected):
                groups.setdefault(tuple(at[axis] for axis in others), []).append(rank)
            assert sorted(mesh.groups(axes)) == sorted(map(tuple, groups.values())), axes
            assert {len(group) for group in mesh.groups(axes)} == {mesh.size(axes)}
            for group in groups.values():
                for index, rank in enumerate(group):
                    assert mesh.group(axes, rank) == tuple(group)
                    assert mesh.index(axes, rank) == index
    for axis in {*DENSE, *EXPERT}:
        assert [mesh.index(axis, rank) for rank in range(mesh.world_size)] == [at[axis] for at in expected]


@pytest.mark.parametrize("seed", range(30, 40))
def test_views_have_the_sizes_of_their_axes_and_experts_keep_the_stages(machine, seed):
    layout = draw_layout(seed)
    mesh = Mesh(layout, machine("any"))
    assert mesh.size("data") == layout.dp
    assert mesh.size("loss") == layout.dp * layout.cp
    assert mesh.size("dense") == mesh.size("expert") == layout.world_size
    assert mesh.size(("edp", "ep", "etp")) == layout.dp * layout.cp * layout.tp
    assert set(mesh.groups(("edp", "ep", "etp"))) == set(mesh.groups(("dp", "cp", "tp")))
    assert set(VIEWS) == {"data", "dense", "expert", "loss"}


def test_axes_of_size_one_leave_the_label_and_make_groups_of_one(machine):
    mesh = Mesh(Layout(dp=2, tp=2), machine("any"))
    assert mesh.label("loss") == mesh.label("dp") == "dp"
    assert mesh.label("dense") == "dp x tp"
    assert mesh.label("cp") == "none"
    assert mesh.groups("cp") == ((0,), (1,), (2,), (3,))


def test_unknown_or_mixed_axes_and_ranks_outside_the_world_are_refused(machine):
    mesh = Mesh(Layout(dp=2), machine("any"))
    for axes in ("up", ("dp", "ep")):
        with pytest.raises(ValueError, match="no axes of one view"):
            mesh.groups(axes)
    with pytest.raises(ValueError, match="rank 2 is outside the world of 2 ranks"):
        mesh.coordinates(2)


def test_the_order_decides_which_axis_has_neighbouring_ranks(machine):
    assert Mesh(Layout(dp=2, tp=2), machine("any")).groups("tp") == ((0, 1), (2, 3))
    assert Mesh(Layout(dp=2, tp=2, order=("dp", "tp", "cp", "pp")), machine("any")).groups("tp") == ((0, 2), (1, 3))


def test_levels_follow_the_placement(machine):
    mesh = Mesh(Layout(dp=2, tp=2), machine(2, 4), placement=(0, 2, 1, 7))
    assert mesh.level_of(0, 2).name == "a" and mesh.level_of(0, 1).name == "b"
    assert mesh.span(mesh.group("dp", 0)).name == "a"
    assert mesh.span(mesh.group("dp", 1)).name == "b"
    assert mesh.span((3,)).name == "a"
    with pytest.raises(ValueError, match="a position each"):
        Mesh(Layout(dp=2), machine("any"), placement=(1, 1))
    with pytest.raises(ValueError, match="position 8 is outside machine"):
        Mesh(Layout(dp=2), machine(2, 4), placement=(0, 8))


def boxes(inside: float | None, outside: float | None, plane: str = "outside") -> Topology:
    """Boxes of two ranks, and what joins them."""
    level = {"latency": None, "members": 2}
    return load(
        {
            "name": "boxes",
            "rank": {"name": "core", "memory_gib": None, "memory_bandwidth": None, "peak_tflops": None},
            "planes": {"inside": {"injection": None}, "outside": {"injection": None}},
            "levels": [
                {**level, "name": "box", "bandwidth": inside, "plane": "inside"},
                {**level, "name": "cluster", "members": "any", "bandwidth": outside, "plane": plane},
            ],
        }
    )


OVER_BOXES = {"dp": 4, "ep": 4}


@pytest.mark.parametrize(
    ("topology", "sizes", "groups"),
    [
        (boxes(100, 50), OVER_BOXES, 2),
        (boxes(100, 50), {"dp": 8, "ep": 8}, 4),
        (boxes(100, 50), {"dp": 8, "ep": 8, "outer_groups": 2}, 2),
        (boxes(100, 50), {"dp": 4, "ep": 2, "etp": 2}, 2),
        (boxes(100, 51), OVER_BOXES, 1),
        (boxes(None, 50), OVER_BOXES, 1),
        (boxes(100, None), OVER_BOXES, 1),
        (boxes(100, 50, "inside"), OVER_BOXES, 1),
        (boxes(100, 50), {"dp": 4, "ep": 2}, 1),  # inside a box
        (boxes(100, 50), {"dp": 3, "ep": 3}, 1),  # a box and a half
        (boxes(100, 50), {**OVER_BOXES, "dispatch": "flat"}, 1),
        (boxes(100, 100), {**OVER_BOXES, "dispatch": "two_level"}, 2),
        (boxes(100, 100), {**OVER_BOXES, "dispatch": "two_level", "outer_groups": 4}, 4),
        (boxes(100, 50), {"dp": 8, "ep": 8, "dispatch": "two_level"}, 4),
        (boxes(100, 50), {"dp": 4, "dispatch": "two_level", "outer_groups": 2}, 1),  # without ep
    ],
)
def test_dispatch_goes_by_two_levels_where_a_group_spans_a_network_of_half_the_bandwidth(topology, sizes, groups):
    mesh = Mesh(Layout(**sizes), topology)
    assert mesh.dispatch()[0] == groups
    assert (f"({groups} outer groups)" in mesh.describe()) == (groups > 1)


UNUSED = "flat dispatch: the bandwidth of cluster or of box is not known; outer_groups has no effect"
UNEVEN = "flat dispatch: ep lies in unequal blocks on cluster, or not in its order"


@pytest.mark.parametrize(
    ("topology", "sizes", "placement", "why"),
    [
        (boxes(100, 50), OVER_BOXES, None, "two-level: 2 blocks of ep are joined by a slower network"),
        (boxes(100, 51), OVER_BOXES, None, "flat dispatch: cluster has more than half the bandwidth of box"),
        (boxes(None, 50), OVER_BOXES | {"outer_groups": 2}, None, UNUSED),
        (boxes(100, None), OVER_BOXES, None, "flat dispatch: the bandwidth of cluster or of box is not known"),
        (boxes(100, 50, "inside"), OVER_BOXES, None, "flat dispatch: no slower network inside ep"),
        (boxes(100, 50), {"dp": 4, "ep": 2}, None, "flat dispatch: no slower network inside ep"),
        (boxes(100, 50), {"dp": 3, "ep": 3}, None, UNEVEN),
        (boxes(100, 50), OVER_BOXES, (0, 2, 1, 3), UNEVEN),
        (boxes(100, 50), {**OVER_BOXES, "dispatch": "flat"}, None, "flat dispatch, as asked"),
        (boxes(100, 100), {**OVER_BOXES, "dispatch": "two_level"}, None, "two-level, as asked"),
    ],
)  # fmt: skip
def test_the_banner_says_why_dispatch_is_what_it_is(topology, sizes, placement, why):
    mesh = Mesh(Layout(**sizes), topology, **({"placement": placement} if placement else {}))
    assert mesh.dispatch()[1] == why
    assert why in mesh.describe()


def test_dispatch_is_flat_where_a_placement_cuts_a_group_unevenly():
    layout = Layout(dp=4, ep=4)
    assert Mesh(layout, boxes(100, 50), placement=(0, 1, 4, 5)).dispatch()[0] == 2
    assert Mesh(layout, boxes(100, 50), placement=(0, 1, 2, 4)).dispatch()[0] == 1
    assert Mesh(layout, boxes(100, 50), placement=(0, 2, 1, 3)).dispatch()[0] == 1  # boxes in turn


def test_a_layout_larger_than_the_machine_is_one_line(machine):
    with pytest.raises(ConfigError) as caught:
        Mesh(Layout(dp=9), machine(2, 4))
    assert str(caught.value) == (
        "topology machine holds 8 ranks, but the layout needs 9; "
        "choose a larger topology or axes with a product of at most 8"
    )


def test_the_banner_line_has_the_product_the_machine_and_what_each_axis_spans(machine):
    assert Mesh(Layout(dp=1), machine("any")).describe() == "pp 1 x dp 1 x cp 1 x tp 1 = 1 rank on machine"
    line = Mesh(Layout(dp=4, tp=2, ep=4), machine(2, 2, 2)).describe()
    assert line == (
        "pp 1 x dp 4 x cp 1 x tp 2 = 8 ranks on machine; experts edp 2 x ep 4 x etp 1; "
        "tp in one a; dp in one c; ep in one b; edp in one c; flat dispatch: no slower network inside ep"
    )
    line = Mesh(Layout(dp=1, pp=2, cp=4, schedule="zb_v", zero=3, recompute=(0, 2)), machine(2, 2, 2)).describe()
    assert line.endswith("pp in one c; zb_v, ring, ZeRO 3, recompute layers [0, 2]")


def test_the_arithmetic_runs_without_mindspore():
    code = (
        "import sys; sys.modules['mindspore'] = None\n"
        "import parallel.topology, parallel.layout, parallel.mesh, parallel.traffic"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
