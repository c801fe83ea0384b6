"""The training step: forward, backward, reduction, clip and AdamW.

With one micro-batch a step all of it is one compiled graph; with more, one graph adds a micro-batch's gradients up
and another finishes the step; with a pipeline its engine walks the stages' graphs. Sums of losses and gradients are
divided by the global count of valid tokens at the end, as the count is not known before every rank has seen its
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from models.kernels import Kernels
from models.segments import Shared
from models.weights import Reader, Weight
from parallel.apply import Parallelized
from parallel.data import DataParallel
from parallel.pipeline import Engine, Stage, Sums
from parallel.sharded import ShardedStage, Shards
from parallel.trace import COMPUTE
from trainer.data.loader import NO_LOSS, Batch
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
    says), with two moments of each that AdamW updates: `trained` are the places of these.
    """

    def __init__(self, specs: Sequence[Weight], data: DataParallel, read: Reader, dtype: type) -> None:
        self.specs, self.data, self.dtype = tuple(specs), data, dtype
        held = data.cut if data.gathers else lambda weight, value: value
        starts = ((weight.name, held(weight, _start(weight, read))) for weight in specs)
        self.values = ParameterTuple([_parameter(value, dtype, name) for name, value in starts])
        self.masters = self.values
        if data.publishes:
            cut = [data.cut(weight, value.asnumpy()) for weight, value in zip(specs, self.values, strict=True)]
            self.masters = ParameterTuple(
                [_parameter(value, dtype, f"master.{weight.name}") for weight, value in zip(specs, cut, strict=True)]
            )
        self.trained = tuple(i for i, weight in enumerate(self.specs) if weight.update == "adamw")
        trained = ParameterTuple([self.masters[i] for i in self.trained])
        self.first = trained.clone(prefix="first", init="zeros")
        self.second = trained.clone(prefix="second", init="zeros")

    def load(self, kind: str, read: Reader) -> None:
        """Set every tensor of `kind`, ``first`` or ``second``, from a parameter reader."""
        for weight, parameter in zip(self._specs(kind), getattr(self, kind), strict=True):
            value = self.data.cut(weight, weight.stack(read))
            parameter.set_data(Tensor(np.ascontiguousarray(value, self.dtype)))

    def own(self, kind: str) -> dict[str, np.ndarray]:
        """What this rank writes into a checkpoint of `kind`, a key of `kinds`: what it holds first of all ranks."""
        return dict(chain(*(entries(weight, p.asnumpy()) for weight, p, entries in self._entries(kind))))

    def writes(self, kind: str) -> bool:
        """Whether this rank writes anything of `kind`."""
        return any(
            True for weight, p, entries in self._entries(kind) for _ in entries(weight, np.broadcast_to(0, p.shape))
        )

    def counted(self) -> dict[str, np.ndarray]:
        """As `own`, of what AdamW does not update: tallies, and biases of choices."""
        found = [(w, p) for w, p in zip(self.specs, self.values, strict=True) if w.update != "adamw"]
        return dict(chain(*(self.data.weight_entries(weight, p.asnumpy()) for weight, p in found)))

    def _entries(self, kind: str) -> Iterator[tuple[Weight, Parameter, Callable]]:
        entries = self.data.weight_entries if kind == "weights" else self.data.entries
        for weight, parameter in zip(self._specs(kind), self.kinds()[kind], strict=True):
            if weight.update != "tally":
                yield weight, parameter, entries

    def _specs(self, kind: str) -> Sequence[Weight]:
        return self.specs if kind == "weights" else [self.specs[i] for i in self.trained]

    def kinds(self) -> dict[str, ParameterTuple]:
        """What a checkpoint holds, by kind."""
        return {"weights": self.values, "first": self.first, "second": self.second}


def _start(weight: Weight, read: Reader) -> np.ndarray:
    return np.zeros(weight.shape) if weight.update == "tally" else weight.stack(read)


def _parameter(value: np.ndarray, dtype: type, name: str) -> Parameter:
    return Parameter(Tensor(np.ascontiguousarray(value, dtype)), name=name)


