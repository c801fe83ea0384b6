"""HCCL's rank tables, versions 1.0 and 1.2: read into a topology, and written in the order of a placement.

A table lists servers, their devices (one a die) and, in version 1.2, the supernodes that hold them. Its ranks count
positions of the machine: rank r of the table is position r of the topology that is made from it.
Format: hicann/hccl, docs/zh/user_guide/cluster_info_config/rank_table_config_a3.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from models.checks import check
from parallel.topology import Level, Topology

NODE, SUPERNODE, CLUSTER = "node", "supernode", "cluster"
"""Levels of a topology that a table's servers, its supernodes and the whole are."""
WITH_SUPERNODES = "1.2"
VERSIONS = ("1.0", WITH_SUPERNODES)
MODE = "HCCL would silently run it in AI Server mode, as if there were no supernode"


@dataclass(frozen=True)
class Server:
    """One server of a table."""

    name: str
    """`server_id`."""
    host: str
    """`host_ip`, or `server_id` where there is none."""
    pod: str | None
    """`super_pod_id`; None in version 1.0."""
    first: int
    """Its first rank; the others follow."""
    devices: tuple[int, ...]
    """`device_id` in the order of ranks: two dies of one package are 2k and 2k + 1."""


@dataclass(frozen=True)
class RankTable:
    """A table that was found to be legal."""

    source: Mapping[str, Any]
    """As the file has it."""
    version: str
    servers: tuple[Server, ...]
    """In the order of their ranks."""

    @property
    def ranks(self) -> int:
        """Devices in the table."""
        return sum(len(server.devices) for server in self.servers)

    @property
    def pods(self) -> list[list[Server]]:
        """Servers of each supernode, in the order of their ranks; in version 1.0 all of them."""
        return [list(servers) for _, servers in groupby(self.servers, lambda server: server.pod)]


