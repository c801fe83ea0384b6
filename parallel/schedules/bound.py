"""What the order of a schedule's actions says of many pipelines without a walk: a least makespan, and the most held."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from parallel.schedules.generate import check_numbers, make
from parallel.schedules.levels import by_pattern, count_of, rows, stack
from parallel.schedules.price import price
from parallel.schedules.schedule import BACKWARD, FORWARD, INPUT, KINDS, WEIGHT, Schedule
from parallel.schedules.simulate import Times


def lower_bound(name: str, pp: int, vpp: int, micro_batches: int | np.ndarray, times: Times) -> np.ndarray:
    """What none of K makespans falls below: [K]. Takes and raises what `price` does.

    The longest of some paths through the passes, less 1e-12 of it for the rounding of sums. For each rank: the first
    micro-batch's way to it, all that the rank does, and the last micro-batch's way from it to the end; for ``1f1b``
    and ``zb_h1`` also such that between the two go to and fro to another rank.

    For ``gpipe`` it is the makespan. For the others it has been wherever stages are equal, messages free and two
    halves as long as a whole backward, but for ``zb_v`` of fewer than ``2 * pp`` micro-batches.
    """
    if name == "gpipe":
        return price(name, pp, vpp, micro_batches, times).makespan * (1 - 1e-12)
    stacked = stack(pp * vpp, micro_batches, times)
    bound = np.empty(len(stacked.micro_batches))
    for found, own, runs in by_pattern(name, pp, vpp, stacked.micro_batches):
        durations, delays = stacked.durations.take(own, 1), stacked.delays.take(own, 1) * found.crossed[:, None]
        idle = _idle(found.schedule, stacked.micro_batches[own], durations, delays)
        bound[own] = (idle + found.busy(runs, durations)).max(0)
    return bound * (1 - 1e-12)


def _idle(schedule: Schedule, micro_batches: np.ndarray, durations: np.ndarray, delays: np.ndarray) -> np.ndarray:
    """By how much paths through each rank are longer than what it does: [pp, K]."""
    ends = _ends(schedule.name, schedule.pp, schedule.vpp, schedule.micro_batches)
    homes = [schedule.rank_of(stage) for stage in range(schedule.stages)]
    before = _late(homes, ends.first, ends.before, durations, delays)
    after = _late(homes, ends.last, ends.after, durations, delays)
    idle = before[0] + after[0]
    for one, other in product(range(2), repeat=2):
        most = before[one] + after[other]
        if schedule.name in ("1f1b", "zb_h1") and one and other:
            most += _to_and_fro(micro_batches, ends.first, durations, delays)
        np.maximum(idle, most, out=idle, where=ends.ordered[one, other][:, None])
    return idle


class _Ends(NamedTuple):
    """The passes of a schedule's first micro-batch, forward through all stages and then back, and those of its last
    one, the other way round: 2 * stages each."""

    first: np.ndarray
    """Their costs."""
    last: np.ndarray
    before: np.ndarray
    """What its rank does before each pass of the first: [2 * stages, costs], how often each."""
    after: np.ndarray
    """And after each pass of the last."""
    ordered: np.ndarray
    """Whether a rank is done with the first half of the first's passes, or all, before it begins the first half of the
    last's, or any: [2, 2, pp]."""


@lru_cache(maxsize=1024)
def _ends(name: str, pp: int, vpp: int, micro_batches: int) -> _Ends:
    """Of a schedule, and of all that have more runs of its middle."""
    stages, ordered = pp * vpp, []
    first, last = np.zeros((2, 2 * stages), int)
    before, after = np.zeros((2, 2 * stages, len(KINDS) * stages))
    for kinds, numbers, own in make(name, pp, vpp, micro_batches).columns:
        costs = kinds * stages + own
        ups, downs = ([], []), ([], [])
        ends = ((numbers == 0) | (numbers == micro_batches - 1)) & (kinds != KINDS.index(WEIGHT))
        for at in np.flatnonzero(ends).tolist():
            back, stage = bool(kinds[at] != KINDS.index(FORWARD)), own[at]
            if numbers[at] == 0:
                place = -1 - stage if back else stage
                first[place], before[place] = costs[at], np.bincount(costs[:at], minlength=before.shape[1])
                ups[back].append(at)
            if numbers[at] == micro_batches - 1:
                place = stage if back else -1 - stage
                last[place], after[place] = costs[at], np.bincount(costs[at + 1 :], minlength=after.shape[1])
                downs[not back].append(at)
        begun = [min(downs[0]), min(map(min, downs))]
        ordered.append([[end <= begin for begin in begun] for end in (max(ups[0]), max(map(max, ups)))])
    return _Ends(first, last, before, after, np.moveaxis(np.array(ordered), 0, -1))


