"""What a callback may do: hooks that the loop calls, in the order in which callbacks are listed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.metrics import Row

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.step import Outcome


class Callback:
    """Everything that is not the step itself. Override what you need; `loop` gives the state of the run.

    A hook runs on every rank unless the callback is only listed on rank 0 (`_callbacks` in trainer/build.py). A hook
    that talks to other ranks must run on all of them.
    """

    name: str = ""
    """Key of this callback's state in a checkpoint; empty where it has none."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave, when a run resumes."""

    def on_start(self, loop: Loop) -> None:
        """Before the first step."""

    def before_step(self, loop: Loop) -> None:
        """Before every step."""

    def after_step(self, loop: Loop, outcome: Outcome) -> None:
        """After every step."""

    def on_row(self, loop: Loop, row: Row) -> None:
        """A row was made: every `train.log_every` steps, with the keys of `trainer.metrics.ROW`."""

    def on_evaluation(self, loop: Loop, row: Row) -> None:
        """The held-out loss was computed: keys `step` and `eval_loss`."""

    def on_event(self, loop: Loop, row: Row) -> None:
        """Something worth a line happened: keys `step`, `event` and more."""

    def on_end(self, loop: Loop) -> None:
        """After the last step, also when the run was told to stop; `loop.status` says how it ended."""

    def on_close(self, loop: Loop) -> None:
        """Always last, after an error too: give back what `on_start` took."""
