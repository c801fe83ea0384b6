"""`busway explain`: what one layout does and why it is not, or is, the plan."""

from __future__ import annotations

import argparse
import json
import shutil

from rich.console import Console

from models.checks import ConfigError
from parallel.planner import Plan, Problem, Search, evaluate
from parallel.planner.explain import NAMES, difference, lost_by, too_large
from parallel.schedules import Times, draw, simulate
from trainer.callbacks.console import terminal
from trainer.compose import compose_recipe
from trainer.errors import EXIT_DONE
from trainer.plan import details, headline
from trainer.planning import plan_of, problem_of_layout
from trainer.recipe import Recipe
from trainer.train import add_recipe, recipe_of


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `busway explain`."""
    add_recipe(parser)
    parser.add_argument("--timeline", action="store_true", help="draw the passes of one step on each pipeline rank")
    parser.add_argument("--alone", action="store_true", help="do not search for a better layout to compare with")
    parser.add_argument("--json", action="store_true", help="print the prediction as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict the recipe's layout; with `--timeline` draw it."""
    recipe = compose_recipe(*recipe_of(args)).recipe
    console = terminal(tables=True)
    if args.timeline:
        _draw(recipe, console)
        return EXIT_DONE
    problem = problem_of_layout(recipe)
    plan = plan_of(recipe, problem, evaluate(problem, [recipe.parallel_layout])[0])
    if args.json:
        print(json.dumps(plan.prediction()))
        return EXIT_DONE
    for part in (headline(plan), *details(plan)):
        console.print(part)
    if not plan.estimate.fits:
        console.print(too_large(problem, plan.estimate))
    if not args.alone:
        _compare(problem, plan, console)
    return EXIT_DONE


def _compare(problem: Problem, plan: Plan, console: Console) -> None:
    """The best layout of as many ranks, and what it does better, term by term."""
    result = Search(problem, keep=1).run()
    if not result.best:
        return
    best = Plan(problem, result.best[0], plan.dtypes)
    this = "this one is" if plan.estimate.fits else "if it fitted, this one would be"
    console.print(f"the best layout: {headline(best)}\n{this} {lost_by(best, plan)}")
    for name, seconds, own in difference(best, plan)[:6]:
        if abs(own - seconds) > 1e-3 * best.estimate.step:
            console.print(f"  {NAMES[name]}: {own:.3g} s, there {seconds:.3g} s")


def _draw(recipe: Recipe, console: Console) -> None:
    """The timeline, with the stages' own times where the machine's speed is known, else a forward of one unit, a
    backward of two and halves of one."""
    if recipe.layout.auto or recipe.parallel_layout.pp == 1:
        raise ConfigError("layout.pp is 1, so there is no pipeline to draw; set layout.pp=2 or more")
    if recipe.machine.rank.device and all(level.bandwidth for level in recipe.machine.levels):
        problem = problem_of_layout(recipe)
        timeline = Plan(problem, evaluate(problem, [recipe.parallel_layout])[0]).timeline
    else:
        timeline = simulate(recipe.parallel_layout.pipeline(recipe.train.global_batch), Times())
    width = shutil.get_terminal_size((120, 24)).columns
    coloured = console.is_terminal
    console.print(draw(timeline, width, colour=coloured), markup=coloured)
