"""HCCL's rank tables: what is read from them, what is refused, and the orders that they can be written in."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import yaml

import recipes
from models.checks import ConfigError
from parallel.rank_table import export, read, to_topology
from parallel.topology import load

# The example of HCCL's guide: hicann/hccl, docs/zh/user_guide/cluster_info_config/rank_table_config_a3.md.
EXAMPLE = {
    "status": "completed", "version": "1.2", "server_count": "2",
    "server_list": [
        {"server_id": "node_0", "host_ip": "172.16.0.100", "device": [
            {"device_id": "0", "super_device_id": "0", "device_ip": "192.168.1.6", "device_port": "16666",
             "backup_device_ip": "192.168.1.7", "backup_device_port": "16667", "host_port": "16665", "rank_id": "0"},
            {"device_id": "1", "super_device_id": "1", "device_ip": "192.168.1.7", "rank_id": "1"}]},
        {"server_id": "node_1", "host_ip": "172.16.0.101", "device": [
            {"device_id": "0", "super_device_id": "0", "device_ip": "192.168.2.6", "rank_id": "2"},
            {"device_id": "1", "super_device_id": "1", "device_ip": "192.168.2.7", "rank_id": "3"}]}],
    "super_pod_list": [
        {"super_pod_id": "0", "server_list": [{"server_id": "node_0"}]},
        {"super_pod_id": "1", "server_list": [{"server_id": "node_1"}]}],
}  # fmt: skip


def packaged(name):
    return load(yaml.safe_load((Path(recipes.__file__).parent / "topology" / f"{name}.yaml").read_text()))


def made(*pods, version="1.2"):
    """A table of supernodes, each a list of its servers' numbers of devices, ranks in plain order."""
    servers, super_pods, rank = [], [], 0
    for pod, sizes in enumerate(pods):
        super_pods.append({"super_pod_id": f"pod {pod}", "server_list": []})
        for place, size in enumerate(sizes):
            name = f"host-{pod}-{place}"
            super_pods[-1]["server_list"].append({"server_id": name})
            devices = [{"device_id": str(i), "rank_id": str(rank + i), "device_ip": f"10.0.{rank + i}"}
                       for i in range(size)]  # fmt: skip
            if version == "1.2":
                devices = [{**device, "super_device_id": f"{place}{device['device_id']:>02}"} for device in devices]
            servers.append({"server_id": name, "device": devices})
            rank += size
    table = {"status": "completed", "version": version, "server_list": servers}
    return table | ({"super_pod_list": super_pods} if version == "1.2" else {})


def imported(table, like):
    return load(to_topology(read(table), "mine", packaged(like)))


def test_supernodes_of_the_documented_example_are_joined_by_roce():
    machine = imported(EXAMPLE, "cloudmatrix384_roce")
    assert (machine.name, machine.capacity) == ("mine", 4)
    assert [machine.level_of(0, rank).name for rank in (1, 2, 3)] == ["package", "cluster", "cluster"]


def test_a_table_of_a_whole_machine_has_its_levels_with_the_speeds_of_the_known_one():
    known, machine = packaged("cloudmatrix384_roce"), imported(made([16] * 48, [16] * 48), "cloudmatrix384_roce")
    assert {level.name: level.ranks for level in machine.levels} == {
        "package": 2, "node": 16, "supernode": 768, "cluster": 1536,
    }  # fmt: skip
    speeds = {level.name: (level.bandwidth, level.latency, level.plane) for level in known.levels}
    assert {level.name: (level.bandwidth, level.latency, level.plane) for level in machine.levels}.items() <= (
        speeds.items()
    )
    assert machine.rank == known.rank


def test_one_supernode_has_no_cluster_and_one_server_of_version_1_0_is_a_node():
    assert [level.name for level in imported(made([16] * 3), "cloudmatrix384").levels][1:] == ["node", "supernode"]
    assert [level.name for level in imported(made([8], version="1.0"), "atlas_900_a2").levels] == ["node"]
    cluster = imported(made([8] * 4, version="1.0"), "atlas_900_a2")
    assert [(level.name, level.ranks) for level in cluster.levels] == [("node", 8), ("cluster", 32)]


