"""The search misses nothing, its bounds hold, and what it says of why is true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from problems import dense, machine, problem, sparse

from models.checks import ConfigError
from models.shapes import PredictionConfig
from parallel.layout import Layout
from parallel.planner import Plan, Problem, Search, evaluate
from parallel.planner.bounds import FineBounds, coarse_bounds
from parallel.planner.cuts import cuts
from parallel.planner.explain import break_even, difference, lost_by, scaled, sensitivity, smallest, verdict
from parallel.planner.memory import Holding, flights
from parallel.planner.shape import ORDERS, contents
from parallel.planner.space import Space

SMALL = {"ranks": 4, "batch": 4, "seq_len": 512, "topology": machine(2)}


def slow_calls(question: Problem) -> Problem:
    """With collectives whose calls cost what their bytes do, as rings of many ranks cost."""
    vars(question)["constants"] = replace(question.constants, call=0.002, call_far=0.005, hide_dp=0.1)
    return question


QUESTIONS = {
    "dense": problem(dense(layers=2), **SMALL),
    "experts": problem(sparse(layers=2), **SMALL, cp=1),
    "little memory": problem(dense(layers=4), **SMALL | {"topology": machine(2, memory_gib=6.0)}),
    "mesh": problem(dense(layers=2), **SMALL | {"topology": machine(4, link=30.0)}, recompute="none"),
    "mesh of slow links": problem(dense(layers=2), **SMALL | {"topology": machine(2, link=12.0)}, recompute="none"),
    "tied": problem(dense(layers=2, tied_embeddings=True), **SMALL, recompute="none"),
    "further tokens": problem(dense(layers=2, mtp=PredictionConfig(depth=1)), **SMALL, recompute="none"),
    "shard groups": slow_calls(problem(dense(layers=2), 16, 32, 512, machine(4), pp=1, cp=1, recompute="none")),
    "slow calls": slow_calls(problem(dense(layers=2), **SMALL, recompute="none")),
    "held": problem(dense(layers=4), **SMALL, tp=2, recompute="full"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_pruned_search_finds_what_simulating_every_layout_finds(name):
    question = QUESTIONS[name]
    found, every = Search(question, keep=3).run(), Search(question, keep=3, exhaustive=True).run()
    assert 0 < found.simulated < every.simulated
    best = sorted(estimate.step for estimate in every.best)[:3]
    assert [estimate.step for estimate in found.best] == pytest.approx(best, rel=1e-12)
    assert all(estimate.fits for estimate in found.best)


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_layout_beats_the_bounds_of_its_rows(name):
    question = QUESTIONS[name]
    space, checked = Space(question), 0
    found, segments = cuts(space)
    for pp, rows in found:
        coarse, fitting = coarse_bounds(space, pp, rows, segments)
        assert np.array_equal(np.sort(fitting.seconds), np.sort(coarse[np.isfinite(coarse)]))
        known: dict[tuple[int, float], float] = {}
        for number, time, filled in zip(*(column.tolist() for column in fitting), strict=True):
            known[number, time] = min(filled, known.get((number, time), np.inf))
        base, owners = space.fine(pp, rows)
        bounds = FineBounds(space, base, segments.take(rows["cut"][owners]))
        for group, taken in space.scheduled(base):
            seconds, held = bounds.scheduled(group.schedule, group.vpp)
            for row in range(0, len(group), 5):
                order = ORDERS[checked % len(ORDERS)]
                estimate = evaluate(question, [group.layout(row, {}, order)])[0]
                layout, own = estimate.layout, taken[row]
                zero = space.zeros.index(layout.zero if layout.dp * layout.cp > 1 else 0)
                least = coarse[zero, space.codes.index(group.recompute[row]), owners[own]]
                assert estimate.peak >= held[own] * (1 - 1e-12)
                assert not estimate.fits or estimate.peak >= known[owners[own], least] * (1 - 1e-12)
                assert estimate.step >= estimate.bound * (1 - 1e-12)
                assert estimate.step >= estimate.prices.rough[0] * (1 - 1e-12)
                assert not estimate.fits or least <= estimate.step * (1 + 1e-12)
                assert not estimate.fits or seconds[own] <= estimate.step * (1 + 1e-12)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("name", ["dense", "experts", "little memory"])
def test_the_fullest_rank_is_among_those_that_are_looked_at(name):
    question = QUESTIONS[name]
    space, k = Space(question), question.constants
    fewer = 0
    for pp, rows in space.coarse():
        base, _ = space.fine(pp, rows)
        holding = Holding(question.shape, question.seq_len, base, k)
        for group, taken in space.scheduled(base):
            parts = contents(question.model, group.stages)
            ranks = question.heaviest(group.schedule, pp, group.vpp, flights(group))
            every, some = (holding.memory(group, parts, taken, ranks=own).total.max(1) for own in (None, ranks))
            assert np.array_equal(every, some)
            fewer += len(ranks) < pp
    assert fewer > 0


def test_terms_add_up_to_the_step():
    question = QUESTIONS["experts"]
    for estimate in Search(question, keep=5).run().best:
        assert sum(Plan(question, estimate).terms.values()) == pytest.approx(estimate.step, rel=1e-9)


def test_a_slower_layout_is_slower_by_the_terms_that_differ():
    question = problem(dense(layers=4), ranks=4, topology=machine(4))
    best, other = (Plan(question, evaluate(question, [Layout(dp=dp, tp=tp, zero=1)])[0]) for dp, tp in ((4, 1), (1, 4)))
    name, first, second = difference(best, other)[0]
    assert name == "tp"
    assert second > first == 0
    assert "tensor-parallel traffic (+" in lost_by(best, other) and " slower: " in lost_by(best, other)
    assert "tensor-parallel traffic (-" in lost_by(other, best) and " faster: " in lost_by(other, best)


def test_an_expected_layout_is_rejected_with_its_reason():
    question = QUESTIONS["little memory"]
    best = Plan(question, Search(question, keep=1).run().best[0])
    assert verdict(question, Layout(dp=2, tp=3), best).startswith("not legal: layout:")
    line = verdict(question, Layout(dp=4, micro_batch=1), best)
    assert line.startswith("does not fit: ")
    assert "over the limit of 6.0" in line
    assert "it fits with " in line
    assert " slower: " in verdict(question, Layout(dp=1, pp=4, schedule="gpipe", recompute="full"), best)


# With 5.9 GiB it fits on 4, 8, 16 and 24 of up to 24 ranks, with 5.7 on 4, 8 and 16.
@pytest.mark.parametrize(("memory", "ranks"), [(6.0, 1), (5.5, 1), (5.1, 2), (5.9, 5), (5.7, 9)])
def test_the_smallest_machine_is_the_first_on_which_a_layout_fits(memory, ranks):
    question = problem(dense(layers=4), ranks=ranks, topology=machine(2, memory_gib=memory))
    assert not Search(question).run().best
    numbers = range(ranks + 1, 17)
    fit = [n for n in numbers if Search(replace(question, positions=tuple(range(n))), keep=1).run().best]
    assert smallest(question) == min(fit)


def test_what_holds_least_is_found_where_its_zero_stage_is_held():
    question = problem(dense(layers=4), ranks=2, topology=machine(2, memory_gib=4.0), zero=3, dp=2)
    found = Search(question).run()
    assert not found.best and found.nearest.layout.zero == 3 and found.nearest.layout.dp == 2


def test_more_bandwidth_outside_never_makes_a_step_longer():
    layout = Layout(dp=4, tp=2, sequence_parallel=True)
    steps = [
        evaluate(problem(dense(layers=4), ranks=8, topology=machine(4, outer=outer)), [layout])[0].step
        for outer in (25.0, 100.0, 400.0, 1600.0)
    ]
    assert steps == sorted(steps, reverse=True)


def test_lists_of_recomputed_layers_are_priced_apart_from_names():
    question = problem(dense(layers=4), ranks=2, topology=machine(2))
    layouts = [Layout(dp=2, recompute=recompute) for recompute in ((0,), "full", "none")]
    together, alone = evaluate(question, layouts), [evaluate(question, [layout])[0] for layout in layouts]
    assert [e.step for e in together] == [e.step for e in alone]
    assert len({e.step for e in together}) == 3


def test_a_machine_that_is_too_small_as_a_whole_has_no_smallest():
    topology = replace(machine(2, memory_gib=0.1), limit=4)
    assert smallest(problem(dense(layers=4), ranks=2, topology=topology)) is None


def test_a_remedy_for_too_much_memory_fits():
    question = QUESTIONS["little memory"]
    line = verdict(question, Layout(dp=4, micro_batch=1), None)
    words = line.split("it fits with ")[1].split(" or ")[0].split()
    changes = {key.removeprefix("layout."): value for key, value in (word.split("=") for word in words)}
    changes = {key: value if key == "recompute" else int(value) for key, value in changes.items()}
    assert evaluate(question, [Layout(**{"dp": 4, "micro_batch": 1} | changes)])[0].fits


def test_the_runner_up_wins_at_the_bandwidth_that_is_named():
    question = problem(dense(layers=4), ranks=8, topology=machine(4))
    first, second = Layout(dp=8, zero=1), Layout(dp=1, tp=4, pp=2, sequence_parallel=True)
    if evaluate(question, [second])[0].step < evaluate(question, [first])[0].step:
        first, second = second, first
    share = break_even(question, first, second, "roce") or break_even(question, first, second, "bus")
    assert share is not None
    plane = "roce" if break_even(question, first, second, "roce") else "bus"
    for factor, ahead in ((share, True), (share**0.9, False)):
        changed = replace(question, topology=scaled(question.topology, plane=plane, bandwidth=factor))
        a, b = evaluate(changed, [first, second])
        assert (b.step <= a.step) is ahead


def test_more_of_anything_is_never_worse():
    question = QUESTIONS["dense"]
    best = Plan(question, Search(question, keep=1).run().best[0])
    gains = {change.change: change.gain for change in sensitivity(question, best)}
    assert len(gains) == 4
    assert all(gain >= -1e-12 for gain in gains.values())


@pytest.mark.parametrize("plane", ["bus", "roce"])
def test_more_bandwidth_helps_who_waits_for_it_up_to_the_planes_injection(plane):
    question = problem(dense(layers=2), ranks=4, topology=machine(4 if plane == "bus" else 1), tp=4, pp=1)
    assert question.topology.planes[1].injection == question.topology.levels[1].bandwidth
    best = Plan(question, Search(question, keep=1).run().best[0])
    gains = {change.change: change.gain for change in sensitivity(question, best)}
    assert gains[f"10 % more bandwidth on {plane}"] > 0.005


def test_nothing_that_fits_leaves_the_nearest():
    question = problem(dense(layers=4), **SMALL | {"topology": machine(2, memory_gib=2.0)})
    result = Search(question).run()
    assert result.best == []
    assert not result.nearest.fits
    assert result.nearest.layout.recompute == "full"


def test_a_machine_of_unknown_speed_is_refused_in_one_line():
    from trainer.compose import compose_topology

    with pytest.raises(ConfigError, match="topology laptop: rank.device is not known"):
        replace(QUESTIONS["dense"], topology=compose_topology("laptop", []))


def test_a_front_has_no_layout_that_another_beats():
    front = Search(QUESTIONS["dense"], keep=3).run().front
    assert len(front) > 1
    pairs = np.array([(found.peak, found.step) for found in front])
    assert np.all(np.diff(pairs[:, 0]) > 0)
    assert np.all(np.diff(pairs[:, 1]) < 0)


@pytest.mark.parametrize("name", ["dense", "experts", "little memory", "tied"])
def test_with_less_memory_the_front_has_what_simulating_every_layout_finds(name):
    """Of each share of the memory in which there is a layout, within 2 % of the fastest that fits into it."""
    question = QUESTIONS[name]
    front, every = Search(question, keep=3).run().front, Search(question, keep=1, exhaustive=True).run().best
    smallest = min(found.peak for found in every)
    for share in np.linspace(smallest, question.machine.memory, 16)[1:]:
        (own, least) = (min(e.step for e in found if e.peak <= share) for found in (front, every))
        assert own <= 1.02 * least, share
