"""One truth: what a layout takes, from its schedule played with each stage's own times.

Everything that is printed as a plan comes from here; `search` only ranks with bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from parallel.layout import Layout
from parallel.planner.memory import Holding, Memory
from parallel.planner.price import Prices, Pricing
from parallel.planner.problem import Problem
from parallel.planner.shape import Contents, candidate, joined
from parallel.schedules import price as play


@dataclass(frozen=True)
class Estimate:
    """What the planner predicts of one layout. Seconds and bytes; arrays by pipeline rank."""

    layout: Layout
    step: float
    pipeline: float
    """From the first pass to the last."""
    busy: np.ndarray
    """[pp]: seconds in which a pipeline rank computes or talks."""
    prices: Prices
    memory: Memory
    fits: bool

    @cached_property
    def bound(self) -> float:
        """Seconds of the closed form, which is never above `step`."""
        return float(self.prices.bound[0])

    @property
    def bubble(self) -> float:
        """The idle share of the pipeline, over all its ranks."""
        return max(0.0, 1 - float(self.busy.mean()) / self.pipeline)

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank."""
        return float(self.memory.total.max())


def evaluate(problem: Problem, layouts: Sequence[Layout]) -> list[Estimate]:
    """Estimates of `layouts`, which must be legal. What does not depend on the pipeline's shape is worked out for all
    at once; those that share schedule, pp and vpp are played together."""
    if not layouts:
        return []
    base = joined([candidate(layout, problem.global_batch) for layout in layouts])
    pricing = Pricing(problem.shape, problem.seq_len, base, problem.machine, problem.constants)
    holding = Holding(problem.shape, problem.seq_len, base, problem.constants)
    groups: dict[tuple, list[int]] = {}
    for index, layout in enumerate(layouts):
        listed = None if isinstance(layout.recompute, str) else layout.recompute
        key = layout.schedule, layout.pp, layout.vpp, layout.stages, listed
        groups.setdefault(key, []).append(index)
    found: dict[int, Estimate] = {}
    for members in groups.values():
        own, first = np.array(members), layouts[members[0]]
        parts = _contents(problem, first)
        schedule, vpp = (first.schedule, first.vpp) if first.pp > 1 else ("1f1b", 1)
        c = replace(base.take(own), schedule=schedule, pp=first.pp, vpp=vpp)
        prices, held = pricing.prices(c, parts, own, terms=True), holding.memory(c, parts, own, exact=True)
        makespan, busy = play(c.schedule, c.pp, c.vpp, c.micro_batches, prices.times)
        total = prices.total(makespan)
        for row, i in enumerate(members):
            memory = Memory(*(getattr(held, f)[row] for f in held.__dataclass_fields__))
            fits = bool(memory.total.max() <= problem.machine.memory)
            found[i] = Estimate(
                layouts[i], float(total[row]), float(makespan[row]), busy[row],
                prices.rows(np.array([row])), memory, fits,
            )  # fmt: skip
    return [found[i] for i in range(len(layouts))]


def _contents(problem: Problem, layout: Layout) -> Contents:
    """What the stages hold, and of a list of recomputed layers the share of each stage."""
    sizes = layout.stages if layout.pp > 1 else None
    parts = problem.contents(layout.pp * layout.vpp if layout.pp > 1 else 1, sizes)
    if isinstance(layout.recompute, str):
        return parts
    return replace(parts, again=_shares(problem, layout, parts))


def _shares(problem: Problem, layout: Layout, parts: Contents) -> tuple[np.ndarray, np.ndarray]:
    from parallel.schedules import cut

    model = problem.model
    counts = np.zeros((2, parts.dense.shape[-1]))
    spans = cut(model.layers, counts.shape[1], layout.stages if layout.pp > 1 else None)
    for stage, span in enumerate(spans):
        for layer in (segment - 1 for segment in span if 0 < segment <= model.layers):
            counts[int(model.moe.in_layer(layer)), stage] += layer in layout.recompute
    return counts[0] / np.maximum(parts.dense, 1), counts[1] / np.maximum(parts.sparse, 1)
