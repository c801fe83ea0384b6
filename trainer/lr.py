"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.settings import LearningRateSettings


@dataclass(frozen=True)
class LearningRate:
    """`rate(step)`: linear warm-up to `peak`, then the schedule's decay, which reaches its end at step `steps`.

    Steps count from 1. The formulas are those of the field (MindFormers' and Megatron-LM's names and numbers):
    with progress = (step - warmup) / (steps - warmup),

    constant      peak
    linear        peak - (peak - min) progress
    cosine        min + (peak - min) (1 + cos(pi progress)) / 2
    polynomial    min + (peak - min) (1 - progress)^power
    inverse_sqrt  peak sqrt(warmup / step), with a warm-up of at least one step, never below min
    wsd           peak, then linearly to min over the last `decay` steps
    """

    settings: LearningRateSettings
    peak: float
    steps: int

    def rate(self, step: int) -> float:
        """The learning rate of `step`; past the horizon, the horizon's."""
        warmup = self.settings.warmup
        if step < warmup:
            return self.peak * step / warmup
        step = min(step, max(self.steps, warmup))
        progress = (step - warmup) / max(self.steps - warmup, 1)
        return getattr(self, f"_{self.settings.schedule}")(step, progress)

    def _constant(self, step: int, progress: float) -> float:
        return self.peak

    def _between(self, share: float) -> float:
        return self.settings.min + (self.peak - self.settings.min) * share

    def _linear(self, step: int, progress: float) -> float:
        return self._between(1 - progress)

    def _cosine(self, step: int, progress: float) -> float:
        return self._between((1 + math.cos(math.pi * progress)) / 2)

    def _polynomial(self, step: int, progress: float) -> float:
        return self._between((1 - progress) ** self.settings.power)

    def _inverse_sqrt(self, step: int, progress: float) -> float:
        warmup = max(self.settings.warmup, 1)
        return max(self.peak * math.sqrt(warmup / step), self.settings.min)

    def _wsd(self, step: int, progress: float) -> float:
        decay = self.settings.decay or max(self.steps // 5, 1)
        return self._between(min(1.0, (self.steps - step) / decay))
