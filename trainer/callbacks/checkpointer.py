"""Saves checkpoints at an interval, at the end and before a stop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer import checkpoint
from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.step import Outcome


class Checkpointer(Callback):
    """Every rank writes what it alone, or first of several, holds; `companions` (file name -> content) go along."""

    def __init__(self, companions: Mapping[str, str]) -> None:
        self.companions = companions
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
        keep, weights = loop.recipe.checkpoint.keep, loop.weights
        kinds = {kind: partial(weights.own, kind) for kind in weights.kinds() if weights.writes(kind)}
        checkpoint.save(loop.run.checkpoints, loop.collectives.world, kinds, self.companions, state_of(loop), keep)
        self.saved_step = loop.step


def state_of(loop: Loop) -> dict[str, Any]:
    """Everything but tensors that a run needs to go on: one integer of data, and the callbacks' own."""
    return {
        "step": loop.step,
        "samples": loop.loader.consumed,
        "callbacks": {callback.name: callback.state() for callback in loop.callbacks if callback.name},
    }
