"""Makes rows out of outcomes: rates, MFU and memory of the steps since the last row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer import metrics
from trainer.metrics import Row
from trainer.step import Outcome


@dataclass
class Meter:
    """Collects steps. `world_maximum` gives the largest of each number over the ranks; every rank must call it."""

    tokens_per_step: int
    """Tokens of a global batch, valid or not."""
    seq_len: int
    ranks: int
    flops_per_token: float
    peak_flops: float | None
    """Peak of one rank in FLOP/s; None: MFU is null."""
    memory_gib: Callable[[], float]
    world_maximum: Callable[[Sequence[float]], Sequence[float]]
    first_step_s: float | None = None
    """Wall time of the first step, compilation included."""
    step_times: list[float] = field(default_factory=list)
    """Of every step but the first."""
    memory_peak_gib: float = 0.0
    last_loss: float | None = None
    eval_loss: float | None = None
    samples: int = 0
    _waits: list[float] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)
    _last: Row = field(default_factory=dict)

    def add(self, outcome: Outcome, rate: float, samples: int, step_s: float, data_wait_s: float) -> None:
        """One step."""
        if self.first_step_s is None:
            self.first_step_s = step_s
        else:
            self.step_times.append(step_s)
        self._times.append(step_s)
        self._waits.append(data_wait_s)
        self.samples, self.last_loss = samples, outcome.loss
        self._last = {metrics.LOSS: outcome.loss, metrics.GRAD_NORM: outcome.grad_norm, metrics.LR: rate}

    def row(self, step: int) -> Row:
        """The row of the steps since the last one: times are their means, the rest is the last step's."""
        step_s, wait_s = statistics.fmean(self._times), statistics.fmean(self._waits)
        self._times, self._waits = [], []
        (self.memory_peak_gib,) = self.world_maximum([self.memory_gib()])
        speed = self.tokens_per_step / step_s
        return {
            metrics.STEP: step,
            **self._last,
            metrics.TOKENS: self.samples * self.seq_len,
            metrics.SAMPLES: self.samples,
            metrics.TOKENS_PER_S: speed,
            metrics.TOKENS_PER_S_PER_RANK: speed / self.ranks,
            metrics.STEP_S: step_s,
            metrics.DATA_WAIT_S: wait_s,
            metrics.MFU: self.mfu(speed),
            metrics.MEMORY_GIB: self.memory_peak_gib,
        }

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilisation of all ranks at that speed (`models.config.FLOPS_CONVENTION`)."""
        if self.peak_flops is None:
            return None
        return tokens_per_s * self.flops_per_token / (self.peak_flops * self.ranks)

    @property
    def median_step_s(self) -> float | None:
        """Median step, the first left out unless it was the only one."""
        return statistics.median(self.step_times) if self.step_times else self.first_step_s