@pytest.mark.parametrize("pods", [([16, 16], [16]), ([16, 16], [16, 8]), ([16, 16, 4],)])
def test_the_last_server_and_the_last_supernode_may_be_smaller(pods):
    machine, ranks = imported(made(*pods), "cloudmatrix384_roce"), sum(map(sum, pods))
    assert machine.capacity == ranks
    owner = [(pod, place) for pod, sizes in enumerate(pods) for place, size in enumerate(sizes) for _ in range(size)]
    for a in range(ranks):
        for b in range(a):
            level = machine.level_of(a, b).name
            assert (level == "cluster") == (owner[a][0] != owner[b][0])
            assert (level in ("node", "package")) == (owner[a] == owner[b])


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [0, 2, 4, 6], [1, 2, 3, 4]])
def test_a_package_whose_dies_are_no_neighbours_is_left_out(order):
    table = made([4])
    for device, number in zip(table["server_list"][0]["device"], order, strict=True):
        device["device_id"] = str(number)
    assert [level.name for level in imported(table, "cloudmatrix384").levels] == ["node", "supernode"]
    assert any("package" in note for note in imported(table, "cloudmatrix384").notes)


@pytest.mark.parametrize(
    ("pods", "message"),
    [
        (([16, 8], [16, 16]), "servers are unequal in devices, in the order of ranks: 1 of 16, 1 of 8, 2 of 16"),
        (([16], [16, 16]), "supernodes are unequal in servers, in the order of ranks: 1 of 1, 1 of 2"),
        (([32],), "servers have 32 devices, but a node of cloudmatrix384_roce has 16"),
    ],
)  # fmt: skip
def test_a_table_that_no_topology_can_express_says_why(pods, message):
    with pytest.raises(ConfigError, match=message):
        imported(made(*pods), "cloudmatrix384_roce")


def test_a_table_of_version_1_0_is_none_of_a_machine_with_supernodes():
    with pytest.raises(ConfigError, match="has no supernodes, but cloudmatrix384 has: .* AI Server mode"):
        imported(made([16], version="1.0"), "cloudmatrix384")


