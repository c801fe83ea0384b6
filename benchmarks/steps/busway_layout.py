"""Busway's step under a layout, as a user gets it: `busway_layout.py FOLDER RANKS_OF_ONE_RUN bound|free [key=value …]`.

With fewer ranks of one run than there are in the world, each is a run of its own beside the others. `free` leaves
ranks on all cores, which Busway does not.
"""

import sys

from steps.ranks import WORLD, serve
from steps.runs import recipe_of, started

from parallel.collectives import mpi
from trainer.run_directory import create

folder, size, cores, words = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
if cores == "free":
    mpi._share_cores = lambda world: None
if size == 1:
    words.append(f"train.out={folder}/{WORLD.rank}")
recipe = recipe_of(folder, words)
run = create(recipe, "layout")[0] if size == 1 or WORLD.rank == 0 else None
if size > 1:
    run = WORLD.bcast(run)
loop, step = started(recipe, run, WORLD.rank)
serve(step)
loop.loader.close()
