"""`busway plan`: the best layout of a recipe on a machine, as a table, plan.yaml, report.html and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parallel.layout import Layout
from parallel.planner import Plan, Problem, Result
from parallel.planner.explain import NAMES, Sensitivity, break_even, lost_by, sensitivity
from trainer.callbacks.console import terminal
from trainer.compose import Composed, compose_recipe
from trainer.errors import EXIT_DONE
from trainer.files import write_text
from trainer.machine import writing_to
from trainer.planning import plan_of, problem_of, search, with_layout
from trainer.recipe import resolved
from trainer.train import add_recipe, recipe_of

SET_OUT = "set plan.out to"


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `busway plan`."""
    add_recipe(parser)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts in the table (default 5)")
    parser.add_argument("--sensitivity", action="store_true", help="what more bandwidth, memory or batch would buy")
    parser.add_argument("--json", action="store_true", help="JSON alone on stdout; files only if plan.out is given")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print, and write the plan's files."""
    name, overrides = recipe_of(args)
    composed = compose_recipe(name, overrides, plan=True)
    progress = Console(stderr=True, highlight=False)
    with progress.status("planning") as status:
        question = problem_of(composed.recipe, composed.given)
        problem, result = search(question, max(args.top, 2), composed.recipe.plan.allow_idle, status.update)
        plans = [plan_of(composed.recipe, problem, found) for found in result.best]
        changes = sensitivity(problem, plans[0]) if args.sensitivity else []
    out = Path(composed.recipe.plan.out).expanduser() / composed.name
    if args.json:
        print(json.dumps(document(composed, plans, result, changes)))
    else:
        show(terminal(tables=True), problem, plans, result, changes)
    if not args.json or any(word.startswith("plan.out=") for word in overrides):
        _write(out, composed, plans, result, changes)
        print(f"{out}/plan.yaml runs with `busway train {out}/plan.yaml`; look at {out}/report.html", file=sys.stderr)
    return EXIT_DONE


def _write(out: Path, composed: Composed, plans: list[Plan], result: Result, changes: list[Sensitivity]) -> None:
    from trainer.plan_report import report

    with writing_to(out, SET_OUT):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "plan.yaml", resolved(with_layout(composed, plans[0]).recipe), SET_OUT)
    write_text(out / "report.html", report(composed.name, plans, result, changes), SET_OUT)


def document(composed: Composed, plans: list[Plan], result: Result, changes: list[Sensitivity]) -> dict[str, Any]:
    """The answer as JSON: the best plan in full, the others by what tells them apart."""
    return {
        "recipe": composed.name,
        "plan": plans[0].prediction(),
        "others": [
            {"layout": other.layout_keys(), "step_s": other.estimate.step, "memory_gib": other.estimate.peak / 2**30}
            | {"why": lost_by(plans[0], other)}
            for other in plans[1:]
        ],
        "pareto": [
            {"step_s": found.step, "memory_gib": found.peak / 2**30, "layout": found.layout.product()}
            for found in result.front
        ],
        "sensitivity": [{"change": c.change, "gain": c.gain, "layout": c.plan and c.plan.product()} for c in changes],
        "search": {
            "coarse": result.coarse, "ranked": result.ranked, "fitting": result.fitting,
            "simulated": result.simulated, "seconds": result.seconds,
        },
    }  # fmt: skip


def show(console: Console, problem: Problem, plans: list[Plan], result: Result, changes: list[Sensitivity]) -> None:
    """The answer on a terminal."""
    best = plans[0]
    console.print(headline(best))
    console.print(ranking(plans))
    for other in plans[1:2]:
        console.print(f"runner-up: {lost_by(best, other)}")
    for part in details(best):
        console.print(part)
    if len(plans) > 1:
        console.print(_overtaken(problem, plans))
    for change in changes:
        then = f"with {change.plan.product()}" if change.plan else "but no layout fits"
        console.print(f"{change.change}: {change.gain:+.1%} tokens/s, {then}")
    console.print(
        f"searched {result.coarse:,} cuts of the model; ranked {result.ranked:,} layouts, of which {result.fitting:,} "
        f"fit; simulated {result.simulated:,}; {result.seconds:.2f} s"
    )


