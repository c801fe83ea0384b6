"""Which machines take part in a run: from the recipe's keys, else from Slurm's, ModelArts' or Volcano's variables.

Sources: srun(1) and sbatch(1); ModelArts, "Managing Environment Variables of a Training Container"; Volcano's user
guides of the `env` and `svc` job plugins. No clock, no network, no MindSpore: a function of its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.checks import ConfigError, check
from trainer.launch.settings import LauncherSettings

DEFAULT_PORT = 8118
"""msrun's own default."""
LOCAL_ADDRESS = "127.0.0.1"

Environ = Mapping[str, str]


@dataclass(frozen=True)
class Cluster:
    """The machines of a run and this one's place among them."""

    nodes: int
    node_rank: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class _Found:
    """What a scheduler's variables say; None where they are silent."""

    source: str
    """`Slurm`, `ModelArts` or `Volcano`."""
    nodes: int
    node_rank: int | None
    master_addr: str | None


def resolve(settings: LauncherSettings, environ: Environ) -> Cluster:
    """The machines of the run. Keys win over variables.

    Raises `ConfigError` naming the variable or key where something is missing, malformed or contradictory.
    """
    by_hand = None not in (settings.nodes, settings.node_rank, settings.master_addr)
    found = None if by_hand or settings.nodes == 1 else _scheduler(environ)
    nodes = settings.nodes or (found.nodes if found else 1)
    port = settings.master_port or DEFAULT_PORT
    if nodes == 1:
        _check_node_rank(settings.node_rank or 0, nodes, "launcher.node_rank")
        return Cluster(1, 0, settings.master_addr or LOCAL_ADDRESS, port)

    node_rank = settings.node_rank if settings.node_rank is not None else found and found.node_rank
    master_addr = settings.master_addr or (found and found.master_addr)
    for key, value in (("node_rank", node_rank), ("master_addr", master_addr)):
        check(
            value is not None,
            f"launcher.{key}",
            f"is not set, but the run has {nodes} nodes and no scheduler's variable gives it",
            f"set launcher.{key}, or under Slurm start with: srun --ntasks-per-node=1 busway train …",
        )
    _check_node_rank(node_rank, nodes, "launcher.node_rank" if settings.node_rank is not None else found.source)
    return Cluster(nodes, node_rank, master_addr, port)


def _check_node_rank(node_rank: int, nodes: int, name: str) -> None:
    check(
        0 <= node_rank < nodes,
        name,
        f"gives node rank {node_rank}, but the run has {nodes} node{'s' * (nodes > 1)}",
        "node ranks go from 0 to nodes - 1: set launcher.nodes and launcher.node_rank",
    )


def _scheduler(environ: Environ) -> _Found | None:
    """What the first scheduler that is recognised says, None on a machine without one."""
    recognised: tuple[tuple[str, Callable[[Environ], _Found]], ...] = (
        ("SLURM_JOB_ID", _slurm),
        ("SLURM_NNODES", _slurm),
        ("MA_NUM_HOSTS", _modelarts),
        ("VC_TASK_INDEX", _volcano),
        ("VK_TASK_INDEX", _volcano),
    )
    return next((read(environ) for name, read in recognised if environ.get(name)), None)


def _slurm(environ: Environ) -> _Found:
    """A step's variables come before the job's: `srun --nodes=2` inside a job of 48 nodes is a run on 2."""
    nodes = _first_number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    name = next((name for name in names if environ.get(name)), None)
    hosts = expand_hosts(environ[name], name) if name else None
    if hosts and nodes not in (None, len(hosts)):
        raise ConfigError(
            f"{name} names {len(hosts)} hosts, but Slurm's number of nodes is {nodes}; "
            "set launcher.nodes, launcher.node_rank and launcher.master_addr"
        )
    nodes = nodes or (len(hosts) if hosts else 1)
    return _Found("Slurm", nodes, _first_number(environ, "SLURM_NODEID"), hosts[0] if hosts else None)


def _modelarts(environ: Environ) -> _Found:
    nodes = _first_number(environ, "MA_NUM_HOSTS")
    hosts = _host_list(environ, "VC_WORKER_HOSTS")
    if hosts:
        _check_hosts("VC_WORKER_HOSTS", hosts, "MA_NUM_HOSTS", nodes)
        master = hosts[0]
    elif environ.get("MA_VJ_NAME") and environ.get("MA_TASK_NAME"):
        # ModelArts' older jobs give no host list, but their domain names follow this pattern.
        master = f"{environ['MA_VJ_NAME']}-{environ['MA_TASK_NAME']}-0.{environ['MA_VJ_NAME']}"
    else:
        master = None
    return _Found("ModelArts", nodes, _first_number(environ, "VC_TASK_INDEX", "MA_TASK_INDEX"), master)


def _volcano(environ: Environ) -> _Found:
    """VC_<TASK>_HOSTS and VC_<TASK>_NUM come from the svc plugin, VC_TASK_INDEX (once VK_) from the env plugin."""
    lists = sorted(name for name in environ if re.fullmatch(r"VC_\w+_HOSTS", name) and environ[name])
    if len(lists) > 1:
        # The index counts within a task, and a pod is not told which task it belongs to.
        raise ConfigError(
            f"{' and '.join(lists)} are set, so that VC_TASK_INDEX does not say which node this is; "
            "give the Volcano job one task, or set launcher.nodes, launcher.node_rank and launcher.master_addr"
        )
    index = _first_number(environ, "VC_TASK_INDEX", "VK_TASK_INDEX")
    if not lists:
        return _Found("Volcano", _first_number(environ, "VC_WORKER_NUM") or 1, index, None)
    hosts = _host_list(environ, lists[0])
    number = lists[0].removesuffix("_HOSTS") + "_NUM"
    _check_hosts(lists[0], hosts, number, _first_number(environ, number))
    return _Found("Volcano", len(hosts), index, hosts[0])


def _check_hosts(name: str, hosts: list[str], number_name: str, number: int | None) -> None:
    check(
        number in (None, len(hosts)),
        name,
        f"names {len(hosts)} hosts, but {number_name} is {number}",
        "set launcher.nodes, launcher.node_rank and launcher.master_addr",
    )


def _host_list(environ: Environ, name: str) -> list[str]:
    return [host.strip() for host in environ.get(name, "").split(",") if host.strip()]


def _first_number(environ: Environ, *names: str) -> int | None:
    """The first of `names` that is set, as a number of at least 0."""
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        return None
    check(
        environ[name].isdecimal(),
        name,
        f"must be a whole number, but is {environ[name]!r}",
        "unset it, or set launcher.nodes, launcher.node_rank and launcher.master_addr",
    )
    return int(environ[name])


def expand_hosts(text: str, name: str = "the node list") -> list[str]:
    """The hosts of a Slurm node list, in order: `a[08-10,12],b` is a08 a09 a10 a12 b.

    Brackets may be several (`rack[1-2]node[1-2]`, the last varies fastest). Raises `ConfigError` naming `name`.
    """
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    hosts = [host for item in items for host in _expand_item(item, name)] if ",".join(items) == text else []
    check(bool(hosts), name, f"is no Slurm node list: {text!r}", "set launcher.nodes, .node_rank and .master_addr")
    return hosts


def _expand_item(item: str, name: str) -> list[str]:
    prefix, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, suffix = rest.partition("]")
    numbers = []
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        check(match is not None, name, f"has a bad range {part!r} in {item!r}", "set launcher.master_addr by hand")
        low, high = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return [prefix + number + tail for number in numbers for tail in _expand_item(suffix, name)]
