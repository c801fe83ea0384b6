"""The search: the best layouts of a problem, with proof that none was missed.

Three grains, each with a bound that no layout of it can beat. A *coarse* row (what cuts the model) takes at least what
the rank with most to do takes under the schedule that is kindest to it. A *fine* row adds schedule, ZeRO and recompute,
with every group as near as can be on the machine. A *layout* adds the nesting of the axes. Layouts are simulated in the
order of their bounds, until no bound is below the worst of the best that are asked for.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from parallel.layout import ORDER, Layout
from parallel.planner.bounds import Filled, FineBounds, coarse_bounds, least_bytes
from parallel.planner.cuts import Tables, cuts
from parallel.planner.evaluate import Estimate, evaluate
from parallel.planner.memory import Holding, flights
from parallel.planner.price import Pricing
from parallel.planner.problem import CHOSEN, Problem
from parallel.planner.shape import ORDERS, Candidates, joined, nestings
from parallel.planner.space import Space, runs

SEEDS = 32
"""Coarse rows of each pp that are refined before all others: what they lead to spares most of the rest."""
CHUNKS = (1024, 2048)
"""Coarse rows that are refined together: at first, and then."""
FRONT, REFINED = 16, 16
"""Shares of the memory for which the front is looked for; of each, the coarse rows that are refined for it, of which
one is simulated."""
PLACED, SIMULATED = 128, 16
"""Fine rows that are placed, and layouts that are simulated, together."""
LEAST = 1024
"""Coarse rows of which together the one is looked for that holds least."""


class Coarse(NamedTuple):
    """Coarse rows in the order of their bounds, behind `seeds` of them: arrays, and tables that they are rows of."""

    segments: Tables
    tables: list[tuple[int, dict[str, np.ndarray]]]
    """By pp: its columns, and under `bounds` those with each ZeRO stage and recompute."""
    bounds: np.ndarray
    owners: np.ndarray
    """Which table each row is in, and at which number there."""
    numbers: np.ndarray
    seeds: int
    small: list[tuple[int, np.ndarray]]
    """By table, numbers of rows that are the fastest of a share of the memory, as far as their bounds tell."""


class Fine(NamedTuple):
    """A fine row in the queue, by its bound."""

    bound: float
    memory: float
    number: int
    group: Candidates
    row: int


class Placed(NamedTuple):
    """A layout in the queue, by its bound."""

    bound: float
    memory: float
    number: int
    owner: int
    """The number of its fine row."""
    group: Candidates
    row: int
    order: tuple[str, ...]


@dataclass
class Result:
    """What a search found."""

    best: list[Estimate]
    """Ascending by step time, ties by memory."""
    front: list[Estimate]
    """Those that no other beats in both time and memory, as far as their bounds were looked at."""
    coarse: int = 0
    """Coarse rows: all of the space."""
    ranked: int = 0
    """Fine rows of which a time and the memory were worked out."""
    fitting: int = 0
    """Of these, those that may fit into memory."""
    simulated: int = 0
    nearest: Estimate | None = None
    """If nothing fits, what is least too large."""
    seconds: float = 0.0


@dataclass
class Search:
    """One search for the `keep` best layouts."""

    problem: Problem
    keep: int = 5
    progress: Callable[[str], None] = lambda line: None
    exhaustive: bool = False
    """Simulate every layout that fits: for tests and small spaces."""
    limit: float | None = None
    """Layouts that take as many seconds a step are of no interest."""
    result: Result = field(default_factory=lambda: Result([], []))
    _queue: list[Fine] = field(default_factory=list)
    _placed: list[Placed] = field(default_factory=list)
    _known: dict[int, Estimate] = field(default_factory=dict)
    """The best of each fine row."""
    _number: int = 0
    _front: dict[int, tuple[float, Candidates, int]] = field(default_factory=dict)
    """share of the memory -> the fine row that may be fastest there: its bound, and where it is."""
    _least: float = 0.0
    """Bytes that no layout holds less than."""

    def run(self) -> Result:
        """Raises nothing: a result without `best` has `nearest`, the layout that misses by least, if any is legal."""
        begin = time.perf_counter()
        space = Space(self.problem)
        coarse = self._coarse(space)
        self._refine(space, coarse, slice(coarse.seeds))
        self._place()
        self._simulate()
        position, chunk = coarse.seeds, CHUNKS[0]
        while True:
            upcoming = coarse.bounds[position] if position < len(coarse.bounds) else np.inf
            waiting, placed = (queue[0].bound if queue else np.inf for queue in (self._queue, self._placed))
            least = min(upcoming, waiting, placed)
            if least == np.inf or least >= self._limit() and not self.exhaustive:
                break
            if least == placed:
                self._simulate()
            elif least == waiting:
                self._place()
            else:
                self._refine(space, coarse, slice(position, position + chunk))
                position, chunk = position + chunk, CHUNKS[1]
                self._place()  # the best of them may spare much of the rest
                self._simulate()
        if not self.result.best:
            self.least()
        self.result.best.sort(key=lambda found: (found.step, found.peak))
        if self.keep > 1:
            self.result.front = self._simulate_front(space, coarse)
        self.result.best = self.result.best[: self.keep] if not self.exhaustive else self.result.best
        self.result.seconds = time.perf_counter() - begin
        return self.result

    def _limit(self) -> float:
        """A bound that reaches this can be left out."""
        steps = sorted(found.step for found in self.result.best)
        own = steps[self.keep - 1] if len(steps) >= self.keep else np.inf
        return own if self.limit is None else min(own, self.limit)

    def _coarse(self, space: Space) -> Coarse:
        """Every coarse row that may fit, ascending by bound."""
        tables, bounds, owners, numbers = [], [np.empty(0)], [np.empty(0, int)], [np.empty(0, int)]
        coarse, segments = cuts(space)
        filled: list[Filled] = []
        for pp, rows in coarse:
            self.result.coarse += len(rows["tp"])
            found, those = coarse_bounds(space, pp, rows, segments)
            filled.append(those)
            best = found.min((0, 1))
            kept = np.flatnonzero(best < np.inf)
            bounds.append(best[kept])
            owners.append(np.full(len(kept), len(tables)))
            numbers.append(kept)
            tables.append((pp, {**rows, "bounds": found.transpose(2, 0, 1)}))
        order = np.argsort(np.concatenate(bounds), kind="stable")
        ahead = np.concatenate([_first(part, SEEDS) for part in bounds])[order]
        order = np.concatenate([order[ahead], order[~ahead]])
        columns = (np.concatenate(parts)[order] for parts in (bounds, owners, numbers))
        return Coarse(segments, tables, *columns, int(ahead.sum()), self._small(filled) if self.keep > 1 else [])

    def _small(self, filled: list[Filled]) -> list[tuple[int, np.ndarray]]:
        """By table, the rows that are among the fastest of a share of the memory."""
        self._least = min((own.bytes.min() for own in filled if len(own.bytes)), default=0.0)
        small: list[tuple[int, float, int, int]] = []
        for owner, (rows, own, held) in enumerate(filled):
            shares = self._shares(held)
            for share in range(FRONT):
                inside = np.flatnonzero(shares == share)
                inside = inside[np.argpartition(own[inside], REFINED)[:REFINED]] if len(inside) > REFINED else inside
                small += [(share, float(own[i]), owner, int(rows[i])) for i in inside]
        found: dict[int, set[int]] = {}
        for share in range(FRONT):
            for _, _, owner, row in sorted(each for each in small if each[0] == share)[:REFINED]:
                found.setdefault(owner, set()).add(row)
        return [(owner, np.array(sorted(rows))) for owner, rows in found.items()]

    def _shares(self, held: np.ndarray) -> np.ndarray:
        """In which part of what is between the least that any layout may hold and the whole memory."""
        share = (held - self._least) / max(self.problem.machine.memory - self._least, 1.0)
        return np.clip(share * FRONT, 0, FRONT - 1).astype(np.int8)

    def _refine(self, space: Space, coarse: Coarse, chunk: slice) -> None:
        """Time and memory of all fine rows of a chunk, and those that may be among the best into the queue."""
        owners, numbers = coarse.owners[chunk], coarse.numbers[chunk]
        for owner in np.unique(owners):
            pp, rows = coarse.tables[owner]
            own = {name: column[numbers[owners == owner]] for name, column in rows.items()}
            wanted = own.pop("bounds").transpose(1, 2, 0) < (np.inf if self.exhaustive else self._limit())
            base, index = space.fine(pp, own, wanted)
            if len(base):
                self._weigh(space, base, coarse.segments.take(own["cut"][index]))
        self.progress(f"{self.result.ranked:,} layouts ranked, {self.result.simulated:,} simulated")

    def _weigh(self, space: Space, base: Candidates, segments: Tables) -> None:
        """Time and memory of `base` under every schedule."""
        bounds, result = FineBounds(space, base, segments), self.result
        limit = np.inf if self.exhaustive else self._limit()
        for name, vpp in space.pipelines(base.pp):
            result.ranked += int(runs(name, base.pp, base.micro_batches).sum())
            seconds, held = bounds.scheduled(name, vpp)
            fits = np.flatnonzero(held <= self.problem.machine.memory)
            result.fitting += len(fits)
            group = replace(base, schedule=name, vpp=vpp)
            self._note_front(group, seconds, held, fits)
            for row in fits[seconds[fits] < limit].tolist():
                self._number += 1
                heapq.heappush(self._queue, Fine(float(seconds[row]), float(held[row]), self._number, group, row))

    def _note_front(self, group: Candidates, seconds: np.ndarray, held: np.ndarray, rows: np.ndarray) -> None:
        """Of each share of the memory, the row whose bound is least."""
        shares, own, least = self._shares(held[rows]), seconds[rows], np.full(FRONT, np.inf)
        np.minimum.at(least, shares, own)
        for share in np.flatnonzero(least < [self._front.get(share, (np.inf,))[0] for share in range(FRONT)]).tolist():
            first = int(np.argmax((shares == share) & (own == least[share])))
            self._front[share] = float(least[share]), group, int(rows[first])

    def _simulate_front(self, space: Space, coarse: Coarse) -> list[Estimate]:
        """Those of the rows noted, and of the best, that no other beats in both time and memory; by memory."""
        counted = self.result.ranked, self.result.fitting  # most of these rows have been
        for owner, numbers in coarse.small:
            pp, rows = coarse.tables[owner]
            own = {name: column[numbers] for name, column in rows.items() if name != "bounds"}
            base, index = space.fine(pp, own)
            self._weigh(space, base, coarse.segments.take(own["cut"][index]))
        self.result.ranked, self.result.fitting = counted
        noted = [(group, row) for _, group, row in self._front.values()]
        layouts = [self._layout(*place, self._orders(*place)[0]) for place in noted]
        noted = [found for found in evaluate(self.problem, layouts) if found.fits]
        known = sorted([*self.result.best, *noted], key=lambda e: (e.peak, e.step))
        front: list[Estimate] = []
        for estimate in known:
            if not front or estimate.step < front[-1].step:
                front.append(estimate)
        return front

    def least(self) -> Estimate | None:
        """What holds least, with the most that ZeRO and recompute save; None: nothing is legal."""
        space = Space(self.problem)
        coarse, segments = cuts(space)
        parts = []
        for pp, rows in coarse:
            held = least_bytes(space, pp, rows, segments)
            order = np.argsort(held, kind="stable")
            chunks = [order[start : start + LEAST] for start in range(0, len(order), LEAST)]
            parts += [(float(held[chunk[0]]), pp, rows, chunk) for chunk in chunks]
        for bound, pp, rows, chunk in sorted(parts, key=lambda part: part[0]):
            if self.result.nearest and bound >= self.result.nearest.peak:
                break
            self._note_least(space, pp, {name: column[chunk] for name, column in rows.items()})
        return self.result.nearest

    def _note_least(self, space: Space, pp: int, rows: dict[str, np.ndarray]) -> None:
        """What holds least of some coarse rows, if it is less than what is known."""
        wanted = np.zeros((len(space.zeros), len(space.codes), len(rows["tp"])), bool)
        wanted[0, -1] = rows["dp"] * rows["cp"] == 1
        wanted[-1, -1] = True  # where a stage is held it is both the first and the last
        base, _ = space.fine(pp, rows, wanted)
        holding = Holding(self.problem.shape, self.problem.seq_len, base, self.problem.constants)
        for group, taken in space.scheduled(base):
            parts = self.problem.contents(group.stages)
            ranks = self.problem.heaviest(group.schedule, group.pp, group.vpp, flights(group))
            total = holding.memory(group, parts, taken, ranks=ranks).total.max(1)
            row = int(total.argmin())
            if self.result.nearest is None or total[row] < self.result.nearest.peak:
                layout = self._layout(group, row, self._orders(group, row)[0])
                self.result.nearest = evaluate(self.problem, [layout])[0]

    def _layout(self, group: Candidates, row: int, order: tuple[str, ...]) -> Layout:
        fixed = self.problem.fixed
        found = group.layout(row, {key: value for key, value in fixed.items() if key not in CHOSEN}, order)
        # What is held of an axis of one rank has no effect, and stays as it was said.
        idle = ("schedule", "vpp") * (found.pp == 1) + ("cp_method", "cp_ulysses") * (found.cp == 1)
        return replace(found, **{key: fixed[key] for key in idle if key in fixed})

    def _orders(self, group: Candidates, row: int) -> list[tuple[str, ...]]:
        """Nestings of the axes that have more than one rank, the usual one first."""
        if "order" in self.problem.fixed:
            return [tuple(self.problem.fixed["order"])]
        sizes = {axis: group.pp if axis == "pp" else int(getattr(group, axis)[row]) for axis in ORDER}
        return nestings(sizes)

    def _heads(self, queue: list[Any], most: int) -> list[Any]:
        """Up to so many from the head of a queue that are below the limit; what is not goes."""
        found, limit = [], np.inf if self.exhaustive else self._limit()
        while queue and len(found) < most:
            first = heapq.heappop(queue)
            if first.bound < limit:
                found.append(first)
        return found

    def _simulate(self) -> None:
        """Simulate the layouts at the head of their queue."""
        heads = self._heads(self._placed, SIMULATED)
        layouts = [self._layout(head.group, head.row, head.order) for head in heads]
        for head, estimate in zip(heads, evaluate(self.problem, layouts), strict=True):
            known = self._known.get(head.owner)
            if estimate.fits and (known is None or estimate.step < known.step):
                self._known[head.owner] = estimate
        self.result.simulated += len(layouts)
        self.result.best = list(self._known.values())

    def _place(self) -> None:
        """Place the fine rows at the head of their queue: those nestings into the other one of which no other costs
        less in some passes or messages and no more in any."""
        problem, batch = self.problem, self._heads(self._queue, PLACED)
        batch = self._fitting(batch) if batch else batch
        if not batch:
            return
        numbers, orders = [], []
        for number, fine in enumerate(batch):
            for order in self._orders(fine.group, fine.row):
                numbers.append(number)
                orders.append(order)
        free = joined([fine.group.take(np.array([fine.row])) for fine in batch])
        base = replace(free.take(np.array(numbers)), order=np.array([ORDERS.index(order) for order in orders]))
        pricing = Pricing(problem.shape, problem.seq_len, base, problem.machine, problem.constants)
        limit = np.inf if self.exhaustive else self._limit()
        for (schedule, pp, vpp), own in _alike([batch[number].group for number in numbers]).items():
            c = replace(base.take(own), schedule=schedule, pp=pp, vpp=vpp)
            prices = pricing.prices(c, problem.contents(c.stages), own)
            rough = prices.rough
            below = np.flatnonzero(rough < limit)
            kept = below[_undominated(np.array(numbers)[own[below]], prices.everything[below])]
            for row in kept.tolist():
                fine, self._number = batch[numbers[own[row]]], self._number + 1
                bound = max(fine.bound, float(rough[row]))
                placed = Placed(bound, fine.memory, self._number, fine.number, fine.group, fine.row, orders[own[row]])
                heapq.heappush(self._placed, placed)

    def _fitting(self, batch: list[Fine]) -> list[Fine]:
        """Those that fit into memory, as far as is known before they are simulated."""
        problem = self.problem
        free = joined([fine.group.take(np.array([fine.row])) for fine in batch])
        holding = Holding(problem.shape, problem.seq_len, free, problem.constants)
        found: list[Fine] = []
        for (schedule, pp, vpp), own in _alike([fine.group for fine in batch]).items():
            c = replace(free.take(own), schedule=schedule, pp=pp, vpp=vpp)
            parts = problem.contents(c.stages)
            ranks = problem.heaviest(schedule, pp, vpp, flights(c))
            held = holding.memory(c, parts, own, ranks=ranks).total.max(1)
            found += [batch[number] for number in own[held <= problem.machine.memory]]
        return found


def _first(values: np.ndarray, count: int) -> np.ndarray:
    """Whether each value is among the `count` least."""
    found = np.full(len(values), len(values) <= count)
    if len(values) > count:
        found[np.argpartition(values, count)[:count]] = True
    return found


def _alike(groups: list[Candidates]) -> dict[tuple[str, int, int], np.ndarray]:
    """Indices of those of one schedule, pp and vpp."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault((group.schedule, group.pp, group.vpp), []).append(index)
    return {key: np.array(indices) for key, indices in found.items()}


def _undominated(owners: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Rows of `costs` [N, K], which `owners` [N] in ascending order share, that no other row of their owner's makes
    needless: by costing no more in anything, and less in something or coming before."""
    kept = []
    for owner in np.unique(owners):
        rows = np.flatnonzero(owners == owner)
        own = costs[rows]
        least = (own[:, None] <= own).all(2)  # [i, j]: i costs no more than j
        needless = least & (~least.T | (rows[:, None] < rows))
        kept.append(rows[~needless.any(0)])
    return np.concatenate([np.empty(0, int), *kept])
