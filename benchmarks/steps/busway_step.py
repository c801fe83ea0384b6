"""Busway's step as a user gets it: the loop with its callbacks, on a dataset of random tokens. `busway_step.py
[key=value …]`."""

import sys
import tempfile

from steps.runs import recipe_of, started, write_tokens
from timing import serve

from trainer.run_directory import create

with tempfile.TemporaryDirectory() as folder:
    write_tokens(folder)
    recipe = recipe_of(folder, ["layout.micro_batch=4", "train.global_batch=4", *sys.argv[1:]])
    loop, step = started(recipe, create(recipe, "step")[0])
    serve(step)
    loop.loader.close()
