"""The pipeline engine: stages as graphs, and a host that walks any schedule over them.

A stage is a run of the model's segments. Its forward graph returns what the segments saved, its backward graph takes
it, so that several micro-batches may be in flight; schedules that split the backward run its two halves as two graphs.
What a rank sends and receives follows from the schedule (`parallel.schedules`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import chain, pairwise
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from models.segments import Segment, Shared
from parallel.collectives import Collectives
from parallel.collectives.channel import Arrival
from parallel.data import DataParallel
from parallel.schedules import BACKWARD, FORWARD, INPUT, Action, Schedule, check_schedule, messages, requests
from parallel.trace import COMPUTE

DIRECTIONS = ("activation", "gradient")


class Sums(nn.Cell):
    """Adds gradients up over micro-batches. `places` are those of their weights among the rank's."""

    def __init__(self, data: DataParallel, accumulators: Sequence[Parameter], places: Sequence[int]) -> None:
        super().__init__(auto_prefix=False)
        self.data, self.places = data, tuple(places)
        self.accumulators = tuple(accumulators[place] for place in places)

    def add(self, result, gradients):
        """`result`, once every gradient is added.

        One after another, the last layers' first: they are there first, and what is added makes room.
        """
        collected = self.data.collect(gradients, self.places)
        done = self.data.nothing
        for j in range(len(collected)):
            i = len(collected) - 1 - j
            done = ops.depend(done, ops.assign_add(self.accumulators[i], ops.depend(collected[i], done)))
        return ops.depend(result, done)


class ForwardGraph(nn.Cell):
    """`(y, *saved)` of one micro-batch."""

    def __init__(self, segment: Segment, values: tuple[Parameter, ...], tables: tuple[Tensor, Tensor]) -> None:
        super().__init__(auto_prefix=False)
        self.segment, self.values, self.tables = segment, values, tables

    def construct(self, x, tokens, labels, first_key):
        y, saved = self.segment.forward(x, self.values, (tokens, labels, first_key) + self.tables)
        return (y,) + saved


class BackwardGraph(nn.Cell):
    """`dx`, after the gradients were added to the accumulators."""

    def __init__(self, forward: ForwardGraph, sums: Sums) -> None:
        super().__init__(auto_prefix=False)
        self.segment, self.values, self.tables = forward.segment, forward.values, forward.tables
        self.sums = sums

    def construct(self, dy, tokens, labels, first_key, *saved):
        context = (tokens, labels, first_key) + self.tables
        dx, gradients = self.segment.backward(dy, saved, self.values, context)
        return self.sums.add(dx, gradients)


class InputGraph(nn.Cell):
    """`(dx, *kept)`: the first half of the backward."""

    def __init__(self, forward: ForwardGraph) -> None:
        super().__init__(auto_prefix=False)
        self.segment, self.values, self.tables = forward.segment, forward.values, forward.tables

    def construct(self, dy, tokens, labels, first_key, *saved):
        dx, kept = self.segment.backward_input(dy, saved, self.values, (tokens, labels, first_key) + self.tables)
        return (dx,) + kept


class WeightGraph(nn.Cell):
    """The second half: adds the gradients to the accumulators. Returns `done` as it came."""

    def __init__(self, forward: ForwardGraph, sums: Sums) -> None:
        super().__init__(auto_prefix=False)
        self.segment, self.sums = forward.segment, sums

    def construct(self, done, *kept):
        return self.sums.add(done, self.segment.backward_weight(kept))