def read(source: Any, msrun: bool = False) -> RankTable:
    """A table from the mapping of its file; with `msrun`, one that MindSpore's scheduler is to take ranks from.

    Raises `models.checks.ConfigError` where HCCL would refuse the table, or silently take it for something else.
    """
    version, status = _text(source, "version"), _text(source, "status")
    known = f"must be one of {', '.join(VERSIONS)}, but is {version!r}"
    check(version in VERSIONS, "rank table: version", known, "2.0, of the Ascend 950, is not read")
    check(status == "completed", "rank table: status", f"must be completed, but is {status!r}", "wait until it is")
    entries = _list(source, "server_list")
    names = [_text(entry, "server_id", "server_list") for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    check(twice is None, f"server {twice}", "is there twice", "give each server its own server_id")
    if "server_count" in source:
        rule = f"is {source['server_count']}, but server_list has {len(entries)}"
        check(str(source["server_count"]) == str(len(entries)), "rank table: server_count", rule, "correct it")
    pods = _pods(source, names) if version == WITH_SUPERNODES else {}
    table = RankTable(source, version, _servers(entries, pods))
    _check_devices(table, pods)
    order = [servers[0].pod for servers in table.pods]
    split = next((pod for pod in order if order.count(pod) > 1), None)
    rule = "has ranks of other supernodes among its own"
    check(split is None, f"supernode {split}", rule, "number the ranks of a supernode one after another")
    if msrun:
        without = next((entry["server_id"] for entry in entries if "pod_ip" not in entry), None)
        rule, remedy = "is missing, so msrun would ignore the table", "add the host's address, or place by node_rank"
        check(without is None, f"server {without}: pod_ip", rule, remedy)
    return table


def _pods(source: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    """`super_pod_id` by `server_id`."""
    remedy = "add it, or set version 1.0 where there is no supernode"
    check(bool(source.get("super_pod_list")), "rank table: super_pod_list", f"is missing: {MODE}", remedy)
    pods: dict[str, str] = {}
    for pod in _list(source, "super_pod_list"):
        name = _text(pod, "super_pod_id", "super_pod_list")
        for entry in _list(pod, "server_list", f"supernode {name}"):
            server = _text(entry, "server_id", f"supernode {name}")
            check(server not in pods, f"server {server}", f"is in supernodes {pods.get(server)} and {name}", "take one")
            pods[server] = name
    odd = min({*names} ^ {*pods}, default=None)
    check(odd is None, f"server {odd}", "is not both in server_list and in super_pod_list", "list each server in both")
    return pods


def _servers(entries: list[Any], pods: Mapping[str, str]) -> tuple[Server, ...]:
    """The servers in the order of their ranks, which count from 0 without a gap and follow each other in a server."""
    devices: dict[int, tuple[str, int]] = {}  # (server, device_id) by rank
    for entry in entries:
        name = entry["server_id"]
        for device in _list(entry, "device"):
            rank, number = _integer(device, "rank_id", name), _integer(device, "device_id", name)
            check(rank not in devices, f"rank {rank}", f"is there twice, also on server {name}", "renumber devices")
            devices[rank] = name, number
    check(max(devices) < len(devices), "rank_id", f"has a gap below {max(devices)}", "number devices from 0 on")
    hosts = {entry["server_id"]: _text(entry, "host_ip") for entry in entries if "host_ip" in entry}
    servers: dict[str, Server] = {}
    for name, ranks in groupby(sorted(devices), lambda rank: devices[rank][0]):
        ranks = list(ranks)
        rule = f"has rank {ranks[0]} apart from its others, which HCCL forbids"
        check(name not in servers, f"server {name}", rule, "number the ranks of a server one after another")
        numbers = tuple(devices[rank][1] for rank in ranks)
        check(len({*numbers}) == len(numbers), f"server {name}", "has a device_id twice", "give each device its own")
        servers[name] = Server(name, hosts.get(name, name), pods.get(name), ranks[0], numbers)
    return tuple(servers.values())


def _check_devices(table: RankTable, pods: Mapping[str, str]) -> None:
    """That the table says of a supernode all that HCCL asks for, or nothing."""
    devices = [(entry["server_id"], device) for entry in table.source["server_list"] for device in entry["device"]]
    addresses: dict[str, str] = {}
    for _, device in devices:
        rank = device["rank_id"]
        address = _text(device, "device_ip", f"rank {rank}") if "device_ip" in device else ""
        other = addresses.setdefault(address, rank) if address else rank
        check(other == rank, f"rank {rank}: device_ip", f"{address} is also that of rank {other}", "give each its own")
    if table.version != WITH_SUPERNODES:
        of_supernode = "super_pod_list" in table.source or any("super_device_id" in device for _, device in devices)
        rule = f"is {table.version}, but the table has super_pod_list or super_device_id: {MODE}"
        check(not of_supernode, "rank table: version", rule, f"set it to {WITH_SUPERNODES}")
        return
    single = len({*pods.values()}) == 1
    seen: dict[tuple[str, str], str] = {}
    for server, device in devices:
        rank = device["rank_id"]
        remedy = "take it from npu-smi info -t spod-info (SDID), or set version 1.0 where there is no supernode"
        check(bool(device.get("super_device_id")), f"rank {rank}: super_device_id", f"is missing: {MODE}", remedy)
        number = _text(device, "super_device_id", f"rank {rank}")
        other = seen.setdefault((pods[server], number), rank)
        check(other == rank, f"rank {rank}: super_device_id", f"{number} is also that of rank {other}", remedy)
        rule = "is missing, but RoCE joins the supernodes of this table"
        check(single or "device_ip" in device, f"rank {rank}: device_ip", rule, "add the address of its RoCE port")


def to_topology(table: RankTable, name: str, like: Topology) -> dict[str, Any]:
    """A topology file's mapping: the levels of `table`, with the numbers of the known topology `like`.

    Servers become its level `node`, supernodes `supernode`, the whole `cluster`; levels inside a node are kept where
    the devices of each of their blocks are neighbours. All blocks of a level must be equal, but for the last one.
    """
    levels = {level.name: level for level in like.levels}
    supernodes = table.version == WITH_SUPERNODES
    rule = f"of version {table.version} has no supernodes, but {like.name} has: {MODE}"
    remedy = f"write version {WITH_SUPERNODES} with super_pod_list and super_device_id, or name another with --like"
    check(supernodes or SUPERNODE not in levels, "the rank table", rule, remedy)
    per_node = _equal("servers", "devices", [len(server.devices) for server in table.servers])
    per_pod = _equal("supernodes", "servers", [len(servers) for servers in table.pods])
    members = {NODE: per_node} | ({SUPERNODE: per_pod} if supernodes else {})
    outermost = len(table.pods) if supernodes else len(table.servers)
    members |= {CLUSTER: outermost} if outermost > 1 else {}
    for name_of_level in members:
        rule, remedy = f"has no level {name_of_level!r}", f"name one that has {', '.join(members)} with --like"
        check(name_of_level in levels, f"topology {like.name}", rule, remedy)
    room = levels[NODE].ranks or per_node
    rule = f"have {per_node} devices, but a {NODE} of {like.name} has {room}"
    check(per_node <= room, "the rank table's servers", rule, "name another with --like")

    notes = [f"Counts are a rank table's (version {table.version}), all other numbers {like.name}'s:", *like.notes]
    kept: list[tuple[Level, int]] = []
    for level in like.levels[: levels[NODE].index]:
        if _neighbours(table, level):
            kept.append((level, level.ranks // math.prod(count for _, count in kept)))
        else:
            notes.append(f"Ranks do not fill one {level.name} after another, so that level is left out.")
    inner = math.prod(count for _, count in kept)
    kept += [(levels[level], count // (inner if level == NODE else 1)) for level, count in members.items()]
    source = {
        "name": name,
        "notes": notes,
        "rank": {**vars(like.rank), "peak_tflops": dict(like.rank.peak_tflops)},
        "planes": {level.plane.name: {"injection": level.plane.injection} for level, _ in kept},
        "levels": [
            {key: getattr(level, key) for key in ("name", "bandwidth", "latency", "links")}
            | {"members": count, "plane": level.plane.name}
            for level, count in kept
        ],
    }
    full = math.prod(count for _, count in kept)
    return source | ({"capacity": table.ranks} if table.ranks < full else {})


def _equal(what: str, unit: str, sizes: list[int]) -> int:
    """The size of all blocks but the last, which may be smaller."""
    counts = ", ".join(f"{len(list(run))} of {size}" for size, run in groupby(sizes))
    holds = all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]
    remedy = "a topology has equal blocks, but for a smaller one with the last ranks: renumber, or leave devices out"
    check(holds, f"the rank table's {what}", f"are unequal in {unit}, in the order of ranks: {counts}", remedy)
    return sizes[0]


def _neighbours(table: RankTable, level: Level) -> bool:
    """Whether ranks fill the blocks of `level` inside a node one after another, as their physical device ids say."""
    whole = len(table.servers[0].devices) % level.ranks == 0
    return whole and all(
        device // level.ranks == server.devices[place - place % level.ranks] // level.ranks
        for server in table.servers
        for place, device in enumerate(server.devices)
    )


def export(table: RankTable, placement: Sequence[int]) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """The table in the order of `placement`, and (host, node_rank) of each server in that order.

    `placement[rank]` is the position where a rank is to run, as in `parallel.mesh.Mesh`: the rank that its device has
    in `table`. Devices without a rank, and servers without any, are left out. HCCL takes permutations of supernodes, of
    servers within one and of devices within a server, no others.
    """
    rule = f"must name positions below the {table.ranks} of the rank table, each once"
    legal = len({*placement}) == len(placement) and all(0 <= position < table.ranks for position in placement)
    check(legal and len(placement) > 0, "placement", rule, "plan on a topology imported from this table")
    rank_of = {position: rank for rank, position in enumerate(placement)}
    used = [server for server in table.servers if _ranks(server, rank_of)]
    uneven = {len(_ranks(server, rank_of)) for server in used}
    rule = f"have {' or '.join(map(str, sorted(uneven)))} devices with ranks, but node_rank needs equally many on each"
    check(
        len(uneven) == 1, "the rank table's servers", rule, "leave devices out of the table, or plan on whole servers"
    )
    ordered = sorted(used, key=lambda server: min(_ranks(server, rank_of)))
    for server in ordered:
        ranks = sorted(_ranks(server, rank_of))
        rule = f"puts ranks of other servers between ranks {ranks[0]} and {ranks[-1]} of server {server.name}"
        check(ranks[-1] - ranks[0] < len(ranks), "placement", rule, "keep the ranks of a server together")
    pods = [pod for pod, _ in groupby(server.pod for server in ordered)]
    split = next((pod for pod in pods if pods.count(pod) > 1), None)
    rule = f"puts ranks of other supernodes among those of supernode {split}"
    check(split is None, "placement", rule, "keep the servers of a supernode together")

    written = copy.deepcopy(dict(table.source))
    place = {server.name: place for place, server in enumerate(ordered)}
    _order(written["server_list"], place)
    if "server_count" in written:
        written["server_count"] = str(len(ordered))
    for entry in written["server_list"]:
        entry["device"] = [device for device in entry["device"] if int(device["rank_id"]) in rank_of]
        for device in entry["device"]:
            device["rank_id"] = str(rank_of[int(device["rank_id"])])
        entry["device"].sort(key=lambda device: int(device["rank_id"]))
    if pods := written.get("super_pod_list"):
        for pod in pods:
            _order(pod["server_list"], place)
        pods[:] = [pod for pod in pods if pod["server_list"]]
        pods.sort(key=lambda pod: place[pod["server_list"][0]["server_id"]])
    return written, [(server.host, place[server.name]) for server in ordered]


def _order(entries: list[Any], place: Mapping[str, int]) -> None:
    """Servers' entries by their place; those that have none go."""
    entries[:] = [entry for entry in entries if entry["server_id"] in place]
    entries.sort(key=lambda entry: place[entry["server_id"]])


def _ranks(server: Server, rank_of: Mapping[int, int]) -> list[int]:
    """Of the devices that have one."""
    places = range(server.first, server.first + len(server.devices))
    return [rank_of[place] for place in places if place in rank_of]


def _text(entry: Any, key: str, where: str = "rank table") -> str:
    check(isinstance(entry, Mapping), where, f"must hold objects, but has {entry!r}", "see HCCL's guide of rank tables")
    check(key in entry, f"{where}: {key}", "is missing", "add it")
    check(isinstance(entry[key], str), f"{where}: {key}", f"must be a string, but is {entry[key]!r}", "quote it")
    return entry[key]


def _integer(entry: Any, key: str, server: str) -> int:
    text = _text(entry, key, f"server {server}")
    check(text.isdecimal(), f"server {server}: {key}", f"must be a number, but is {text!r}", "count from 0")
    return int(text)


def _list(entry: Any, key: str, where: str = "rank table") -> list[Any]:
    check(isinstance(entry, Mapping), where, f"must hold objects, but has {entry!r}", "see HCCL's guide of rank tables")
    value = entry.get(key)
    check(isinstance(value, list) and value != [], f"{where}: {key}", "must be a list with entries", "add them")
    return value
