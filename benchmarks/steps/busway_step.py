"""Busway's step as a user gets it: the loop with its callbacks, on a dataset of random tokens."""

import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from timing import serve

from trainer.build import build, connect
from trainer.compose import compose_recipe
from trainer.data.indexed import IndexedWriter
from trainer.launch.rank import StopSignal
from trainer.run_directory import create

with tempfile.TemporaryDirectory() as folder:
    tokens = np.random.default_rng(0).integers(0, 1024, 400_000)
    with IndexedWriter(Path(folder) / "tokens", np.uint16) as writer:
        for document in tokens.reshape(-1, 1000):
            writer.add(document)
    shape = ["layers=4", "hidden=256", "ffn=688", "heads=8", "kv_heads=8", "vocab=1024"]
    recipe = compose_recipe(
        "tiny_dense",
        [*(f"model.{s}" for s in shape), "layout.tp=1", "layout.pp=1", "layout.micro_batch=4", "train.global_batch=4",
         "data.seq_len=256", f"data.sources=[{{path: {folder}/tokens}}]", "data.tokenizer=null",
         f"train.out={folder}", "train.steps=1000000", "train.eval_every=0", "optimizer.lr=3e-4", "lr=constant"],
    ).recipe  # fmt: skip
    run, _ = create(recipe, "step")
    console = Console(file=(run.logs / "console").open("w"))
    loop = build(recipe, run, connect(recipe), StopSignal(insist=True), console)
    loop.call("on_start")

    def step() -> float:
        """One step of the loop; its loss."""
        loop.advance()
        return loop.meter.last_loss

    serve(step)
    loop.loader.close()
