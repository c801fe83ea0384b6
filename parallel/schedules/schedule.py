"""What a pipeline schedule is: for each pipeline rank the order of its actions. Messages follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

FORWARD, BACKWARD, INPUT, WEIGHT = KINDS = "FBIW"
V_SHAPED = ("zb_v", "dualpipe_v")
SPLIT = ("zb_h1", *V_SHAPED)
"""Schedules in which some backwards come in two halves."""


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: str
    """`FORWARD`; `BACKWARD`, whole; or its halves `INPUT` (gradient of the input) and `WEIGHT` (of the weights)."""
    micro_batch: int
    stage: int
    """Virtual stage, 0 to ``pp * vpp - 1`` in the order of depth."""

    def __str__(self) -> str:
        return f"{self.kind}(micro-batch {self.micro_batch}, stage {self.stage})"


class Message(NamedTuple):
    """What one rank hands to another; the messages of a channel arrive in the order in which they were sent."""

    sender: int
    receiver: int
    direction: str
    """`activation` (to the next stage) or `gradient` (to the one before)."""
    micro_batch: int
    stage: int
    """The stage that made it."""

    @property
    def channel(self) -> tuple[int, int, str]:
        return self[:3]

    def __str__(self) -> str:
        what = f"{self.direction} of micro-batch {self.micro_batch} out of stage {self.stage}"
        return f"{what}, rank {self.sender} to {self.receiver}"


class Step(NamedTuple):
    """An action as the simulator prices it. Actions are numbered rank after rank; their count stands for none."""

    number: int
    before: int
    """The action before it on its rank."""
    needs: int
    """The latest action that it needs: its message's, where it receives one."""
    boundary: int
    """Where the message goes: s between stages s and s + 1; the last stage, which has none behind it, for nowhere."""
    cost: int
    """``KINDS.index(kind) * stages + stage``."""


class Columns(NamedTuple):
    """The actions of one rank in their order, as arrays [actions]."""

    kinds: np.ndarray
    """Indices into `KINDS`."""
    micro_batches: np.ndarray
    stages: np.ndarray


@dataclass(frozen=True, eq=False)
class Schedule:
    """The actions of every pipeline rank in their order. `make` builds one, `check_schedule` proves it.

    A rank receives what an action needs just before it, and sends what it makes just after it, without waiting.
    """

    name: str
    pp: int
    vpp: int
    """Virtual stages of a rank."""
    micro_batches: int
    columns: tuple[Columns, ...]
    """By pipeline rank."""

    @cached_property
    def actions(self) -> tuple[tuple[Action, ...], ...]:
        """`columns` one by one, for those who go from action to action."""
        return tuple(
            tuple(
                Action(KINDS[kind], micro_batch, stage)
                for kind, micro_batch, stage in zip(*(column.tolist() for column in own), strict=True)
            )
            for own in self.columns
        )

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    def only(self, kind: str) -> Schedule:
        """The passes of one kind alone, as an evaluation runs the forwards."""
        own = [columns.kinds == KINDS.index(kind) for columns in self.columns]
        kept = [Columns(*(column[those] for column in found)) for found, those in zip(self.columns, own, strict=True)]
        return replace(self, columns=tuple(kept))

    def rank_of(self, stage: int) -> int:
        """The rank that holds `stage`. Schedules in the shape of a V return, so that rank 0 holds both ends."""
        if self.name in V_SHAPED and stage >= self.pp:
            return 2 * self.pp - 1 - stage
        return stage % self.pp

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The virtual stages of `rank`, in ascending order."""
        return (rank, 2 * self.pp - 1 - rank) if self.name in V_SHAPED else tuple(range(rank, self.stages, self.pp))

    def outgoing(self, action: Action) -> Message | None:
        """What is sent after `action`; None where nothing is, or where the neighbouring stage lies on this rank."""
        if action.kind == WEIGHT:
            return None
        return self._message(action, action.stage, action.stage + (1 if action.kind == FORWARD else -1))

    def incoming(self, action: Action) -> Message | None:
        """What `action` receives first; None where nothing is, or where this rank made it itself."""
        if action.kind == WEIGHT:
            return None
        return self._message(action, action.stage - (1 if action.kind == FORWARD else -1), action.stage)

    def _message(self, action: Action, source: int, target: int) -> Message | None:
        if not (0 <= source < self.stages and 0 <= target < self.stages):
            return None
        sender, receiver = self.rank_of(source), self.rank_of(target)
        direction = "activation" if action.kind == FORWARD else "gradient"
        return None if sender == receiver else Message(sender, receiver, direction, action.micro_batch, source)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All actions in an order in which each comes after what it needs. Made once: schedules are priced often.

        Runs every rank as far as it can, and goes on with it when what it waits for is made: one look at each action.
        Raises ValueError, naming the actions, where one comes before what it needs or ranks wait for ever.
        """
        firsts = [0, *accumulate(map(len, self.actions))]
        made: dict[tuple[str, int, int], int] = {}
        waiting: dict[tuple[str, int, int], tuple[int, int]] = {}
        ready = [(rank, 0) for rank in reversed(range(self.pp))]
        steps: list[Step] = []
        while ready:
            rank, begin = ready.pop()
            for position in range(begin, len(self.actions[rank])):
                kind, micro_batch, stage = action = self.actions[rank][position]
                needs = self._needs(action)
                missing = next((need for need in needs if need not in made), None)
                if missing and self.rank_of(missing[2]) == rank:
                    raise ValueError(f"rank {rank}: {action} comes before {_made(*missing)}, which it needs")
                if missing:
                    waiting[missing] = rank, position
                    break
                number, boundary = firsts[rank] + position, self.stages - 1
                if needs and self.rank_of(needs[-1][2]) != rank:
                    boundary = min(needs[-1][2], stage)
                before = number - 1 if position else firsts[-1]
                source = made[needs[-1]] if needs else firsts[-1]
                steps.append(Step(number, before, source, boundary, KINDS.index(kind) * self.stages + stage))
                output = (INPUT if kind == BACKWARD else kind, micro_batch, stage)
                made[output] = number
                if output in waiting:
                    ready.append(waiting.pop(output))
        if waiting:
            stuck = [f"rank {r} at {self.actions[r][p]} for {_made(*need)}" for need, (r, p) in waiting.items()]
            raise ValueError(f"these wait for ever: {'; '.join(stuck)}")
        return tuple(steps)

    def _needs(self, action: Action) -> list[tuple[str, int, int]]:
        """What must be made before `action` (`INPUT` is made by `BACKWARD` too), the neighbouring stage's part last."""
        kind, micro_batch, stage = action
        if kind == FORWARD:
            return [(FORWARD, micro_batch, stage - 1)] if stage else []
        if kind == WEIGHT:
            return [(INPUT, micro_batch, stage)]
        own = [(FORWARD, micro_batch, stage)]
        return own if stage == self.stages - 1 else [*own, (INPUT, micro_batch, stage + 1)]


def _made(kind: str, micro_batch: int, stage: int) -> str:
    return f"the {'output' if kind == FORWARD else 'input gradient'} of micro-batch {micro_batch}, stage {stage}"
