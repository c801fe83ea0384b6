"""Why: what decides between two layouts, what a layout would need, and what a change of the machine would buy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.checks import ConfigError, check, nearest_divisor
from parallel.layout import ORDER, Layout
from parallel.planner import shape
from parallel.planner.evaluate import Estimate, evaluate
from parallel.planner.plan import Plan
from parallel.planner.problem import Problem
from parallel.planner.search import Result, Search
from parallel.planner.space import runs
from parallel.schedules.generate import check_numbers
from parallel.topology import Topology

NAMES = {
    "matmul": "matmuls", "attention": "attention", "passes": "passes over memory", "kernels": "gaps between kernels",
    "tp": "tensor-parallel traffic", "cp": "context-parallel traffic", "ep": "dispatch to experts",
    "recompute": "recompute", "pp": "messages between stages", "zero": "gathers and scatters of ZeRO",
    "bubble": "pipeline bubble", "dp": "gradients and weights over dp", "optimizer": "optimizer",
    "other": "rest of a step", "stragglers": "waiting for the slowest rank",
}  # fmt: skip
"""A term of `Plan.terms` in words."""

HELD = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "activations": "activations",
    "passing": "what comes and goes (gathered weights, a micro-batch's gradients, logits, recomputed activations)",
    "fixed": "framework, communicators, fragments",
}  # fmt: skip
"""A part of `memory.Memory` in words."""

LARGEST = 2**17
"""Ranks up to which `smallest` looks."""


def difference(first: Plan, other: Plan) -> list[tuple[str, float, float]]:
    """(term, seconds of each) of two plans, those that differ most first."""
    names = list(dict.fromkeys([*first.terms, *other.terms]))
    rows = [(name, first.terms.get(name, 0.0), other.terms.get(name, 0.0)) for name in names]
    return sorted(rows, key=lambda row: -abs(row[1] - row[2]))


def lost_by(best: Plan, other: Plan) -> str:
    """One line: by how much `other` is slower, through what, and what it gains in turn. One that does not fit may be
    faster. Of plans for different work only tokens/s are compared."""
    step, work = best.estimate.step, _different_work(best.problem, other.problem)
    if work:
        gain = other.tokens_per_s / best.tokens_per_s - 1
        way = "faster" if gain > 0 else "slower"
        return f"{abs(gain):.1%} {way} by tokens/s, with another {' and another '.join(work)}"
    slower = other.estimate.step / step - 1
    if abs(slower) < 5e-4:
        gib = (other.estimate.peak - best.estimate.peak) / 2**30
        return f"as fast within 0.05 %, with {gib:+.1f} GiB a rank"
    way, sign = ("slower", 1) if slower > 0 else ("faster", -1)
    changes = [(name, b - a) for name, a, b in difference(best, other)]
    through = _named(change for change in changes if sign * change[1] > 1e-4 * step)
    against = _named(change for change in changes if -sign * change[1] > abs(slower) * step / 4)
    line = f"{abs(slower):.1%} {way}: {through or 'of everything a little'}"
    return f"{line}, in spite of {against}" if against else line


def _different_work(first: Problem, other: Problem) -> list[str]:
    """What makes a step of one other work than a step of the other."""
    parts = {"model": "model", "data.seq_len": "seq_len", "train.global_batch": "global_batch"}
    return [name for name, key in parts.items() if getattr(first, key) != getattr(other, key)]


def _named(changes: Iterable[tuple[str, float]]) -> str:
    """The first two of some (term, seconds)."""
    return " and ".join(f"{NAMES[name]} ({seconds:+.3g} s)" for name, seconds in [*changes][:2])


def nested(layout: Layout) -> list[str]:
    """The axes that have more than one rank, innermost first."""
    return [axis for axis in layout.order if getattr(layout, axis) > 1]


def nestings(plan: Plan) -> list[Estimate]:
    """The plan's layout under every nesting of its axes, which differ in nothing but where groups lie."""
    layout = plan.estimate.layout
    orders = shape.nestings({axis: getattr(layout, axis) for axis in ORDER}, layout.order)
    return evaluate(plan.problem, [replace(layout, order=order) for order in orders])


def verdict(problem: Problem, layout: Layout, best: Plan | None) -> str:
    """Why a layout that a user expected is not the plan: it is illegal, does not fit, or loses by so much."""
    try:
        problem.check(layout)
    except ConfigError as error:
        return f"not legal: {error}"
    estimate = evaluate(problem, [layout])[0]
    if not estimate.fits:
        return too_large(problem, estimate)
    return lost_by(best, Plan(problem, estimate)) if best else "legal, and it fits"


