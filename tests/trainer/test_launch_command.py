"""The composed commands and environments, and what is checked on the machine before they run."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from models.checks import ConfigError
from trainer import launch as launching
from trainer.errors import MachineError
from trainer.launch import rank_environment
from trainer.launch.command import launched_environment, worker_command
from trainer.launch.settings import LauncherSettings

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def bin_directory(tmp_path, monkeypatch) -> Path:
    """A folder with an interpreter and stand-ins for both launchers, which becomes the running interpreter's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "mpiexec", "msrun"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def kept(folder: Path, run: Path) -> list[str]:
    """A rank's command under its keeper, without the keeper's interpreter."""
    return ["-P", "-m", "trainer.launch.keeper", f"{folder}/python", "-P", "-m", "trainer.worker", str(run), "auto"]


def compose(settings: LauncherSettings, ranks: int, run: Path, device: str, environ: dict[str, str]):
    """The launch of workers that resume."""
    return launching.compose(settings, ranks, run, device, environ, worker_command(run, "auto"))


def test_on_cpu_mpiexec_starts_the_ranks_on_this_machine_alone(bin_directory, tmp_path):
    launch = compose(LauncherSettings(), 4, tmp_path / "run", "CPU", {"PATH": "/bin", "SLURM_NNODES": "2"})
    assert launch.command == [
        f"{bin_directory}/mpiexec",
        *("-launcher", "fork", "-rmk", "user", "-localhost", "127.0.0.1", "-n", "4"),
        f"{bin_directory}/python",
        *kept(bin_directory, tmp_path / "run"),
    ]
    assert (launch.ranks, launch.nodes) == (range(4), 1)


@pytest.mark.parametrize("device", ["CPU", "Ascend"])
def test_one_rank_has_a_process_of_its_own_and_no_launcher(bin_directory, tmp_path, device):
    launch = compose(LauncherSettings(), 1, tmp_path / "run", device, {})
    assert launch.command == [f"{bin_directory}/python", *kept(bin_directory, tmp_path / "run")]
    assert launch.ranks == range(1)


def test_on_one_ascend_node_msrun_starts_all_ranks(bin_directory, tmp_path):
    launch = compose(LauncherSettings(master_port=18118), 16, tmp_path / "run", "Ascend", {})
    assert launch.command == [
        f"{bin_directory}/msrun",
        "--worker_num=16",
        "--local_worker_num=16",
        "--master_addr=127.0.0.1",
        "--master_port=18118",
        "--node_rank=0",
        f"--log_dir={tmp_path}/run/logs/msrun",
        "--join=True",
        "--cluster_time_out=600",
        "python",
        *kept(bin_directory, tmp_path / "run"),
    ]
    assert (launch.ranks, launch.nodes) == (range(16), 1)


def test_on_48_nodes_each_starts_its_share_of_768_ranks(bin_directory, tmp_path):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "48", "SLURM_NODEID": "12", "SLURM_JOB_NODELIST": "a3-[009-056]"}
    by_hand = LauncherSettings(nodes=48, node_rank=12, master_addr="a3-009")
    launches = [
        compose(LauncherSettings(), 768, tmp_path / "run", "Ascend", slurm),
        compose(by_hand, 768, tmp_path / "run", "Ascend", {}),
    ]
    for launch in launches:
        assert launch.command == [
            f"{bin_directory}/msrun",
            "--worker_num=768",
            "--local_worker_num=16",
            "--master_addr=a3-009",
            "--master_port=8118",
            "--node_rank=12",
            f"--log_dir={tmp_path}/run/logs/msrun",
            "--join=True",
            "--cluster_time_out=600",
            "python",
            *kept(bin_directory, tmp_path / "run"),
        ]
        assert (launch.ranks, launch.nodes) == (range(192, 208), 48)
        assert launch.log.name == "launcher-0192.log"


def test_ranks_get_their_threads_and_a_world_of_their_own(bin_directory):
    environ = {
        "PATH": "/usr/bin",
        "PYTHONPATH": "/elsewhere",
        "OPENBLAS_NUM_THREADS": "7",
        "PMI_RANK": "0",
        "PMI_SIZE": "1",
        "RANK_SIZE": "8",
        "SLURM_NODEID": "12",
    }
    assert launched_environment(environ, 4, "CPU") == {
        "PATH": f"{bin_directory}:/usr/bin",
        "PYTHONPATH": f"{ROOT}:/elsewhere",
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "4",
        "OPENBLAS_NUM_THREADS": "7",
        "MKL_NUM_THREADS": "4",
        "SLURM_NODEID": "12",
    }
    ascend = launched_environment({}, 0, "Ascend")
    assert (ascend["OMP_NUM_THREADS"], ascend["HCCL_CONNECT_TIMEOUT"]) == ("1", "1200")
    assert launched_environment({"HCCL_CONNECT_TIMEOUT": "7200"}, 1, "Ascend")["HCCL_CONNECT_TIMEOUT"] == "7200"


