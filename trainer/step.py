"""The training step: forward, backward, reduction, clip and AdamW.

With one micro-batch a step all of it is one compiled graph; with more, one graph adds a micro-batch's gradients up
and another finishes the step; with a pipeline its engine walks the stages' graphs. Sums of losses and gradients are
divided by the global count of valid tokens at the end, as the count is not known before every rank has seen its
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from models.decoder import Decoder
from models.kernels import Kernels
from models.weights import Reader, Weight
from parallel.apply import Parallelized
from parallel.data import DataParallel
from parallel.pipeline import Engine, Stage, Sums
from parallel.sharded import ShardedStage, Shards
from parallel.trace import COMPUTE
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
    """A rank's weights, and what the optimizer has of them, as MindSpore Parameters in the order of `specs`.

    `values` are what graphs read, or gather from; `masters` what the optimizer writes (the same, or pieces: `data`
    says), with two moments each.
    """

    def __init__(self, specs: Sequence[Weight], data: DataParallel, read: Reader, dtype: type) -> None:
        self.specs, self.data, self.dtype = tuple(specs), data, dtype
        held = data.cut if data.gathers else lambda weight, value: value
        starts = ((weight.name, held(weight, weight.stack(read))) for weight in specs)
        self.values = ParameterTuple([_parameter(value, dtype, name) for name, value in starts])
        self.masters = self.values
        if data.publishes:
            cut = [data.cut(weight, value.asnumpy()) for weight, value in zip(specs, self.values, strict=True)]
            self.masters = ParameterTuple(
                [_parameter(value, dtype, f"master.{weight.name}") for weight, value in zip(specs, cut, strict=True)]
            )
        self.first = self.masters.clone(prefix="first", init="zeros")
        self.second = self.masters.clone(prefix="second", init="zeros")

    def load(self, kind: str, read: Reader) -> None:
        """Set every tensor of `kind`, ``first`` or ``second``, from a parameter reader."""
        for weight, parameter in zip(self.specs, getattr(self, kind), strict=True):
            value = self.data.cut(weight, weight.stack(read))
            parameter.set_data(Tensor(np.ascontiguousarray(value, self.dtype)))

    def own(self, kind: str) -> dict[str, np.ndarray]:
        """What this rank writes into a checkpoint of `kind`, a key of `kinds`: what it holds first of all ranks."""
        values = {}
        for weight, parameter in zip(self.specs, self.kinds()[kind], strict=True):
            entries = self.data.weight_entries if kind == "weights" else self.data.entries
            values |= entries(weight, parameter.asnumpy())
        return values

    def writes(self, kind: str) -> bool:
        """Whether this rank writes anything of `kind`."""
        entries = self.data.weight_entries if kind == "weights" else self.data.entries
        shapes = [p.shape for p in self.kinds()[kind]]
        return any(True for w, s in zip(self.specs, shapes, strict=True) for _ in entries(w, np.broadcast_to(0, s)))

    def kinds(self) -> dict[str, ParameterTuple]:
        """What a checkpoint holds, by kind."""
        return {"weights": self.values, "first": self.first, "second": self.second}


def _parameter(value: np.ndarray, dtype: type, name: str) -> Parameter:
    return Parameter(Tensor(np.ascontiguousarray(value, dtype)), name=name)


class Gradients(nn.Cell):
    """Forward and backward of one micro-batch: `run(tokens, labels, first_key) -> (sums, gradients)`.

    `sums` is [loss sum, valid tokens]; all three inputs are int32 [micro_batch * seq_len].
    """

    def __init__(self, model: Decoder, values: ParameterTuple, tables: tuple[Tensor, Tensor]) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.values, self.tables = model, values, tables
        self.total = ops.ReduceSum()

    def loss(self, tokens, labels, first_key):
        """`(sums, saved)` of the forward pass."""
        loss, saved = self.model.forward(tokens, self.values, (tokens, labels, first_key) + self.tables)
        valid = self.total(ops.cast(labels >= 0, loss.dtype)).reshape((1,))
        return ops.concat((loss, valid)), saved

    def run(self, tokens, labels, first_key):
        """Loss sums and the gradients of the loss sum."""
        sums, saved = self.loss(tokens, labels, first_key)
        context = (tokens, labels, first_key) + self.tables
        _, gradients = self.model.backward(sums, saved, self.values, context)
        return sums, gradients


class Finish(nn.Cell):
    """Reduction over ranks, clip and AdamW: `run(sums, gradients, lr, step, stop) -> statistics`.

    statistics: [loss sum, valid tokens, gradient norm, ranks that were told to stop].
    """

    def __init__(self, weights: Weights, kernels: Kernels, settings: OptimizerSettings, dtype: type) -> None:
        super().__init__(auto_prefix=False)
        self.values, self.masters = weights.values, weights.masters
        self.first, self.second, self.data = weights.first, weights.second, weights.data
        self.adamw = kernels.AdamW(settings.betas[0], settings.betas[1], settings.eps)
        self.decays = Tensor(np.array([settings.weight_decay * w.decays for w in weights.specs], dtype))
        self.clips = settings.clip > 0
        self.clip = Tensor(np.array([settings.clip], dtype))
        self.one = Tensor(np.ones(1, dtype))
        self.tiny = Tensor(np.array([1e-6], dtype))  # torch's clip_grad_norm_ adds it to the norm

    def collect(self, gradients):
        """What `run` takes of the gradients of a step of one micro-batch."""
        return self.data.collect(gradients, self.data.all)

    def run(self, sums, gradients, lr, step, stop):
        """One update of all weights, from what was collected of the gradients."""
        sums, gradients = self.data.reduce(ops.concat((sums, stop)), gradients)
        sums, square = self.data.total(sums, gradients)
        count = ops.maximum(sums[1:2], self.one)
        norm = ops.sqrt(square) / count
        factor = self.one / count
        if self.clips:
            factor = factor * ops.minimum(self.one, self.clip / (norm + self.tiny))
        done = self.adamw.forward(self.masters, self.first, self.second, gradients, self.decays, factor, lr, step)
        return ops.depend(ops.concat((sums[0:2], norm, sums[2:3])), done)


class WholeStep(nn.Cell):
    """A step of one micro-batch."""

    def __init__(self, gradients: Gradients, finish: Finish) -> None:
        super().__init__(auto_prefix=False)
        self.gradients, self.finish = gradients, finish

    def construct(self, tokens, labels, first_key, lr, step, stop):
        """Statistics of the step."""
        sums, gradients = self.gradients.run(tokens, labels, first_key)
        return self.finish.run(sums, self.finish.collect(gradients), lr, step, stop)


class Accumulate(nn.Cell):
    """Adds one micro-batch's gradients to the accumulators; its sums."""

    def __init__(self, gradients: Gradients, sums: Sums) -> None:
        super().__init__(auto_prefix=False)
        self.gradients, self.sums = gradients, sums

    def construct(self, tokens, labels, first_key):
        """[loss sum, valid tokens]."""
        sums, gradients = self.gradients.run(tokens, labels, first_key)
        return self.sums.add(sums, gradients)


