"""Figures of many pipelines at once, beside the simulation of each and beside published formulas."""

from __future__ import annotations

import numpy as np
import pytest

from models.checks import ConfigError
from parallel.schedules import NAMES, Times, lower_bound, make, peak_live, peaks, price, simulate

UNEVEN = (0.0, 1e-9, 0.03, 2.0)
MESSAGES = (0.0, 0.05, 1.0)
"""Free, quick, and so slow that they say after how many micro-batches a pipeline repeats."""


def drawn(rng: np.random.Generator, name: str) -> tuple[tuple[str, int, int], np.ndarray]:
    """A schedule's name, pp and vpp, and micro-batches of 12 pipelines: few, some more than ``2 * pp``, and many."""
    pp = int(rng.integers(1, 7))
    vpp = {"interleaved": int(rng.integers(2, 5)), "zb_v": 2, "dualpipe_v": 2}.get(name, 1)
    micro_batches = rng.permutation(
        np.repeat(rng.integers([1, 1, 2 * pp, 5 * pp], [2 * pp, 2 * pp, 4 * pp, 15 * pp]), 3)
    )
    if name == "interleaved":
        micro_batches = -(-micro_batches // pp) * pp
    return (name, pp, vpp), np.maximum(micro_batches, 2 * pp * (name == "dualpipe_v"))


def drawn_times(rng: np.random.Generator, count: int, stages: int, whole: float = 0.8) -> Times:
    """Of `count` pipelines; a whole backward takes `whole` of the weight half more than the input half."""
    uneven, message = (rng.choice(sizes, (count, 1)) for sizes in (UNEVEN, MESSAGES))
    forward, half, weight = rng.uniform(0.5, 1, (3, count, 1)) + uneven * rng.random((3, count, stages))
    return Times(forward, half + whole * weight, half, weight, message * rng.random((count, stages - 1)))


def one_of(times: Times, index: int) -> Times:
    rows = (times.forward, times.backward, times.input, times.weight, times.transfer)
    return Times(*(row[index].tolist() for row in rows))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_prices_and_bounds_are_those_of_the_simulation_of_each(name, seed):
    rng = np.random.default_rng(seed)
    arguments, micro_batches = drawn(rng, name)
    print("seed", seed, arguments, micro_batches)
    times = drawn_times(rng, len(micro_batches), arguments[1] * arguments[2])
    found, bound = (call(*arguments, micro_batches, times) for call in (price, lower_bound))
    for index, count in enumerate(micro_batches):
        timeline = simulate(make(*arguments, int(count)), one_of(times, index))
        assert found.makespan[index] == pytest.approx(timeline.makespan, rel=1e-12)
        assert found.busy[index] == pytest.approx(timeline.busy, rel=1e-11)
        assert 0.85 * timeline.makespan < bound[index] <= timeline.makespan


@pytest.mark.parametrize("name", NAMES)
def test_a_long_schedule_costs_no_more_than_its_beginning_and_its_end(name):
    """Walked whole it would take hours. Bubbles of Narayanan et al., arXiv:2104.04473, section 2.2, and of Qi et al.,
    arXiv:2401.10241, table 2 and section 6; that of dualpipe_v is at most what DeepSeek-AI's table says."""
    pp, m = 4, 10**8
    vpp = {"interleaved": 3, "zb_v": 2, "dualpipe_v": 2}.get(name, 1)
    found = price(name, pp, vpp, m, Times())
    assert found.busy.tolist() == [[3.0 * m * vpp] * pp]
    published = {"zb_h1": pp - 1, "zb_v": pp - 1, "dualpipe_v": 2 * (pp - 1)}.get(name, 3 * (pp - 1))
    idle = found.makespan[0] - 3.0 * m * vpp
    assert 0 < idle <= published and (idle == published or name == "dualpipe_v")


def test_a_long_schedule_costs_no_more_if_it_repeats_after_several_micro_batches():
    """1F1B holds four micro-batches on rank 0, and each goes to the last rank and back: 4 (F + B) + 2 * 3 transfers."""
    pp, times = 4, Times(transfer=1.0)
    few, many = (simulate(make("1f1b", pp, 1, 40), times).makespan, price("1f1b", pp, 1, 10**8 + 40, times).makespan[0])
    assert many - few == 10**8 / 4 * (4 * 3 + 2 * 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_costs_the_same_alone_and_among_many(name):
    rng = np.random.default_rng(0)
    vpp = {"interleaved": 2, "zb_v": 2, "dualpipe_v": 2}.get(name, 1)
    micro_batches = rng.choice([8, 12, 60, 400], 1100)
    times = drawn_times(rng, len(micro_batches), 4 * vpp)
    found = price(name, 4, vpp, micro_batches, times).makespan
    for index in rng.choice(len(found), 8):
        alone = price(name, 4, vpp, int(micro_batches[index]), one_of(times, index)).makespan
        assert alone == pytest.approx([found[index]], rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_the_makespan_where_stages_are_equal(name, seed):
    rng = np.random.default_rng(seed)
    arguments, micro_batches = drawn(rng, name)
    if name == "zb_v":
        micro_batches = np.maximum(micro_batches, 2 * arguments[1])
    print("seed", seed, arguments, micro_batches)
    forward, half, weight = rng.uniform(0.1, 1, (3, len(micro_batches), 1))
    times = Times(forward, half + weight, half, weight)
    found = price(*arguments, micro_batches, times).makespan
    assert lower_bound(*arguments, micro_batches, times) == pytest.approx(found, rel=1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_what_many_pipelines_hold_is_what_each_holds(name, seed):
    rng = np.random.default_rng(seed)
    arguments, micro_batches = drawn(rng, name)
    print("seed", seed, arguments, micro_batches)
    saved, kept = rng.random((2, len(micro_batches), arguments[1] * arguments[2]))
    found = peak_live(*arguments, micro_batches, saved, kept)
    for index, count in enumerate(micro_batches):
        one = peaks(make(*arguments, int(count)), saved[index].tolist(), kept[index].tolist())
        assert found[index] == pytest.approx(one, rel=1e-12)


def test_numbers_and_times_that_cannot_be_are_errors():
    for call in (price, lower_bound):
        with pytest.raises(ConfigError, match="a multiple of layout.pp 4 for layout.schedule=interleaved"):
            call("interleaved", 4, 2, np.array([8, 4002]), Times())
        with pytest.raises(ConfigError, match="layout.vpp must be 1 for layout.schedule=gpipe"):
            call("gpipe", 4, 2, 8, Times())
        for times in (Times(forward=[1, float("nan")]), Times(transfer=-1.0)):
            with pytest.raises(ValueError, match="must be finite and not negative"):
                call("1f1b", 2, 1, 8, times)
        with pytest.raises(ValueError, match="3 values are given for 4 stages"):
            call("1f1b", 4, 1, 8, Times(forward=np.ones((5, 3))))
    with pytest.raises(ConfigError, match="must be at least 2 x layout.pp 4 = 8"):
        peak_live("dualpipe_v", 4, 2, 7, 1, 1)
