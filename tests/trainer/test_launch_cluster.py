"""Which machines a run takes, out of the recipe's keys and the schedulers' variables; and what a process's rank is."""

from __future__ import annotations

import re

import pytest
from omegaconf import OmegaConf

from models.checks import ConfigError
from trainer.launch import choose, local_size, resolve, world_from_environment
from trainer.launch.cluster import expand_hosts
from trainer.launch.settings import LauncherSettings

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "48", "SLURM_NODEID": "12", "SLURM_JOB_NODELIST": "a3-[009-056]"}
MODELARTS = {
    "MA_NUM_HOSTS": "4",
    "MA_VJ_NAME": "ma-job-x",
    "MA_TASK_NAME": "worker",
    "VC_TASK_INDEX": "3",
    "VC_WORKER_NUM": "4",
}
MODELARTS_HOSTS = ",".join(f"modelarts-job-x-worker-{i}.modelarts-job-x" for i in range(4))
VOLCANO = {"VC_TASK_INDEX": "1", "VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job", "VC_WORKER_NUM": "2"}


@pytest.mark.parametrize(
    ("keys", "environ", "expected"),
    [
        ({}, {}, (1, 0, "127.0.0.1", 8118)),
        ({"master_port": 9000}, {}, (1, 0, "127.0.0.1", 9000)),
        ({"nodes": 2, "node_rank": 1, "master_addr": "10.0.0.1"}, {}, (2, 1, "10.0.0.1", 8118)),
        ({"nodes": 2, "node_rank": 1, "master_addr": "10.0.0.1"}, SLURM, (2, 1, "10.0.0.1", 8118)),
        ({"nodes": 1}, SLURM, (1, 0, "127.0.0.1", 8118)),
        ({}, SLURM, (48, 12, "a3-009", 8118)),
        ({"master_addr": "10.0.0.9"}, SLURM, (48, 12, "10.0.0.9", 8118)),
        ({}, {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_NODELIST": "a,b"}, (2, 1, "a", 8118)),
        (
            {},
            SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "a3-[020,031]", "SLURM_NODEID": "1"},
            (2, 1, "a3-020", 8118),
        ),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}, (1, 0, "127.0.0.1", 8118)),
        ({}, MODELARTS, (4, 3, "ma-job-x-worker-0.ma-job-x", 8118)),
        (
            {},
            MODELARTS | {"VC_WORKER_HOSTS": MODELARTS_HOSTS},
            (4, 3, "modelarts-job-x-worker-0.modelarts-job-x", 8118),
        ),
        ({}, {"MA_NUM_HOSTS": "1", "VC_TASK_INDEX": "0"}, (1, 0, "127.0.0.1", 8118)),
        ({}, VOLCANO, (2, 1, "job-worker-0.job", 8118)),
        ({}, {"VK_TASK_INDEX": "0", "VC_TRAIN_HOSTS": "a.j,b.j,c.j"}, (3, 0, "a.j", 8118)),
        ({"master_addr": "h"}, {"VC_TASK_INDEX": "1", "VC_WORKER_NUM": "2"}, (2, 1, "h", 8118)),
    ],
)
def test_keys_win_over_the_schedulers_variables(keys, environ, expected):
    cluster = resolve(LauncherSettings(**keys), environ)
    assert (cluster.nodes, cluster.node_rank, cluster.master_addr, cluster.master_port) == expected


@pytest.mark.parametrize(
    ("keys", "environ", "names"),
    [
        ({"nodes": 2}, {}, ["launcher.node_rank", "2 nodes"]),
        ({"nodes": 2, "node_rank": 0}, {}, ["launcher.master_addr"]),
        ({"nodes": 2, "node_rank": 2, "master_addr": "a"}, {}, ["launcher.node_rank", "2 nodes"]),
        ({"node_rank": 3}, {}, ["launcher.node_rank", "1 node;"]),
        ({"nodes": 4}, SLURM, ["Slurm", "node rank 12", "4 nodes"]),
        ({}, SLURM | {"SLURM_NODEID": ""}, ["launcher.node_rank", "srun"]),
        ({}, SLURM | {"SLURM_NODEID": "x"}, ["SLURM_NODEID", "'x'"]),
        ({}, SLURM | {"SLURM_NNODES": "47"}, ["SLURM_JOB_NODELIST", "48 hosts", "47"]),
        ({}, SLURM | {"SLURM_JOB_NODELIST": "a3-[009-"}, ["SLURM_JOB_NODELIST", "'a3-[009-'"]),
        ({}, MODELARTS | {"VC_WORKER_HOSTS": "a,b"}, ["VC_WORKER_HOSTS", "2 hosts", "MA_NUM_HOSTS is 4"]),
        ({}, {"MA_NUM_HOSTS": "2", "VC_TASK_INDEX": "1"}, ["launcher.master_addr"]),
        ({}, VOLCANO | {"VC_WORKER_NUM": "3"}, ["VC_WORKER_HOSTS", "VC_WORKER_NUM is 3"]),
        ({}, VOLCANO | {"VC_TASK_INDEX": "2"}, ["Volcano", "node rank 2", "2 nodes"]),
        ({}, VOLCANO | {"VC_MASTER_HOSTS": "m.job"}, ["VC_MASTER_HOSTS and VC_WORKER_HOSTS", "launcher.node_rank"]),
    ],
)
def test_what_is_missing_or_contradictory_is_one_line_that_names_it(keys, environ, names):
    with pytest.raises(ConfigError) as caught:
        resolve(LauncherSettings(**keys), environ)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    for name in names:
        assert name in message


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,20],m", ["n08", "n09", "n10", "n11", "n20", "m"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1,3].local", ["r1n1.local", "r1n3.local", "r2n1.local", "r2n3.local"]),
    ],
)
def test_slurms_node_lists_are_expanded_in_order_with_their_padding(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[", "n]", "n[a-b]", "n[]", "a,,b", ","])
def test_a_malformed_node_list_is_refused(text):
    with pytest.raises(ConfigError):
        expand_hosts(text)


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, (0, 1)),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "768"}, (5, 768)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "768"}, (0, 1)),
        ({"RANK_SIZE": "8", "RANK_ID": "1"}, (0, 1)),
        ({"MS_ROLE": "MS_WORKER", "RANK_SIZE": "768", "RANK_ID": "17", "PMI_RANK": "1", "PMI_SIZE": "48"}, (17, 768)),
    ],
    ids=["alone", "MPICH", "Open MPI", "srun", "batch script", "a platform's RANK_SIZE", "msrun under srun"],
)
def test_a_process_knows_its_rank_under_each_launcher(environ, world):
    assert world_from_environment(environ) == world