class Stage:
    """One virtual stage of this rank: its graphs, and what its micro-batches in flight have saved."""

    def __init__(
        self, decoder: Shared, values: tuple[Parameter, ...], sums: Sums, tables: tuple[Tensor, Tensor]
    ) -> None:
        self.forward_graph = ForwardGraph(decoder, values, tables)
        self.backward_graph = BackwardGraph(self.forward_graph, sums)
        self.input_graph = InputGraph(self.forward_graph)
        self.weight_graph = WeightGraph(self.forward_graph, sums)
        self.saved: dict[int, tuple[Tensor, ...]] = {}
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        self.done = Tensor(np.zeros(1, np.float32))

    def forward(self, micro_batch: int, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The stage's output."""
        y, *saved = self.forward_graph(x, *inputs)
        self.saved[micro_batch] = tuple(saved)
        return y

    def backward(self, micro_batch: int, dy: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The gradient of the stage's input."""
        return self.backward_graph(dy, *inputs, *self.saved.pop(micro_batch))

    def backward_input(self, micro_batch: int, dy: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The same; the weights' gradients are left to `backward_weight`."""
        dx, *kept = self.input_graph(dy, *inputs, *self.saved.pop(micro_batch))
        self.kept[micro_batch] = tuple(kept)
        return dx

    def backward_weight(self, micro_batch: int) -> None:
        """The gradients of the weights."""
        self.weight_graph(self.done, *self.kept.pop(micro_batch))


class Engine:
    """Runs a schedule's actions of this rank, one micro-batch's tensors at a time.

    `stages` are the rank's own by virtual stage, each a `Stage` or a `parallel.sharded.ShardedStage`; `shape` and
    `dtype` are those of the stream that ranks exchange.
    """

    def __init__(
        self, schedule: Schedule, stages: dict[int, Stage], collectives: Collectives, shape: tuple[int, ...], dtype: Any
    ) -> None:
        check_schedule(schedule)
        self.schedule, self.stages = schedule, stages
        self.shape, self.dtype = shape, dtype
        self.rank = collectives.mesh.index("pp", collectives.rank)
        self.recorder = collectives.recorder
        self.channels = {}
        for direction in DIRECTIONS if schedule.pp > 1 else ():
            pairs = {message[:2] for _, message in chain(*messages(schedule)) if message.direction == direction}
            self.channels[direction] = collectives.Channel("pp", direction, pairs)
        ahead = all(channel.ahead for channel in self.channels.values())
        self.early = ahead and collectives.mesh.layout.early_receive
        self.training, self.evaluation = map(self._plan, (schedule, schedule.only(FORWARD)))
        self.asked: dict[Action, Arrival] = {}
        self.handed: dict[tuple[str, int, int], Tensor] = {}
        self.last = schedule.stages - 1
        self.nothing = Tensor(np.zeros(1, np.float32))

    def run(self, inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """One step; the loss sums of the micro-batches, on the rank of the last stage.

        inputs: tokens, labels and first keys of each micro-batch. The stages add the gradients up.
        """
        return self._walk(self.training, inputs)

    def evaluate(self, inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The loss sums alone."""
        return self._walk(self.evaluation, inputs)

    def _plan(self, schedule: Schedule) -> list[tuple[Action, list[Action]]]:
        return list(zip(schedule.actions[self.rank], requests(schedule, self.rank), strict=True))

    def _walk(self, plan: list[tuple[Action, list[Action]]], inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """`plan`: actions, each with those whose messages are asked for before it."""
        losses = []
        keeps = plan is self.training
        for (action, due), (following, _) in pairwise([*plan, (None, [])]):
            for other in due:
                self._ask(other)
            received = self._take(action)
            if self.early and following:
                self._ask(following)
            stage, micro_batch = self.stages[action.stage], action.micro_batch
            if action.kind == FORWARD:
                x = received if action.stage else inputs[micro_batch][0]
                with self._recorded(action):
                    y = stage.forward(micro_batch, x, inputs[micro_batch])
                if not keeps:
                    stage.saved.clear()
                if action.stage == self.last:
                    losses.append(y)
                else:
                    self._give(action, y)
            elif action.kind in (BACKWARD, INPUT):
                dy = self.nothing if action.stage == self.last else received
                half = stage.backward if action.kind == BACKWARD else stage.backward_input
                with self._recorded(action):
                    dx = half(micro_batch, dy, inputs[micro_batch])
                if action.stage:
                    self._give(action, dx)
            else:
                with self._recorded(action):
                    stage.backward_weight(micro_batch)
        if self.handed:
            raise RuntimeError(f"the schedule {self.schedule.name} left {sorted(self.handed)} without a reader")
        for channel in self.channels.values():
            channel.check_drained()
        return losses

    def _recorded(self, action: Action) -> AbstractContextManager[None]:
        return self.recorder.span(COMPUTE, action.kind, stage=action.stage, micro_batch=action.micro_batch)

    def _give(self, action: Action, tensor: Tensor) -> None:
        message = self.schedule.outgoing(action)
        if message is None:
            step = 1 if action.kind == FORWARD else -1
            self.handed[_direction(action), action.micro_batch, action.stage + step] = tensor
        else:
            self.channels[message.direction].send(tensor, message.receiver)

    def _ask(self, action: Action) -> None:
        message = self.schedule.incoming(action)
        if message and action not in self.asked:
            arrival = self.channels[message.direction].receive(self.shape, self.dtype, message.sender)
            self.asked[action] = arrival

    def _take(self, action: Action) -> Tensor | None:
        """What the neighbouring stage made for `action`; None where there is none."""
        if action in self.asked:
            return self.asked.pop(action).wait()
        return self.handed.pop((_direction(action), action.micro_batch, action.stage), None)


def _direction(action: Action) -> str:
    return DIRECTIONS[action.kind != FORWARD]
