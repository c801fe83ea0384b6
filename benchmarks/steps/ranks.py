"""What the workers of `benchmarks/layouts.py` share: the recipe, and how several ranks answer one driver."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from mpi4py import MPI

from trainer.compose import compose_recipe
from trainer.recipe import Recipe

WORLD = MPI.COMM_WORLD
SHAPE = {"layers": 4, "hidden": 256, "ffn": 688, "heads": 8, "kv_heads": 8, "vocab": 1024}
SEQ = 256


def recipe_of(folder: str, words: list[str]) -> Recipe:
    """The recipe of `words`, on the tokens in `folder`, into which the run goes as well."""
    return compose_recipe(
        "tiny_dense",
        [*(f"model.{name}={value}" for name, value in SHAPE.items()), f"data.seq_len={SEQ}", "data.tokenizer=null",
         f"data.sources=[{{path: {folder}/tokens}}]", f"train.out={folder}", "train.steps=1000000",
         "train.eval_every=0", "optimizer.lr=3e-4", "lr=constant", "lr.warmup=0", "layout.dp=1", "layout.tp=1",
         "layout.pp=1", *words],
    ).recipe  # fmt: skip


def serve(step: Callable[[], float]) -> None:
    """As `timing.serve`, by all ranks of the world, and without warming up: rank 0 answers, with the ranks' mean.

    `step` does one step and returns its loss.
    """
    WORLD.Barrier()
    if WORLD.rank == 0:
        print("READY", flush=True)
    while count := _next():
        WORLD.Barrier()
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            value = step()
            times.append(time.perf_counter() - begin)
        medians = WORLD.gather(statistics.median(times))
        if WORLD.rank == 0:
            print(f"T {statistics.mean(medians):.6f} {value:.9f}", flush=True)


def _next() -> int:
    """Steps that rank 0 was asked for; 0 at the end. The others sleep meanwhile: another world has the cores."""
    line = sys.stdin.readline() if WORLD.rank == 0 else ""
    meeting = WORLD.Ibarrier()
    while not meeting.Test():
        time.sleep(0.01)
    return WORLD.bcast(int(line.split()[1]) if line else 0)
