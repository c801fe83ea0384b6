"""What many pipelines cost in time at once, without a timeline of each.

Pipelines that differ in their times, and if need be in their micro-batches, are walked side by side through the levels
of their schedule (`parallel.schedules.levels`); and a middle that repeats is walked until it does nothing else.

When that is: all that comes behind a level follows from the ends of a few passes before it (`Pattern.live`), by adding
times and by taking the later of two. So if each of those ends is by the same `gain` later than it was `lag` runs of
the middle ago, then `lag` runs on each is later by `gain` again, and so to the end of the middle. Pipelines in which
that does not show, as where a rank slowly catches up with one that is hardly slower, are walked to the end: that costs
more and is as right. More than one run it takes where messages are slow: the critical path then goes to and fro
between two ranks, once for as many micro-batches as there are ranks from the one to the other, hence lags up to `pp`.

Sums of rounded numbers would hide all this, so times are first rounded to a grid on which sums are exact, of 2^-46 of
the longest pass: less than 1e-12 of the makespan.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import NamedTuple

import numpy as np

from parallel.schedules.generate import check_numbers
from parallel.schedules.levels import Levels, Pattern, Stacked, by_pattern, stack
from parallel.schedules.schedule import BACKWARD, FORWARD, KINDS
from parallel.schedules.simulate import Times

SIDE_BY_SIDE = 4096
"""Ends that are worked out in one call: enough to outweigh it, few enough for the cache."""


class Price(NamedTuple):
    """Of K pipelines, in the unit of their times."""

    makespan: np.ndarray
    """[K]"""
    busy: np.ndarray
    """The time that each rank computes: [K, pp]."""


def price(name: str, pp: int, vpp: int, micro_batches: int | np.ndarray, times: Times) -> Price:
    """What `simulate` says of K pipelines of one schedule, to 1e-12 of it.

    `micro_batches` is a number or an array [K]; the fields of `times` are numbers or arrays [stages] or [K, stages],
    for messages [stages - 1] or [K, stages - 1]; 1 instead of either is for all stages alike. Raises
    `models.checks.ConfigError` where `make` does, and ValueError for times that are negative, not finite, or for
    another number of stages.
    """
    stacked = stack(pp * vpp, micro_batches, times)
    if name == "gpipe":
        return _gpipe(pp, vpp, stacked)
    makespan, busy = np.empty(len(stacked.micro_batches)), np.empty((len(stacked.micro_batches), pp))
    for found, own, runs in by_pattern(name, pp, vpp, stacked.micro_batches):
        busy[own] = found.busy(runs, stacked.durations.take(own, 1)).T
        width = max(1, min(SIDE_BY_SIDE, 2**18 // max(1, len(found.middle.cost))) // pp)
        for start in range(0, len(own), width):
            some = slice(start, start + width)
            durations, delays = (array.take(own[some], 1) for array in stacked[1:])
            makespan[own[some]] = _makespan(found, runs[some], durations, delays)
    return Price(makespan, busy)


def _gpipe(pp: int, vpp: int, stacked: Stacked) -> Price:
    """A critical path goes through every stage and back, and each way stays for the other micro-batches at the slowest:
    sum(F + B) + 2 sum(transfer) + (m - 1)(max(F) + max(B))."""
    check_numbers("gpipe", pp, vpp, int(stacked.micro_batches.min()))
    forward, backward = (stacked.durations[KINDS.index(kind) * pp :][:pp] for kind in (FORWARD, BACKWARD))
    once = (forward + backward + 2 * stacked.delays).sum(0)
    makespan = once + (stacked.micro_batches - 1) * (forward.max(0) + backward.max(0))
    return Price(makespan, (stacked.micro_batches * (forward + backward)).T)


def _makespan(found: Pattern, runs: np.ndarray, durations: np.ndarray, delays: np.ndarray) -> np.ndarray:
    # Times of what does not occur would coarsen the grid.
    durations, delays = durations * np.append(found.counts.any(0), False)[:, None], delays * found.crossed[:, None]
    period = len(found.middle.cost)
    bits = _grid(durations, delays, len(found.first.cost) + int(runs.max()) * period + len(found.last.cost))
    durations, delays = (np.rint(np.ldexp(array, bits)).astype(np.int64) for array in (durations, delays))
    ring = (found.memory + 1 + _lags(found) * period) * found.schedule.pp
    ends = _Ends(np.zeros((ring, len(runs)), np.int64))
    ends.walk(found.first, durations, delays)
    ends.put(found.live, _behind_middle(found, ends, runs, durations, delays))
    ends.walk(found.last, durations, delays)
    return np.ldexp(ends.at(np.arange(-found.schedule.pp, 0)).max(0).astype(float), -bits)


def _grid(durations: np.ndarray, delays: np.ndarray, levels: int) -> np.ndarray:
    """Powers of two that times are multiplied by and then rounded: [K]. No end reaches 2^62."""
    longest = durations.max(0)
    return np.minimum(46 - np.frexp(longest)[1], 62 - np.frexp(levels * (longest + delays.max(0)))[1])


def _lags(found: Pattern) -> int:
    """Runs of the middle after which it is looked for to repeat, at most."""
    return max(2, found.schedule.pp // found.period)


class _Ends:
    """When what K pipelines did at the last levels ended: by place (level x pp + rank), in a ring, [places, K]."""

    def __init__(self, ring: np.ndarray, following: int = 0) -> None:
        self.ring, self.following = ring, following
        """And where the next level begins, from which places are counted."""

    def at(self, places: np.ndarray) -> np.ndarray:
        return self.ring.take((self.following + places) % len(self.ring), 0)

    def put(self, places: np.ndarray, ends: np.ndarray) -> None:
        self.ring[(self.following + places) % len(self.ring)] = ends

    def walk(self, levels: Levels, durations: np.ndarray, delays: np.ndarray) -> None:
        """Goes through `levels`, with `durations` by cost and `delays` by boundary."""
        cost, wait = np.empty((2, levels.cost.shape[1], self.ring.shape[1]), np.int64)
        costs = (durations.take(row, 0, cost, "clip") for row in levels.cost)
        self.repeat(levels, costs, (delays.take(row, 0, wait, "clip") for row in levels.boundary))

    def repeat(self, levels: Levels, durations: Iterable, delays: Iterable, runs: int = 1) -> None:
        """Goes through `levels` so many times, with `durations` and `delays` by level, [pp, K] each."""
        count, pp = levels.cost.shape
        places = np.arange(self.following, self.following + runs * count * pp)
        sources = (places.reshape(runs, count, pp) - levels.reach).reshape(-1, pp) % len(self.ring)
        rows = list(self.ring.reshape(-1, pp, self.ring.shape[1]))
        level, take, arrived = self.following // pp, self.ring.take, np.empty_like(rows[0])
        for source, delay, duration in zip(sources, cycle(delays), cycle(durations), strict=False):
            ends = rows[level % len(rows)]
            take(source, 0, arrived, "clip")  # without a check, as all are inside
            np.add(arrived, delay, arrived)
            np.maximum(arrived, rows[(level - 1) % len(rows)], arrived)
            np.add(arrived, duration, ends)
            level += 1
        self.following = level * pp


def _behind_middle(
    found: Pattern, ends: _Ends, runs: np.ndarray, durations: np.ndarray, delays: np.ndarray
) -> np.ndarray:
    """The ends at `Pattern.live` behind all runs of the middle, from `ends` before it."""
    middle, left, which, walked = found.middle, runs.copy(), np.arange(len(runs)), 0
    live, shortest = ends.at(found.live), max(1, found.schedule.pp // (2 * found.period))
    while len(which := which[left > 0]):
        going = np.nonzero(left > 0)[0]
        if len(going) < len(left):
            ends = _Ends(ends.ring.take(going, 1), ends.following)
            left, durations, delays = left[going], durations.take(going, 1), delays.take(going, 1)
        costs, waits = [durations.take(row, 0) for row in middle.cost], [delays.take(row, 0) for row in middle.boundary]
        while 2 * np.count_nonzero(left > 0) > len(left):  # or else goes on with those that are not done
            longest = min(walked // 2, 2**14 // len(middle.cost))
            stride = int(min(max(shortest, longest), left[left > 0].min()))
            ends.repeat(middle, costs, waits, stride)
            left, walked = left - stride, walked + stride
            lag, gain = _repeats(found, ends, min(_lags(found), walked))
            done = np.nonzero((left == 0) | (left > 0) & (lag > 0))[0]
            # From here, or from some runs ago, whole lags lead to the end.
            ago = -left[done] % np.maximum(lag[done], 1)
            lags = (left[done] + ago) // np.maximum(lag[done], 1)
            places = (ends.following + found.live[:, None] - ago * middle.cost.size) % len(ends.ring)
            live[:, which[done]] = ends.ring[places, done] + lags * gain[done]
            left[done] = 0
    return live


def _repeats(found: Pattern, ends: _Ends, lags: int) -> tuple[np.ndarray, np.ndarray]:
    """After how many runs of the middle, up to `lags`, pipelines repeat (0: they do not), and how much later: [K] each.

    Looks at a few ranks and then, where these repeat, at all that matters.
    """
    run, pp = found.middle.cost.size, found.schedule.pp
    ranks = np.arange(-pp, 0, -(-pp // 4))
    gains = ends.at(ranks) - ends.at(ranks - run * np.arange(1, lags + 1)[:, None])
    alike = (gains == gains[:, :1]).all(1)
    lag = np.where(alike.any(0), alike.argmax(0) + 1, 0)
    gain = gains[lag - 1, 0, np.arange(len(lag))]
    now = ends.at(found.live)
    for runs in np.unique(lag[lag > 0]):
        lag[(lag == runs) & (now - ends.at(found.live - runs * run) != gain).any(0)] = 0
    return lag, gain
