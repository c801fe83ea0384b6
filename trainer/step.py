"""The training step: forward, backward, reduction, clip and AdamW.

With one micro-batch a step all of it is one compiled graph; with more, one graph adds a micro-batch's gradients
up and another finishes the step. Sums of losses and gradients are divided by the global count of valid tokens at
the end, as the count is not known before every rank has seen its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from models.attention import rotary_tables
from models.config import ModelConfig
from models.decoder import Decoder
from models.kernels import Kernels
from models.weights import Reader, Weight
from parallel.data import DataParallel
from trainer.data.loader import Batch
from trainer.settings import OptimizerSettings


@dataclass(frozen=True)
class Outcome:
    """What one step says of itself, summed over all ranks."""

    loss: float
    """Mean cross-entropy over the valid tokens; NaN where there are none."""
    tokens: int
    """Valid tokens: exact up to 2^24 in fp32, and rounded beyond."""
    grad_norm: float
    """Global norm of the mean loss's gradient, before clipping."""
    stop_requested: bool
    """Some rank was told to stop."""


class Weights:
    """A model's weights and the two moments of each, as MindSpore Parameters in the order of `specs`."""

    def __init__(self, specs: Sequence[Weight], read: Reader, dtype: type) -> None:
        self.specs = tuple(specs)
        self.values = ParameterTuple(
            [Parameter(Tensor(np.ascontiguousarray(w.stack(read), dtype)), name=w.name) for w in specs]
        )
        self.first = self.values.clone(prefix="first", init="zeros")
        self.second = self.values.clone(prefix="second", init="zeros")

    def load(self, kind: str, read: Reader, dtype: type) -> None:
        """Set every tensor of `kind` (a key of `kinds`) from a parameter reader."""
        for spec, parameter in zip(self.specs, self.kinds()[kind], strict=True):
            parameter.set_data(Tensor(np.ascontiguousarray(spec.stack(read), dtype)))

    def kinds(self) -> dict[str, ParameterTuple]:
        """What a checkpoint holds, by kind."""
        return {"weights": self.values, "first": self.first, "second": self.second}


class Gradients(nn.Cell):
    """Forward and backward of one micro-batch: `run(tokens, labels, first_key) -> (sums, gradients)`.

    `sums` is [loss sum, valid tokens]; all three inputs are int32 [micro_batch * seq_len].
    """

    def __init__(self, model: Decoder, config: ModelConfig, weights: Weights, seq_len: int, dtype: type) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.values = weights.values
        cos, sin = rotary_tables(config, seq_len, dtype)
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        self.total = ops.ReduceSum()

    def loss(self, tokens, labels, first_key):
        """`(sums, saved)` of the forward pass."""
        context = (tokens, labels, first_key, self.cos, self.sin)
        loss, saved = self.model.forward(tokens, self.values, context)
        valid = self.total(ops.cast(labels >= 0, loss.dtype)).reshape((1,))
        return ops.concat((loss, valid)), saved

    def run(self, tokens, labels, first_key):
        """Loss sums and the gradients of the loss sum."""
        sums, saved = self.loss(tokens, labels, first_key)
        context = (tokens, labels, first_key, self.cos, self.sin)
        _, gradients = self.model.backward(sums, saved, self.values, context)
        return sums, gradients


class Finish(nn.Cell):
    """Reduction over ranks, clip and AdamW: `run(sums, gradients, lr, step, stop) -> statistics`.

    statistics: [loss sum, valid tokens, gradient norm, ranks that were told to stop].
    """

    def __init__(
        self, weights: Weights, data: DataParallel, kernels: Kernels, settings: OptimizerSettings, dtype: type
    ) -> None:
        super().__init__(auto_prefix=False)
        self.values, self.first, self.second = weights.values, weights.first, weights.second
        self.data = data
        self.square_sum = kernels.SquareSum()
        self.adamw = kernels.AdamW(settings.betas[0], settings.betas[1], settings.eps)
        self.decays = Tensor(np.array([settings.weight_decay * w.decays for w in weights.specs], dtype))
        self.clips = settings.clip > 0
        self.clip = Tensor(np.array([settings.clip], dtype))
        self.one = Tensor(np.ones(1, dtype))
        self.tiny = Tensor(np.array([1e-6], dtype))  # torch's clip_grad_norm_ adds it to the norm

    def run(self, sums, gradients, lr, step, stop):
        """One update of all weights."""
        sums, gradients = self.data.reduce(ops.concat((sums, stop)), gradients)
        count = ops.maximum(sums[1:2], self.one)
        norm = ops.sqrt(self.square_sum.forward(gradients)) / count
        factor = self.one / count
        if self.clips:
            factor = factor * ops.minimum(self.one, self.clip / (norm + self.tiny))
        done = self.adamw.forward(self.values, self.first, self.second, gradients, self.decays, factor, lr, step)
        return ops.depend(ops.concat((sums[0:2], norm, sums[2:3])), done)


