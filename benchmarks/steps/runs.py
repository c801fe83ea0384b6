"""The run that `benchmarks/step.py` and `benchmarks/layouts.py` time: its recipe, its data and its loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from trainer.compose import compose_recipe
from trainer.data.indexed import IndexedWriter
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory

if TYPE_CHECKING:
    from trainer.loop import Loop

SHAPE = {"layers": 4, "hidden": 256, "ffn": 688, "heads": 8, "kv_heads": 8, "vocab": 1024}
SEQ = 256


def write_tokens(folder: str | Path) -> None:
    """A data set of random tokens."""
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab"], 400_000)
    with IndexedWriter(Path(folder) / "tokens", np.uint16) as writer:
        for document in tokens.reshape(-1, 1000):
            writer.add(document)


def recipe_of(folder: str, words: list[str]) -> Recipe:
    """The recipe of `words`, on the tokens in `folder`, into which the run goes as well."""
    return compose_recipe(
        "tiny_dense",
        [*(f"model.{name}={value}" for name, value in SHAPE.items()), f"data.seq_len={SEQ}", "data.tokenizer=null",
         f"data.sources=[{{path: {folder}/tokens}}]", f"train.out={folder}", "train.steps=1000000",
         "train.eval_every=0", "optimizer.lr=3e-4", "lr=constant", "lr.warmup=0", "layout.dp=1", "layout.tp=1",
         "layout.pp=1", *words],
    ).recipe  # fmt: skip


def started(recipe: Recipe, run: RunDirectory, rank: int = 0) -> tuple[Loop, Callable[[], float]]:
    """The loop of this rank as a user gets it, with its callbacks, and what does one step and returns its loss."""
    from trainer.build import build, connect  # MindSpore, which the driver does not need
    from trainer.launch.rank import StopSignal

    console = Console(file=(run.logs / f"console-{rank}").open("w"))
    loop = build(recipe, run, connect(recipe), StopSignal(insist=True), console)
    loop.call("on_start")

    def step() -> float:
        loop.advance()
        return loop.meter.last_loss

    return loop, step
