"""Saves checkpoints at an interval, at the end and before a stop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import checkpoint
from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.step import Outcome, Weights


class Checkpointer(Callback):
    """Rank 0 writes, as all ranks hold the same weights; the others wait, so that its error finds nobody far ahead."""

    def __init__(self, tokenizer: Path | None) -> None:
        self.tokenizer = tokenizer.read_bytes().decode() if tokenizer else None
        self.saved_step: int | None = None

    def on_start(self, loop: Loop) -> None:
        """What was resumed is saved already, and what an earlier start saved past it is superseded."""
        self.saved_step = loop.step or None
        if loop.collectives.rank == 0:
            checkpoint.drop_after(loop.run.checkpoints, loop.step)

    def after_step(self, loop: Loop, outcome: Outcome) -> None:
        """At the interval."""
        every = loop.recipe.checkpoint.every
        if every and loop.step % every == 0:
            self._save(loop)

    def on_end(self, loop: Loop) -> None:
        """The last state."""
        if self.saved_step != loop.step:
            self._save(loop)

    def _save(self, loop: Loop) -> None:
        if loop.collectives.rank == 0:
            kinds = {kind: partial(_values, loop.weights, kind) for kind in loop.weights.kinds()}
            keep = loop.recipe.checkpoint.keep
            checkpoint.save(loop.run.checkpoints, loop.model, kinds, state_of(loop), keep, self.tokenizer)
        self.saved_step = loop.step
        loop.collectives.world.barrier()


def _values(weights: Weights, kind: str) -> dict[str, np.ndarray]:
    """Parameter name -> value of one kind, read from the device when it is asked for."""
    return {
        part.spec.name: value
        for weight, parameter in zip(weights.specs, weights.kinds()[kind], strict=True)
        for part, value in weight.split(parameter.asnumpy())
    }


def state_of(loop: Loop) -> dict[str, Any]:
    """Everything but tensors that a run needs to go on: one integer of data, and the callbacks' own."""
    return {
        "step": loop.step,
        "samples": loop.loader.consumed,
        "callbacks": {callback.name: callback.state() for callback in loop.callbacks if callback.name},
    }
