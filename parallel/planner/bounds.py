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

from parallel.planner.communication import Group
from parallel.planner.cuts import Tables
from parallel.planner.memory import (
    ALONE,
    EMBEDDING,
    GIB,
    HEAD,
    LAYERS,
    communicators,
    enough,
    flights,
    live,
    shares_ends,
)
from parallel.planner.price import ACROSS, NEAR, WHOLE, halves, travels
from parallel.planner.shape import KINDS, Candidates, Column
from parallel.planner.space import Space, runs
from parallel.schedules import SPLIT

CHUNK = 16384
"""Rows that are bounded together: enough to outweigh a call, few enough for the cache."""


class Filled(NamedTuple):
    """Of those rows that may fit, with a ZeRO stage and a recompute each, [K]."""

    row: np.ndarray
    seconds: np.ndarray
    bytes: np.ndarray
    """Of the fullest rank."""


def coarse_bounds(space: Space, pp: int, rows: dict[str, np.ndarray], tables: Tables) -> tuple[np.ndarray, Filled]:
    """Of coarse rows (`cuts`) with each ZeRO stage and recompute of the space, under any schedule, the seconds of a
    step, [zeros, codes, N], infinite where it does not fit; and, where it does, the bytes too."""
    problem = space.problem
    whole = rows["dp"] * rows["cp"]
    found = np.full((len(space.zeros), len(space.codes), len(whole)), np.inf)
    filled = [Filled(np.empty(0, int), np.empty(0), np.empty(0))]
    layers, flying = first_rank(space, pp, rows["micro_batches"])
    for part, bounds in _parts(space, pp, rows, tables):
        sharded = [bounds.sharding(zero, False) for zero in space.zeros]
        kept = [bounds.kept(each, layers) for each in sharded]
        legal = [(whole[part] > 1) | (zero == 0) | ("zero" in problem.fixed) for zero in space.zeros]
        for code in range(len(space.codes)):
            recomputed = bounds.recomputing(code)
            saved = bounds.saved(recomputed, flying[part])
            held = np.stack([bounds.total(bounds.held(each, saved)) for each in kept])
            fits = legal & (held <= problem.machine.memory)
            pipeline, backward = bounds.pipeline(recomputed, fits.any(0)), bounds.share @ recomputed.backward
            seconds = np.stack([bounds.step(pipeline, each, backward) for each in sharded])
            filled.append(Filled(np.nonzero(fits)[1] + part.start, seconds[fits], held[fits]))
            np.copyto(found[:, code, part], seconds, where=fits)
    return found, Filled(*map(np.concatenate, zip(*filled, strict=True)))


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
    each: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Bytes of weights, gradients and the optimizer's state, and of a micro-batch's gradients beside, for each element:
    of a segment, of the piece of it that a rank updates, and of what has no moments (less than none)."""
    gathered: np.ndarray
    """Bytes that a rank gathers of its largest segment, for each of its elements."""


class PipelineTimes:
    """Seconds that passes take and, between stages, messages: arrays [2 x kinds + 3, N] that go with `Load.busy`."""

    def __init__(
        self, forward: np.ndarray, backward: np.ndarray, weight: np.ndarray, message: np.ndarray, m: np.ndarray,
        hidden: float,
    ) -> None:  # fmt: skip
        self.m, self.message, self.forward, self.both = m, message, forward, forward + backward
        self.inputs, self.sent = self.both - weight, (1 - hidden) * message  # what keeps the ranks at both ends

    @cached_property
    def whole(self) -> np.ndarray:
        """All passes, behind the forwards of the first micro-batch before, and before the backwards of the last."""
        return self._joined(self.both, self.both, 2)

    @cached_property
    def through(self) -> np.ndarray:
        """The same without the weights' halves of backwards."""
        return self._joined(self.inputs, self.inputs, 2)

    @cached_property
    def behind(self) -> np.ndarray:
        """All passes, behind the forwards of the first micro-batch before."""
        return self._joined(self.both, self.forward, 1)

    def _joined(self, own: np.ndarray, before: np.ndarray, ways: int) -> np.ndarray:
        """`own` passes of every micro-batch, and one through the stages before, there or there and back."""
        once = [before, [ways * self.sent], [ways * self.message]]
        return np.concatenate([own * self.m, [2 * self.sent * self.m], *once])

    def slowest(self, busy: np.ndarray, split: bool) -> np.ndarray:
        """[N] seconds of the rank that is done last. Of backwards that are `split` the weights' halves may come behind
        those that wait for them."""
        if not split:
            return (busy @ self.whole).max(0)
        return np.maximum(busy @ self.through, busy @ self.behind).max(0)


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
        self.factor = problem.network.factor(problem.ranks, self.k.spread)

    def sharding(self, zero: Column, grouped: bool) -> Sharded:
        """What depends on the ZeRO stage, a number or a column. Where rows are not `grouped`, so that shard groups may
        be any, what travels in these costs nothing, and calls do not either: smaller groups have cheaper ones."""
        k, c = self.k, self.c
        zero = np.where(self.several, zero, 0)
        split, (sizes, pieces) = zero > 0, self.shares
        moved = 2 * (k.optimizer_bytes + k.own_bytes) + k.gradient_bytes + k.weight_bytes
        update = np.where(split, pieces, sizes) * k.optimizer * moved
        accumulates = (c.micro_batches > 1) | (c.pp > 1) | (zero == 3)
        owned = k.optimizer_bytes + np.where((zero == 1) | (zero == 2), k.own_bytes, 0.0)
        owned = owned + np.where(zero == 3, k.weight_bytes, 0.0) + (zero >= 2) * accumulates * k.gradient_bytes
        whole = k.weight_bytes * (1 + self.copies) + (zero < 2) * accumulates * k.gradient_bytes
        whole = np.where(zero == 3, 0.0, whole) + np.where(split, 0.0, owned)
        spared = k.optimizer_bytes / np.where(split, np.maximum(c.shards, 1), 1)
        update = update / (self.problem.machine.memory_bandwidth * k.memory) + k.step
        walks: tuple[Column, Column] = (0.0, 0.0)
        if grouped:
            gradients, walks, gathered = self._travels(zero)
            update = update + gathered
        else:
            sent, calls = self.reduced
            gradients = np.where(zero == 0, sent + calls, np.where(zero == 1, sent / 2, 0.0))
        each = whole, np.where(split, owned, 0.0), -spared
        return Sharded(update, gradients, walks, each, np.where(zero == 3, k.weight_bytes * (1 + self.copies), 0.0))

    def _travels(self, zero: Column) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
        """What `price` says of traffic over dp, but for calls for experts behind the pipeline, and for what a pass
        hides that is long enough."""
        k, near, across = self.k, self._groups(NEAR), self._groups(ACROSS)
        scattered, pieces = self._halves(near, NEAR), self._halves(across, ACROSS)
        calls = (self.tables.elements > 0) * near[0].half_call + (self.tables.experts > 0) * near[1].half_call
        mean, shown = self.share @ scattered, 1 - k.hide_dp
        forward = (zero == 3) * (k.message_bytes * scattered + calls) * shown
        backward = forward + (zero >= 2) * (k.gradient_bytes * scattered + calls) * shown
        shared = 2 * (k.gradient_bytes * (self.share @ pieces) + across[0].half_call)
        own = k.gradient_bytes * mean + near[0].half_call
        gradients = np.where(zero == 0, sum(self.reduced), shared + (zero == 1) * own)
        gathered = ((zero == 1) | (zero == 2)) * (k.message_bytes * mean + near[0].half_call) * (1 - k.hide_gather)
        return gradients, (forward, backward), gathered

    def recomputing(self, code: Column) -> Recomputed:
        """What depends on recompute: an index into those of the space, or a column of these."""
        t = self.tables
        if np.ndim(code) == 0:
            return Recomputed(t.backward + t.again[code], t.left[code], t.coming[code] / self.c.pp)
        rows = np.arange(len(code))
        again, left = (table[code, :, rows].T for table in (t.again, t.left))
        return Recomputed(t.backward + again, left, t.coming[code, rows] / self.c.pp)

    def pipeline(self, recomputed: Recomputed, wanted: np.ndarray) -> np.ndarray:
        """[N] seconds of the passes of a step, under the schedule that takes least; infinite where not `wanted`."""
        ways: dict[bytes, tuple[np.ndarray, bool]] = {}
        for name, vpp in self.space.pipelines(self.c.pp):
            load = self.problem.load(name, self.c.pp, vpp)
            busy, split = ways.get(load.own.tobytes(), (load.busy, False))
            ways[load.own.tobytes()] = np.minimum(busy, load.busy), split or name in SPLIT
        found, rows, t = np.full(len(wanted), np.inf), np.flatnonzero(wanted), self.tables
        columns = (t.forward, recomputed.backward, t.weight, t.message, self.c.micro_batches)
        passes = PipelineTimes(*(column.take(rows, -1) for column in columns), self.k.hide_pp)
        found[rows] = np.min([passes.slowest(*way) for way in ways.values()], 0)
        return found

    def step(self, pipeline: np.ndarray, sharded: Sharded, backward: np.ndarray) -> np.ndarray:
        """[N] seconds of a step: its passes, what of the gradients' travel a `backward` of so many seconds does not
        hide, and the optimizer."""
        gradients = sharded.gradients
        exposed = np.maximum(gradients - backward, gradients * (1 - self.k.hide_dp))
        return (pipeline + exposed + sharded.update) * (self.factor * (1 - 1e-12))

    def kept(self, sharded: Sharded, layers: float) -> tuple[np.ndarray, np.ndarray]:
        """[N] bytes of weights, gradients and moments of ranks on average, and of the first, with so many layers."""
        mean, first = _summed(sharded.each, self.on_average), layers * _summed(sharded.each, self.of_layers).min(0)
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

    def total(self, held: np.ndarray) -> np.ndarray:
        """[N] bytes, with what every rank takes."""
        return held * (1 + self.k.fragments) + self.fixed

    @cached_property
    def fixed(self) -> np.ndarray:
        return GIB * (self.k.reserve + self.k.buffers * communicators(replace(self.c, zero=0)))

    def _groups(self, which: int) -> tuple[Group, Group]:
        return travels(self.c, self.problem.network, which)

    def _halves(self, groups: tuple[Group, Group], which: int) -> np.ndarray:
        return halves(self.c, groups, which, self.tables.elements, self.tables.experts)

    @cached_property
    def reduced(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] seconds of an all-reduce of gradients over all ranks: for their bytes, and beside these."""
        groups = self._groups(WHOLE)
        return 2 * self.k.gradient_bytes * (self.share @ self._halves(groups, WHOLE)), 2 * groups[0].half_call

    @cached_property
    def sizes(self) -> np.ndarray:
        """[kinds, N]: a segment's weights."""
        return self.tables.elements + self.tables.experts

    @cached_property
    def elements(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[kinds, N] of a segment: all its weights, what one rank updates of them under ZeRO, those without moments."""
        shards, experts = (np.maximum(column, 1) for column in (self.c.shards, self.c.expert_shards))
        return self.sizes, self.tables.elements / shards + self.tables.experts / experts, self.tables.counted

    @cached_property
    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] of a rank on average: its weights, and what it updates of them under ZeRO."""
        return self.share @ self.elements[0], self.share @ self.elements[1]

    @cached_property
    def on_average(self) -> tuple[np.ndarray, ...]:
        """[N]: `elements` of a rank on average, as they are stored."""
        return tuple(self.stored @ table for table in self.elements)

    @cached_property
    def of_layers(self) -> tuple[np.ndarray, ...]:
        """[kinds of layers, N]: `elements` of the layers that the model has."""
        return tuple(table[self.used] for table in self.elements)


class FineBounds(Bounds):
    """Bounds of columns of which the schedule alone is open."""

    def __init__(self, space: Space, c: Candidates, tables: Tables) -> None:
        super().__init__(space, c, tables)
        self.sharded = self.sharding(c.zero, True)
        self.recomputed = self.recomputing(np.searchsorted(space.codes, c.recompute))
        (forward, backward), own = self.sharded.walks, self.recomputed.backward
        times = tables.forward + forward, own + backward, tables.weight, tables.message
        self.state = _summed(self.sharded.each, self.elements)
        self.passes, self.backward = PipelineTimes(*times, c.micro_batches, self.k.hide_pp), self.share @ own

    def scheduled(self, name: str, vpp: int) -> tuple[np.ndarray, np.ndarray]:
        """[N] seconds of a step, and bytes of the fullest rank, under one schedule; bytes are infinite where it cannot
        run, and seconds where these do not fit."""
        c = replace(self.c, schedule=name, vpp=vpp)
        seconds, legal = np.full(len(c), np.inf), runs(name, c.pp, c.micro_batches)
        if not legal.any():
            return seconds, seconds
        total = np.where(legal, self.total(self._fullest(c, legal)), np.inf)
        fits = total <= self.problem.machine.memory
        if fits.any():
            pipeline = self.passes.slowest(self.problem.load(name, c.pp, vpp).busy, name in SPLIT)
            seconds[fits] = self.step(pipeline, self.sharded, self.backward)[fits]
        return seconds, total

    def _fullest(self, c: Candidates, legal: np.ndarray) -> np.ndarray:
        """[N] bytes of the fullest rank under the schedule of `c`, where it is `legal`."""
        load = self.problem.load(c.schedule, c.pp, c.vpp)
        found = flights(replace(c, micro_batches=c.micro_batches[legal]))
        ranks = self.problem.heaviest(c.schedule, c.pp, c.vpp, found)
        own = load.own[ranks]
        stored = own.copy()
        if self.shared:
            stored[:, EMBEDDING] *= (own[:, EMBEDDING] == 0) | (own[:, HEAD] == 0)
        held = stored @ self.state
        numbers = np.minimum(c.micro_batches, enough(c.schedule, c.pp))
        for m in found:
            same = numbers == m
            flying = live(c.schedule, c.pp, c.vpp, m)[ranks] @ load.stages
            held[:, same] += flying @ self.recomputed.left[:, same]
        if np.any(self.sharded.gathered):
            held += np.stack([self.sizes[row > 0].max(0) for row in own]) * self.sharded.gathered
        return held.max(0)


def _summed(each: tuple[np.ndarray, ...], elements: tuple[np.ndarray, ...]) -> np.ndarray:
    """Bytes of some elements, of which each has so many."""
    (whole, piece, counted), (a, b, c) = each, elements
    return a * whole + b * piece + c * counted


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
