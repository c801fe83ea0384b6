"""Proves a schedule before anybody runs it, and says what it sends and what it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from numbers import Real

from parallel.schedules.schedule import FORWARD, INPUT, WEIGHT, Action, Message, Schedule

SEND, RECEIVE = "send", "receive"


def messages(schedule: Schedule) -> tuple[tuple[tuple[str, Message], ...], ...]:
    """For each rank, in order, what it does with each message: `RECEIVE` or `SEND`, and the message."""
    return tuple(tuple(_messages(schedule, actions)) for actions in schedule.actions)


def _messages(schedule: Schedule, actions: Sequence[Action]) -> Iterator[tuple[str, Message]]:
    for action in actions:
        for verb, message in ((RECEIVE, schedule.incoming(action)), (SEND, schedule.outgoing(action))):
            if message:
                yield verb, message


def check_schedule(schedule: Schedule) -> tuple[float, ...]:
    """The peak of live activations of each rank (`peaks`), if every rank can run its actions to the end.

    Raises ValueError naming the action or the message where a rank runs another stage's action, an action is missing
    or doubled, whole backwards and halves mix, an action comes before what it needs, ranks wait for each other, or a
    channel delivers another message than its receiver waits for.
    """
    for rank in range(schedule.pp):
        _check_complete(schedule, rank)
    _ = schedule.steps
    _check_channels(schedule)
    return peaks(schedule)


def _check_complete(schedule: Schedule, rank: int) -> None:
    stages = schedule.stages_of(rank)
    kinds = dict.fromkeys(product(range(schedule.micro_batches), stages), "")
    for action in schedule.actions[rank]:
        if action[1:] not in kinds:
            own = f"{schedule.micro_batches} micro-batches of stages {list(stages)}"
            raise ValueError(f"rank {rank}: {action} is not among its {own}")
        kinds[action[1:]] += action.kind
    for (micro_batch, stage), found in kinds.items():
        if "".join(sorted(found)) not in ("BF", "FIW"):
            place = f"micro-batch {micro_batch}, stage {stage}"
            raise ValueError(f"rank {rank}: {found}({place}) must be F and B, or F, I and W, once each")


def _check_channels(schedule: Schedule) -> None:
    sent, received = defaultdict(list), defaultdict(list)
    for rank in messages(schedule):
        for verb, message in rank:
            (sent if verb == SEND else received)[message.channel].append(message)
    for channel, expected in received.items():
        for want, have in zip(expected, sent[channel], strict=True):
            if want != have:
                raise ValueError(f"the receiver waits for the {want}, but first comes the {have}")


def peaks(
    schedule: Schedule, saved: float | Sequence[float] = 1, kept: float | Sequence[float] = 1
) -> tuple[float, ...]:
    """The most that each rank holds at once of what its forwards saved.

    A forward's tensors weigh `saved` from F to B or I, and what is left of them `kept` from I to W: numbers or one for
    each stage. With the defaults the peak counts stage-forwards; with ``saved=0`` those between their two halves; with
    bytes it is bytes.
    """
    saved, kept = per_stage(saved, schedule.stages), per_stage(kept, schedule.stages)
    found = []
    for actions in schedule.actions:
        held = peak = 0
        for kind, _, stage in actions:
            if kind == FORWARD:
                held += saved[stage]
            elif kind == WEIGHT:
                held -= kept[stage]
            else:
                held -= saved[stage] - (kept[stage] if kind == INPUT else 0)
            peak = max(peak, held)
        found.append(peak)
    return tuple(found)


def per_stage(value: float | Sequence[float], stages: int) -> list[float]:
    """`value` for each stage: a number for all alike, or already one for each."""
    values = [value] * stages if isinstance(value, Real) else list(value)
    if len(values) != stages:
        raise ValueError(f"{len(values)} values are given for {stages} stages")
    return values
