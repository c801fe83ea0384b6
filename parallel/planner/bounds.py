"""What no layout can beat whatever its schedule and its place on the machine.

A pipeline takes at least what its slowest rank does, and its fullest rank holds at least what ranks hold on average
with one micro-batch in flight. Its first rank holds no fewer layers, with no fewer micro-batches in flight,
than under the schedule that asks for the fewest. The rank with the largest segment gathers it under ZeRO 3.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from parallel.planner.compute import Passes
from parallel.planner.memory import GIB, LAYERS, Holding, communicators, enough, live
from parallel.planner.price import Pricing
from parallel.planner.shape import KINDS, RECOMPUTE, Candidates, Column, places
from parallel.planner.space import Space
from parallel.schedules import V_SHAPED

CHUNK = 8192
"""Rows that are bounded together: enough to outweigh a call, few enough for the cache."""


def coarse_bounds(space: Space, pp: int, rows: dict[str, np.ndarray]) -> np.ndarray:
    """[zeros, codes, N] seconds of a step of coarse rows (`Space.coarse`) with each ZeRO stage and recompute of the
    space; infinite where it does not fit."""
    problem = space.problem
    whole = rows["dp"] * rows["cp"]
    found = np.full((len(space.zeros), len(space.codes), len(whole)), np.inf)
    layers, flying = first_rank(space, pp, rows["micro_batches"])
    for start in range(0, len(whole), CHUNK):
        part = slice(start, start + CHUNK)
        own = {name: column[part] for name, column in rows.items()}
        nothing = np.zeros_like(own["tp"])
        c = Candidates("1f1b", pp, 1, order=None, **own, zero=nothing + 1, shards=whole[part], recompute=nothing)
        pricing = Pricing(problem.shape, problem.seq_len, c, problem.machine, problem.constants)
        holding = Holding(problem.shape, problem.seq_len, c, problem.constants)
        bounds = Bounds(space, c, pricing, holding, (layers, flying[part]))
        recomputed = [bounds.recomputing(code, holding.under(code)) for code in space.codes]
        for row, zero in enumerate(space.zeros):
            legal, sharded = (whole[part] > 1) | (zero == 0) | ("zero" in problem.fixed), bounds.sharding(zero)
            for column, each in enumerate(recomputed):
                found[row, column, part] = np.where(legal, bounds.seconds(sharded, each), np.inf)
    return found


class Recomputed(NamedTuple):
    """What a recompute makes of rows: seconds and bytes, [N] each."""

    backward: np.ndarray
    """Of a micro-batch, on a rank that has what ranks have on average."""
    pipeline: np.ndarray
    """All passes of the rank that has most, behind the forwards of the first micro-batch before it."""
    held: np.ndarray
    """Of a micro-batch, and what comes and goes, on average."""
    smallest: np.ndarray
    """What a micro-batch leaves of the smallest layer."""


class Sharded(NamedTuple):
    """What a ZeRO stage makes of rows: seconds and bytes, [N] each."""

    update: np.ndarray
    """The optimizer, and what every step takes beside."""
    gradients: np.ndarray
    """An all-reduce of them, or what of it is not inside shard groups."""
    held: np.ndarray
    """Weights, gradients and the optimizer's state of a rank that has what ranks have on average."""
    first: np.ndarray
    """Those of the first rank's layers."""
    largest: np.ndarray
    """The largest segment, where it is gathered and there is one rank that has it."""