def too_large(problem: Problem, estimate: Estimate) -> str:
    """By how much a layout does not fit, what holds most, and what would make it fit."""
    place = int(estimate.memory.total.argmax())
    parts = {name: float(value[place]) for name, value in vars(estimate.memory).items()}
    most = max(parts, key=lambda name: parts[name])
    over = (estimate.peak - problem.machine.memory) / 2**30
    line = (
        f"does not fit: {estimate.peak / 2**30:.1f} GiB on pipeline rank {place}, {over:.1f} over the limit of "
        f"{problem.machine.memory / 2**30:.1f}; the largest part is {HELD[most]}: {parts[most] / 2**30:.1f}"
    )
    remedies = [text for text, changed in _smaller(problem, estimate.layout) if evaluate(problem, [changed])[0].fits]
    return f"{line}; it fits with {' or '.join(remedies[:3])}" if remedies else f"{line}; no one key makes it fit"


def _smaller(problem: Problem, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Legal layouts that differ in one key and hold less."""
    changes: list[dict[str, Any]] = [{"zero": zero} for zero in range(layout.zero + 1, 4) if layout.dp * layout.cp > 1]
    changes += [{"recompute": name} for name in ("selective", "full") if layout.recompute == "none"]
    changes += [{"recompute": "full"}] if layout.recompute not in ("none", "full") else []
    changes += [{"micro_batch": size} for size in range(layout.micro_batch - 1, 0, -1)]
    changes += [{"sequence_parallel": True}] if layout.tp > 1 and not layout.sequence_parallel else []
    changes += [
        {"ep": layout.ep * 2},
        {"tp": layout.tp * 2, "dp": layout.dp // 2},
        {"pp": layout.pp * 2, "dp": layout.dp // 2},
    ]
    for change in changes:
        try:
            changed = replace(layout, **change)
            problem.check(changed)
        except (ConfigError, ZeroDivisionError):
            continue
        yield " ".join(f"layout.{key}={value}" for key, value in change.items()).replace("True", "true"), changed


def contradiction(problem: Problem) -> str | None:
    """Which rule the keys that are held break, whatever the rest of a layout; None: no one rule."""
    held, stage = dict(problem.fixed), ("ep", "etp", "zero_group", "outer_groups")
    sizes = {axis: held[axis] for axis in ORDER if axis in held}
    product, named = math.prod(sizes.values()), " x ".join(f"layout.{axis}={size}" for axis, size in sizes.items())
    try:
        alone = Layout(**{"dp": 1, "micro_batch": 1} | {key: held[key] for key in held if key not in stage})
        alone.check_model(problem.model, problem.seq_len)
        alone.check_batch(problem.global_batch)
        if "schedule" in held and "vpp" in held:
            check_numbers(alone.schedule, alone.pp, alone.vpp, 2 * alone.pp)
        _check_micro_batches(problem, held)
        group = held.get("zero_group") or 1
        within = sizes["dp"] * sizes["cp"] if {"dp", "cp"} <= sizes.keys() else problem.ranks
        over = f"dp x cp, {within:,} ranks" if within < problem.ranks else f"the {within:,} ranks"
        nearest = nearest_divisor(within, group)
        check(
            within % group == 0, f"layout.zero_group {group}", f"must divide {over}", f"set layout.zero_group={nearest}"
        )
        whole = product == problem.ranks if len(sizes) == len(ORDER) else problem.ranks % product == 0
        rule = f"must {'be' if len(sizes) == len(ORDER) else 'divide'} the {problem.ranks} ranks, but is {product}"
        check(whole, named, rule, "change one of them, or plan.ranks")
        if "dp" not in held or len(sizes) == len(ORDER):
            rest = {"dp": problem.ranks // product, "micro_batch": 1}
            Layout(**rest | held).check_model(problem.model, problem.seq_len)
    except ConfigError as error:
        return str(error)
    return None


def _check_micro_batches(problem: Problem, held: dict[str, Any]) -> None:
    """Raise `ConfigError` where a schedule that is held cannot run any number of micro-batches that the batch makes."""
    if not {"schedule", "pp", "micro_batch"} <= held.keys():
        return
    pp, schedule, most = held["pp"], held["schedule"], problem.global_batch // held["micro_batch"]
    cut = f"layout.micro_batch={held['micro_batch']}" + (f" layout.dp={held['dp']}" if "dp" in held else "")
    if "dp" in held:
        most //= held["dp"]
    counts = np.array([n for n in range(1, most + 1) if most % n == 0 and ("dp" not in held or n == most)])
    needed = "a multiple of pp" if schedule == "interleaved" else f"at least {2 * pp}"
    made = f"a batch of {problem.global_batch} makes at most {most} with {cut}"
    legal = not len(counts) or bool(runs(schedule, pp, counts).any())
    remedy = "make layout.micro_batch smaller, or train.global_batch larger"
    check(legal, f"layout.schedule={schedule} with layout.pp={pp}", f"needs {needed} micro-batches, but {made}", remedy)


def smallest(problem: Problem) -> int | None:
    """The fewest ranks, to a 32nd of them, on which a layout fits of a problem in which none does, if the machine's
    outermost level held any number; None: not on `LARGEST`. Asked is what holds least (`Search.least`).

    Powers of two tell how far to look, as their layouts are many. All numbers below are asked in turn: more ranks may
    fit worse, where their factors do not divide the model.
    """
    *inner, outermost = problem.topology.levels
    topology = replace(problem.topology, levels=(*inner, replace(outermost, members=None, ranks=None)), limit=None)
    node = next((level.ranks for level in topology.levels if level.name == "node"), None) or 1

    def fits(ranks: int) -> bool:
        nearest = Search(replace(problem, topology=topology, positions=tuple(range(ranks)))).least()
        return nearest is not None and nearest.fits

    many = 1 << problem.ranks.bit_length()
    while not fits(many):
        if many >= LARGEST:
            return None
        many *= 2
    unit = -(-max(1, many // 32) // node) * node
    between = range(problem.ranks // unit * unit + unit, many, unit)
    return next((ranks for ranks in between if fits(ranks)), many)


@dataclass(frozen=True)
class Sensitivity:
    """What a change of the machine or of the batch would buy."""

    change: str
    gain: float
    """Of tokens/s."""
    plan: Layout | None
    """The best layout then; None: no layout fits."""


def scaled(topology: Topology, plane: str | None = None, bandwidth: float = 1.0, memory: float = 1.0) -> Topology:
    """`topology` with the bandwidth and injection of one plane (None: of all), and the memory of ranks multiplied."""

    def times(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    planes = {
        own.name: replace(own, injection=times(own.injection, bandwidth)) if plane in (None, own.name) else own
        for own in topology.planes
    }
    levels = tuple(
        replace(
            level,
            plane=planes[level.plane.name],
            bandwidth=times(level.bandwidth, bandwidth) if plane in (None, level.plane.name) else level.bandwidth,
        )
        for level in topology.levels
    )
    rank = replace(topology.rank, memory_gib=times(topology.rank.memory_gib, memory))
    return replace(topology, planes=tuple(planes.values()), levels=levels, rank=rank)


def changes(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """The questions of the sensitivity table."""
    for plane in problem.topology.planes:
        topology = scaled(problem.topology, plane=plane.name, bandwidth=1.1)
        yield f"10 % more bandwidth on {plane.name}", replace(problem, topology=topology)
    yield "10 % more memory a rank", replace(problem, topology=scaled(problem.topology, memory=1.1))
    yield "twice the global batch", replace(problem, global_batch=2 * problem.global_batch)


def sensitivity(
    problem: Problem, best: Plan, search: Callable[[Problem], Result] = lambda problem: Search(problem, keep=1).run()
) -> list[Sensitivity]:
    """Each change with a search of its own."""
    found = []
    for change, changed in changes(problem):
        result = search(changed)
        if not result.best:
            found.append(Sensitivity(change, 0.0, None))
            continue
        plan = Plan(changed, result.best[0])
        found.append(Sensitivity(change, plan.tokens_per_s / best.tokens_per_s - 1, plan.estimate.layout))
    return found


def break_even(problem: Problem, best: Layout, other: Layout, plane: str) -> float | None:
    """The share of today's bandwidth on `plane` at which `other` overtakes `best`, between 1/16 and 16; None: nowhere
    there. By bisection: the faster of two changes once."""

    def ahead(factor: float) -> bool:
        changed = replace(problem, topology=scaled(problem.topology, plane=plane, bandwidth=factor))
        first, second = evaluate(changed, [best, other])
        return second.step < first.step

    for end in (1 / 16, 16.0):
        if ahead(end):
            near, far = 1.0, end
            for _ in range(24):
                middle = (near * far) ** 0.5
                near, far = (near, middle) if ahead(middle) else (middle, far)
            return far
    return None
