"""What one rank does from its start to its end: `python -P -m trainer.worker RUN_DIR RESUME`, started by a launcher.

A failing rank writes down why, ends all others, and leaves with the exit code of its error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.callbacks.console import terminal
from trainer.callbacks.summary import note_failure
from trainer.errors import EXIT_DONE, Stopped, exit_code_of
from trainer.launch import is_scheduler, world_from_environment
from trainer.launch import rank as ranks
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory, load_recipe

if TYPE_CHECKING:
    from parallel.collectives import Collectives


def join(recipe: Recipe, begin: Callable[[], RunDirectory]) -> int:
    """Run this process as a rank of the world around it, or alone, to its end and return its exit code.

    Rank 0 calls `begin`, which checks the machine and makes the run directory; its error ends every rank.
    """
    from trainer.build import connect

    collectives = connect(recipe)
    try:
        run = ranks.from_rank_0(collectives.world, begin)
    except Exception as error:
        if collectives.rank == 0:
            raise
        return exit_code_of(error)
    process = ranks.start(run.path, collectives.rank)
    return _train(process, recipe, run, collectives)


def _train(process: ranks.RankProcess, recipe: Recipe, run: RunDirectory, collectives: Collectives | None) -> int:
    """Train as a rank that has its log, `connect` first where that is not done."""

    def connected() -> Collectives:
        from trainer.build import connect

        return collectives or connect(recipe)

    def work(collectives: Collectives) -> None:
        from trainer.build import build

        if collectives.world.size > 1:
            ranks.shared_path_check(run.path, collectives.world)
        loop = build(recipe, run, collectives, process.stop, terminal())
        try:
            loop.fit()
        finally:
            loop.loader.close()

    def failed(code: int) -> None:
        if not process.launch_directory:  # where Busway launched the ranks, their parent does it
            note_failure(run, code)

    return carry_out(process, connected, work, failed)


def carry_out(
    process: ranks.RankProcess, connect: Callable[[], Collectives], work: Callable[[Collectives], None],
    failed: Callable[[int], None] = lambda code: None,
) -> int:  # fmt: skip
    """Join the world and do the `work` of a rank that has its log; its exit code. A failure ends all other ranks."""
    abort = os._exit
    try:
        collectives = connect()
        if collectives.world.size > 1:
            abort = collectives.world.abort
        work(collectives)
    except BaseException as error:
        code = process.fail(error)
        failed(code)
        if process.size > 1 and not isinstance(error, Stopped):
            abort(code)
        return code
    return process.finish()


def main() -> int:
    """Entry of a process that Busway started: a rank, or msrun's rendezvous, which only waits for the ranks."""
    if is_scheduler(os.environ):
        from mindspore.communication import init

        init()
        return EXIT_DONE
    run, resume = RunDirectory(Path(sys.argv[1])), sys.argv[2]
    rank, _ = world_from_environment(os.environ)
    process = ranks.start(run.path, rank)
    recipe = load_recipe(run)
    return _train(process, replace(recipe, checkpoint=replace(recipe.checkpoint, resume=resume)), run, None)


if __name__ == "__main__":
    sys.exit(main())
