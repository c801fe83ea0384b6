"""Topology files: what they hold and how a broken one is answered."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import recipes
from models.checks import ConfigError
from parallel.topology import load

FOLDER = Path(recipes.__file__).parent / "topology"


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def test_the_laptop_holds_any_number_of_ranks_on_one_level_and_has_no_peak():
    laptop = load(read("laptop"))
    assert laptop.capacity is None
    assert laptop.level_of(0, 10**6).name == laptop.level_of(3, 3).name == "machine"
    assert laptop.rank.peak_tflops == {}


def test_cloudmatrix384_counts_dies_packages_nodes_and_cabinets_as_published():
    machine = load(read("cloudmatrix384"))
    assert machine.capacity == 768
    # arXiv 2506.12708v2, s3.2 and s3.3: 384 packages of two dies, 48 nodes of 16 dies, 12 compute cabinets.
    assert {level.name: 768 // level.ranks for level in machine.levels} == {
        "package": 384, "node": 48, "cabinet": 12, "supernode": 1,
    }  # fmt: skip
    # 289 PFLOPS in BF16 at 752 TFLOPS a package, and 49.2 TB of memory.
    assert round(768 * machine.rank.peak_tflops["bfloat16"] / 1e3) == 289
    assert round(768 * machine.rank.memory_gib / 1e3, 1) == 49.2


def test_cloudmatrix384_has_its_published_bandwidths_and_latencies():
    machine = load(read("cloudmatrix384"))
    assert [(level.name, level.bandwidth, level.latency, level.plane.name) for level in machine.levels] == [
        ("package", 210, 0.2, "package_link"),
        ("node", 167, 1.2, "unified_bus"),
        ("cabinet", 164, 1.9, "unified_bus"),
        ("supernode", 164, 1.9, "unified_bus"),
    ]
    assert {plane.name: plane.injection for plane in machine.planes} == {"package_link": 270, "unified_bus": 196}
    assert machine.rank.memory_bandwidth == 1600


@pytest.mark.parametrize(
    ("a", "b", "level"),
    [
        (0, 0, "package"), (0, 1, "package"), (1, 2, "node"), (0, 15, "node"), (15, 16, "cabinet"),
        (0, 63, "cabinet"), (63, 64, "supernode"), (0, 767, "supernode"), (767, 766, "package"), (766, 752, "node"),
    ],
)  # fmt: skip
def test_the_level_of_two_dies_is_the_innermost_that_holds_both(a, b, level):
    machine = load(read("cloudmatrix384"))
    assert machine.level_of(a, b).name == machine.level_of(b, a).name == level


def test_each_die_meets_as_many_others_on_a_level_as_its_block_holds():
    machine = load(read("cloudmatrix384"))
    met = Counter(machine.level_of(300, other).name for other in range(768) if other != 300)
    assert met == {"package": 1, "node": 14, "cabinet": 48, "supernode": 704}


def test_a_position_outside_the_machine_is_refused():
    with pytest.raises(ValueError, match="position 768 is outside cloudmatrix384, which holds 768 ranks"):
        load(read("cloudmatrix384")).level_of(0, 768)


def test_levels_on_one_plane_share_one_injection_limit():
    machine = load(read("cloudmatrix384"))
    assert machine.levels[1].plane is machine.levels[3].plane


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_every_packaged_topology_has_its_files_name_and_gets_no_faster_outwards(name):
    machine = load(read(name))
    assert machine.name == name
    known = [level for level in machine.levels if level.bandwidth is not None]
    for inner, outer in pairwise(known):
        assert inner.reach >= outer.reach and inner.latency <= outer.latency
    for level in known:
        assert level.bandwidth <= level.reach <= level.plane.injection


# ranks that meet on each level, outermost left open; GB/s of a rank in one direction there; dense bf16 TFLOPS
CLUSTERS = {
    "cloudmatrix384_roce": ({"package": 2, "node": 16, "cabinet": 64, "supernode": 768}, 25, 376),
    "ascend910c_roce": ({"package": 2, "node": 16}, 25, 376),
    "atlas_900_a2": ({"node": 8}, 25, 376),
    "dgx_a100": ({"node": 8}, 25, 312),
    "dgx_h100": ({"node": 8}, 50, 989),
    "gb200_nvl72": ({"rack": 72}, 50, 2500),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_takes_any_number_of_ranks_over_a_plane_of_its_own(name):
    machine = load(read(name))
    blocks, bandwidth, peak = CLUSTERS[name]
    *inner, cluster = machine.levels
    assert {level.name: level.ranks for level in inner} == blocks
    assert (cluster.name, cluster.bandwidth, machine.rank.peak_tflops["bfloat16"]) == ("cluster", bandwidth, peak)
    assert cluster.plane not in [level.plane for level in inner]
    machine.check_fits(50_000)
    assert machine.level_of(0, 49_999) == cluster


def test_the_supernode_of_the_cluster_is_the_one_that_stands_alone():
    assert load(read("cloudmatrix384_roce")).levels[:-1] == load(read("cloudmatrix384")).levels


@pytest.mark.parametrize(
    ("packages", "levels"),
    [  # sizes that Huawei sells, and one node; a level larger than the supernode drops out
        (8, {"package": 2, "node": 16, "supernode": 16}),
        (16, {"package": 2, "node": 16, "supernode": 32}),
        (32, {"package": 2, "node": 16, "cabinet": 64, "supernode": 64}),
        (64, {"package": 2, "node": 16, "cabinet": 64, "supernode": 128}),
        (96, {"package": 2, "node": 16, "cabinet": 64, "supernode": 192}),
        (384, {"package": 2, "node": 16, "cabinet": 64, "supernode": 768}),
    ],
)  # fmt: skip
def test_members_of_a_logical_supernode_count_packages(packages, levels):
    machine = load({**read("cloudmatrix384_roce"), "supernode": {"members": packages}})
    assert {level.name: level.ranks for level in machine.levels[:-1]} == levels
    assert [level.index for level in machine.levels] == list(range(len(machine.levels)))
    assert machine.level_of(0, 2 * packages - 1).name != "cluster" == machine.level_of(0, 2 * packages).name


def test_one_machine_cut_into_six_logical_supernodes_holds_as_many_ranks_as_before():
    source = {**read("cloudmatrix384_roce"), "supernode": {"members": 64}, "cluster": {"members": 6}}
    assert load(source).capacity == 768
    assert load({**read("cloudmatrix384"), "supernode": {"members": 64}}).capacity == 128


def test_levels_and_planes_are_changed_under_their_names():
    source = {**read("cloudmatrix384"), "node": {"bandwidth": 200, "latency": None}, "unified_bus": {"injection": 98}}
    machine = load(source)
    assert (machine.levels[1].bandwidth, machine.levels[1].latency) == (200, None)
    assert machine.levels[1].plane is machine.levels[3].plane and machine.levels[1].plane.injection == 98
    assert machine.levels[2] == replace(load(read("cloudmatrix384")).levels[2], plane=machine.levels[2].plane)


def test_a_level_in_a_mesh_has_a_link_to_each_other_block_as_far_as_the_injection_goes():
    node, cluster = load(read("atlas_900_a2")).levels
    assert (node.links, node.bandwidth, node.reach) == ("mesh", 28, 7 * 28)
    assert (cluster.links, cluster.reach) == ("switch", cluster.bandwidth)
    assert load(read("atlas_900_a2") | {"node": {"members": 4}}).levels[0].reach == 3 * 28
    assert load(read("atlas_900_a2") | {"hccs": {"injection": 100}}).levels[0].reach == 100


def test_a_machine_whose_last_block_is_not_full_holds_what_its_capacity_says():
    machine = load({**read("cloudmatrix384"), "capacity": 700})
    assert machine.capacity == 700
    with pytest.raises(ValueError, match="position 700 is outside"):
        machine.level_of(0, 700)


def edited(path: str, value) -> dict:
    """cloudmatrix384 with the entry at `path` set, or removed where value is None."""
    source = copy.deepcopy(read("cloudmatrix384"))
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    at = source
    for step in way:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return source


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("levles", [], "topology.levles is no key, level or plane of cloudmatrix384; did you mean 'levels'?"),
        ("levels", None, "topology.levels is missing; add it (null where the value is not known)"),
        ("levels", [], "topology.levels must list at least one level; list them innermost first"),
        ("levels.1.bandwith", 1,
         "topology.levels[1].bandwith is no key of a topology file; did you mean 'bandwidth'?"),
        ("levels.0.members", "any", "topology.package.members is any below the outermost level; give a number"),
        ("levels.0.members", 2.5,
         "topology.package.members must be a whole number or any, but is 2.5; give a number"),
        ("levels.0.members", 0, "topology.package.members must be at least 1, but is 0; "
         "set topology.package.members=1 or more"),
        ("levels.2.bandwidth", 0, "topology.cabinet.bandwidth must be above 0, but is 0; "
         "set topology.cabinet.bandwidth to a number above 0"),
        ("levels.2.latency", "1us", "topology.cabinet.latency must be a number or null, but is '1us'; "
         "write a plain number"),
        ("levels.3.plane", "unified_buss", "topology.supernode.plane must be one of package_link, unified_bus, "
         "but is 'unified_buss'; did you mean 'unified_bus'?"),
        ("levels.2.name", "node", "topology.levels names 'node' more than once; give each level its own name"),
        ("supernod", {"members": 64},
         "topology.supernod is no key, level or plane of cloudmatrix384; did you mean 'supernode'?"),
        ("supernode", {"member": 64},
         "topology.supernode.member is no key of a topology file; did you mean 'members'?"),
        ("supernode", {"members": 48}, "topology.supernode.members 48 makes 96 ranks, no whole number of blocks of "
         "cabinet (64); set topology.supernode.members to a multiple of 32"),
        ("supernode", 64, "topology.supernode must be a mapping, but is 64; write it as key: value"),
        ("unified_bus", {"bandwidth": 64}, "topology.unified_bus.bandwidth is no key of a topology file; "
         "known: injection"),
        ("supernode", {"of": "rack"}, "topology.supernode.of must be one of die, package, node, cabinet, "
         "but is 'rack'; did you mean 'package'?"),
        ("levels.1.links", "ring", "topology.node.links must be one of switch, mesh, but is 'ring'; "
         "set topology.node.links to one of them"),
        ("supernode", {"members": "any", "links": "mesh"},
         "topology.supernode.members is any in a mesh, whose links it counts; give a number"),
        ("capacity", 769, "topology.capacity is 769, but the levels hold 768; lower it or leave it out"),
        ("levels.2.name", "rank", "topology: 'rank' is a key and names no level or plane; choose another name"),
        ("planes", [1], "topology.planes must be a mapping, but is [1]; write it as key: value"),
        ("rank.peak_tflops.bf16", 1,
         "topology.rank.peak_tflops key must be one of float64, float32, bfloat16, float16, "
         "int8, but is 'bf16'; did you mean 'bfloat16'?"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line_that_names_the_key_the_rule_and_the_remedy(path, value, message):
    with pytest.raises(ConfigError) as caught:
        load(edited(path, value))
    assert str(caught.value) == message