class FinishAccumulated(nn.Cell):
    """Finishes a step from the accumulators and clears them."""

    def __init__(self, finish: Finish, accumulators: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.finish, self.accumulators = finish, accumulators
        self.zero = Tensor(np.zeros(1), accumulators[0].dtype)

    def construct(self, sums, lr, step, stop):
        """Statistics of the step."""
        statistics = self.finish.run(sums, self.accumulators, lr, step, stop)
        for accumulator in self.accumulators:
            # zeros_like would take as much memory as all accumulators
            zeros = ops.broadcast_to(ops.depend(self.zero, statistics), accumulator.shape)
            statistics = ops.depend(statistics, ops.assign(accumulator, zeros))
        return statistics


class Publish(nn.Cell):
    """Brings what the optimizer has written to the weights that graphs read."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(auto_prefix=False)
        self.data, self.masters, self.values = weights.data, weights.masters, weights.values

    def construct(self):
        return self.data.publish(self.masters, self.values)


class Evaluation(nn.Cell):
    """Loss sums of one micro-batch, without gradients."""

    def __init__(self, gradients: Gradients) -> None:
        super().__init__(auto_prefix=False)
        self.gradients = gradients

    def construct(self, tokens, labels, first_key):
        """[loss sum, valid tokens]."""
        sums, _ = self.gradients.loss(tokens, labels, first_key)
        return sums


class Total(nn.Cell):
    """Loss sums over all ranks."""

    def __init__(self, data: DataParallel) -> None:
        super().__init__(auto_prefix=False)
        self.data = data

    def construct(self, sums):
        """[loss sum, valid tokens]."""
        return self.data.evaluation(sums)


class TrainStep:
    """`step(batch, lr, number, stop) -> Outcome`, and `evaluate(batches) -> mean loss`.

    `tables` are the rotary cosines and sines of this rank's positions in a sequence of `seq_len`; `shape` is that of
    the stream that pipeline ranks exchange.
    """

    def __init__(
        self, parallel: Parallelized, weights: Weights, finish: Finish, micro_batches: int,
        tables: Sequence[np.ndarray], shape: tuple[int, ...], seq_len: int, dtype: type,
    ) -> None:  # fmt: skip
        self.dtype, self.seq_len, self.positions = dtype, seq_len, parallel.positions
        self.span = partial(parallel.collectives.recorder.span, COMPUTE)
        self.total = Total(parallel.data)
        self.publish = Publish(weights) if parallel.data.publishes else None
        self.whole = self.engine = None
        tables = tuple(Tensor(table) for table in tables)
        if parallel.schedule is None:
            gradients = Gradients(parallel.stages[0], weights.values, tables)
            self.evaluation = Evaluation(gradients)
            if micro_batches == 1:
                self.whole = WholeStep(gradients, finish)
                return
        shapes = [parallel.data.collected(weight) for weight in weights.specs]
        names = [f"accumulated.{weight.name}" for weight in weights.specs]
        accumulators = ParameterTuple([_parameter(np.zeros(s), dtype, n) for s, n in zip(shapes, names, strict=True)])
        self.finish = FinishAccumulated(finish, accumulators)
        if parallel.schedule is None:
            self.accumulate = Accumulate(gradients, Sums(parallel.data, accumulators, parallel.data.all))
            return
        make_stages = _sharded_stages if parallel.data.gathers else _stages
        stages = make_stages(parallel, weights, accumulators, tables)
        self.engine = Engine(parallel.schedule, stages, parallel.collectives, shape, weights.values[0].dtype)

    def __call__(self, batch: Batch, lr: float, number: int, stop: bool) -> Outcome:
        """Run step `number` (from 1) on this rank's micro-batches."""
        inputs = self._inputs(batch)
        scalars = [self._scalar(value) for value in (lr, number, stop)]
        if self.whole:
            with self.span("whole step"):
                statistics = self.whole(*inputs[0], *scalars)
        else:
            if self.engine:
                sums = self._sums(batch, self.engine.run(inputs))
            else:
                sums = np.sum([self._accumulated(i, tensors) for i, tensors in enumerate(inputs)], axis=0)
            with self.span("finish"):
                statistics = self.finish(Tensor(sums), *scalars)
        if self.publish:
            with self.span("publish"):
                self.publish()
        loss, tokens, norm, stops = (float(value) for value in statistics.asnumpy())
        return Outcome(loss / tokens if tokens else math.nan, int(tokens), norm, stops > 0)

    def _accumulated(self, micro_batch: int, tensors: Sequence[Tensor]) -> np.ndarray:
        with self.span("accumulate", micro_batch=micro_batch):
            return self.accumulate(*tensors).asnumpy()

    def evaluate(self, batches: Sequence[Batch]) -> float | None:
        """Mean loss over all valid tokens of `batches`, on all ranks; None where there are none."""
        sums = np.zeros(2, self.dtype)
        for batch in batches:
            inputs = self._inputs(batch)
            if self.engine:
                sums += self._sums(batch, self.engine.evaluate(inputs))
            else:
                sums += np.sum([self.evaluation(*tensors).asnumpy() for tensors in inputs], axis=0)
        loss, tokens = self.total(Tensor(sums)).asnumpy()
        return float(loss / tokens) if tokens else None

    def _sums(self, batch: Batch, losses: Sequence[Tensor]) -> np.ndarray:
        """[loss sum, valid tokens] of the rank of the last stage, and zeros on the others."""
        if not losses:
            return np.zeros(2, self.dtype)
        valid = np.count_nonzero(self._own(batch.labels) >= 0)
        return np.array([sum(loss.asnumpy()[0] for loss in losses), valid], self.dtype)

    def _scalar(self, value: float) -> Tensor:
        return Tensor(np.array([value], self.dtype))

    def _inputs(self, batch: Batch) -> list[list[Tensor]]:
        """Tokens and labels of this rank, and first keys of whole sequences, of each micro-batch."""
        fields = (self._own(batch.tokens), self._own(batch.labels), batch.first_key)
        return [[Tensor(field[i]) for field in fields] for i in range(len(batch.tokens))]

    def _own(self, field: np.ndarray) -> np.ndarray:
        """[micro-batches, this rank's tokens] of a field over whole sequences."""
        sequences = field.reshape(len(field), -1, self.seq_len)
        return np.ascontiguousarray(sequences[:, :, self.positions]).reshape(len(field), -1)


def _stages(
    parallel: Parallelized, weights: Weights, sums: ParameterTuple, tables: tuple[Tensor, ...]
) -> dict[int, Stage]:
    """The stages of this rank."""
    places = {weight.name: place for place, weight in enumerate(weights.specs)}
    stages = {}
    for number, decoder in parallel.stages.items():
        own = [places[weight.name] for weight in decoder.weights]
        values = tuple(weights.values[place] for place in own)
        stages[number] = Stage(decoder, values, Sums(parallel.data, sums, own), tables)
    return stages


def _sharded_stages(
    parallel: Parallelized, weights: Weights, sums: ParameterTuple, tables: tuple[Tensor, ...]
) -> dict[int, ShardedStage]:
    """The same of ZeRO 3."""
    prefetch = parallel.collectives.mesh.layout.prefetch
    shards = Shards(weights.specs, weights.values, sums, tables, parallel.data, prefetch)
    return {number: ShardedStage(decoder, shards) for number, decoder in parallel.stages.items()}