class Bounds:
    """Bounds of columns without a schedule. `pricing` and `holding` are of the same cuts of the model, with the shard
    groups that `c` has for a ZeRO stage above 0; `first` is of their micro-batches."""

    def __init__(
        self, space: Space, c: Candidates, pricing: Pricing, holding: Holding, first: tuple[float, np.ndarray]
    ) -> None:  # fmt: skip
        self.c, self.pricing, self.holding = c, pricing, holding
        self.k, self.problem = space.problem.constants, space.problem
        one = self.problem.contents(1)
        self.counts = np.array([one.counts(kind)[0] for kind in KINDS])
        self.share = self.counts / c.pp
        self.used = [i for i in LAYERS if self.counts[i]]
        self.several = np.asarray(c.dp * c.cp > 1)
        self.copies = np.where(self.several, self.k.gradient_copies, min(self.k.gradient_copies, 1.0))
        self.loads = loads(space, c.pp)
        self.layers, self.flying = first

    def seconds(self, sharded: Sharded, recomputed: Recomputed) -> np.ndarray:
        """[N] of a step; infinite where it does not fit."""
        # Gradients that nothing hides; what travels in shard groups, which may be near, costs nothing here.
        gradients = sharded.gradients
        exposed = np.maximum(gradients - recomputed.backward, gradients * (1 - self.k.hide_dp))
        least = recomputed.pipeline + exposed + sharded.update
        held = np.maximum(sharded.held + recomputed.held, sharded.first + self.flying * recomputed.smallest)
        if self.c.pp == 1:
            held = held + sharded.largest
        held = held * (1 + self.k.fragments) + self.fixed
        return np.where(held <= self.problem.machine.memory, least, np.inf)

    def sharding(self, zero: Column) -> Sharded:
        """What depends on the ZeRO stage, a number or a column."""
        k = self.k
        zero = np.where(self.several, zero, 0)
        moved = 2 * (k.optimizer_bytes + k.own_bytes) + k.gradient_bytes + k.weight_bytes
        sizes, pieces, _ = self.mean
        update = np.where(zero > 0, pieces, sizes) * k.optimizer * moved
        times = np.where(zero == 0, 1.0, np.where(zero == 1, 0.5, 0.0))
        widest = self.widest * k.weight_bytes * (1 + self.copies) if self.c.pp == 1 else 0.0
        return Sharded(
            update / (self.problem.machine.memory_bandwidth * k.memory) + k.step,
            times * k.gradient_bytes * self.reduced,
            self._state(zero, self.mean),
            self.layers * self._state(zero, self.smallest),
            np.where(zero == 3, widest, 0.0),
        )

    def recomputing(self, code: Column, holding: Holding) -> Recomputed:
        """What depends on recompute, a number or a column; `holding` is under it."""
        k, item = self.k, self.k.item_bytes * self.k.saved
        logits = holding.logits[:, 0] * (1 + np.asarray(self.problem.shape.further)) * k.logit_bytes / self.c.pp
        coming = np.maximum(holding.logits[:, 0] * k.logits * k.item_bytes, _least(holding.back, self.used) * item)
        return Recomputed(
            *self._pipeline(code),
            holding.saved @ self.share * item + logits + coming / self.c.pp,
            _least(holding.saved, self.used) * item,
        )

    def _pipeline(self, code: Column) -> tuple[np.ndarray, np.ndarray]:
        base, m = self.pricing, self.c.micro_batches
        backward = (base.input + base.weight).T.copy()
        for i in self.used:
            backward[i] += self.again(base.passes[KINDS[i]], code)
        forward = base.forward.T
        passes = forward + backward
        # Of each division into stages, the rank that takes longest; of these divisions the one that takes least.
        slowest = [(m * (own @ passes) + before @ forward).max(0) for own, before in self.loads]
        return self.share @ backward, np.min(slowest, 0) * (1 - 1e-12)

    @staticmethod
    def again(passes: Passes, code: Column) -> Column:
        full, selective = (np.asarray(code) == RECOMPUTE.index(name) for name in ("full", "selective"))
        return np.where(full, passes.forward.total, np.where(selective, passes.core, 0.0))

    @cached_property
    def reduced(self) -> np.ndarray:
        return self.pricing.reduced @ self.share

    @cached_property
    def sizes(self) -> np.ndarray:
        """[N, kinds]: a segment's weights."""
        return self.pricing.elements + self.pricing.experts

    @cached_property
    def pieces(self) -> np.ndarray:
        """[N, kinds]: of a segment's weights, what one rank updates under ZeRO."""
        shards, experts = (np.maximum(column, 1)[:, None] for column in (self.c.shards, self.c.expert_shards))
        return self.pricing.elements / shards + self.pricing.experts / experts

    @cached_property
    def fixed(self) -> np.ndarray:
        return GIB * (self.k.reserve + self.k.buffers * communicators(replace(self.c, zero=0)))

    @cached_property
    def widest(self) -> np.ndarray:
        return self.sizes[:, self.counts > 0].max(1)

    @cached_property
    def mean(self) -> tuple[np.ndarray, ...]:
        return tuple(table @ self.share for table in (self.sizes, self.pieces, self.holding.counted))

    @cached_property
    def smallest(self) -> tuple[np.ndarray, ...]:
        sizes, pieces = (_least(table, self.used) for table in (self.sizes, self.pieces))
        return sizes, pieces, self.holding.counted[:, self.used].max(1)

    def _state(self, zero: Column, tables: tuple[np.ndarray, ...]) -> np.ndarray:
        """[N] bytes of weights, gradients and the optimizer's state, and of a micro-batch's gradients beside."""
        k = self.k
        sizes, pieces, counted = tables
        own = np.where(zero > 0, pieces, sizes)
        whole = np.where(zero == 3, 0.0, sizes) * k.weight_bytes * (1 + self.copies)  # and the gradients beside
        summed = np.where(zero >= 2, k.gradient_bytes, 0.0)  # none where the step is one graph
        owned = k.optimizer_bytes + np.where((zero == 1) | (zero == 2), k.own_bytes, 0.0)
        owned = owned + summed + np.where(zero == 3, k.weight_bytes, 0.0)
        shards = np.where(zero > 0, np.maximum(self.c.shards, 1), 1)
        return whole + own * owned - counted / shards * k.optimizer_bytes


