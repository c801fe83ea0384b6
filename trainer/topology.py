"""`busway topology`: draws a machine, measures one, reads HCCL's rank tables and writes them in a plan's order."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from models.checks import ConfigError, check
from parallel import rank_table, topology
from parallel.topology import ANY, Topology
from trainer.callbacks.console import plain_table, terminal
from trainer.compose import YAML, compose_recipe, compose_topology, read_yaml
from trainer.errors import EXIT_DONE
from trainer.files import write_text
from trainer.probe import add_probe

LIKE = "cloudmatrix384_roce"
SET_OUT = "set --out to"
UNKNOWN = "-"

LEGEND = """
GB/s are of one rank in one direction, us are those of a small message. Two ranks talk on the innermost level that
holds both. What one rank sends on all levels of a plane together is at most the plane's injection."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `busway topology`; each sets `run`: parsed arguments to exit code."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_show(commands)
    _add_import(commands)
    _add_export(commands)
    add_probe(commands)


def _add_show(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "show",
        help="draw a machine: levels, planes, totals",
        description="Draw a machine: its levels, the planes that carry them, and the compute and memory of each block.",
    )
    command.add_argument("name", metavar="NAME|FILE", help="a packaged topology (recipes/topology) or a YAML file")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="topology.LEVEL.KEY=VALUE: topology.supernode.members=64"
    )
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    machine = compose_topology(args.name, args.overrides)
    if args.json:
        print(json.dumps(described(machine), indent=2))
        return EXIT_DONE
    console = terminal(tables=True)
    for part in (_headline(machine), "", _levels(machine), "", _planes(machine)):
        console.print(part)
    console.print(LEGEND, *machine.notes, sep="\n")
    return EXIT_DONE


def _add_import(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "import",
        help="make a topology from a cluster's HCCL rank table",
        description="Make a topology from HCCL's rank table, version 1.0 or 1.2: counts from the table, speeds from a "
        "topology that is known.",
    )
    command.add_argument("table", metavar="RANKTABLE.json", help="the cluster's rank table")
    command.add_argument(
        "--like", metavar="NAME|FILE", help=f"whose speeds to take (default for version 1.2: {LIKE}; else required)"
    )
    command.add_argument("--out", metavar="FILE.yaml", help="where to write the topology (default: print it)")
    command.add_argument("--msrun", action="store_true", help="ask for pod_ip, without which msrun ignores a table")
    command.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    table = _read_table(args.table, args.msrun)
    if not args.like and table.version != rank_table.WITH_SUPERNODES:
        raise ConfigError(f"{args.table} does not say of which machine it is; give --like NAME, such as atlas_900_a2")
    source = rank_table.to_topology(table, Path(args.table).stem, compose_topology(args.like or LIKE, []))
    text = yaml.safe_dump(source, sort_keys=False, width=110, allow_unicode=True)
    if not args.out:
        print(text, end="")
        return EXIT_DONE
    out = _out(args.out, YAML)
    write_text(out, text, SET_OUT)
    print(f"{out}: {topology.load(source).capacity:,} ranks; take it with topology={out}")
    return EXIT_DONE


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "export",
        help="write a rank table in the order of a plan, and the node rank of each host",
        description="Write HCCL's rank table in the order of a plan's placement, and the node rank of each host.",
    )
    command.add_argument("table", metavar="RANKTABLE.json", help="the cluster's rank table")
    command.add_argument("plan", nargs="?", metavar="PLAN.yaml", help="holds a placement (default: plain order)")
    command.add_argument("--out", required=True, metavar="FILE.json", help="where to write the table")
    command.add_argument("--msrun", action="store_true", help="ask for pod_ip, without which msrun ignores a table")
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    table = _read_table(args.table, args.msrun)
    out = _out(args.out, (".json",))
    check(out.resolve() != Path(args.table).resolve(), f"--out {out}", "is the table itself", "name another file")
    written, hosts = rank_table.export(table, _placement(args.plan, table) if args.plan else range(table.ranks))
    lines = [f"{host} {node_rank}" for host, node_rank in hosts]
    ids = [[device["device_id"] for device in server["device"]] for server in written["server_list"]]
    if any([*map(int, devices)] != [*range(len(devices))] for devices in ids):  # the n-th process takes device n
        lines = [f"{line} ASCEND_RT_VISIBLE_DEVICES={','.join(of)}" for line, of in zip(lines, ids, strict=True)]
    text = "".join(f"{line}\n" for line in lines)
    write_text(out, json.dumps(written, indent=2) + "\n", SET_OUT)
    write_text(out.with_suffix(".node_rank"), text, SET_OUT)
    print(text, end="")
    return EXIT_DONE


