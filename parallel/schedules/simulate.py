"""What a schedule costs in time, without running it: the start and the end of every action, and the bubble."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub
from statistics import fmean
from typing import NamedTuple

import numpy as np

from parallel.schedules.check import per_stage
from parallel.schedules.schedule import Action, Schedule

Duration = float | Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Times:
    """How long a pass takes, in any unit: for all stages alike, or a number for each virtual stage. Those of many
    pipelines (`price`) are arrays with a row for each.

    The defaults are the unit times of the papers: as long a forward as each half of the backward.
    """

    forward: Duration = 1.0
    backward: Duration = 2.0
    input: Duration = 1.0
    weight: Duration = 1.0
    transfer: Duration = 0.0
    """A message between two ranks: alike for all, or by boundary, the s-th between stages s and s + 1."""


@dataclass(frozen=True)
class Timeline:
    """When every action of a schedule runs, in the unit of the `Times`; time 0 is the first action's start."""

    schedule: Schedule
    times: Times
    starts: tuple[tuple[float, ...], ...]
    """By pipeline rank, in the order of ``schedule.actions``."""
    ends: tuple[tuple[float, ...], ...]
    makespan: float

    @property
    def busy(self) -> tuple[float, ...]:
        """The time that each rank computes."""
        return tuple(sum(map(sub, ends, starts)) for ends, starts in zip(self.ends, self.starts, strict=True))

    @property
    def bubble(self) -> float:
        """The idle share of the makespan over all ranks: ``1 - busy / (pp * makespan)``."""
        return max(0.0, 1 - sum(self.busy) / (self.schedule.pp * self.makespan))


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Runs `schedule` with every action as early as its rank and its message allow.

    Sends overlap with computation, and messages do not slow each other. One pass over the actions in the order of
    their dependencies (`Schedule.steps`); raises its ValueError for a schedule that cannot run.
    """
    stages = schedule.stages
    durations = [
        duration
        for times_of_kind in (times.forward, times.backward, times.input, times.weight)
        for duration in per_stage(times_of_kind, stages)
    ]
    delays = [*per_stage(times.transfer, stages - 1), 0.0]
    steps = schedule.steps
    starts, ends = [0.0] * len(steps), [0.0] * (len(steps) + 1)
    for number, before, needs, boundary, cost in steps:
        start = ends[before]
        arrival = ends[needs] + delays[boundary]
        if arrival > start:
            start = arrival
        starts[number] = start
        ends[number] = start + durations[cost]
    by_rank, first = [], 0
    for actions in schedule.actions:
        by_rank.append(slice(first, first + len(actions)))
        first += len(actions)
    return Timeline(
        schedule, times, tuple(tuple(starts[s]) for s in by_rank), tuple(tuple(ends[s]) for s in by_rank), max(ends)
    )


def requests(schedule: Schedule, rank: int) -> list[list[Action]]:
    """For each action of `rank`, those whose messages it asks for just before: what in unit times was sent by then.

    So every rank comes to its end even where a pass ends only when all has arrived that its rank sent and asked for
    before it: it waits for passes alone that, in unit times, start earlier.
    """
    timeline = simulate(schedule, Times())
    ends = {
        schedule.outgoing(action): end
        for actions, own in zip(schedule.actions, timeline.ends, strict=True)
        for action, end in zip(actions, own, strict=True)
    }
    due = [[] for _ in schedule.actions[rank]]
    for action in schedule.actions[rank]:
        if message := schedule.incoming(action):
            due[bisect_left(timeline.starts[rank], ends[message])].append(action)
    return due


class Formula(NamedTuple):
    """A published bubble."""

    text: str
    share: float
    """Of the makespan."""


def bubble_formula(schedule: Schedule, times: Times) -> Formula | None:
    """The bubble that the literature gives for equal stages and free messages; None where no formula is sourced.

    With p ranks and m micro-batches, as a share of the makespan:

    - ``gpipe`` (Huang et al. 2019, arXiv:1811.06965) and ``1f1b`` (Narayanan et al. 2021, arXiv:2104.04473, section
      2.2.1, as (p - 1)/m of the time without a bubble): (p - 1)/(m + p - 1);
    - ``interleaved`` with v stages a rank (the same, section 2.2.2: (p - 1)/(v m) of the time without a bubble):
      (p - 1)/(v m + p - 1);
    - ``zb_h1`` (Qi et al. 2023, arXiv:2401.10241, table 2 and, for m < p, appendix H, whose T_B is our I): idle for
      (p - 1)(F + I - W), where 1F1B is for (p - 1)(F + I + W); with m < p for (p - 1)(F + I) - (m - 1) W. It holds
      where W is at most F and I. Stages that differ enter with their mean.
    """
    p, m, v = schedule.pp, schedule.micro_batches, schedule.vpp
    if schedule.name in ("gpipe", "1f1b"):
        return Formula("(p-1)/(m+p-1)", (p - 1) / (m + p - 1))
    if schedule.name == "interleaved":
        return Formula("(p-1)/(vm+p-1)", (p - 1) / (v * m + p - 1))
    if schedule.name == "zb_h1":
        f, i, w = (fmean(per_stage(t, schedule.stages)) for t in (times.forward, times.input, times.weight))
        idle, text = (p - 1) * (f + i) - (min(m, p) - 1) * w, "(p-1)(F+I-W)" if m >= p else "(p-1)(F+I)-(m-1)W"
        return Formula(f"{text} idle", idle / (m * (f + i + w) + idle))
    return None