class WholeStep(nn.Cell):
    """A step of one micro-batch."""

    def __init__(self, gradients: Gradients, finish: Finish) -> None:
        super().__init__(auto_prefix=False)
        self.gradients, self.finish = gradients, finish

    def construct(self, tokens, labels, first_key, lr, step, stop):
        """Statistics of the step."""
        sums, gradients = self.gradients.run(tokens, labels, first_key)
        return self.finish.run(sums, gradients, lr, step, stop)


class Accumulate(nn.Cell):
    """Adds one micro-batch's sums and gradients to the accumulators."""

    def __init__(self, gradients: Gradients, accumulators: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.gradients, self.accumulators = gradients, accumulators

    def construct(self, tokens, labels, first_key):
        """The micro-batch's sums."""
        sums, gradients = self.gradients.run(tokens, labels, first_key)
        added = (sums,) + gradients
        for i in range(len(added)):
            sums = ops.depend(sums, ops.assign_add(self.accumulators[i], added[i]))
        return sums


class FinishAccumulated(nn.Cell):
    """Finishes a step from the accumulators and clears them."""

    def __init__(self, finish: Finish, accumulators: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.finish, self.accumulators = finish, accumulators

    def construct(self, lr, step, stop):
        """Statistics of the step."""
        statistics = self.finish.run(self.accumulators[0], self.accumulators[1:], lr, step, stop)
        for accumulator in self.accumulators:
            cleared = ops.assign(accumulator, ops.depend(ops.zeros_like(accumulator), statistics))
            statistics = ops.depend(statistics, cleared)
        return statistics


class Evaluation(nn.Cell):
    """Loss sums of one micro-batch over all ranks, without gradients."""

    def __init__(self, gradients: Gradients, data: DataParallel) -> None:
        super().__init__(auto_prefix=False)
        self.gradients, self.data = gradients, data

    def construct(self, tokens, labels, first_key):
        """[loss sum, valid tokens]."""
        sums, _ = self.gradients.loss(tokens, labels, first_key)
        return self.data.reduce(sums, ())[0]


class TrainStep:
    """`step(batch, lr, number, stop) -> Outcome`, and `evaluate(batches) -> mean loss`."""

    def __init__(self, gradients: Gradients, finish: Finish, weights: Weights, micro_batches: int, dtype: type) -> None:
        self.dtype = dtype
        self.micro_batches = micro_batches
        self.evaluation = Evaluation(gradients, finish.data)
        if micro_batches == 1:
            self.whole = WholeStep(gradients, finish)
            return
        accumulators = [Parameter(Tensor(np.zeros(2, dtype)), name="accumulated.sums")]
        accumulators += [Parameter(ops.zeros_like(p), name=f"accumulated.{p.name}") for p in weights.values]
        accumulators = ParameterTuple(accumulators)
        self.accumulate = Accumulate(gradients, accumulators)
        self.finish = FinishAccumulated(finish, accumulators)

    def __call__(self, batch: Batch, lr: float, number: int, stop: bool) -> Outcome:
        """Run step `number` (from 1) on this rank's micro-batches."""
        scalars = [self._scalar(value) for value in (lr, number, stop)]
        if self.micro_batches == 1:
            statistics = self.whole(*_tensors(batch, 0), *scalars)
        else:
            for i in range(self.micro_batches):
                self.accumulate(*_tensors(batch, i))
            statistics = self.finish(*scalars)
        loss, tokens, norm, stops = (float(value) for value in statistics.asnumpy())
        return Outcome(loss / tokens if tokens else math.nan, int(tokens), norm, stops > 0)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over all valid tokens of `batches`, on all ranks; NaN where there are none."""
        sums = np.zeros(2)
        for batch in batches:
            for i in range(len(batch.tokens)):
                sums += self.evaluation(*_tensors(batch, i)).asnumpy()
        return float(sums[0] / sums[1]) if sums[1] else math.nan

    def _scalar(self, value: float) -> Tensor:
        return Tensor(np.array([value], self.dtype))


def _tensors(batch: Batch, micro_batch: int) -> list[ms.Tensor]:
    return [Tensor(getattr(batch, name)[micro_batch]) for name in ("tokens", "labels", "first_key")]