@pytest.mark.parametrize(
    ("environ", "local"),
    [
        ({}, 32),
        ({"MPI_LOCALNRANKS": "8"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "16"}, 16),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4,12", "SLURM_NODEID": "2"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4,12"}, 12),
        ({"SLURM_NTASKS_PER_NODE": "16", "SLURM_NODEID": "1"}, 16),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_NTASKS_PER_NODE": "16"}, 8),
        ({"MPI_LOCALNRANKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_NODEID": "3"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "64"}, 32),
    ],
)
def test_the_ranks_of_this_machine_are_those_that_the_launcher_says(environ, local):
    assert local_size(environ, 32) == local


@pytest.mark.parametrize(
    ("name", "value"),
    [("MPI_LOCALNRANKS", "x"), ("SLURM_NTASKS_PER_NODE", "0"), ("SLURM_STEP_TASKS_PER_NODE", "8(x")],
)
def test_a_variable_that_gives_no_number_of_local_ranks_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}={re.escape(value)} does not say"):
        local_size({name: value}, 32)


def test_a_rank_outside_its_world_is_refused():
    with pytest.raises(ConfigError, match="PMI_RANK=8 and PMI_SIZE=8"):
        world_from_environment({"PMI_RANK": "8", "PMI_SIZE": "8"})


MPI_WORLD = {"PMI_RANK": "0", "PMI_SIZE": "4"}
ONE_TASK_A_NODE = SLURM | {"SLURM_PROCID": "12", "SLURM_STEP_NUM_TASKS": "48", "SLURM_STEP_NUM_NODES": "48"}


@pytest.mark.parametrize(
    ("kind", "ranks", "device", "environ", "chosen"),
    [
        ("auto", 1, "CPU", {}, "alone"),
        ("auto", 1, "Ascend", {}, "alone"),
        ("none", 1, "CPU", {}, "none"),
        ("auto", 4, "CPU", {}, "mpi"),
        ("auto", 8, "Ascend", {}, "msrun"),
        ("auto", 4, "CPU", MPI_WORLD, "none"),
        ("auto", 4, "CPU", {"PMI_RANK": "0", "PMI_SIZE": "1"}, "mpi"),
        ("auto", 768, "Ascend", ONE_TASK_A_NODE, "msrun"),
        ("auto", 768, "Ascend", ONE_TASK_A_NODE | {"PMI_RANK": "12", "PMI_SIZE": "48"}, "msrun"),
        ("none", 4, "CPU", MPI_WORLD, "none"),
        ("mpi", 1, "CPU", {}, "mpi"),
    ],
)
def test_auto_launches_unless_the_world_is_already_there(kind, ranks, device, environ, chosen):
    assert choose(LauncherSettings(kind=kind), ranks, device, environ) == chosen


@pytest.mark.parametrize(
    ("kind", "ranks", "device", "environ", "names"),
    [
        ("auto", 8, "CPU", MPI_WORLD, ["world of 4 ranks", "needs 8"]),
        ("auto", 1, "CPU", MPI_WORLD, ["world of 4 ranks", "needs 1"]),
        ("none", 8, "CPU", MPI_WORLD, ["world of 4 ranks", "needs 8"]),
        ("none", 2, "CPU", {}, ["no launcher", "needs 2 ranks"]),
        ("msrun", 2, "CPU", {}, ["launcher.kind", "msrun", "launcher.kind=mpi"]),
        ("mpi", 2, "Ascend", {}, ["launcher.kind", "mpi", "launcher.kind=msrun"]),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(kind, ranks, device, environ, names):
    with pytest.raises(ConfigError) as caught:
        choose(LauncherSettings(kind=kind), ranks, device, environ)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", "mpirun"), ("ranks", 0), ("nodes", 0), ("node_rank", -1), ("master_port", 80), ("master_addr", "")],
)
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ConfigError, match=f"launcher.{key}"):
        LauncherSettings(**{key: value})


def test_the_settings_are_a_structured_config():
    merged = OmegaConf.merge(OmegaConf.structured(LauncherSettings), {"ranks": 8, "master_addr": "10.0.0.1"})
    assert OmegaConf.to_object(merged) == LauncherSettings(ranks=8, master_addr="10.0.0.1")