def _placement(file: str, table: rank_table.RankTable) -> list[int]:
    """The positions of a plan's ranks: those that it lists (`runs/NAME/plan.yaml`), or where its recipe puts them."""
    plan = read_yaml(Path(file), "plan")
    if "placement" not in plan:
        check(
            {"layout", "topology"} <= {*plan}, f"plan {file}", "has no placement, and is no recipe", "name a plan.yaml"
        )
        recipe = compose_recipe(file, []).recipe
        check(
            not recipe.layout.auto,
            f"plan {file}",
            "leaves its layout to the planner",
            "export what `busway plan` wrote",
        )
        known, holds = recipe.machine.capacity, f"is for the {recipe.machine.capacity} ranks of {recipe.machine.name}"
        rule = f"{holds}, but the table has {table.ranks}"
        check(known in (None, table.ranks), f"plan {file}", rule, "plan on a topology imported from this table")
        return list(recipe.placement)
    placement = plan["placement"]
    whole = isinstance(placement, list) and all(type(position) is int for position in placement)
    check(whole, "placement", "must be a list of positions", "write the position of rank 0, of rank 1, …")
    return placement


def _read_table(path: str, msrun: bool) -> rank_table.RankTable:
    try:
        source = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is not JSON ({error})"
        raise ConfigError(f"cannot read the rank table {path}: {reason}; name HCCL's JSON file") from error
    return rank_table.read(source, msrun)


def _out(name: str, suffixes: tuple[str, ...]) -> Path:
    check(Path(name).suffix in suffixes, f"--out {name}", f"must end in {suffixes[0]}", "name such a file")
    return Path(name)


def described(machine: Topology) -> dict[str, Any]:
    """A machine as plain data, with the compute (dense TFLOPS by dtype) and the memory (GiB) of a block of each level.

    What is unknown, or of a level that holds any number of ranks, is None.
    """
    levels = []
    for level in machine.levels:
        blocks = -(-machine.capacity // level.ranks) if machine.capacity and level.ranks else None
        ranks = machine.capacity if blocks == 1 else level.ranks  # of the only block, which need not be full
        row = dataclasses.asdict(level) | {"plane": level.plane.name, "blocks": blocks, "ranks": ranks}
        levels.append(row | _totals(machine, ranks))
    return {
        "name": machine.name,
        "ranks": machine.capacity,
        **_totals(machine, machine.capacity),
        "rank": dataclasses.asdict(machine.rank),
        "planes": {plane.name: plane.injection for plane in machine.planes},
        "levels": levels,
        "notes": list(machine.notes),
    }


def _totals(machine: Topology, ranks: int | None) -> dict[str, Any]:
    memory, peaks = machine.rank.memory_gib, machine.rank.peak_tflops
    return {
        "tflops": {dtype: peak * ranks for dtype, peak in peaks.items()} if ranks else {},
        "memory_gib": memory * ranks if memory and ranks else None,
    }


def _headline(machine: Topology) -> str:
    ranks = f"{_number(machine.capacity, 'any number of')} ranks; a rank is a {machine.rank.name}"
    compute, memory = _sizes(_totals(machine, machine.capacity), _dtype(machine))
    sizes = [compute + f" of dense {_dtype(machine)}"] * (compute != UNKNOWN) + [memory] * (memory != UNKNOWN)
    return f"{machine.name}: {ranks}" + (f"; in all {', '.join(sizes)}" if sizes else "")


def _levels(machine: Topology) -> Table:
    dtype, rows = _dtype(machine), described(machine)["levels"]
    table = plain_table(["level"], ["holds", "ranks", "in all", "GB/s", "us", "plane", dtype, "memory"])
    for depth, row in enumerate(reversed(rows)):
        inner = rows[row["index"] - 1]["name"] if row["index"] else machine.rank.name
        counts = (f"{row['members'] or ANY} x {inner}", _number(row["ranks"], ANY), _number(row["blocks"], ANY))
        speeds = (_number(row["bandwidth"]), _number(row["latency"]), row["plane"])
        table.add_row(_branch(depth, row["name"]), *counts, *speeds, *_sizes(row, dtype))
    counts = ("", "1", _number(machine.capacity, ANY))
    table.add_row(_branch(len(rows), machine.rank.name), *counts, "", "", "", *_sizes(_totals(machine, 1), dtype))
    return table


def _planes(machine: Topology) -> Table:
    table = plain_table(["plane"], ["injection GB/s"])
    for plane in machine.planes:
        table.add_row(plane.name, _number(plane.injection))
    return table


def _branch(depth: int, name: str) -> str:
    return f"{'   ' * (depth - 1)}└─ {name}" if depth else name


def _dtype(machine: Topology) -> str:
    return next(iter(machine.rank.peak_tflops), "compute")


def _number(value: float | None, unknown: str = UNKNOWN) -> str:
    return unknown if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _sizes(totals: dict[str, Any], dtype: str) -> tuple[str, str]:
    return (
        _scaled(totals["tflops"].get(dtype), ("TFLOPS", "PFLOPS", "EFLOPS"), 1000),
        _scaled(totals["memory_gib"], ("GiB", "TiB", "PiB"), 1024),
    )


def _scaled(value: float | None, units: tuple[str, ...], step: int) -> str:
    if value is None:
        return UNKNOWN
    while value >= step and units[1:]:
        value, units = value / step, units[1:]
    return f"{value:,.4g} {units[0]}"