def _least(table: np.ndarray, kinds: list[int]) -> np.ndarray:
    """[N, kinds], the least of some kinds: [N]."""
    found = table[:, kinds[0]]
    for kind in kinds[1:]:
        found = np.minimum(found, table[:, kind])
    return found


def loads(space: Space, pp: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every division of the model into the stages of `pp` ranks: what ranks hold, and what stages before them hold
    that the first micro-batch goes through, [ranks, kinds] each. Of ranks that hold the same, the last is there alone.
    """
    found = []
    for folded, vpp in dict.fromkeys((name in V_SHAPED, vpp) for name, vpp in space.pipelines(pp)):
        counts = np.stack([space.problem.contents(pp * vpp).counts(kind) for kind in KINDS], -1)
        place, _ = places(V_SHAPED[0] if folded else "1f1b", pp, pp * vpp + 1)
        own = (place[:, None] == np.arange(pp)).T @ counts
        before = np.cumsum(counts[:pp], 0) - counts[:pp]
        _, last = np.unique(own[::-1], axis=0, return_index=True)
        last = pp - 1 - last
        found.append((own[last], before[last]))
    return found


def first_rank(space: Space, pp: int, micro_batches: np.ndarray) -> tuple[float, np.ndarray]:
    """The fewest layers of the first rank, and [N] the fewest of them times micro-batches in flight, of all schedules
    that may run."""
    numbers, where = np.unique(micro_batches, return_inverse=True)
    flying, held = np.full(len(numbers), np.inf), np.inf
    for name, vpp in space.pipelines(pp):
        parts = space.problem.contents(pp * vpp)
        layers = parts.dense + parts.sparse
        runs = {"interleaved": numbers % pp == 0, "dualpipe_v": numbers >= 2 * pp}.get(name, numbers > 0)
        capped = np.minimum(numbers, enough(name, pp))
        for m in np.unique(capped[runs]).tolist():
            table, those = live(name, pp, vpp, m)[0], runs & (capped == m)
            flying[those] = np.minimum(flying[those], float(table @ layers))
            held = min(held, float((table > 0) @ layers))
    return held, flying[where]
