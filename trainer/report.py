"""`busway report`: what a run measured beside what the planner predicts of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from models.checks import ConfigError, check
from parallel.mesh import Mesh
from parallel.planner import Plan, evaluate
from parallel.planner.explain import scaled
from parallel.traffic import step_rows
from trainer import machine, metrics, precision
from trainer.callbacks.console import plain_table, terminal
from trainer.callbacks.summary import MEMORY_KINDS
from trainer.compose import YAML, read_yaml
from trainer.errors import EXIT_DONE, InputError
from trainer.files import write_text
from trainer.planning import dtypes_of, problem_of_layout
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory, load_recipe

FIGURES = {"step_s": "s a step", "tokens_per_s": "tokens/s", "mfu": "MFU", "memory_gib": "GiB a rank"}
KEY = ("axis", "collective", "dtype", "level")
SPEEDS = ("matmul", "attention", "memory", "inner", "outer")
"""Constants that say how much of what a machine promises is reached."""
FACTORS = 1e-5, 1e5
"""Between which a refit looks."""

Rows = list[dict[str, Any]]
Routing = Sequence[Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class Measured:
    """A run that has done a step, as its directory tells."""

    run: RunDirectory
    recipe: Recipe
    summary: Mapping[str, Any]

    @property
    def device(self) -> str:
        """`CPU` or `Ascend`."""
        return next(device for device, kind in MEMORY_KINDS.items() if kind == self.summary["memory_kind"])

    def routing(self) -> Routing | None:
        """What each rank routed where in the step whose traffic the summary has: the first after the last start."""
        if not self.recipe.metrics.routing:
            return None
        starts = [row[metrics.STEP] for row in metrics.read_rows(self.run.metrics) if row.get("event") == "resumed"]
        files = [self.run.routing([0, *starts][-1] + 1, rank) for rank in range(self.summary["world_size"])]
        return [_chosen(file) for file in files] if all(file.is_file() for file in files) else None

    def plan(self, routing: Routing | None = None) -> Plan:
        """What the planner says of the layout. Raises `ConfigError` where the topology does not know its speed."""
        problem = problem_of_layout(self.recipe, self.device)
        (estimate,) = evaluate(problem, [self.recipe.parallel_layout])
        return Plan(problem, estimate, routing)

    def traffic(self, routing: Routing | None) -> Rows:
        """The planner's account of a step, for which no speed need be known."""
        recipe = self.recipe
        mesh = Mesh(recipe.parallel_layout, recipe.machine, recipe.placement)
        sizes = (recipe.model, recipe.data.seq_len, recipe.train.global_batch, *dtypes_of(recipe, self.device))
        return step_rows(mesh, *sizes, routed=routing)

    def needed_gib(self) -> float:
        """The memory that a start looks for."""
        recipe, item = self.recipe, precision.choose(self.recipe.train.precision, self.device).item_bytes
        sizes = (recipe.data.seq_len, recipe.train.global_batch, item)
        return machine.needed_memory_gib(recipe.model, recipe.parallel_layout, *sizes)

    def stored(self) -> Mapping[str, Any] | None:
        """The prediction that came with the recipe, if it is still of this layout, topology, precision and batch."""
        found, keys = self.recipe.plan.prediction, asdict(self.recipe.parallel_layout)
        if not found:
            return None
        layout = {key: tuple(value) if isinstance(value, list) else value for key, value in found["layout"].items()}
        alike = all(keys[key] == value for key, value in layout.items() if key != "stages" or keys["pp"] > 1)
        alike &= (found["topology"], found["ranks"]) == (self.recipe.machine.name, self.summary["world_size"])
        alike &= found["dtypes"] == list(dtypes_of(self.recipe, self.device))
        tokens = self.recipe.train.global_batch * self.recipe.data.seq_len
        return found if alike and round(found["tokens_per_s"] * found["step_s"]) == tokens else None


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `busway report`."""
    parser.add_argument("directory", metavar="RUN", help="a run directory, such as runs/tiny_moe-1")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--refit",
        metavar="FILE.yaml",
        help="write the planner's constants, with speeds scaled to predict this run's step",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the run beside its prediction; with `--refit` write constants."""
    measured, refit = read(Path(args.directory)), args.refit and Path(args.refit)
    if refit:
        check(refit.suffix in YAML, f"--refit {refit}", "must end in .yaml", "name such a file")
        write_text(refit, refitted(measured), "set --refit to")
    found = document(measured)
    if args.json:
        print(json.dumps(found))
        return EXIT_DONE
    console = terminal(tables=True)
    show(console, found)
    if refit:
        console.print(f"{refit}: constants that predict this step; topology.rank.device={refit} takes them")
    return EXIT_DONE


def read(path: Path) -> Measured:
    """The run in a directory. Raises `InputError` unless it has done a step."""
    directory = RunDirectory(path)
    for file in (directory.recipe, directory.summary):
        if not file.is_file():
            raise InputError(f"{path} is no run directory: it has no {file.name}; name one, such as runs/tiny_moe-1")
    read_yaml(directory.recipe, "recipe")
    try:
        summary = json.loads(directory.summary.read_text(encoding="utf-8"))
        status = summary["status"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory.summary} is no summary of a run; run it again") from error
    if not summary.get("step_s"):
        raise InputError(f"{path} has not done a step (its status is {status}); report a run that has")
    return Measured(directory, load_recipe(directory), summary)


def _chosen(file: Path) -> dict[int, np.ndarray]:
    """layer -> the experts [N, K] of a rank's tokens."""
    with np.load(file) as saved:
        layers = {int(key.removeprefix("layer.")): saved[key] for key in saved.files if key.startswith("layer.")}
    return {layer: chosen.reshape(-1, chosen.shape[-1]) for layer, chosen in layers.items()}


