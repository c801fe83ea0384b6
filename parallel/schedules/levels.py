"""Schedules of any number of micro-batches, for arrays: what `price` walks and `lower_bound` adds up.

A schedule is written as levels. A level has at most one action of each rank, and none of them waits for another: they
are the actions that start together where every pass takes 1 and messages nothing. From ``2 * pp`` micro-batches on,
more of them make a schedule longer in its middle alone: each further `period` of them, one or for ``interleaved`` `pp`,
puts the same levels between the same two. So two small schedules, made once, say what all larger ones are.

``gpipe``, which has two middles, is not written so: its figures are formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from parallel.schedules.generate import check_numbers, make
from parallel.schedules.schedule import BACKWARD, FORWARD, INPUT, KINDS, Schedule
from parallel.schedules.simulate import Times


class Levels(NamedTuple):
    """What each rank does at each of n levels: arrays [n, pp]."""

    reach: np.ndarray
    """Where the message comes from that the rank waits for: so many places back, counted through the ranks of a level
    and then through levels. Without one `pp`, which is the rank itself a level before."""
    boundary: np.ndarray
    """`Step.boundary`."""
    cost: np.ndarray
    """`Step.cost`; ``len(KINDS) * stages`` where the rank has nothing to do."""

    def part(self, start: int, stop: int | None = None) -> Levels:
        return Levels(*(array[start:stop] for array in self))


@dataclass(frozen=True)
class Pattern:
    """A schedule in three parts, of which the middle is run any number of times, each for `period` micro-batches."""

    schedule: Schedule
    """That without the middle; without its columns too, which are too many to keep."""
    period: int
    first: Levels
    middle: Levels
    """No levels in a schedule of fewer than ``2 * pp`` micro-batches."""
    last: Levels

    @cached_property
    def memory(self) -> int:
        """Levels that an action looks back at most."""
        longest = max(int(part.reach.max(initial=1)) for part in (self.first, self.middle, self.last))
        return -(-longest // self.schedule.pp)

    @cached_property
    def live(self) -> np.ndarray:
        """Places before the end of a middle at which levels behind it look, counted back from there: [places], < 0."""
        pp = self.schedule.pp
        again = [self.middle.reach] * -(-self.memory // max(1, len(self.middle.reach)))
        behind = [np.arange(reach.size) - reach.ravel() for reach in (np.concatenate(again), self.last.reach)]
        places = np.unique(np.concatenate([np.arange(-pp, 0), *behind]))
        return places[places < 0]

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each cost occurs outside the middle and in one run of it: [2, len(KINDS), stages]."""
        size = len(KINDS) * self.schedule.stages
        first, middle, last = (
            np.bincount(part.cost.ravel(), minlength=size + 1)[:size] for part in (self.first, self.middle, self.last)
        )
        return np.stack([first + last, middle]).reshape(2, len(KINDS), -1)

    def busy(self, runs: np.ndarray, durations: np.ndarray) -> np.ndarray:
        """What each rank computes, by the `runs` [K] of the middle and the `durations` of `Stacked`: [pp, K]."""
        passes = durations[:-1].reshape(*self.counts.shape[1:], -1)
        once, again = (self.counts[..., None] * passes).sum(1)[:, self.own].sum(2)
        return once + runs * again

    @cached_property
    def crossed(self) -> np.ndarray:
        """Whether messages go over a boundary: [stages]. Those whose sides lie on one rank have none."""
        boundaries = np.concatenate([part.boundary.ravel() for part in (self.first, self.middle, self.last)])
        return np.append(np.isin(np.arange(self.schedule.stages - 1), boundaries), False)

    @cached_property
    def own(self) -> np.ndarray:
        """The stages of each rank: [pp, vpp]."""
        return np.array([self.schedule.stages_of(rank) for rank in range(self.schedule.pp)])