def _late(
    homes: list[int], costs: np.ndarray, counts: np.ndarray, durations: np.ndarray, delays: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By how much each rank is late at the least when the first micro-batch is through with it: [pp, K], behind its
    forwards and behind its backwards too.

    Late is how much after time 0 a pass starts beyond what the rank does before it. It starts when the pass before it
    has ended and its message has come, and no less late than an earlier one of its rank. Seen from the end of time,
    the last micro-batch's passes are the same.
    """
    stages, work = len(homes), counts @ durations[:-1]
    late, ready = np.zeros((max(homes) + 1, durations.shape[1])), 0.0
    for place, stage in enumerate([*range(stages), *reversed(range(stages))]):
        if place == stages:
            half = late.copy()
        own = late[homes[stage]]
        np.maximum(own, ready - work[place], out=own)
        ready = own + work[place] + durations[costs[place]] + delays[stage - (place >= stages)]
    return half, late


def _to_and_fro(micro_batches: np.ndarray, passes: np.ndarray, durations: np.ndarray, delays: np.ndarray) -> np.ndarray:
    """What paths of ``1f1b`` and ``zb_h1`` gain that go from a rank to a later one and back, over those that stay: [pp,
    K]. `passes` are the costs of the first micro-batch's.

    Rank r has w = pp - 1 - r forwards to do before the first pair of a forward and a backward (or input half). Behind
    its backward k comes forward w + k + 1. That goes on to rank s, where backward k + n is next, n = s - r + 1, and
    goes back to rank r, which by then has done n pairs more. So it is from the rank's first backward to its last
    forward. Weight halves lie in pairs, one in each but in the first r; so in no more than r rounds on the way is none,
    and r fewer are passed over.
    """
    pp = len(delays)
    forward, backward = durations[passes[:pp]], durations[passes[: pp - 1 : -1]]
    halves = passes[: pp - 1 : -1, None] >= KINDS.index(INPUT) * pp
    weight = durations[KINDS.index(WEIGHT) * pp :][:pp] * halves
    sums = np.concatenate([np.zeros((1, len(micro_batches))), (forward + backward + 2 * delays).cumsum(0)])
    gains = np.zeros(forward.shape)
    for rank in range(pp):
        pairs = np.arange(1, pp - rank + 1)[:, None]
        gain = sums[rank + 1 :] - sums[rank] - 2 * delays[rank:] - pairs * (forward[rank] + backward[rank])
        gain -= (pairs - 1) * weight[rank]
        times = (micro_batches - 1 - (pp - rank)) // pairs
        gains[rank] = (np.maximum(times, 0) * gain).max(0)
    return gains


def peak_live(
    name: str, pp: int, vpp: int, micro_batches: int | np.ndarray, saved: float | np.ndarray, kept: float | np.ndarray
) -> np.ndarray:
    """What `peaks` says of K pipelines of one schedule: [K, pp].

    `micro_batches` is a number or an array [K]; `saved` and `kept`, none negative, are as the fields of `price`'s times
    are. Raises `models.checks.ConfigError` where `make` does.
    """
    weights = [np.asarray(weight, float) for weight in (saved, kept)]
    count = count_of(micro_batches, *weights)
    weights = np.stack([rows(weight, count, pp * vpp) for weight in weights], 1)
    micro_batches = np.broadcast_to(micro_batches, count)
    if name == "gpipe":
        check_numbers(name, pp, vpp, int(micro_batches.min()))
        return micro_batches[:, None] * weights[:, 0]
    most = np.empty((count, pp))
    for found, own, _ in by_pattern(name, pp, vpp, micro_batches):
        for rank, held in enumerate(_held(name, pp, vpp, found.schedule.micro_batches)):
            of_rank = weights[own][:, :, found.own[rank]].reshape(len(own), -1)
            most[own, rank] = (of_rank @ held.T).max(1)
    return most


TAKES = np.array([{FORWARD: (1, 0), BACKWARD: (-1, 0), INPUT: (-1, 1), WEIGHT: (0, -1)}[kind] for kind in KINDS])
"""By kind, how many more a rank holds behind it: whole ones, and those between the halves of their backwards."""


@lru_cache(maxsize=1024)
def _held(name: str, pp: int, vpp: int, micro_batches: int) -> list[np.ndarray]:
    """Of each rank, what it holds at times at which it never holds more of everything: counts [times, 2 * vpp] of its
    stages' forwards, whole ones and then those between the halves of their backwards.

    Of a schedule, and of all that have more runs of its middle, which leaves behind what it found.
    """
    schedule = make(name, pp, vpp, micro_batches)
    found = []
    for rank, (kinds, _, stages) in enumerate(schedule.columns):
        chunks = np.searchsorted(schedule.stages_of(rank), stages)
        changes = np.zeros((len(kinds), 2, vpp), int)
        changes[np.arange(len(kinds)), :, chunks] = TAKES[kinds]
        changes = changes.reshape(len(kinds), -1)
        more, less = (changes > 0).any(1), np.append((changes[1:] < 0).any(1), True)
        found.append(_most(changes.cumsum(0)[more & less]))
    return found


def _most(held: np.ndarray) -> np.ndarray:
    """The rows of `held` [N, columns] than which no other has more or as much in every column, each once."""
    kept = []
    while len(held):
        kept.append(held[held.sum(1).argmax()])
        held = held[(held > kept[-1]).any(1)]
    return np.array(kept)
