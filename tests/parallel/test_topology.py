"""Topology files: what they hold and how a broken one is answered."""

from __future__ import annotations

import copy
from collections import Counter
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


def edited(path: str, value) -> dict:
    """cloudmatrix384 with the entry at `path` replaced, or removed where value is None."""
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
        ("levles", [], "topology.levles is no key of a topology file; did you mean 'levels'?"),
        ("levels", None, "topology.levels is missing; add it (null where the value is not known)"),
        ("levels", [], "topology.levels must list at least one level; list them innermost first"),
        ("levels.1.bandwith", 1,
         "topology.levels[1].bandwith is no key of a topology file; did you mean 'bandwidth'?"),
        ("levels.0.members", "any", "topology.levels[0].members is any below the outermost level; give a number"),
        ("levels.0.members", 2.5,
         "topology.levels[0].members must be a whole number or any, but is 2.5; give a number"),
        ("levels.0.members", 0, "topology.levels[0].members must be at least 1, but is 0; "
         "set topology.levels[0].members=1 or more"),
        ("levels.2.bandwidth", 0, "topology.levels[2].bandwidth must be above 0, but is 0; "
         "set topology.levels[2].bandwidth to a number above 0"),
        ("levels.2.latency", "1us", "topology.levels[2].latency must be a number or null, but is '1us'; "
         "write a plain number"),
        ("levels.3.plane", "unified_buss", "topology.levels[3].plane must be one of package_link, unified_bus, "
         "but is 'unified_buss'; did you mean 'unified_bus'?"),
        ("levels.2.name", "node", "topology.levels names 'node' more than once; give each level its own name"),
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
