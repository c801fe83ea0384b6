"""`busway explain`: what one layout does and why it is not, or is, the plan; and what sets two layouts apart."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from models.checks import ConfigError
from parallel.planner import Plan, Search, evaluate
from parallel.planner.explain import NAMES, difference, lost_by, too_large
from parallel.planner.problem import CHOSEN
from parallel.schedules import Times, draw, simulate
from trainer.callbacks.console import plain_table, terminal
from trainer.compose import YAML, Composed, compose_recipe
from trainer.errors import EXIT_DONE
from trainer.plan import details, headline
from trainer.planning import problem_of, problem_of_layout, search
from trainer.recipe import Recipe
from trainer.settings import LayoutSettings
from trainer.train import add_recipe, recipe_of


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `busway explain`."""
    add_recipe(parser)
    parser.add_argument(
        "--against", metavar="key=value|PLAN.yaml", action="append", default=[],
        help="compare with the same recipe under other keys (may be given several times), or with a recipe's YAML file",
    )  # fmt: skip
    parser.add_argument("--timeline", action="store_true", help="draw the passes of one step on each pipeline rank")
    parser.add_argument("--alone", action="store_true", help="do not look for a better layout to compare with")
    parser.add_argument("--json", action="store_true", help="print the prediction as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict the recipe's layout, and compare it; with `--timeline` draw it."""
    name, overrides = recipe_of(args)
    console = terminal(tables=True)
    if args.timeline:
        composed = compose_recipe(name, overrides, plan=True)
        plan = _filled(composed, held) if (held := _held(composed)) else None
        _draw(plan, composed.recipe if plan else compose_recipe(name, overrides).recipe, console)
        return EXIT_DONE
    plan, held = _plan(name, overrides)
    other = _other(name, overrides, args.against) if args.against else None if args.alone else _best(plan, held)
    if args.json:
        print(json.dumps(plan.prediction() | _compared(plan, other)))
        return EXIT_DONE
    if held is not None:
        keys = " ".join(f"layout.{key}" for key in held) or "nothing"
        console.print(f"held: {keys}; the rest is what the planner finds for {plan.problem.ranks:,} ranks")
    for part in (headline(plan), *details(plan)):
        console.print(part)
    if not plan.estimate.fits:
        console.print(too_large(plan.problem, plan.estimate))
    if other:
        _compare(plan, other, "the other layout" if args.against else "the best layout", console)
    return EXIT_DONE


def _plan(name: str, overrides: list[str]) -> tuple[Plan, list[str] | None]:
    """The layout that a recipe says; the best that has its keys where it leaves the number of ranks open, and these."""
    composed = compose_recipe(name, overrides, plan=True)
    held = _held(composed)
    return (_own(compose_recipe(name, overrides).recipe) if held is None else _filled(composed, held)), held


def _held(composed: Composed) -> list[str] | None:
    """Keys of a layout that leaves its number of ranks open, on a machine that says how many there are; None: the
    layout is whole as it is, as one that lists its stages or recomputed layers is."""
    recipe = composed.recipe
    ranks = recipe.plan.ranks or recipe.machine.capacity
    listed = recipe.layout.stages is not None or not isinstance(recipe.layout.recompute, str)
    if recipe.layout.dp or recipe.launcher.ranks or listed or not ranks:
        return None
    plain, own = asdict(LayoutSettings()), asdict(recipe.layout)
    return [key for key in CHOSEN if key in composed.given or own[key] != plain[key]]


def _filled(composed: Composed, held: list[str]) -> Plan:
    """The best layout that has the keys that are held."""
    problem = problem_of(composed.recipe, composed.given | {*held})
    problem, result = search(problem, 1, composed.recipe.plan.allow_idle, lambda line: None)
    return Plan(problem, result.best[0])


def _own(recipe: Recipe) -> Plan:
    """The layout that a recipe says."""
    problem = problem_of_layout(recipe)
    return Plan(problem, evaluate(problem, [recipe.parallel_layout])[0])


def _other(name: str, overrides: list[str], against: list[str]) -> Plan:
    """What `--against` names."""
    files = [word for word in against if Path(word).suffix in YAML and "=" not in word]
    keys = [word for word in against if word not in files]
    if len(files) > 1:
        raise ConfigError(f"--against names {len(files)} recipes ({', '.join(files)}); name one")
    return _plan(*(files[0], keys) if files else (name, [*overrides, *keys]))[0]


def _best(plan: Plan, held: list[str] | None) -> Plan | None:
    """The best layout of the same ranks, whatever a recipe holds; None: nothing fits."""
    if held == []:
        return plan
    passed = {key: value for key, value in plan.problem.fixed.items() if key not in CHOSEN}
    problem = replace(plan.problem, fixed=passed)
    result = Search(problem, keep=1).run()
    return Plan(problem, result.best[0]) if result.best else None


def _compared(plan: Plan, other: Plan | None) -> dict[str, Any]:
    if other is None:
        return {}
    predicted = other.prediction()
    return {
        "compared_with": {key: predicted[key] for key in ("layout", "topology", "ranks", "step_s", "fits")},
        "this_is": lost_by(other, plan),
        "difference_s": {name: [own, there] for name, own, there in difference(plan, other)},
        "difference_sent_bytes": {name: [own, there] for name, own, there in _levels(plan, other)},
    }


def _levels(plan: Plan, other: Plan) -> list[tuple[str, int, int]]:
    """(level, wire bytes of each) of two plans."""
    return [(name, *(p.levels.get(name, 0) for p in (plan, other))) for name in {**plan.levels, **other.levels}]


def _question(plan: Plan) -> tuple[Any, ...]:
    """What tells two plans apart, beside what was held to find them."""
    asked = replace(plan.problem, fixed={})
    return plan.estimate.layout, asked


def _compare(plan: Plan, other: Plan, called: str, console: Console) -> None:
    """Another layout, and what it does better, term by term and level by level."""
    if _question(plan) == _question(other):
        console.print(f"this is {called}")
        return
    this = "this one is" if plan.estimate.fits else "if it fitted, this one would be"
    console.print(f"{called}: {headline(other)}\n{this} {lost_by(other, plan)}", "", sep="\n")
    table = plain_table(["what differs"], ["here", "there", "difference"])
    for name, own, there in difference(plan, other):
        if abs(own - there) > 1e-3 * other.estimate.step:
            table.add_row(f"{NAMES[name]}, s", f"{own:.3g}", f"{there:.3g}", f"{own - there:+.3g}")
    for level, *sizes in _levels(plan, other):
        own, there = (size / 1e9 for size in sizes)
        if own != there:
            table.add_row(f"sent over {level}, GB a rank", f"{own:,.4g}", f"{there:,.4g}", f"{own - there:+,.4g}")
    own, there = (p.estimate.peak / 2**30 for p in (plan, other))
    table.add_row("memory of the fullest rank, GiB", f"{own:.1f}", f"{there:.1f}", f"{own - there:+.1f}")
    console.print(table)


def _draw(plan: Plan | None, recipe: Recipe, console: Console) -> None:
    """The timeline of a plan or of the recipe's own layout, with the stages' own times where the machine's speed is
    known, else a forward of one unit, a backward of two and halves of one."""
    layout = plan.estimate.layout if plan else None if recipe.layout.auto else recipe.parallel_layout
    if layout is None or layout.pp == 1:
        raise ConfigError("layout.pp is 1, so there is no pipeline to draw; set layout.pp=2 or more")
    if plan or (recipe.machine.rank.device and all(level.bandwidth for level in recipe.machine.levels)):
        timeline = (plan or _own(recipe)).timeline
    else:
        timeline = simulate(layout.pipeline(recipe.train.global_batch), Times())
    width = shutil.get_terminal_size((120, 24)).columns
    coloured = console.is_terminal
    console.print(draw(timeline, width, colour=coloured), markup=coloured)
