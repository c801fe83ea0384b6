"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from models.config import ModelConfig
from parallel.collectives import Collectives
from parallel.mesh import Mesh
from parallel.trace import COMPUTE
from trainer import checkpoint, metrics
from trainer.callbacks.base import Callback
from trainer.checkpoint import Checkpoint
from trainer.data.loader import Batch, Loader
from trainer.errors import InputError, NotFiniteError, Stopped
from trainer.experts import TallyMeter
from trainer.lr import LearningRate
from trainer.meter import Meter
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory
from trainer.step import Outcome, TrainStep, Weights


class Loop:
    """One rank's run: its parts, where it stands, and `fit`.

    Attributes:
        step: the last step that is done.
        status: `running`, then `done`, `stopped` or `not_finite`.
        stop_requested: this rank was told to stop; `stopped`: all ranks know it and stop after this step.
        meter: makes rows out of outcomes.
    """

    def __init__(
        self, recipe: Recipe, run: RunDirectory, mesh: Mesh, collectives: Collectives, weights: Weights,
        train_step: TrainStep, loader: Loader, holdout: Sequence[Batch], meter: Meter, callbacks: Iterable[Callback],
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.mesh, self.collectives = recipe, run, mesh, collectives
        self.weights, self.train_step, self.loader, self.holdout = weights, train_step, loader, holdout
        self.meter, self.callbacks = meter, list(callbacks)
        counts = recipe.model.moe.experts or recipe.model.mtp.depth
        self.tallies = TallyMeter(recipe.model, weights, collectives) if counts else None
        self.rates = LearningRate(recipe.lr, recipe.optimizer.lr, recipe.train.steps)
        self.step = 0
        self.status = "running"
        self.stop_requested = self.stopped = False
        self.resumed_from: Path | None = None

    @property
    def model(self) -> ModelConfig:
        """Shapes of the model."""
        return self.recipe.model

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return self.recipe.train.last_step

    def fit(self) -> None:
        """Train to the last step. Raises `Stopped` after a signal, `NotFiniteError` on a bad loss."""
        try:
            self.call("on_start")
            if self.resumed_from:
                self.event("resumed", checkpoint=str(self.resumed_from))
            while self.step < self.last_step and not self.stopped:
                self.advance()
            self.status = "stopped" if self.stopped else "done"
            self.call("on_end")
        finally:
            self.call("on_close")
        if self.stopped:
            raise Stopped(f"stopped by a signal after step {self.step}; the state is saved in {self.run.checkpoints}")

    def advance(self) -> None:
        """One step and what belongs to it."""
        self.call("before_step")
        outcome = self._one_step()
        self.stopped = outcome.stop_requested
        self.call("after_step", outcome)
        if self.step % self.recipe.train.log_every == 0 or self.stopped or self.step == self.last_step:
            row = self.meter.row(self.step)
            self.call("on_row", row | self.tallies.row(self.step, outcome.tokens) if self.tallies else row)
        if self._evaluates() and not self.stopped:
            self._evaluate()

    def resume(self, saved: Checkpoint) -> None:
        """Take the step and the callbacks' state from a checkpoint; weights and data start from it already."""
        self.step, self.resumed_from = saved.step, saved.path
        if self.tallies:
            self.tallies.step = saved.step
        for callback in self.callbacks:
            if callback.name in saved.state["callbacks"]:
                callback.load_state(saved.state["callbacks"][callback.name])

    def call(self, hook: str, *arguments: Any) -> None:
        """Call one hook of every callback."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def event(self, name: str, **details: Any) -> None:
        """Tell every callback that something happened after the last step, or at `details["step"]`."""
        self.call("on_event", {metrics.STEP: self.step, metrics.EVENT: name, **details})

    def _one_step(self) -> Outcome:
        begin = time.perf_counter()
        with self.collectives.recorder.span(COMPUTE, "data"):
            batch = next(self.loader)
        rate = self.rates.rate(self.step + 1)
        outcome = self.train_step(batch, rate, self.step + 1, self.stop_requested)
        self._check(outcome, self.step + 1)
        self.step += 1
        self.meter.add(outcome, rate, self.loader.consumed, time.perf_counter() - begin, self.loader.wait_s)
        return outcome

    def _check(self, outcome: Outcome, step: int) -> None:
        if outcome.tokens == 0:
            raise InputError(
                f"step {step}: no token of the batch has a label; see to data.sources, where prompts take no loss"
            )
        if not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
            self._end_not_finite(step, loss=outcome.loss, grad_norm=outcome.grad_norm)

    def _end_not_finite(self, step: int, **values: float) -> NoReturn:
        self.status = "not_finite"
        self.event("not_finite", step=step, **{name: repr(value) for name, value in values.items()})
        # The first rank to raise ends the others: they wait here for rank 0, which is still writing.
        good = self.collectives.world.broadcast(checkpoint.last_saved(self.run.checkpoints))
        names = {
            metrics.LOSS: "the loss",
            metrics.GRAD_NORM: "the gradient norm",
            metrics.EVAL_LOSS: "the held-out loss",
        }
        what = " and ".join(f"{names[key]} is {value}" for key, value in values.items())
        start = f"go on from {good} with checkpoint.resume={good}, another train.name" if good else "start again with"
        raise NotFiniteError(f"step {step}: {what}; {start} and a smaller optimizer.lr or a longer lr.warmup")

    def _evaluates(self) -> bool:
        every = self.recipe.train.eval_every
        return bool(every and self.holdout) and (self.step % every == 0 or self.step == self.last_step)

    def _evaluate(self) -> None:
        before = self.tallies.sent() if self.tallies else None
        loss = self.train_step.evaluate(self.holdout)
        if self.tallies:
            self.tallies.dispatched += self.tallies.sent() - before
        if loss is None:
            raise InputError("no held-out token has a label; see to data.sources, or set train.eval_every=0")
        if not math.isfinite(loss):
            self._end_not_finite(self.step, eval_loss=loss)
        self.meter.eval_loss = loss
        self.call("on_evaluation", {metrics.STEP: self.step, metrics.EVAL_LOSS: loss})