def headline(plan: Plan) -> str:
    """The plan in a line: layout, machine, step, throughput."""
    found, problem = plan.estimate, plan.problem
    package = next((level for level in problem.topology.levels if level.name == "package"), None)
    per = f"{plan.tokens_per_s / problem.ranks:,.0f} a {problem.topology.rank.name}"
    if package:
        per += f", {plan.tokens_per_s / problem.ranks * package.ranks:,.0f} a package (card)"
    held = f"{found.peak / 2**30:.1f} of {problem.machine.memory / 2**30:.1f} GiB"
    return (
        f"{plan.mesh.describe()}\n{found.step:.4g} s a step, {plan.tokens_per_s:,.0f} tokens/s ({per}), "
        f"MFU {plan.mfu:.1%}, bubble {found.bubble:.1%}, {held}"
    )


def ranking(plans: list[Plan]) -> Table:
    """What tells plans apart, a row each."""
    table = _table("", "tp", "pp", "vpp", "schedule", "cp", "ep", "etp", "dp", "zero", "batch", "recompute", "order")
    for name in ("s a step", "tokens/s", "MFU", "bubble", "GiB"):
        table.add_column(name, justify="right")
    for number, plan in enumerate(plans, 1):
        found, layout = plan.estimate, plan.estimate.layout
        tp = f"{layout.tp} sp" if layout.sequence_parallel and layout.tp > 1 else str(layout.tp)
        cp = f"{layout.cp} {layout.cp_method}" if layout.cp > 1 else "1"
        zero = f"{layout.zero} of {layout.zero_group}" if layout.zero_group else str(layout.zero)
        sizes = (
            tp,
            layout.pp,
            layout.vpp,
            layout.schedule if layout.pp > 1 else "-",
            cp,
            layout.ep,
            layout.etp,
            layout.dp,
        )
        choices = (zero, layout.micro_batch, layout.recompute, _nesting(layout))
        figures = (f"{found.step:.4g}", f"{plan.tokens_per_s:,.0f}", f"{plan.mfu:.1%}", f"{found.bubble:.1%}")
        table.add_row(str(number), *map(str, (*sizes, *choices)), *figures, f"{found.peak / 2**30:.1f}")
    return table


def _nesting(layout: Layout) -> str:
    """The axes that have more than one rank, innermost first."""
    return " < ".join(axis for axis in layout.order if getattr(layout, axis) > 1) or "-"


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def details(plan: Plan) -> list[Any]:
    """Where a step's time goes, what each axis does where, and what ranks hold."""
    found = plan.estimate
    terms = _table("where the step goes", "s", "share")
    for name, seconds in sorted(plan.terms.items(), key=lambda term: -term[1]):
        terms.add_row(NAMES[name], f"{seconds:.3g}", f"{seconds / found.step:.1%}")
    axes = _table("axis", "ranks", "reaches", "payload GB a step", "exposed s")
    for axis in plan.axes:
        cells = (
            axis["axis"],
            axis["size"],
            axis["level"],
            f"{axis['payload_bytes'] / 1e9:.3g}",
            f"{axis['seconds']:.3g}",
        )
        axes.add_row(*map(str, cells))
    levels = _table("level", "wire GB a step and rank")
    for name, size in plan.levels.items():
        levels.add_row(name, f"{size / 1e9:.3g}")
    memory = plan.memory()
    held = _table("GiB of pipeline rank", *memory[0], "in all")
    for place in sorted({0, len(memory) // 2, len(memory) - 1}):
        parts = memory[place]
        held.add_row(str(place), *(f"{value:.2f}" for value in parts.values()), f"{sum(parts.values()):.2f}")
    notes = [f"HCCL_ALGO={plan.algorithms}"] if plan.algorithms else []
    notes += [placement(plan), f"constants: {plan.problem.fit.chosen}"]
    return ["", terms, "", axes, "", levels, "", held, "", *notes]


def placement(plan: Plan) -> str:
    """Whether the nesting of axes matters on this machine."""
    planes = {plan.mesh.topology.levels[0].plane.name} | {
        level.plane.name for level in plan.mesh.topology.levels if level.name in {axis["level"] for axis in plan.axes}
    }
    if (
        len({level.bandwidth for level in plan.mesh.topology.levels if level.plane.name in planes}) == 1
        or len(planes) == 1
    ):
        return "placement: every axis lies inside one network, where it makes no difference"
    return f"placement: axes nest, innermost first, {_nesting(plan.estimate.layout)}"


def _overtaken(problem: Problem, plans: list[Plan]) -> str:
    """At which bandwidth the runner-up wins."""
    found = []
    for plane in problem.topology.planes:
        share = break_even(problem, plans[0].estimate.layout, plans[1].estimate.layout, plane.name)
        if share is not None:
            found.append(f"with {share:.2g} x the bandwidth of {plane.name}")
    return (
        f"the runner-up wins {' or '.join(found)}" if found else "no bandwidth from 1/16 to 16 x lets the runner-up win"
    )
