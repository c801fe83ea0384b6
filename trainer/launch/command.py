"""The commands that start the ranks, and the environment they are started in."""

from __future__ import annotations

import errno
import os
import shutil
import site
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.checks import check
from trainer.errors import MachineError
from trainer.launch.cluster import Cluster

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CLUSTER_TIMEOUT = 600
"""Seconds in which all nodes must have met; msrun's default."""
HCCL_CONNECT_TIMEOUT = 1200
"""Seconds in which HCCL's links must stand. Its default of 120 is short for large runs, which use 1,200 and more."""

# A rank or a launcher reads these as its place in a world. Ours gets a world of its own.
FOREIGN_PREFIXES = ("PMI_", "PMIX_", "HYDI_", "MPI_LOCAL", "OMPI_COMM_WORLD_")
FOREIGN_NAMES = ("MS_ROLE", "MS_NODE_ID", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "RANK_ID", "RANK_SIZE")

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def worker_command(run_directory: Path, resume: str) -> list[str]:
    """One rank, which starts as `checkpoint.resume` says.

    `-P` keeps a folder `models/` in the working directory from shadowing the package.
    """
    return [sys.executable, "-P", "-m", "trainer.worker", str(Path(run_directory).absolute()), resume]


def mpi_command(ranks: int, worker: Sequence[str]) -> list[str]:
    """`mpiexec` for `ranks` ranks on this machine, in the way of MPICH's Hydra.

    `-rmk user` and `-launcher fork` keep it from spreading over the nodes of a Slurm job that it happens to stand in,
    `-localhost` from resolving a host name that a laptop may not resolve.
    """
    options = ["-launcher", "fork", "-rmk", "user", "-localhost", "127.0.0.1"]
    return [_program("mpiexec", "pip install mpich"), *options, "-n", str(ranks), *kept(worker)]


def msrun_command(cluster: Cluster, ranks: int, log_dir: Path, worker: Sequence[str]) -> list[str]:
    """`msrun` for this node's share of `ranks`."""
    local = local_ranks(cluster, ranks)
    # msrun takes what is not called python or python3 for a script and runs `python` on it. The bare name is found in
    # PATH, which `rank_environment` begins with this interpreter's folder.
    python = "python" if Path(sys.executable).with_name("python").exists() else "python3"
    return [
        _program("msrun", "pip install mindspore"),
        f"--worker_num={ranks}",
        f"--local_worker_num={len(local)}",
        f"--master_addr={cluster.master_addr}",
        f"--master_port={cluster.master_port}",
        f"--node_rank={cluster.node_rank}",
        f"--log_dir={log_dir}",
        "--join=True",
        f"--cluster_time_out={CLUSTER_TIMEOUT}",
        python,
        *kept(worker)[1:],
    ]


def kept(worker: Sequence[str]) -> list[str]:
    """A rank under its keeper, which says how it ended whatever launcher stands above."""
    return [sys.executable, "-P", "-m", "trainer.launch.keeper", *worker]


def local_ranks(cluster: Cluster, ranks: int) -> range:
    """The ranks that this node runs. Raises `ConfigError` unless every node runs equally many."""
    check(
        ranks % cluster.nodes == 0,
        "launcher.ranks",
        f"must be a multiple of the number of nodes, but is {ranks} on {cluster.nodes} nodes",
        f"set launcher.ranks or the layout to a multiple of {cluster.nodes}",
    )
    share = ranks // cluster.nodes
    return range(cluster.node_rank * share, (cluster.node_rank + 1) * share)


def _program(name: str, remedy: str) -> str:
    beside = Path(sys.executable).parent / name
    path = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if path is None:
        raise MachineError(f"{name} is neither beside {sys.executable} nor in PATH; {remedy}")
    return path


def rank_environment(environ: Mapping[str, str], local: int, cores: int, device: str) -> dict[str, str]:
    """The environment for this process as one of the `local` ranks that a launcher above has started on this machine.

    `cores` is how many this rank may run on. The launcher may have bound it to its share, or to a socket that several
    ranks share: it takes all of them, but no more than its share of the machine.
    """
    return launched_environment(environ, min(cores, (os.cpu_count() or cores) // local), device)


def launched_environment(environ: Mapping[str, str], threads: int, device: str) -> dict[str, str]:
    """The environment for ranks of `threads` threads each, at least 1. What the user has set stays."""
    env = {
        name: value
        for name, value in environ.items()
        if not name.startswith(FOREIGN_PREFIXES) and name not in FOREIGN_NAMES
    }
    # Spinning OpenMP threads take the cores that MindSpore's own threads work on.
    defaults = {"OMP_WAIT_POLICY": "passive", **dict.fromkeys(THREAD_VARIABLES, str(max(1, threads)))}
    if device == "Ascend":
        defaults["HCCL_CONNECT_TIMEOUT"] = str(HCCL_CONNECT_TIMEOUT)
    for name, value in defaults.items():
        env.setdefault(name, value)
    env["PYTHONUNBUFFERED"] = "1"
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    paths = env.get("PYTHONPATH", "").split(os.pathsep) if env.get("PYTHONPATH") else []
    if PACKAGE_ROOT not in [*site.getsitepackages(), site.getusersitepackages(), *paths]:
        # Run from a checkout: under -P the working directory no longer leads to the package.
        env["PYTHONPATH"] = os.pathsep.join([PACKAGE_ROOT, *paths])
    return env


def check_master_port(cluster: Cluster) -> None:
    """Raise `MachineError` if node 0 cannot listen where the ranks are to meet. Elsewhere there is nothing to check."""
    if cluster.node_rank != 0:
        return
    where = f"{cluster.master_addr}:{cluster.master_port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            cluster.master_addr, cluster.master_port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror as error:
        raise MachineError(
            f"launcher.master_addr {cluster.master_addr!r} cannot be resolved ({error.strerror}); name node 0's address"
        ) from error
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "the port is taken; set launcher.master_port to a free one, the same on every node",
            errno.EADDRNOTAVAIL: "the address is not this machine's, which is node 0; set launcher.master_addr or "
            "launcher.node_rank",
        }.get(error.errno, error.strerror)
        raise MachineError(f"cannot listen on {where}: {reason}") from error