def test_launched_ranks_share_the_cores_that_busway_may_use(bin_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)))
    launch = compose(LauncherSettings(), 3, tmp_path / "run", "CPU", {})
    assert launch.env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("local", "cores", "threads"),
    [(8, 64, "8"), (8, 8, "8"), (8, 4, "4"), (8, 32, "8"), (1, 16, "16"), (128, 64, "1"), (128, 1, "1")],
    ids=["unbound", "its share", "fewer", "a socket for four", "alone", "crowded", "crowded and bound"],
)
def test_a_rank_of_another_launcher_uses_the_cores_that_it_is_bound_to(monkeypatch, local, cores, threads):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert rank_environment({}, local, cores, "CPU")["OMP_NUM_THREADS"] == threads


def test_an_installed_package_is_not_put_before_the_standard_library(monkeypatch):
    monkeypatch.setattr("trainer.launch.command.site.getsitepackages", lambda: [ROOT])
    assert "PYTHONPATH" not in launched_environment({}, 1, "CPU")


def test_a_rank_does_not_import_from_the_working_directory(tmp_path):
    assert worker_command(tmp_path, "none") == [sys.executable, "-P", "-m", "trainer.worker", str(tmp_path), "none"]


@pytest.mark.parametrize(("device", "name", "remedy"), [("CPU", "mpiexec", "mpich"), ("Ascend", "msrun", "mindspore")])
def test_a_missing_launcher_is_a_machine_error_with_its_remedy(
    bin_directory, tmp_path, monkeypatch, device, name, remedy
):
    (bin_directory / name).unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match=f"{name} is neither .*; pip install {remedy}"):
        compose(LauncherSettings(), 2, tmp_path, device, {})


def test_a_launcher_elsewhere_in_the_path_is_found(bin_directory, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (bin_directory / "mpiexec").rename(elsewhere / "mpiexec")
    monkeypatch.setenv("PATH", str(elsewhere))
    assert compose(LauncherSettings(), 2, tmp_path, "CPU", {}).command[0] == f"{elsewhere}/mpiexec"


def test_a_taken_port_is_a_machine_error_on_node_0_alone(bin_directory, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        keys = {"nodes": 2, "master_addr": "127.0.0.1", "master_port": port}
        with pytest.raises(MachineError, match=f"127.0.0.1:{port}: the port is taken; set launcher.master_port"):
            compose(LauncherSettings(node_rank=0, **keys), 16, tmp_path, "Ascend", {})
        compose(LauncherSettings(node_rank=1, **keys), 16, tmp_path, "Ascend", {})


def test_a_master_address_of_another_machine_is_a_machine_error_on_node_0(bin_directory, tmp_path):
    # 192.0.2.0/24 is reserved for documentation (RFC 5737).
    with pytest.raises(MachineError, match="192.0.2.1:8118: the address is not this machine's"):
        compose(LauncherSettings(nodes=2, node_rank=0, master_addr="192.0.2.1"), 16, tmp_path, "Ascend", {})


@pytest.mark.parametrize(
    ("settings", "ranks", "device", "names"),
    [
        (LauncherSettings(nodes=2), 4, "CPU", ["launcher.nodes", "launcher.kind=none"]),
        (LauncherSettings(nodes=3, node_rank=0, master_addr="a"), 16, "Ascend", ["multiple", "16 on 3 nodes"]),
    ],
)
def test_ranks_that_do_not_fit_the_nodes_are_a_recipe_error(bin_directory, tmp_path, settings, ranks, device, names):
    with pytest.raises(ConfigError) as caught:
        compose(settings, ranks, tmp_path, device, {})
    assert all(name in str(caught.value) for name in names)


def test_the_users_environment_is_left_alone(tmp_path):
    before = dict(os.environ)
    launched_environment(os.environ, 1, "CPU")
    assert dict(os.environ) == before
