"""What no layout can beat whatever its schedule and its place on the machine.

A pipeline takes at least what its slowest rank does, and its fullest rank holds at least what ranks hold on average
with one micro-batch in flight. Its first rank holds no fewer layers, with no fewer micro-batches in flight,
than under the schedule that asks for the fewest. The rank with the largest segment gathers it under ZeRO 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from parallel.planner.communication import Network
from parallel.planner.cuts import Tables
from parallel.planner.memory import (
    ALONE,
    EMBEDDING,
    GIB,
    HEAD,
    LAYERS,
    communicators,
    enough,
    heaviest,
    largest,
    live,
    shares_ends,
)
from parallel.planner.price import ACROSS, NEAR, WHOLE, halves, travels
from parallel.planner.shape import KINDS, Candidates, Column, Load
from parallel.planner.space import Space, runs
from parallel.schedules import SPLIT

CHUNK = 16384
"""Rows that are bounded together: enough to outweigh a call, few enough for the cache."""


def coarse_bounds(
    space: Space, pp: int, rows: dict[str, np.ndarray], tables: Tables
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Of coarse rows (`cuts`) with each ZeRO stage and recompute of the space, under any schedule, the seconds of a
    step, infinite where it does not fit, and the bytes of the fullest rank: [zeros, codes, N]."""
    problem = space.problem
    whole = rows["dp"] * rows["cp"]
    found = np.full((len(space.zeros), len(space.codes), len(whole)), np.inf)
    filled = np.empty(found.shape)
    layers, flying = first_rank(space, pp, rows["micro_batches"])
    for part, bounds in _parts(space, pp, rows, tables):
        recomputed = [bounds.recomputing(index) for index in range(len(space.codes))]
        saved = [bounds.saved(each, flying[part]) for each in recomputed]
        passes = [(bounds.pipeline(each), bounds.share @ each.backward) for each in recomputed]
        for row, zero in enumerate(space.zeros):
            legal, sharded = (whole[part] > 1) | (zero == 0) | ("zero" in problem.fixed), bounds.sharding(zero, False)
            kept = bounds.kept(sharded, layers)
            for column, (pipeline, backward) in enumerate(passes):
                held = bounds.total(bounds.held(kept, saved[column]))
                seconds = pipeline + bounds.behind(sharded, backward)
                found[row, column, part] = np.where(legal & (held <= problem.machine.memory), seconds, np.inf)
                filled[row, column, part] = held
    return found, filled


def least_bytes(space: Space, pp: int, rows: dict[str, np.ndarray], tables: Tables) -> np.ndarray:
    """[N] bytes of the fullest rank of coarse rows with the last ZeRO stage and recompute of the space, which save
    most, under any schedule."""
    found = np.empty(len(rows["tp"]))
    layers, flying = first_rank(space, pp, rows["micro_batches"])
    for part, bounds in _parts(space, pp, rows, tables):
        sharded, recomputed = bounds.sharding(space.zeros[-1], False), bounds.recomputing(len(space.codes) - 1)
        found[part] = bounds.total(bounds.held(bounds.kept(sharded, layers), bounds.saved(recomputed, flying[part])))
    return found


def _parts(space: Space, pp: int, rows: dict[str, np.ndarray], tables: Tables) -> Iterator[tuple[slice, Bounds]]:
    """Coarse rows by chunks, each cut over all of dp x cp where it is cut."""
    whole = rows["dp"] * rows["cp"]
    for start in range(0, len(whole), CHUNK):
        part = slice(start, start + CHUNK)
        own = {name: column[part] for name, column in rows.items() if name != "cut"}
        nothing = np.zeros_like(own["tp"])
        c = Candidates("1f1b", pp, 1, order=None, **own, zero=nothing + 1, shards=whole[part], recompute=nothing)
        yield part, Bounds(space, c, tables.take(rows["cut"][part]))


