"""The time of a step, for columns of layouts: what each stage's passes take, and a bound on their pipeline.

`Pricing` knows what layouts of one pp take by kind of segment; `prices` gives that to the stages of one schedule. What
comes out, `Prices`, has every pass of every virtual stage: `parallel.schedules.price` plays the schedule with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from parallel.planner.communication import Group, Network
from parallel.planner.compute import TERMS, Compute, Passes
from parallel.planner.constants import Constants
from parallel.planner.machine import Machine, cut, expert_factors, factors
from parallel.planner.memory import spread, weights
from parallel.planner.shape import KINDS, Candidates, Column, Contents, Shape, places
from parallel.schedules import SPLIT, Times, lower_bound

WHOLE, NEAR, ACROSS = range(3)
"""Of the groups that gradients travel over (`travels`)."""


@dataclass(frozen=True)
class Prices:
    """Seconds of one step of every layout. Arrays [N, S] by virtual stage, [N, pp] by pipeline rank, or [N]."""

    candidates: Candidates
    forward: np.ndarray
    input: np.ndarray
    weight: np.ndarray
    transfer: np.ndarray
    """[N, S - 1]: a message over the s-th boundary."""
    traffic: np.ndarray
    """[N, pp]: of gradients and weights over dp, behind the pipeline, that nothing hides."""
    update: np.ndarray
    """[N, pp]: the optimizer."""
    step: np.ndarray
    """[N]: what every step takes beside."""
    factor: np.ndarray
    """[N]: by which a step is longer as ranks wait for the slowest."""
    terms: dict[str, np.ndarray]
    """[N, S]: parts of the three passes of a stage together; empty unless asked for."""

    @property
    def times(self) -> Times:
        """Of every pass, as schedules are priced with."""
        return Times(self.forward, self.input + self.weight, self.input, self.weight, self.transfer)

    @cached_property
    def behind(self) -> np.ndarray:
        """[N]: what follows the pipeline."""
        return (self.traffic + self.update).max(1) + self.step

    @cached_property
    def rough(self) -> np.ndarray:
        """[N]: a step takes no less. Quick to work out, as no schedule is made.

        Every rank waits for the first micro-batch to come through the stages before its own, has its work, and hands
        the last back through these stages. Of backwards in two halves, the weights' may come behind that.
        """
        c = self.candidates
        place, _ = places(c.schedule, c.pp, c.stages + 1)
        on_rank = (place[:, None] == np.arange(c.pp)).astype(float)
        m, before = np.asarray(c.micro_batches)[:, None], slice(c.pp - 1)
        comes, goes = np.zeros((2, len(c), c.pp))
        np.cumsum(self.forward[:, before] + self.transfer[:, before], 1, out=comes[:, 1:])
        backward = self.input + (0.0 if c.schedule in SPLIT else self.weight)
        np.cumsum(backward[:, before] + self.transfer[:, before], 1, out=goes[:, 1:])
        least = comes + goes + m * ((self.forward + backward) @ on_rank)
        if c.schedule in SPLIT:
            least = np.maximum(least, comes + m * ((self.forward + backward + self.weight) @ on_rank))
        return self.total(least.max(1) * (1 - 1e-12))

    @cached_property
    def bound(self) -> np.ndarray:
        """[N]: a step takes no less."""
        c = self.candidates
        return self.total(lower_bound(c.schedule, c.pp, c.vpp, c.micro_batches, self.times))

    @property
    def everything(self) -> np.ndarray:
        """[N, K]: none of a layout's prices is higher than another's where none of these is."""
        return np.column_stack(
            [self.forward, self.input, self.weight, self.transfer, self.traffic + self.update, self.step * self.factor]
        )

    def rows(self, rows: np.ndarray) -> Prices:
        """Those of some layouts."""
        names = [name for name in self.__dataclass_fields__ if isinstance(getattr(self, name), np.ndarray)]
        terms = {name: value[rows] for name, value in self.terms.items()}
        own = {name: getattr(self, name)[rows] for name in names}
        return replace(self, candidates=self.candidates.take(rows), terms=terms, **own)

    def total(self, pipeline: np.ndarray) -> np.ndarray:
        """The step whose passes end after `pipeline`."""
        return (pipeline + self.behind) * self.factor


def price(
    shape: Shape, seq_len: Column, candidates: Candidates, parts: Contents, machine: Machine, constants: Constants,
    terms: bool = False,
) -> Prices:  # fmt: skip
    """Price every layout of `candidates`, whose stages hold `parts`, with its `terms` or without."""
    return Pricing(shape, seq_len, candidates, machine, constants).prices(candidates, parts, terms=terms)


def travels(c: Candidates, network: Network, which: int) -> tuple[Group, Group]:
    """Over which gradients of dense weights, and of experts, travel: all ranks (`WHOLE`), the parts of them that share
    one set of pieces (`NEAR`), or those across which pieces are the same (`ACROSS`)."""
    found = []
    for own, shards in ((factors(c, ("dp", "cp")), c.shards), (expert_factors(c, "edp"), c.expert_shards)):
        parts = own if which == WHOLE else cut(own, np.where(c.zero > 0, shards, 1))[which - 1]
        found.append(network.group(parts))
    return found[0], found[1]


def halves(
    c: Candidates, groups: tuple[Group, Group], which: int, elements: np.ndarray, experts: np.ndarray
) -> np.ndarray:  # fmt: skip
    """Seconds of a reduce-scatter, or a gather, for each byte of a weight: [kinds, N], of segments with so many
    `elements` [kinds, N] and, in experts, so many more. `groups` are those of `travels`; `ACROSS` a weight's pieces
    travel."""
    found = 0.0
    for numbers, group, shards in zip((elements, experts), groups, (c.shards, c.expert_shards), strict=True):
        found = found + numbers * (group.half_byte / (np.maximum(shards, 1) if which == ACROSS else 1))
    return found


class Pricing:
    """What layouts of one pp and nesting take by kind of segment, whatever their schedule. Arrays [N, kinds]."""

    def __init__(
        self, shape: Shape, seq_len: Column, base: Candidates, machine: Machine, k: Constants, sparse: bool = True
    ) -> None:  # fmt: skip
        self.shape, self.base, self.machine, self.k, self.rows = shape, base, machine, k, len(base)
        self._groups: dict[int, tuple[Group, Group]] = {}
        self.compute = Compute(shape, seq_len, base, machine, k)
        self.passes = self.compute.passes(sparse and bool(np.any(shape.experts)))
        found = {kind: self.passes.get(kind, Passes()) for kind in KINDS}
        self.forward = self.table({kind: p.forward.total for kind, p in found.items()})
        self.input = self.table({kind: p.input.total for kind, p in found.items()})
        self.weight = self.table({kind: p.weight.total for kind, p in found.items()})
        self.again = self.again_under(base.recompute)
        held = weights(shape, base)
        self.elements = self.table({kind: w.dense for kind, w in held.items()})
        self.experts = self.table({kind: w.experts for kind, w in held.items()})

    def again_under(self, code: Column) -> np.ndarray:
        """[N, kinds]: what a recompute runs again."""
        return self.table({kind: Compute.again(self.passes.get(kind, Passes()), code) for kind in ("dense", "sparse")})

    def column(self, value: Column) -> Column:
        """A number, or [N, 1]."""
        return value if np.ndim(value) == 0 else np.asarray(value, float)[:, None]

    def table(self, per_kind: dict[str, Column]) -> np.ndarray:
        """[N, kinds]"""
        found = np.zeros((self.rows, len(KINDS)))
        for kind, value in per_kind.items():
            found[:, KINDS.index(kind)] = value
        return found

    def groups(self, which: int) -> tuple[Group, Group]:
        """See `travels`; worked out once."""
        if which not in self._groups:
            self._groups[which] = travels(self.base, self.compute.network, which)
        return self._groups[which]

    @cached_property
    def reduced(self) -> np.ndarray:
        """[N, kinds]: an all-reduce for each byte of a weight."""
        return 2 * self._halves(WHOLE)

    @cached_property
    def scattered(self) -> np.ndarray:
        """[N, kinds]: a reduce-scatter, or a gather, for each byte of a weight among those that share its pieces."""
        return self._halves(NEAR)

    @cached_property
    def shared(self) -> np.ndarray:
        """[N, kinds]: an all-reduce of a weight's pieces, for each of its bytes, across those that have the same."""
        return 2 * self._halves(ACROSS)

    def _halves(self, which: int) -> np.ndarray:
        return halves(self.base, self.groups(which), which, self.elements.T, self.experts.T).T

    def calls(self, which: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """[N, kinds] whether there are dense weights, or experts; and [N, 1] what one of their collectives costs beside
        its bytes."""
        pairs = zip((self.elements, self.experts), self.groups(which), strict=True)
        return [
            ((elements > 0).astype(float), np.broadcast_to(self.column(group.half_call), (self.rows, 1)))
            for elements, group in pairs
        ]

    @cached_property
    def sent(self) -> Column:
        """[N] bytes of the stream that one stage of a pipeline hands to the next."""
        return self.k.stream_bytes * self.compute.stream * self.shape.hidden

    @cached_property
    def updates(self) -> np.ndarray:
        """[N, kinds]: AdamW reads and writes its state, weights and gradients once."""
        c, k = self.base, self.k
        moved = 2 * (k.optimizer_bytes + k.own_bytes) + k.gradient_bytes + k.weight_bytes
        dense, experts = (np.where(c.zero > 0, shards, 1) for shards in (c.shards, c.expert_shards))
        elements = self.elements / self.column(dense) + self.experts / self.column(experts)
        return elements * self.column(moved * k.optimizer / (self.machine.memory_bandwidth * k.memory))

    def prices(self, c: Candidates, parts: Contents, rows: Any = slice(None), terms: bool = False) -> Prices:
        """Of those `rows` of the base that are `c`, under its schedule, with stages of `parts`."""
        return _Stages(self, c, parts, rows).prices(terms)


class _Stages:
    """One call of `Pricing.prices`."""

    def __init__(self, base: Pricing, c: Candidates, parts: Contents, rows: Any) -> None:
        self.base, self.c, self.parts, self.rows, self.k = base, c, parts, rows, base.k
        counts = np.stack([parts.counts(kind) for kind in KINDS], -2)  # [kinds, S] or [N, kinds, S]
        self.counts = counts.astype(float)
        self.place, _ = places(c.schedule, c.pp, c.stages + 1)
        self.on_rank = (self.place[:, None] == np.arange(c.pp)).astype(float)

    def own(self, value: Column) -> Column:
        """A number, or [N, 1]."""
        found = self.base.column(value)
        return found[self.rows] if np.ndim(found) else found

    def stages(self, table: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """[N, S]: of each stage, the sum over what it holds of a table by kind."""
        return spread(table[self.rows], self.counts if counts is None else counts)

    def prices(self, detailed: bool) -> Prices:
        base, c, k = self.base, self.c, self.k
        forward, inputs, weight = (self.stages(table) for table in (base.forward, base.input, base.weight))
        again = self.again()
        transfer = self.transfers()
        sent = (1 - self.own(k.hide_pp)) * self.sends(transfer)
        walks = self.walked(forward, 1), self.walked(inputs + weight + again, 2)
        terms: dict[str, np.ndarray] = {}
        if detailed:
            terms = {term: self.term(term) for term in TERMS}
            terms |= {"recompute": again, "pp": 2 * sent, "zero": walks[0] + walks[1]}
        traffic = self.traffic((inputs + weight) @ self.on_rank)
        update = self.stages(base.updates) @ self.on_rank
        step = np.broadcast_to(np.asarray(k.step, float), (base.rows,))[self.rows]
        return Prices(
            c, forward + sent + walks[0], inputs + again + sent + walks[1], weight, transfer, traffic, update, step,
            self.factor(), terms,
        )  # fmt: skip

    def term(self, term: str) -> np.ndarray:
        """[N, S]"""
        passes = self.base.passes.items()
        sums = {k: sum(each.seconds.get(term, 0.0) for each in (p.forward, p.input, p.weight)) for k, p in passes}
        return self.stages(self.base.table(sums))

    def again(self) -> np.ndarray:
        """[N, S]: what recompute runs again in a stage's backward."""
        if self.parts.again is None:
            return self.stages(self.base.again)
        shares = np.zeros_like(self.counts)
        for kind, share in zip(("dense", "sparse"), self.parts.again, strict=True):
            shares[..., KINDS.index(kind), :] = share
        return self.stages(self.base.again, self.counts * shares)

    def transfers(self) -> np.ndarray:
        """[N, S - 1]: the stream to the next stage; 0 where it lies on the same rank."""
        c, network = self.c, self.base.compute.network
        if c.stages == 1:
            return np.zeros((len(c), 0))
        place, following = places(c.schedule, c.pp, c.stages)
        distance = np.broadcast_to(np.asarray(factors(c, ("pp",))[0][1]), (len(c),))[:, None]
        beside = np.abs(place - following) == 1
        level = network.level_between(distance, np.where(beside, np.minimum(place, following), 0))
        if c.pp > 2:  # from the last rank back to the first
            level = np.where(beside | (place == following), level, network.level_of_ends(distance, c.pp))
        level = np.broadcast_to(level, (len(c), c.stages - 1))
        seconds = network.message(np.broadcast_to(self.own(self.base.sent), level.shape), level)
        return np.where(place == following, 0.0, seconds)

    def sends(self, transfer: np.ndarray) -> np.ndarray:
        """[N, S]: what a stage sends on in one direction, on average over the two."""
        found = np.zeros((len(transfer), self.c.stages))
        found[:, :-1] += transfer / 2
        found[:, 1:] += transfer / 2
        return found

    def walked(self, beside: np.ndarray, gathers: int) -> np.ndarray:
        """[N, S]: weights that ZeRO 3 gathers in a pass, and gradients that it and ZeRO 2 scatter in backwards, as far
        as the pass beside does not hide them."""
        base, c, k = self.base, self.c, self.k
        third, second = (np.asarray(c.zero) == zero for zero in (3, 2))
        if not np.any(third | second):
            return np.zeros_like(beside)
        scattered = self.stages(base.scattered)
        calls = sum(self.stages(there) * each[self.rows] for there, each in base.calls(NEAR))
        total = third[:, None] * (self.own(k.message_bytes) * scattered + calls)
        if gathers == 2:
            total = total + (third | second)[:, None] * (self.own(k.gradient_bytes) * scattered + calls)
        return np.maximum(total - beside, total * (1 - self.own(k.hide_dp)))

    def traffic(self, backward: np.ndarray) -> np.ndarray:
        """[N, pp]: gradients behind the last micro-batch, and weights gathered behind the optimizer."""
        base, c, k = self.base, self.c, self.k
        zero = np.where(np.broadcast_to(np.asarray(c.dp * c.cp) > 1, (len(c),)), c.zero, 0)[:, None]
        reduced, scattered, shared = (
            self.stages(table) @ self.on_rank for table in (base.reduced, base.scattered, base.shared)
        )
        waits = [
            sum(((self.stages(there) @ self.on_rank) > 0) * each[self.rows] for there, each in base.calls(which))
            for which in (WHOLE, NEAR, ACROSS)
        ]
        size = self.own(k.gradient_bytes)
        gradients = np.where(zero == 0, size * reduced + 2 * waits[WHOLE], size * shared + 2 * waits[ACROSS])
        gradients = gradients + (zero == 1) * (size * scattered + waits[NEAR])
        gathered = ((zero == 1) | (zero == 2)) * (self.own(k.message_bytes) * scattered + waits[NEAR])
        exposed = np.maximum(gradients - backward, gradients * (1 - self.own(k.hide_dp)))
        return exposed + gathered * (1 - self.own(k.hide_gather))

    def factor(self) -> np.ndarray:
        """[N]: by which ranks wait for the slowest."""
        c = self.c
        ranks = np.broadcast_to(np.asarray(c.dp * c.cp * c.tp * c.pp, float), (len(c),))
        spread = np.broadcast_to(np.asarray(self.k.spread, float), (self.base.rows,))[self.rows]
        return self.base.compute.network.factor(ranks, spread)
