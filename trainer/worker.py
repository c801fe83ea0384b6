"""What one rank does from its start to its end: `python -P -m trainer.worker RUN_DIR`, started by a launcher.

A failing rank writes down why, ends all others, and leaves with the exit code of its error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from trainer.errors import EXIT_DONE, Stopped
from trainer.launch import is_scheduler, world_from_environment
from trainer.launch import rank as ranks
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory, load_recipe


def work(recipe: Recipe, run: RunDirectory, rank: int) -> int:
    """Run this rank to its end and return its exit code. Other ranks are ended where this one fails."""
    process = ranks.start(run.path, rank)
    abort = os._exit
    try:
        from trainer.build import build, connect

        collectives = connect(recipe)
        world = collectives.world
        if world.size > 1:
            abort = world.abort
            ranks.shared_path_check(run.path, world)
        loop = build(recipe, run, collectives, process.stop, Console(soft_wrap=True))
        try:
            loop.fit()
        finally:
            loop.loader.close()
    except BaseException as error:
        code = process.fail(error)
        if process.size > 1 and not isinstance(error, Stopped):
            abort(code)
        return code
    return process.finish()


def main() -> int:
    """Entry of a process that a launcher started: a rank, or msrun's rendezvous, which only waits for the ranks."""
    if is_scheduler(os.environ):
        from mindspore.communication import init

        init()
        return EXIT_DONE
    run = RunDirectory(Path(sys.argv[1]))
    rank, _ = world_from_environment(os.environ)
    return work(load_recipe(run), run, rank)


if __name__ == "__main__":
    sys.exit(main())