class Recomputed(NamedTuple):
    """What a recompute makes of rows: arrays [kinds, N] of one segment of each kind."""

    backward: np.ndarray
    """Seconds of a micro-batch."""
    left: np.ndarray
    """Bytes that a micro-batch leaves."""
    coming: np.ndarray
    """[N] bytes that come and go on average."""


class Sharded(NamedTuple):
    """What a ZeRO stage makes of rows, [N] unless said."""

    update: np.ndarray
    """Seconds of the optimizer, of weights gathered behind it, and of what every step takes beside."""
    gradients: np.ndarray
    """Seconds that they travel behind the last micro-batch."""
    walks: tuple[Column, Column]
    """[kinds, N] seconds that weights and gradients travel in a forward and a backward of one segment."""
    state: np.ndarray
    """[kinds, N] bytes of weights, gradients and the optimizer's state, and of a micro-batch's gradients beside."""
    gathered: np.ndarray
    """Bytes that a rank gathers of its largest segment, for each of its elements."""


def slowest(
    load: Load, split: bool, m: np.ndarray, forward: np.ndarray, backward: np.ndarray, weight: np.ndarray
) -> np.ndarray:  # fmt: skip
    """[N] seconds of the rank that is done last, by seconds [kinds, N] of one segment: all passes, behind the forwards
    of the first micro-batch before it, and before the backwards of the last. Of backwards that are `split` the weights'
    halves may come behind."""
    own, before = load.own[load.last], load.before[load.last]
    passes = forward + backward
    if not split:
        return (own @ passes * m + before @ passes).max(0)
    inputs = passes - weight
    return np.maximum(own @ inputs * m + before @ inputs, own @ passes * m + before @ forward).max(0)