def edited(path, value=None):
    """The example with the entry at `path` set, or removed where value is None."""
    table = copy.deepcopy(EXAMPLE)
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    at = table
    for step in way:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return table


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("super_pod_list", None, "super_pod_list is missing: HCCL would silently run it in AI Server mode"),
        ("server_list.1.device.0.super_device_id", None, "rank 2: super_device_id is missing: HCCL would silently"),
        ("version", "1.0", "version is 1.0, but the table has super_pod_list or super_device_id: .*set it to 1.2"),
        ("version", "2.0", "version must be one of 1.0, 1.2, but is '2.0'"),
        ("status", "initializing", "status must be completed"),
        ("server_list.1.device.1.device_ip", None, "rank 3: device_ip is missing, but RoCE joins the supernodes"),
        ("server_list.1.device.1.device_ip", "192.168.1.6", "rank 3: device_ip 192.168.1.6 is also that of rank 0"),
        ("server_count", "3", "server_count is 3, but server_list has 2"),
        ("server_list.0.device.1.super_device_id", "0", "rank 1: super_device_id 0 is also that of rank 0"),
        ("super_pod_list.1.server_list.0.server_id", "node_0", "server node_0 is in supernodes 0 and 1"),
        ("super_pod_list.1.server_list.0.server_id", "node_2", "server node_1 is not both in server_list and"),
        ("server_list.1.server_id", "node_0", "server node_0 is there twice"),
        ("server_list.1.device.0.rank_id", "4", "rank_id has a gap below 4"),
        ("server_list.1.device.0.rank_id", "1", "rank 1 is there twice, also on server node_1"),
        ("server_list.1.device.0.rank_id", 2, "server node_1: rank_id must be a string, but is 2"),
        ("server_list.1.device.1.device_id", "0", "server node_1 has a device_id twice"),
        ("server_list.0.device", [], "device must be a list with entries"),
        ("server_list.0.device.0", "0", "must hold objects, but has '0'"),
    ],
)  # fmt: skip
def test_a_broken_table_is_one_line_that_names_the_place(path, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(edited(path, value))
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_device_ip_may_be_missing_in_one_supernode():
    table = made([2, 2])
    for server in table["server_list"]:
        for device in server["device"]:
            del device["device_ip"]
    assert read(table).ranks == 4


def test_ranks_of_servers_and_of_supernodes_may_not_interleave():
    table = made([4, 4], version="1.0")  # the guide's illegal example: {0, 1, 2, 7} and {3, 4, 5, 6}
    for server, ranks in zip(table["server_list"], ("0127", "3456"), strict=True):
        for device, rank in zip(server["device"], ranks, strict=True):
            device["rank_id"] = rank
    with pytest.raises(ConfigError, match="server host-0-0 has rank 7 apart from its others, which HCCL forbids"):
        read(table)
    table = made([2, 2], [2])
    for server, ranks in zip(table["server_list"], ("01", "45", "23"), strict=True):
        for device, rank in zip(server["device"], ranks, strict=True):
            device["rank_id"] = rank
    with pytest.raises(ConfigError, match="supernode pod 0 has ranks of other supernodes among its own"):
        read(table)


def test_msrun_needs_pod_ip():
    with pytest.raises(ConfigError, match="server node_0: pod_ip is missing, so msrun would ignore the table"):
        read(EXAMPLE, msrun=True)
    table = copy.deepcopy(EXAMPLE)
    for server in table["server_list"]:
        server["pod_ip"] = server["host_ip"]
    assert export(read(table, msrun=True), range(4))[0] == table


def test_plain_order_writes_the_table_that_was_read():
    written, hosts = export(read(EXAMPLE), range(4))
    assert written == EXAMPLE
    assert hosts == [("172.16.0.100", 0), ("172.16.0.101", 1)]


def test_supernodes_that_change_places_take_their_ranks_hosts_and_all_fields_along():
    written, hosts = export(read(EXAMPLE), [2, 3, 0, 1])
    assert hosts == [("172.16.0.101", 0), ("172.16.0.100", 1)]
    assert [pod["super_pod_id"] for pod in written["super_pod_list"]] == ["1", "0"]
    assert [device["rank_id"] for server in written["server_list"] for device in server["device"]] == list("0123")
    assert written["server_list"][1]["device"][0] == EXAMPLE["server_list"][0]["device"][0] | {"rank_id": "2"}
    assert read(written).servers[0].name == "node_1"


def test_servers_without_ranks_are_left_out_and_counted_out():
    written, hosts = export(read(EXAMPLE), [2, 3])
    assert hosts == [("172.16.0.101", 0)] and written["server_count"] == "1"
    assert read(written).servers[0].name == "node_1" and len(written["super_pod_list"]) == 1


def test_every_permutation_of_supernodes_servers_and_devices_is_written_and_read_back():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    table = read(made(*[[4] * 3] * 4))
    for _ in range(20):
        pods = [[[*range(4 * server, 4 * server + 4)] for server in range(3 * pod, 3 * pod + 3)] for pod in range(4)]
        draw.shuffle(pods)
        for pod in pods:
            draw.shuffle(pod)
            for server in pod:
                draw.shuffle(server)
        placement = [position for pod in pods for server in pod for position in server]
        written, hosts = export(table, placement)
        again = read(written)
        before = {rank: (server.name, id) for server in table.servers
                  for rank, id in enumerate(server.devices, server.first)}  # fmt: skip
        after = {rank: (server.name, id) for server in again.servers
                 for rank, id in enumerate(server.devices, server.first)}  # fmt: skip
        assert [after[rank] for rank in range(48)] == [before[position] for position in placement]
        assert hosts == [(server.host, number) for number, server in enumerate(again.servers)]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([0, 2, 1, 3, 4, 5, 6, 7], "puts ranks of other servers between ranks 0 and 2 of server host-0-0"),
        ([0, 1, 4, 5, 2, 3, 6, 7], "puts ranks of other supernodes among those of supernode pod 0"),
        ([0, 1, 2, 3, 4, 5, 6], "have 1 or 2 devices with ranks, but node_rank needs equally many on each"),
        ([0, 1, 2, 3, 4, 5, 6, 6], "must name positions below the 8 of the rank table, each once"),
        ([0, 1, 2, 3, 4, 5, 6, 8], "must name positions below the 8 of the rank table, each once"),
    ],
)  # fmt: skip
def test_orders_that_hccl_does_not_take_are_refused(placement, message):
    with pytest.raises(ConfigError, match=message):
        export(read(made([2, 2], [2, 2])), placement)


def test_servers_of_unequal_size_have_no_node_rank():
    with pytest.raises(ConfigError, match="have 2 or 4 devices with ranks, but node_rank needs equally many"):
        export(read(made([4, 2])), range(6))
