"""`metrics.routing`: what every token was routed to, in a file a step and rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trainer.callbacks.base import Callback
from trainer.experts import RoutingRecord
from trainer.machine import writing_to

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.step import Outcome


class Routing(Callback):
    """Writes ``tokens`` [M, T], the numbers of a rank's tokens (place of the sequence in the global batch times its
    length, plus position), and ``layer.N`` [M, T, K] for each layer that the rank has."""

    def __init__(self, record: RoutingRecord, tokens: np.ndarray) -> None:
        self.record, self.tokens = record, tokens

    def after_step(self, loop: Loop, outcome: Outcome) -> None:
        """One file."""
        file = loop.run.routing(loop.step, loop.collectives.rank)
        chosen = {f"layer.{layer}": indices for layer, indices in self.record.take().items()}
        with writing_to(file.parent):
            file.parent.mkdir(exist_ok=True)
            np.savez(file, tokens=self.tokens, **chosen)