class Bounds:
    """Bounds of columns whose schedule is open. Of their ZeRO stage only `sharding` knows: shard groups are those that
    they have for a stage above 0."""

    def __init__(self, space: Space, c: Candidates, tables: Tables) -> None:
        problem = space.problem
        self.c, self.tables, self.space, self.problem, self.k = c, tables, space, problem, problem.constants
        one = problem.contents(1)
        self.counts = np.array([one.counts(kind)[0] for kind in KINDS])
        self.share = self.counts / c.pp
        self.shared = bool(shares_ends(problem.shape))
        # A matrix that both ends use is there once where they lie on one rank.
        self.stored = self.share * np.where(self.shared, ALONE[:, 0], 1.0)
        self.used = [i for i in LAYERS if self.counts[i]]
        self.several = np.asarray(c.dp * c.cp > 1)
        self.copies = np.where(self.several, self.k.gradient_copies, min(self.k.gradient_copies, 1.0))

    def sharding(self, zero: Column, grouped: bool) -> Sharded:
        """What depends on the ZeRO stage, a number or a column. Where rows are not `grouped`, so that shard groups may
        be any, what travels in these costs nothing."""
        k, c = self.k, self.c
        zero = np.where(self.several, zero, 0)
        sizes, counted = self.sizes, self.tables.counted
        pieces = np.where(zero > 0, self.pieces, sizes)
        moved = 2 * (k.optimizer_bytes + k.own_bytes) + k.gradient_bytes + k.weight_bytes
        update = self.share @ pieces * k.optimizer * moved
        accumulates = (c.micro_batches > 1) | (c.pp > 1) | (zero == 3)
        owned = k.optimizer_bytes + np.where((zero == 1) | (zero == 2), k.own_bytes, 0.0)
        owned = owned + np.where(zero == 3, k.weight_bytes, 0.0) + (zero >= 2) * accumulates * k.gradient_bytes
        whole = k.weight_bytes * (1 + self.copies) + (zero < 2) * accumulates * k.gradient_bytes
        shards = np.where(zero > 0, np.maximum(c.shards, 1), 1)
        state = np.where(zero == 3, 0.0, whole) * sizes + pieces * owned - counted * (k.optimizer_bytes / shards)
        update = update / (self.problem.machine.memory_bandwidth * k.memory) + k.step
        walks: tuple[Column, Column] = (0.0, 0.0)
        if grouped:
            gradients, walks, gathered = self._travels(zero)
            update = update + gathered
        else:
            gradients = np.where(zero == 0, 1.0, np.where(zero == 1, 0.5, 0.0)) * k.gradient_bytes * self.reduced
        return Sharded(
            update,
            gradients,
            walks,
            state,
            np.where(zero == 3, k.weight_bytes * (1 + self.copies), 0.0),
        )

    def _travels(self, zero: Column) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
        """What `price` says of traffic over dp, but for its calls, and for what a pass hides that is long enough."""
        k, scattered = self.k, self._halves(NEAR)
        mean = self.share @ scattered
        gradients = np.where(zero == 0, self.reduced, 2 * (self.share @ self._halves(ACROSS))) + (zero == 1) * mean
        shown = scattered * (1 - k.hide_dp)
        forward = (zero == 3) * k.message_bytes * shown
        backward = forward + (zero >= 2) * k.gradient_bytes * shown
        gathered = ((zero == 1) | (zero == 2)) * k.message_bytes * mean * (1 - k.hide_gather)
        return k.gradient_bytes * gradients, (forward, backward), gathered

    def recomputing(self, code: Column) -> Recomputed:
        """What depends on recompute: an index into those of the space, or a column of these."""
        t = self.tables
        if np.ndim(code) == 0:
            return Recomputed(t.backward + t.again[code], t.left[code], t.coming[code] / self.c.pp)
        rows = np.arange(len(code))
        again, left = (table[code, :, rows].T for table in (t.again, t.left))
        return Recomputed(t.backward + again, left, t.coming[code, rows] / self.c.pp)

    def pipeline(self, recomputed: Recomputed) -> np.ndarray:
        """[N] seconds of the passes of a step, under the schedule that takes least."""
        ways: dict[bytes, tuple[Load, bool]] = {}
        for name, vpp in self.space.pipelines(self.c.pp):
            found = self.problem.load(name, self.c.pp, vpp)
            key = found.own.tobytes()
            other, split = ways.get(key, (found, False))
            ways[key] = found._replace(before=np.minimum(found.before, other.before)), split or name in SPLIT
        times = self.c.micro_batches, self.tables.forward, recomputed.backward, self.tables.weight
        return np.min([slowest(way, split, *times) for way, split in ways.values()], 0) * (1 - 1e-12)

    def _slowest(self, name: str, vpp: int, split: bool, forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
        times = forward, backward, self.tables.weight
        return slowest(self.problem.load(name, self.c.pp, vpp), split, self.c.micro_batches, *times) * (1 - 1e-12)

    def behind(self, sharded: Sharded, backward: np.ndarray) -> np.ndarray:
        """[N] seconds behind the pipeline: gradients that a `backward` of so many seconds does not hide, and the
        optimizer."""
        gradients = sharded.gradients
        exposed = np.maximum(gradients - backward, gradients * (1 - self.k.hide_dp))
        return exposed + sharded.update

    def kept(self, sharded: Sharded, layers: float) -> tuple[np.ndarray, np.ndarray]:
        """[N] bytes of weights, gradients and moments of ranks on average, and of the first, with so many layers."""
        mean, first = self.stored @ sharded.state, layers * _least(sharded.state, self.used)
        if self.c.pp == 1:
            gathered = self.sizes[self.counts > 0].max(0) * sharded.gathered
            return mean + gathered, first + gathered
        return mean, first

    def saved(self, recomputed: Recomputed, flying: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N] bytes that passes leave on ranks on average with one micro-batch in flight, and on the first with so many
        layers times micro-batches in `flying`."""
        return self.share @ recomputed.left + recomputed.coming, flying * _least(recomputed.left, self.used)

    @staticmethod
    def held(kept: tuple[np.ndarray, np.ndarray], saved: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """[N] bytes of the fullest rank under any schedule."""
        return np.maximum(kept[0] + saved[0], kept[1] + saved[1])

    def scheduled(
        self, name: str, vpp: int, sharded: Sharded, recomputed: Recomputed
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """[N] seconds of a step, and bytes of the fullest rank, under one schedule; bytes are infinite where it cannot
        run, and seconds where these do not fit."""
        c = replace(self.c, schedule=name, vpp=vpp)
        seconds, legal = np.full(len(c), np.inf), runs(name, c.pp, c.micro_batches)
        if not legal.any():
            return seconds, seconds
        parts, load = self.problem.contents(c.stages), self.problem.load(name, c.pp, vpp)
        ranks = heaviest(replace(c, micro_batches=c.micro_batches[legal]), parts, self.shared)
        own = load.own[ranks]
        stored = own.copy()
        if self.shared:
            stored[:, EMBEDDING] *= (own[:, EMBEDDING] == 0) | (own[:, HEAD] == 0)
        held = stored @ sharded.state
        numbers = np.minimum(c.micro_batches, enough(name, c.pp))
        for m in np.unique(numbers[legal]):
            same = numbers == m
            held[:, same] += live(name, c.pp, vpp, int(m))[ranks] @ load.stages @ recomputed.left[:, same]
        if np.any(sharded.gathered):
            held = held + largest(self.sizes.T, own.T).T * sharded.gathered
        total = np.where(legal, self.total(held.max(0)), np.inf)
        fits = total <= self.problem.machine.memory
        if fits.any():
            forward, backward = sharded.walks
            times = self.tables.forward + forward, recomputed.backward + backward
            found = self._slowest(name, vpp, name in SPLIT, *times) + self.behind(
                sharded, self.share @ recomputed.backward
            )
            seconds[fits] = found[fits]
        return seconds, total

    def total(self, held: np.ndarray) -> np.ndarray:
        """[N] bytes, with what every rank takes."""
        return held * (1 + self.k.fragments) + self.fixed

    @cached_property
    def fixed(self) -> np.ndarray:
        return GIB * (self.k.reserve + self.k.buffers * communicators(replace(self.c, zero=0)))

    def _halves(self, which: int) -> np.ndarray:
        groups = travels(self.c, Network(self.problem.machine, self.k), which)
        return halves(self.c, groups, which, self.tables.elements, self.tables.experts)

    @cached_property
    def reduced(self) -> np.ndarray:
        return 2 * (self.share @ self._halves(WHOLE))

    @cached_property
    def sizes(self) -> np.ndarray:
        """[kinds, N]: a segment's weights."""
        return self.tables.elements + self.tables.experts

    @cached_property
    def pieces(self) -> np.ndarray:
        """[kinds, N]: of a segment's weights, what one rank updates under ZeRO."""
        shards, experts = (np.maximum(column, 1) for column in (self.c.shards, self.c.expert_shards))
        return self.tables.elements / shards + self.tables.experts / experts


def _least(table: np.ndarray, kinds: list[int]) -> np.ndarray:
    """[kinds, N], the least of some kinds: [N]."""
    return table[kinds].min(0)


def first_rank(space: Space, pp: int, micro_batches: np.ndarray) -> tuple[float, np.ndarray]:
    """The fewest layers of the first rank, and [N] the fewest of them times micro-batches in flight, of all schedules
    that may run."""
    numbers, where = np.unique(micro_batches, return_inverse=True)
    flying, held = np.full(len(numbers), np.inf), np.inf
    for name, vpp in space.pipelines(pp):
        parts = space.problem.contents(pp * vpp)
        layers, legal = parts.dense + parts.sparse, runs(name, pp, numbers)
        capped = np.minimum(numbers, enough(name, pp))
        for m in np.unique(capped[legal]).tolist():
            table, those = live(name, pp, vpp, m)[0], legal & (capped == m)
            flying[those] = np.minimum(flying[those], float(table @ layers))
            held = min(held, float((table > 0) @ layers))
    return held, flying[where]