def document(measured: Measured) -> dict[str, Any]:
    """All that is reported, as plain data. Ratios are measured over predicted."""
    summary, recipe, routing = measured.summary, measured.recipe, measured.routing()
    ours, theirs = {key: summary[key] for key in FIGURES}, measured.stored()
    plan, source, unpriced = None, "plan.prediction, which came with the recipe", ""
    try:
        plan = measured.plan(routing)
    except ConfigError as error:
        unpriced = str(error)
    if not theirs and plan:
        theirs, source = plan.prediction(), f"constants {plan.problem.fit.chosen}"
    elif not theirs:
        theirs, source = {"memory_gib": measured.needed_gib()}, f"memory's formula alone: {unpriced}"
    theirs = {key: theirs[key] for key in FIGURES if key in theirs}
    return {
        "run": str(measured.run),
        "status": summary["status"],
        "layout": recipe.parallel_layout.product(),
        "topology": recipe.machine.name,
        "ranks": summary["world_size"],
        "device": measured.device,
        "memory_kind": summary["memory_kind"],
        "measured": ours,
        "predicted": theirs,
        "ratio": {key: ours[key] / value for key, value in theirs.items() if ours[key] and value},
        "source": source,
        "routing": ("recorded" if routing else "in turn") if recipe.model.moe.experts else None,
        "traffic": compared(summary["traffic"], plan.traffic if plan else measured.traffic(routing)),
    }


def compared(measured: Rows, predicted: Rows) -> dict[str, Any]:
    """Two accounts, [measured, predicted]: whether all rows are the same, the bytes of each and those of a level."""
    sides = [{tuple(row[key] for key in KEY): row for row in rows} for rows in (measured, predicted)]
    rows, levels = [], {}
    for key in sorted({*sides[0], *sides[1]}):
        pair = [side.get(key, {}) for side in sides]
        sizes = {name: [row.get(name, 0) for row in pair] for name in ("payload_bytes", "wire_bytes")}
        rows.append(dict(zip(KEY, key, strict=True)) | sizes)
        levels[key[-1]] = [a + b for a, b in zip(levels.get(key[-1], (0, 0)), sizes["wire_bytes"], strict=True)]
    return {"equal": measured == predicted, "rows": rows, "wire_bytes_by_level": levels}


def show(console: Console, found: Mapping[str, Any]) -> None:
    """The report on a terminal."""
    figures = plain_table([""], ["measured", "predicted", "ratio"])
    for key, name in FIGURES.items():
        values = (found["measured"][key], found["predicted"].get(key), found["ratio"].get(key))
        name += f", {found['memory_kind']}" if key == "memory_gib" else ""
        figures.add_row(name, *("-" if value is None else f"{value:,.4g}" for value in values))
    traffic = plain_table(KEY, ["payload bytes", "predicted", "wire bytes", "predicted"])
    for row in found["traffic"]["rows"]:
        traffic.add_row(*(row[key] for key in KEY), *_pair(row["payload_bytes"]), *_pair(row["wire_bytes"]))
    for level, pair in found["traffic"]["wire_bytes_by_level"].items():
        traffic.add_row("all", "", "", level, "", "", *_pair(pair))
    verdict = "equal" if found["traffic"]["equal"] else "NOT equal"
    on = {
        "recorded": ", on the routing that was recorded",
        "in turn": ", which takes experts in turn; metrics.routing=true records what tokens choose",
        None: "",
    }
    heading = f"{found['run']} ({found['status']}): {found['layout']} on {found['topology']}, {found['device']}"
    for part in (heading, f"predicted by {found['source']}", "", figures, "", *[traffic, ""] * bool(traffic.row_count)):
        console.print(part)
    console.print(f"traffic of a step, the largest of any rank: {verdict} to the prediction{on[found['routing']]}")


def _pair(values: Sequence[int]) -> tuple[str, str]:
    return f"{values[0]:,}", "equal" if values[0] == values[1] else f"{values[1]:,}"


def refitted(measured: Measured) -> str:
    """A file of constants (`parallel.planner.constants`) whose speeds are scaled until the run's step is predicted.

    Raises `InputError` where no scale does: what does not depend on speeds, as gaps between kernels, takes longer.
    """
    plan, step_s = measured.plan(), measured.summary["step_s"]
    known, (low, high) = plan.problem.topology, FACTORS

    def step(share: float) -> float:  # constants are shares of the machine's rates, so that scaling these is the same
        machine = scaled(known, bandwidth=share)
        rank = replace(
            known.rank, memory_bandwidth=known.rank.memory_bandwidth * share,
            peak_tflops={dtype: peak * share for dtype, peak in known.rank.peak_tflops.items()},
        )  # fmt: skip
        return evaluate(replace(plan.problem, topology=replace(machine, rank=rank)), [plan.estimate.layout])[0].step

    if not step(high) < step_s < step(low):
        raise InputError(
            f"no speeds predict a step of {step_s:.3g} s on {known.name}, as {step(high):.3g} s of it do not depend on "
            "them; change its latencies, or constants such as `kernel`"
        )
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if step(middle) > step_s else (low, middle)
    found = asdict(plan.problem.fit.constants)
    found |= {name: float(f"{found[name] * low:.6g}") for name in SPEEDS}
    error = {"rows": 1, "median_abs_err": 0.0, "of": str(measured.run), "from": plan.problem.fit.chosen}
    table = {"pooled": "busway", "frameworks": {"busway": found | {"error": error}}}
    return yaml.safe_dump(table, sort_keys=False, width=110)
