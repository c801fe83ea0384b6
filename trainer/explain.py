"""`busway explain`: what a recipe's layout does, before it runs. So far its pipeline's timeline, as text."""

from __future__ import annotations

import argparse
import shutil

from models.checks import ConfigError
from parallel.schedules import Times, draw, simulate
from trainer.callbacks.console import Terminal
from trainer.compose import compose_recipe
from trainer.errors import EXIT_DONE
from trainer.train import add_recipe, recipe_of


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `busway explain`."""
    add_recipe(parser)
    parser.add_argument(
        "--timeline", action="store_true", required=True, help="draw the passes of one step on each pipeline rank"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the timeline: a forward takes one unit of time, a backward two, its halves one each."""
    recipe = compose_recipe(*recipe_of(args)).recipe
    schedule = recipe.parallel_layout.pipeline(recipe.train.global_batch)
    if schedule is None:
        raise ConfigError("layout.pp is 1, so there is no pipeline to draw; set layout.pp=2 or more")
    terminal = Terminal(soft_wrap=True, highlight=False)
    width = shutil.get_terminal_size((120, 24)).columns
    print_markup = terminal.is_terminal
    terminal.print(draw(simulate(schedule, Times()), width, colour=print_markup), markup=print_markup)
    return EXIT_DONE
