"""`busway topology probe`: measures a running world by level and writes it down as a topology."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from models.checks import ConfigError, check, check_above, check_at_least
from parallel import topology
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.topology import ANY, Topology
from trainer import launch, machine
from trainer.callbacks.console import plain_table, terminal
from trainer.compose import YAML, compose_topology
from trainer.errors import EXIT_DONE, EXIT_MACHINE, EXIT_STOPPED, EXIT_UNEXPECTED, MachineError
from trainer.files import write_text
from trainer.launch import rank as processes
from trainer.launch.settings import LauncherSettings
from trainer.worker import carry_out

if TYPE_CHECKING:
    from parallel.collectives import Collectives

SECONDS = 30
NEAREST = "ascend910c"
"""Whose constants a device takes that has none."""
KINDS = ("point to point", "all_reduce", "all_gather", "all_to_all")
"""What is measured at each level."""
RESULT = "probe.json"
SET_OUT = "set --out to"


class Fit(NamedTuple):
    """Of messages at one level: seconds = latency + bytes that a rank sends / bandwidth."""

    bandwidth: float
    """GB/s."""
    latency: float
    """Microseconds; 0 where it cannot be told from none."""
    residual: float
    """Root mean square of the relative errors."""


def add_probe(commands: argparse._SubParsersAction) -> None:
    """Add `busway topology probe`."""
    command = commands.add_parser(
        "probe",
        help="measure the machine that ranks run on, and write it as a topology",
        description="Start ranks, measure messages and collectives by level, a matmul and memory on each rank, and "
        "write a topology. Under a launcher of the user's (mpiexec, srun) each process is a rank.",
    )
    command.add_argument("--ranks", type=int, help="ranks to start (default: one a core, at least 2)")
    command.add_argument("--like", default="laptop", metavar="NAME|FILE", help="whose levels to measure (laptop: one)")
    command.add_argument("--out", metavar="FILE.yaml", help="where to write the topology (default: LIKE_probed.yaml)")
    command.add_argument("--seconds", type=float, default=SECONDS, help=f"to measure for, about (default {SECONDS})")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the file."""
    like, ranks = compose_topology(args.like, []), _ranks(args)
    _check(like, ranks)
    check_above("--seconds", args.seconds, 0)
    out = Path(args.out or f"{like.name}_probed.yaml")
    check(out.suffix in YAML, f"--out {out}", "must end in .yaml", "name such a file")
    check(out.parent.is_dir(), f"--out {out}", f"must lie in a folder, but there is no {out.parent}", "make it first")
    settings, device = LauncherSettings(ranks=ranks), machine.device()
    folder = Path(tempfile.mkdtemp(prefix="busway-probe-"))
    (folder / "logs").mkdir()
    if launch.choose(settings, ranks, device) == "none":
        return _be_a_rank(folder, like, args.seconds, out)
    worker = [sys.executable, "-P", "-m", "trainer.probe", str(folder), args.like, str(ranks), str(args.seconds)]
    code = EXIT_STOPPED
    try:
        code = launch.supervise(launch.compose(settings, ranks, folder, device, os.environ, worker), console=2)
        if code == EXIT_DONE:
            finish(like, json.loads((folder / RESULT).read_text()), out)
        elif code == EXIT_STOPPED:
            print("busway: stopped; no topology was written", file=sys.stderr)
    finally:
        if code not in (EXIT_UNEXPECTED, EXIT_MACHINE):  # whose messages name logs in it
            shutil.rmtree(folder, ignore_errors=True)
    return code


def _ranks(args: argparse.Namespace) -> int:
    """As many as were asked for, as the launcher above has started, or as there are cores."""
    size = launch.world_from_environment(os.environ)[1]
    if args.ranks is None:
        return size if size > 1 else max(2, len(os.sched_getaffinity(0)))
    check_at_least("--ranks", args.ranks, 2)
    return args.ranks


def _check(like: Topology, ranks: int) -> None:
    capacity = like.capacity or ranks
    check(ranks <= capacity, f"--ranks {ranks}", f"is more than the {capacity} that {like.name} holds", "lower it")
    found, inner = meetings(like, ranks), 1
    for level in like.levels:
        if level.ranks != inner and level.name not in found:
            raise ConfigError(
                f"--ranks {ranks} are too few to meet at level {level.name} of {like.name}, which takes {inner + 1}; "
                "set --ranks to more, or --like to a topology without that level"
            )
        inner = level.ranks


