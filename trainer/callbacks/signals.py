"""Stops the run after the step in which a signal came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.callbacks.base import Callback
from trainer.launch.rank import StopSignal

if TYPE_CHECKING:
    from trainer.loop import Loop


class Signals(Callback):
    """Hands a request to stop to the next step, which sums it over the ranks: all stop after the same step."""

    def __init__(self, signal: StopSignal) -> None:
        self.signal = signal

    def before_step(self, loop: Loop) -> None:
        """Signals reach ranks at different times; the step's own reduction makes them agree."""
        loop.stop_requested = self.signal.requested
