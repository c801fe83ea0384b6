"""Busway's step under a layout, as a user gets it: `busway_layout.py FOLDER RANKS_OF_ONE_RUN [key=value …]`.

With fewer ranks of one run than there are in the world, each is a run of its own beside the others.
"""

import sys

from rich.console import Console
from steps.ranks import WORLD, recipe_of, serve

from trainer.build import build, connect
from trainer.launch.rank import StopSignal
from trainer.run_directory import create

folder, size, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if size == 1:
    words.append(f"train.out={folder}/{WORLD.rank}")
recipe = recipe_of(folder, words)
run = create(recipe, "layout")[0] if size == 1 or WORLD.rank == 0 else None
if size > 1:
    run = WORLD.bcast(run)
console = Console(file=(run.logs / f"console-{WORLD.rank}").open("w"))
loop = build(recipe, run, connect(recipe), StopSignal(insist=True), console)
loop.call("on_start")


def step() -> float:
    """One step of the loop; its loss."""
    loop.advance()
    return loop.meter.last_loss


serve(step)
loop.loader.close()