def meetings(like: Topology, ranks: int) -> dict[str, list[tuple[int, ...]]]:
    """By level, the largest groups of ranks of which any two meet first there: one of each block inside."""
    found, inner = {}, 1
    for level in like.levels:
        groups: dict[tuple[int, int], list[int]] = {}
        for rank in range(ranks):
            groups.setdefault((rank // (level.ranks or ranks), rank % inner), []).append(rank)
        most = max(map(len, groups.values()))
        if most > 1:
            found[level.name] = [tuple(group) for group in groups.values() if len(group) == most]
        inner = level.ranks
    return found


def _be_a_rank(folder: Path, like: Topology, seconds: float, out: Path) -> int:
    """This process is a rank that Busway did not start. Each has a folder of its own for its log."""
    rank, size = launch.world_from_environment(os.environ)
    local = launch.local_size(os.environ, size)
    os.environ.update(launch.rank_environment(os.environ, local, len(os.sched_getaffinity(0)), machine.device()))
    code = _measure(folder, rank, like, size, seconds)
    if rank == 0 and code == EXIT_DONE:
        finish(like, json.loads((folder / RESULT).read_text()), out)
    if code in (EXIT_DONE, EXIT_STOPPED):
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _measure(folder: Path, rank: int, like: Topology, ranks: int, seconds: float) -> int:
    """Measure as a rank; rank 0 leaves the result in `folder`."""

    def connect() -> Collectives:
        from trainer.build import join

        return join(Mesh(Layout(dp=ranks), like))

    def work(collectives: Collectives) -> None:
        from trainer.measure import Probe

        def say(line: str) -> None:
            if collectives.rank == 0:
                print(line, flush=True)

        found = Probe(collectives, process.stop, seconds, say).measure()
        if collectives.rank == 0:
            write_text(folder / RESULT, json.dumps(found), "set TMPDIR to")

    process = processes.start(folder, rank)
    return carry_out(process, connect, work)


def main() -> int:
    """Entry of a process that Busway started."""
    if launch.is_scheduler(os.environ):
        from mindspore.communication import init

        init()
        return EXIT_DONE
    folder, like, ranks, seconds = sys.argv[1:]
    rank, _ = launch.world_from_environment(os.environ)
    return _measure(Path(folder), rank, compose_topology(like, []), int(ranks), float(seconds))


def fit(points: list[list[float]], what: str) -> Fit:
    """Least squares of the relative errors over [bytes, seconds]; `MachineError` where bytes cost nothing."""
    size, seconds = np.array(points).T
    terms = np.stack([1 / seconds, size / seconds], axis=1)
    (latency, each), *_ = np.linalg.lstsq(terms, np.ones(len(size)), rcond=None)
    if latency <= 0:
        latency, (each,) = 0.0, np.linalg.lstsq(terms[:, 1:], np.ones(len(size)), rcond=None)[0]
    if not (each > 0 and np.all(seconds > 0)):
        raise MachineError(
            f"{what} took no longer for more bytes: the machine is too busy; try again, or more --seconds"
        )
    residual = np.sqrt(np.mean((terms @ [latency, each] - 1) ** 2))
    return Fit(1e-9 / each, 1e6 * latency, float(residual))


def finish(like: Topology, found: Mapping[str, Any], out: Path) -> None:
    """Fit, write the topology and print what was measured."""
    fits = {
        level: {kind: fit(entry["points"], f"{kind} at level {level}") for kind, entry in kinds.items()}
        for level, kinds in found["levels"].items()
    }
    source = described(like, found, fits) | {"name": out.stem}
    topology.load(source)  # what cannot be read is not written
    write_text(out, yaml.safe_dump(source, sort_keys=False, width=110, allow_unicode=True), SET_OUT)
    table = plain_table(("level", ""), ("ranks", "GB/s", "us", "residual"))
    for level, kinds in fits.items():
        for kind, of in kinds.items():
            cells = (f"{of.bandwidth:,.3g}", f"{of.latency:,.1f}", f"{of.residual:.0%}")
            table.add_row(level, kind, str(found["levels"][level][kind]["ranks"]), *cells)
    rank, known = found["rank"], like.rank.peak_tflops.get(found["rank"]["dtype"])
    matmuls = f"{rank['tflops']:.3g} TFLOPS in matmuls of {rank['dtype']}" + (f" (of {known:g})" if known else "")
    for part in (
        table,
        f"a rank: {matmuls}; {rank['memory_bandwidth']:.3g} GB/s between it and its memory",
        "GB/s are what a rank sends while all do; us of a collective are those of all its steps",
        f"{out}: {found['ranks']} ranks; take it with topology={out}",
    ):
        terminal().print(part)


def described(like: Topology, found: Mapping[str, Any], fits: Mapping[str, Mapping[str, Fit]]) -> dict[str, Any]:
    """A topology file's mapping: levels as they were measured; of a rank what `like` knows, else as measured too.

    The planner's constants are shares of what `like` knows, so that a measured rate would count what is lost twice.
    """
    rank, measured = vars(like.rank), found["rank"]
    notes = [f"Measured by `busway topology probe` over {found['ranks']} ranks, all at work: medians of the slowest."]
    own = {key: measured[key] and _rounded(measured[key]) for key in ("memory_gib", "memory_bandwidth")}
    own |= {"device": NEAREST, "peak_tflops": {measured["dtype"]: _rounded(measured["tflops"])}}
    if not rank["device"]:
        notes.append(
            f"{NEAREST}'s constants are taken, as this device has none; `busway report RUN --refit` makes some."
        )
    if not rank["memory_gib"] and own["memory_gib"]:
        notes.append("memory_gib is what was free, in equal parts.")
    if not rank["peak_tflops"] and measured["dtype"] == "float32":
        own["peak_tflops"]["bfloat16"] = own["peak_tflops"]["float32"]
        notes.append("bfloat16 is emulated in float32, and has its peak.")
    levels, inner = [], 1
    for level in like.levels:
        members, speeds = level.members or ANY, {"bandwidth": level.bandwidth, "latency": level.latency}
        if members == ANY and found["ranks"] % inner == 0:
            members = found["ranks"] // inner
        if level.name in fits:
            sent, *others = fits[level.name].values()
            speeds = {"bandwidth": _rounded(sent.bandwidth), "latency": _rounded(sent.latency) or None}
            shares = ", ".join(f"{of.bandwidth:.3g} in {kind}" for kind, of in zip(KINDS[1:], others, strict=True))
            notes.append(f"{level.name}: GB/s point to point, the fit's residual {sent.residual:.0%}; {shares}.")
        wires = {"plane": level.plane.name, "links": level.links}
        levels.append({"name": level.name, "members": members, **speeds, **wires})
        inner = level.ranks or inner
    source = {
        "name": like.name,
        "notes": notes,
        "rank": {key: (dict(v) if key == "peak_tflops" else v) or own[key] for key, v in rank.items()},
        "planes": {plane.name: {"injection": plane.injection} for plane in like.planes},
        "levels": levels,
    }
    return source | ({"capacity": like.limit} if like.limit else {})


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