class Gradients(nn.Cell):
    """Forward and backward of one micro-batch: `run(tokens, labels, first_key) -> (sums, gradients)`.

    `sums` is [loss sum, valid tokens]; all three inputs are int32 [micro_batch * seq_len].
    """

    def __init__(self, model: Shared, values: ParameterTuple, tables: tuple[Tensor, Tensor]) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.values, self.tables = model, values, tables
        self.total = ops.ReduceSum()

    def loss(self, tokens, labels, first_key):
        """`(sums, saved)` of the forward pass."""
        loss, saved = self.model.forward(tokens, self.values, (tokens, labels, first_key) + self.tables)
        valid = self.total(ops.cast(labels[: tokens.shape[0]] >= 0, loss.dtype)).reshape((1,))
        return ops.concat((loss, valid)), saved

    def run(self, tokens, labels, first_key):
        """Loss sums and the gradients of the loss sum."""
        sums, saved = self.loss(tokens, labels, first_key)
        context = (tokens, labels, first_key) + self.tables
        _, gradients = self.model.backward(sums, saved, self.values, context)
        return sums, gradients


class Finish(nn.Cell):
    """Reduction over ranks, clip and AdamW: `run(sums, gradients, lr, step, stop) -> statistics`.

    statistics: [loss sum, valid tokens, gradient norm, ranks that were told to stop]. Routers' tallies are kept, and
    the biases of their choices go `bias_rate` toward the experts that got fewer copies in this step than the `even`
    share.
    """

    def __init__(
        self, weights: Weights, kernels: Kernels, settings: OptimizerSettings, dtype: type, bias_rate: float = 0.0,
        even: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.values, self.data, self.trained = weights.values, weights.data, weights.trained
        self.masters = ParameterTuple([weights.masters[i] for i in weights.trained])
        self.first, self.second = weights.first, weights.second
        self.others = tuple(i for i, weight in enumerate(weights.specs) if i not in weights.trained)
        self.counters = tuple(weights.masters[i] for i in self.others)
        self.balances = tuple(weights.specs[i].update == "balance" for i in self.others)
        self.rate, self.even = Tensor(np.array([bias_rate], dtype)), Tensor(np.array([even], dtype))
        self.adamw = kernels.AdamW(settings.betas[0], settings.betas[1], settings.eps)
        decays = [settings.weight_decay * weights.specs[i].decays for i in weights.trained]
        self.decays = Tensor(np.array(decays, dtype))
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
        trained = ()
        for i in self.trained:
            trained = trained + (gradients[i],)
        done = self.adamw.forward(self.masters, self.first, self.second, trained, self.decays, factor, lr, step)
        result = ops.depend(ops.concat((sums[0:2], norm, sums[2:3])), done)
        for k, i in enumerate(self.others):
            value = gradients[i]
            if self.balances[k]:
                value = self.counters[k] + self.rate * ops.sign(self.even - value)
            result = ops.depend(result, ops.assign(self.counters[k], value))
        return result


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
    the stream that pipeline ranks exchange; `ahead` is how many tokens further the model predicts.
    """

    def __init__(
        self, parallel: Parallelized, weights: Weights, finish: Finish, micro_batches: int,
        tables: Sequence[np.ndarray], shape: tuple[int, ...], seq_len: int, dtype: type, ahead: int = 0,
    ) -> None:  # fmt: skip
        self.dtype, self.seq_len, self.positions, self.ahead = dtype, seq_len, parallel.positions, ahead
        self.span = partial(parallel.collectives.recorder.span, COMPUTE)
        self.total = Total(parallel.data)
        self.publish = Publish(weights) if parallel.data.publishes else None
        self.whole = self.engine = self.routing = None
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
        labels = [batch.labels]
        for k in range(1, self.ahead + 1):
            labels += [self._later(batch.tokens, k), self._later_labels(batch.labels, k)]
        fields = (self._own(batch.tokens), np.concatenate([*map(self._own, labels)], axis=1), batch.first_key)
        return [[Tensor(field[i]) for field in fields] for i in range(len(batch.tokens))]

    def _later(self, field: np.ndarray, ahead: int) -> np.ndarray:
        """What comes `ahead` tokens later in the same sequence, -1 behind it."""
        sequences = field.reshape(len(field), -1, self.seq_len)
        later = np.full_like(sequences, NO_LOSS)
        later[:, :, : self.seq_len - ahead] = sequences[:, :, ahead:]
        return later.reshape(field.shape)

    def _later_labels(self, labels: np.ndarray, ahead: int) -> np.ndarray:
        """Later labels, and none behind a token without a label: there a document may end."""
        runs = np.stack([self._later(labels, k) for k in range(ahead + 1)])
        return np.where((runs >= 0).all(0), runs[-1], NO_LOSS)

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