def split_off(name: str, pp: int, vpp: int, micro_batches: int) -> tuple[int, int]:
    """The micro-batches of the `pattern` of so many, and how often its middle is run.

    Raises `models.checks.ConfigError` where `make` does.
    """
    check_numbers(name, pp, vpp, micro_batches)
    period = _period(name, pp)
    runs = max(0, (micro_batches - 2 * pp) // period)
    return micro_batches - runs * period, runs


def _period(name: str, pp: int) -> int:
    return pp if name == "interleaved" else 1


@lru_cache(maxsize=1024)
def pattern(name: str, pp: int, vpp: int, micro_batches: int) -> Pattern:
    """The schedule of `micro_batches`, at most ``2 * pp``, and what more of them put into its middle."""
    schedule, period = make(name, pp, vpp, micro_batches), _period(name, pp)
    short, schedule = _levels(schedule), replace(schedule, columns=())
    if micro_batches < 2 * pp:
        return Pattern(schedule, period, short, short.part(0, 0), short.part(0, 0))
    long = _levels(make(name, pp, vpp, micro_batches + period))
    count = len(short.cost)
    both = [np.any(one != other[:count], axis=1) for one, other in zip(short, long, strict=True)]
    start = int(np.append(np.any(both, axis=0), True).argmax())
    stop = start + len(long.cost) - count
    if any(np.any(one[start:] != other[stop:]) for one, other in zip(short, long, strict=True)):
        raise ValueError(f"{name} of {pp} ranks has no middle that repeats with its micro-batches")
    return Pattern(schedule, period, long.part(0, start), long.part(start, stop), long.part(stop))


def _levels(schedule: Schedule) -> Levels:
    """Goes from level to level, with all ranks side by side: each does its next action unless that needs another of the
    same level. Raises ValueError where ranks wait for ever."""
    pp, stages, m = schedule.pp, schedule.stages, schedule.micro_batches
    cost, needs, makes = _slots(schedule)
    done = np.full(2 * stages * m + len(SPECIAL), -1)  # at which level
    done[SPECIAL.index("never")] = done[len(SPECIAL) :] = NEVER
    ranks, at, level = np.arange(pp), np.zeros(pp, int), 0
    reached, needed = np.full(needs.shape, NEVER), np.full(needs.shape, -1)
    while True:
        waits = needs[ranks, at]
        ready = np.flatnonzero(done[waits] < level)
        if not len(ready):
            break
        own = ready, at[ready]
        reached[own], needed[own] = level, done[waits[ready]]
        done[makes[own]] = level
        at[ready] += 1
        level += 1
    if np.any(at < [len(own.kinds) for own in schedule.columns]):
        raise ValueError(f"{schedule.name}: ranks wait for ever")
    rank, position = np.nonzero(reached < NEVER)
    own = rank, position
    homes = np.array([schedule.rank_of(stage) for stage in range(stages)])
    stage, source = cost[own] % stages, (needs[own] - len(SPECIAL)) // m % stages
    receives = (needs[own] >= len(SPECIAL)) & (homes[source] != rank)
    levels = Levels(*(np.full((level, pp), fill) for fill in (pp, stages - 1, len(KINDS) * stages)))
    place = reached[own], rank
    levels.cost[place] = cost[own]
    levels.boundary[place] = np.where(receives, np.minimum(source, stage), stages - 1)
    levels.reach[place] = np.where(receives, (reached[own] - needed[own]) * pp + rank - homes[source], pp)
    return levels


SPECIAL = ("nothing", "nobody", "never")
"""Slots of `_slots` before those of outputs: what is there at once, what nobody asks for, what never comes."""
NEVER = 2**40


def _slots(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each rank's actions, and one beyond its last: `Step.cost`, the slot of the output that it needs of the
    neighbouring stage, and that of its own; [pp, actions + 1] each."""
    stages, m = schedule.stages, schedule.micro_batches
    longest = max(len(own.kinds) for own in schedule.columns)
    cost, makes = np.zeros((2, schedule.pp, longest + 1), int)
    needs = np.full(cost.shape, SPECIAL.index("never"))
    for rank, (kind, micro_batch, stage) in enumerate(schedule.columns):
        forward, back = kind == KINDS.index(FORWARD), (kind == KINDS.index(BACKWARD)) | (kind == KINDS.index(INPUT))
        source = np.where(forward, stage - 1, stage + 1)
        asks = (forward & (stage > 0)) | (back & (stage < stages - 1))
        first = len(SPECIAL) + np.where(forward, 0, stages * m) + micro_batch
        own = rank, slice(len(kind))
        cost[own] = kind * stages + stage
        needs[own] = np.where(asks, first + source * m, SPECIAL.index("nothing"))
        makes[own] = np.where(forward | back, first + stage * m, SPECIAL.index("nobody"))
    return cost, needs, makes


class Stacked(NamedTuple):
    """The numbers of K pipelines of one schedule."""

    micro_batches: np.ndarray
    """[K]"""
    durations: np.ndarray
    """By `Step.cost`, and at last 0 for an idle rank: [len(KINDS) * stages + 1, K]."""
    delays: np.ndarray
    """Of messages by `Step.boundary`: [stages, K]."""


def stack(stages: int, micro_batches: int | np.ndarray, times: Times) -> Stacked:
    """Pipelines out of what `price` takes. Raises ValueError for times that are negative, not finite, or not one for
    each stage."""
    passes = [np.asarray(getattr(times, kind), float) for kind in ("forward", "backward", "input", "weight")]
    transfer = np.asarray(times.transfer, float)
    count = count_of(micro_batches, *passes, transfer)
    idle = np.zeros((1, count))
    durations = np.concatenate([*(rows(array, count, stages).T for array in passes), idle])
    delays = np.concatenate([rows(transfer, count, stages - 1).T, idle])
    if not all(np.all((array >= 0) & np.isfinite(array)) for array in (durations, delays)):
        raise ValueError("times of passes and messages must be finite and not negative")
    return Stacked(np.broadcast_to(micro_batches, count), durations, delays)


def count_of(micro_batches: int | np.ndarray, *values: np.ndarray) -> int:
    """How many pipelines a number or array [K] of micro-batches and such arrays as `rows` takes are of."""
    return np.broadcast_shapes((1,), np.shape(micro_batches), *(array.shape[:-1] for array in values))[0]


def rows(values: np.ndarray, count: int, stages: int) -> np.ndarray:
    """A number or an array [stages] or [count, stages] as the last of these; 1 instead of `stages` is for all alike."""
    if values.ndim and values.shape[-1] not in (1, stages):
        raise ValueError(f"{values.shape[-1]} values are given for {stages} stages")
    return np.broadcast_to(values, (count, stages))


def by_pattern(
    name: str, pp: int, vpp: int, micro_batches: np.ndarray
) -> Iterator[tuple[Pattern, np.ndarray, np.ndarray]]:
    """Each pattern that pipelines of `micro_batches` [K] have, their indices, and how often they run its middle.

    In ascending order of runs. Raises `models.checks.ConfigError` where `make` does.
    """
    unique, inverse = np.unique(micro_batches, return_inverse=True)
    splits = np.array([split_off(name, pp, vpp, int(count)) for count in unique])
    for least in np.unique(splits[:, 0]):
        own = np.nonzero(splits[inverse, 0] == least)[0]
        own = own[np.argsort(micro_batches[own], kind="stable")]
        yield pattern(name, pp, vpp, int(least)), own, splits[inverse[own], 1]
