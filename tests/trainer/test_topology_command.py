"""`busway topology`, as typed: machines drawn, rank tables read and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import recipes
from trainer import cli

HOSTS = ("172.16.0.100", "172.16.0.101")


@pytest.fixture
def table(tmp_path):
    """A rank table of two supernodes of one server with two dies each."""
    servers = [
        {"server_id": f"node_{i}", "host_ip": host, "device": [
            {"device_id": str(die), "super_device_id": str(die), "device_ip": f"192.168.{i}.{die}",
             "rank_id": str(2 * i + die)} for die in range(2)]}
        for i, host in enumerate(HOSTS)
    ]  # fmt: skip
    pods = [{"super_pod_id": str(i), "server_list": [{"server_id": f"node_{i}"}]} for i in range(2)]
    path = tmp_path / "site.json"
    path.write_text(
        json.dumps({"status": "completed", "version": "1.2", "server_list": servers, "super_pod_list": pods})
    )
    return path


@pytest.fixture
def busway(capsys):
    """`busway(code, *words)` runs a command that ends with `code`; what it printed, errors of one line among it."""

    def run(code, *words):
        assert cli.main([*map(str, words)]) == code
        printed = capsys.readouterr()
        assert code == 0 or printed.err.count("\n") == 1 and not printed.out
        return printed.err or printed.out

    return run


def test_show_draws_levels_planes_and_totals_as_published(busway):
    text = busway(0, "topology", "show", "cloudmatrix384")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # arXiv 2506.12708v2: 384 packages of 752 TFLOPS and 128 GB (as memory is made: GiB) are 289 PFLOPS and 48 TiB
    assert "supernode 12 x cabinet 768 1 164 1.9 unified_bus 288.8 PFLOPS 48 TiB" in lines
    assert "└─ package 2 x die 2 384 210 0.2 package_link 752 TFLOPS 128 GiB" in lines
    assert "└─ die 1 768 376 TFLOPS 64 GiB" in lines
    assert "unified_bus 196" in lines
    assert "49.2 TB" in text and "Published figures per card are per package" in text


def test_show_takes_overrides_by_name_before_and_after_an_option(busway):
    words = ("topology", "show", "cloudmatrix384", "topology.supernode.members=64", "--json")
    machine = json.loads(busway(0, *words, "topology.unified_bus.injection=98"))
    assert (machine["ranks"], machine["tflops"]["bfloat16"], machine["memory_gib"]) == (128, 128 * 376, 128 * 64)
    assert machine["planes"]["unified_bus"] == 98
    assert {level["name"]: level["blocks"] for level in machine["levels"]} == {
        "package": 64, "node": 8, "cabinet": 2, "supernode": 1,
    }  # fmt: skip


def test_show_counts_what_the_last_block_of_a_level_holds(busway, tmp_path):
    packaged = Path(recipes.__file__).with_name("topology") / "cloudmatrix384.yaml"
    uneven = {**yaml.safe_load(packaged.read_text()), "capacity": 700}
    (tmp_path / "uneven.yaml").write_text(yaml.safe_dump(uneven))
    machine = json.loads(busway(0, "topology", "show", tmp_path / "uneven.yaml", "--json"))
    whole, cabinet = machine["levels"][-1], machine["levels"][-2]
    assert (whole["ranks"], whole["memory_gib"]) == (machine["ranks"], machine["memory_gib"]) == (700, 700 * 64)
    assert (cabinet["ranks"], cabinet["blocks"]) == (64, 11)


def test_show_draws_a_machine_of_any_size_and_of_unknown_speed(busway):
    assert "any number of ranks; a rank is a process" in busway(0, "topology", "show", "laptop")
    machine = json.loads(busway(0, "topology", "show", "laptop", "--json"))
    assert (machine["ranks"], machine["memory_gib"], machine["levels"][0]["bandwidth"]) == (None, None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cloudmatrix",), "unknown topology 'cloudmatrix'; did you mean 'cloudmatrix384'?"),
        (("cloudmatrix384", "topology.supernod.members=4"), "did you mean 'supernode'?"),
        (("cloudmatrix384", "topology.supernode.membres=4"), "did you mean 'members'?"),
        (("cloudmatrix384", "layout.tp=4"), "layout.tp=4 changes no topology; write topology.LEVEL.KEY=VALUE"),
        (("cloudmatrix384", "topology.supernode.members=4,8"), "changes no topology"),
        (("none.yaml",), "cannot read the topology none.yaml"),
    ],
)
def test_what_cannot_be_shown_is_one_line(busway, words, message):
    assert message in busway(2, "topology", "show", *words)


def test_an_imported_table_is_a_topology_that_a_recipe_takes(busway, table, tmp_path):
    out = tmp_path / "site.yaml"
    assert "4 ranks; take it with topology=" in busway(0, "topology", "import", table, "--out", out)
    machine = json.loads(busway(0, "topology", "show", out, "--json"))
    assert [(level["name"], level["ranks"], level["bandwidth"]) for level in machine["levels"]] == [
        ("package", 2, 210), ("node", 2, 167), ("supernode", 2, 164), ("cluster", 4, 25),
    ]  # fmt: skip
    assert "name: site" in busway(0, "train", "llama3_8b", f"topology={out}", "layout.tp=4", "--cfg", "job")
    assert yaml.safe_load(busway(0, "topology", "import", table)) == yaml.safe_load(out.read_text())


def test_a_table_without_supernodes_asks_which_machine_it_is(busway, table):
    content = json.loads(table.read_text()) | {"version": "1.0"}
    del content["super_pod_list"]
    for server in content["server_list"]:
        for device in server["device"]:
            del device["super_device_id"]
    table.write_text(json.dumps(content))
    assert "give --like NAME, such as atlas_900_a2" in busway(2, "topology", "import", table)
    source = yaml.safe_load(busway(0, "topology", "import", table, "--like", "ascend910c_roce"))
    assert [level["name"] for level in source["levels"]] == ["package", "node", "cluster"]
    assert "AI Server mode" in busway(2, "topology", "import", table, "--like", "cloudmatrix384")


def test_export_writes_the_table_and_the_hosts_in_the_order_of_a_plan(busway, table, tmp_path):
    plan, out = tmp_path / "plan.yaml", tmp_path / "new.json"
    plan.write_text("layout: {tp: 2, dp: 2}\nplacement: [2, 3, 0, 1]\n")
    printed = busway(0, "topology", "export", table, plan, "--out", out)
    assert printed == (tmp_path / "new.node_rank").read_text() == f"{HOSTS[1]} 0\n{HOSTS[0]} 1\n"
    assert [server["server_id"] for server in json.loads(out.read_text())["server_list"]] == ["node_1", "node_0"]
    busway(0, "topology", "export", table, "--out", out)
    assert json.loads(out.read_text()) == json.loads(table.read_text())


def test_export_says_which_devices_a_plan_uses_of_a_server(busway, table, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("placement: [1, 3]\n")
    printed = busway(0, "topology", "export", table, plan, "--out", tmp_path / "new.json")
    assert printed.splitlines() == [f"{host} {rank} ASCEND_RT_VISIBLE_DEVICES=1" for rank, host in enumerate(HOSTS[:2])]


def test_export_leaves_out_what_a_plan_does_not_use(busway, table, tmp_path):
    site, out = tmp_path / "site.yaml", tmp_path / "new.json"
    busway(0, "topology", "import", table, "--out", site)
    model = ("model.layers=2", "data.seq_len=512", "train.global_batch=4", f"plan.out={tmp_path}")
    busway(0, "plan", "llama3_8b", f"topology={site}", *model, "plan.without=node:0")
    plan = tmp_path / "llama3_8b" / "plan.yaml"
    assert busway(0, "topology", "export", table, plan, "--out", out) == f"{HOSTS[1]} 0\n"
    written = json.loads(out.read_text())
    assert [server["server_id"] for server in written["server_list"]] == ["node_1"]
    assert [device["rank_id"] for device in written["server_list"][0]["device"]] == ["0", "1"]
    assert [[server["server_id"] for server in pod["server_list"]] for pod in written["super_pod_list"]] == [["node_1"]]
    assert "is the table itself" in busway(2, "topology", "export", table, plan, "--out", table)
    busway(0, "plan", "llama3_8b", "topology=cloudmatrix384", "plan.ranks=4", *model)
    assert "but the table has 4" in busway(2, "topology", "export", table, plan, "--out", out)


def test_export_says_which_devices_a_server_counts_in_another_order(busway, table, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("placement: [1, 0, 2, 3]\n")
    printed = busway(0, "topology", "export", table, plan, "--out", tmp_path / "new.json")
    assert printed.splitlines() == [
        f"{HOSTS[0]} 0 ASCEND_RT_VISIBLE_DEVICES=1,0", f"{HOSTS[1]} 1 ASCEND_RT_VISIBLE_DEVICES=0,1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("placement: [0, 2, 1, 3]", "puts ranks of other servers between ranks 0 and 2 of server node_0"),
        ("placement: [0, 4]", "must name positions below the 4 of the rank table, each once"),
        ("placement: [0, 0]", "must name positions below the 4 of the rank table, each once"),
        ("placement: [0, 1, 2]", "have 1 or 2 devices with ranks, but node_rank needs equally many on each"),
        ("server_list: []", "has no placement, and is no recipe; name a plan.yaml"),
        ("placement: [a, b]", "placement must be a list of positions"),
        ("placement: 3", "placement must be a list of positions"),
    ],
)
def test_a_plan_that_cannot_be_exported_writes_nothing(busway, table, tmp_path, plan, message):
    (tmp_path / "plan.yaml").write_text(plan)
    assert message in busway(2, "topology", "export", table, tmp_path / "plan.yaml", "--out", tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_bad_files_and_msrun_without_pod_ip_are_one_line(busway, table, tmp_path):
    (tmp_path / "no.json").write_text("{")
    assert "it is not JSON" in busway(2, "topology", "import", tmp_path / "no.json")
    assert "No such file" in busway(2, "topology", "import", tmp_path / "none.json")
    assert "must end in .json" in busway(2, "topology", "export", table, "--out", tmp_path / "new.yaml")
    assert "pod_ip is missing" in busway(2, "topology", "export", table, "--msrun", "--out", tmp_path / "new.json")
    assert "cannot write" in busway(3, "topology", "export", table, "--out", tmp_path / "none" / "new.json")
