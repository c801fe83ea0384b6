"""What no layout can beat whatever its schedule and its place on the machine.

A pipeline's slowest rank takes at least what its ranks take on average, and its fullest holds at least what they hold
on average with one micro-batch in flight. Its first rank holds no fewer layers, with no fewer micro-batches in flight,
than under the schedule that asks for the fewest. The rank with the largest segment gathers it under ZeRO 3.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from parallel.planner.compute import Passes
from parallel.planner.memory import GIB, LAYERS, Holding, communicators, enough, live
from parallel.planner.price import Pricing
from parallel.planner.shape import KINDS, RECOMPUTE, Candidates, Column
from parallel.planner.space import Space


def coarse_bounds(space: Space, pp: int, rows: dict[str, np.ndarray]) -> np.ndarray:
    """[zeros, codes, N] seconds of a step of coarse rows (`Space.coarse`) with each ZeRO stage and recompute of the
    space; infinite where it does not fit."""
    problem = space.problem
    nothing, whole = np.zeros_like(rows["tp"]), rows["dp"] * rows["cp"]
    c = Candidates("1f1b", pp, 1, order=None, **rows, zero=nothing, shards=whole, recompute=nothing)
    pricing = Pricing(problem.shape, problem.seq_len, c, problem.machine, problem.constants)
    found, first = np.full((len(space.zeros), len(space.codes), len(c)), np.inf), first_rank(space, c)
    for column, code in enumerate(space.codes):
        recomputed = replace(c, recompute=np.full(len(c), code))
        holding = Holding(problem.shape, problem.seq_len, recomputed, problem.constants)
        for row, zero in enumerate(space.zeros):
            legal = (whole > 1) | (zero == 0) | ("zero" in problem.fixed)
            bounds = Bounds(space, replace(recomputed, zero=np.full(len(c), zero)), pricing, holding, first)
            found[row, column] = np.where(legal, bounds.seconds(), np.inf)
    return found


class Bounds:
    """Bounds of columns without a schedule. `pricing` and `holding` are of the same cuts of the model."""

    def __init__(
        self,
        space: Space,
        c: Candidates,
        pricing: Pricing,
        holding: Holding,
        first: tuple[float, np.ndarray] | None = None,
    ) -> None:
        self.c, self.pricing, self.holding = c, pricing, holding
        self.first = first or first_rank(space, c)
        self.k, self.problem = space.problem.constants, space.problem
        one = self.problem.contents(1)
        self.counts = np.array([one.counts(kind)[0] for kind in KINDS])
        self.share = self.counts / c.pp
        self.zero = np.where(c.dp * c.cp > 1, c.zero, 0)
        self.shards = np.where(self.zero > 0, c.shards, 1), np.where(self.zero > 0, c.expert_shards, 1)

    def seconds(self) -> np.ndarray:
        """[N] of a step; infinite where it does not fit."""
        c, k, base = self.c, self.k, self.pricing
        forward, backward = base.forward @ self.share, (base.input + base.weight) @ self.share
        backward = backward + sum(self.share[i] * self.again(base.passes.get(KINDS[i], Passes())) for i in LAYERS)
        moved = 2 * (k.optimizer_bytes + k.own_bytes) + k.gradient_bytes + k.weight_bytes
        update = self.pieces @ self.share * k.optimizer * moved / (self.problem.machine.memory_bandwidth * k.memory)
        least = c.micro_batches * (forward + backward) + self.traffic(backward) + update + k.step
        return np.where(self.bytes() <= self.problem.machine.memory, least, np.inf)

    def again(self, passes: Passes) -> Column:
        full, selective = (np.asarray(self.c.recompute) == RECOMPUTE.index(name) for name in ("full", "selective"))
        return np.where(full, passes.forward.total, np.where(selective, passes.core, 0.0))

    def traffic(self, backward: np.ndarray) -> np.ndarray:
        """Gradients over dp that nothing hides. What travels in shard groups, which may be near, costs nothing here."""
        k = self.k
        times = np.where(self.zero == 0, 1.0, np.where(self.zero == 1, 0.5, 0.0))
        gradients = times * k.gradient_bytes * (self.pricing.reduced @ self.share)
        return np.maximum(gradients - backward, gradients * (1 - k.hide_dp))

    @cached_property
    def pieces(self) -> np.ndarray:
        """[N, kinds]: of a segment's weights, what one rank updates."""
        dense, experts = self.shards
        return self.pricing.elements / dense[:, None] + self.pricing.experts / experts[:, None]

    def bytes(self) -> np.ndarray:
        """[N] of the fullest rank."""
        k, c, holding = self.k, self.c, self.holding
        item = k.item_bytes * k.saved
        sizes = self.pricing.elements + self.pricing.experts
        state = self.state(sizes)
        logits = holding.logits[:, 0] * (1 + np.asarray(self.problem.shape.further)) * k.logit_bytes
        used = [i for i in LAYERS if self.counts[i]]
        passing = np.maximum(
            holding.logits[:, 0] * k.logits * k.item_bytes, np.min([holding.back[:, i] for i in used], 0) * item
        )
        mean = state @ self.share + holding.saved @ self.share * item + (logits + passing) / c.pp
        layers, flying = self.first
        first = layers * np.min([state[:, i] for i in used], 0)
        first = first + flying * np.min([holding.saved[:, i] for i in used], 0) * item
        largest = np.where(self.zero == 3, sizes[:, self.counts > 0].max(1) * k.weight_bytes, 0.0)
        largest = largest * (1 + self.copies)
        fixed = GIB * (k.reserve + k.buffers * communicators(c))
        return (np.maximum(mean, first) + largest * (c.pp == 1)) * (1 + k.fragments) + fixed

    @cached_property
    def copies(self) -> np.ndarray:
        k = self.k
        return np.where(self.c.dp * self.c.cp > 1, k.gradient_copies, min(k.gradient_copies, 1.0))

    def state(self, sizes: np.ndarray) -> np.ndarray:
        """[N, kinds] bytes of weights, gradients and the optimizer's state, and of a micro-batch's gradients beside."""
        k, zero = self.k, self.zero[:, None]
        held = np.where(zero == 3, self.pieces, sizes) * k.weight_bytes
        summed = np.where(zero >= 2, self.pieces, 0.0) * k.gradient_bytes  # none where the step is one graph
        owned = k.optimizer_bytes + np.where((zero == 1) | (zero == 2), k.own_bytes, 0.0)
        beside = np.where(zero == 3, 0.0, sizes) * k.weight_bytes * self.copies[:, None]
        counted = self.holding.counted / np.where(zero > 0, self.c.shards[:, None], 1)
        return held + summed + self.pieces * owned - counted * k.optimizer_bytes + beside


def first_rank(space: Space, c: Candidates) -> tuple[float, np.ndarray]:
    """The fewest layers of the first rank, and [N] the fewest of them times micro-batches in flight, of all schedules
    that may run."""
    numbers, where = np.unique(c.micro_batches, return_inverse=True)
    flying, held = np.full(len(numbers), np.inf), np.inf
    for name, vpp in space.pipelines(c.pp):
        parts = space.problem.contents(c.pp * vpp)
        layers = parts.dense + parts.sparse
        runs = {"interleaved": numbers % c.pp == 0, "dualpipe_v": numbers >= 2 * c.pp}.get(name, numbers > 0)
        capped = np.minimum(numbers, enough(name, c.pp))
        for m in np.unique(capped[runs]).tolist():
            table, those = live(name, c.pp, vpp, m)[0], runs & (capped == m)
            flying[those] = np.minimum(flying[those], float(table @ layers))
            held = min(held, float((table > 0) @ layers))
    return held, flying[where]
