"""The page of a plan: its numbers, a chart for each part, and nothing from elsewhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from parallel.layout import Layout
from parallel.planner import Plan, Result, evaluate
from parallel.planner.explain import Sensitivity, lost_by
from trainer.compose import compose_recipe
from trainer.plan_report import report
from trainer.planning import problem_of

EVERYWHERE = {"chart-step", "chart-machine", "chart-memory"}
PIPELINED = Layout(dp=4, tp=2, pp=2, ep=4, zero=1)


@cache
def question():
    """The recipe of a small mixture of experts on 16 dies of a supernode, and what it asks."""
    recipe = compose_recipe("tiny_moe", ["topology=cloudmatrix384", "plan.ranks=16"], plan=True).recipe
    return recipe, problem_of(recipe)


def plans_of(*layouts, ranks=16, batch=64):
    """Plans in the order of `layouts`."""
    recipe, problem = question()
    problem = replace(problem, positions=tuple(range(ranks)), global_batch=batch)
    for layout in layouts:
        problem.check(layout)
    return [Plan(problem, found) for found in evaluate(problem, layouts)]


def page_of(plans, front=False, changes=()):
    """A page without Plotly's script."""
    estimates = [plan.estimate for plan in plans]
    result = Result(estimates, estimates if front else [], 1234, 56789, 4321, 67, None, 1.25)
    return report("tiny_moe", plans, result, list(changes)).replace(get_plotlyjs(), "")


def charts(page):
    """name -> (traces, layout) of every chart."""
    found, decoder = {}, json.JSONDecoder()
    for call in re.finditer(r'Plotly\.newPlot\(\s*"([\w-]+)",\s*', page):
        traces, end = decoder.raw_decode(page, call.end())
        layout, _ = decoder.raw_decode(page, page.index("{", end))
        found[call[1]] = traces, layout
    return found


def stacked(traces, place):
    """By bar, what its colours add up to along `place`."""
    return [sum(parts) for parts in zip(*(trace[place] for trace in traces if trace["type"] == "bar"), strict=True)]


@pytest.fixture(scope="module")
def full():
    """Two plans, the better first, and their page with every part."""
    plans = plans_of(PIPELINED, Layout(dp=8, tp=2, ep=4, order=("dp", "tp", "cp", "pp")))
    plans.sort(key=lambda plan: plan.estimate.step)
    changes = [Sensitivity("10 % more <bus>", 0.034, PIPELINED), Sensitivity("less memory", 0.0, None)]
    return plans, page_of(plans, True, changes)


def test_the_page_has_the_numbers_of_the_plan_and_why_others_lost(full):
    (best, other), page = full
    for text in (
        f"{best.estimate.step:.4g} s", f"{best.tokens_per_s:,.0f}", f"{best.tokens_per_s / 16:,.0f}",
        f"{best.tokens_per_s / 8:,.0f}", f"{best.mfu:.1%}", f"{best.estimate.peak / 2**30:.1f} GiB",
        best.estimate.layout.product(), lost_by(best, other), "1,234", "56,789", "4,321", "67", "1.25", "+3.4%",
        "10 % more &lt;bus&gt;", "no layout fits", best.problem.fit.chosen, "has not been run on Ascend",
    ):  # fmt: skip
        assert text in page, text


def test_every_part_has_a_chart_whose_bars_are_the_plans_figures(full):
    plans, page = full
    best, drawn = plans[0], charts(page)
    extra = {"chart-pipeline"} if best.timeline else set()
    assert set(drawn) == EVERYWHERE | {"chart-axes", "chart-front", "chart-changes"} | extra
    assert stacked(drawn["chart-step"][0], "x") == pytest.approx([plan.estimate.step for plan in plans])
    held = [sum(parts.values()) for parts in best.memory()]
    assert stacked(drawn["chart-memory"][0], "y") == pytest.approx(held)
    assert drawn["chart-memory"][1]["shapes"][0]["y0"] == best.problem.machine.memory / 2**30
    sent = [size / 1e9 for size in best.levels.values()]
    assert stacked(drawn["chart-machine"][0], "x") == pytest.approx(sent, rel=5e-3)
    assert drawn["chart-machine"][0][0]["y"] == ["package", "node", "cabinet", "supernode"]


def test_an_axis_is_drawn_to_the_level_that_it_reaches():
    (plan,) = plans_of(PIPELINED)
    (reach, _), _ = charts(page_of([plan]))["chart-axes"]
    ends = dict(zip(reach["y"], reach["x"], strict=True))
    assert ends["tp 2"] == 1 and ends["dp 4"] == ends["pp 2"] == 2  # a package; 16 dies are a node
    blocks = {axis["axis"]: axis["blocks"] for axis in plan.axes}
    assert blocks["tp"] == {"package": 1, "node": 1, "cabinet": 1, "supernode": 1}
    assert blocks["dp"]["package"] == 4 and blocks["pp"]["package"] == 2 and blocks["pp"]["node"] == 1


@pytest.mark.parametrize(
    ("layout", "ranks", "more"), [(Layout(dp=16, ep=8), 16, {"chart-axes"}), (Layout(dp=1), 1, set())]
)
def test_parts_without_data_are_left_out(layout, ranks, more):
    page = page_of(plans_of(layout, ranks=ranks))
    assert set(charts(page)) == EVERYWHERE | more
    assert "Why the others lost" not in page


def test_the_passes_are_those_of_the_simulated_step():
    (plan,) = plans_of(Layout(dp=4, pp=4, vpp=2, schedule="zb_v"))
    assert plan.timeline.makespan == pytest.approx(plan.estimate.pipeline, rel=1e-9)
    traces, layout = charts(page_of([plan]))["chart-pipeline"]
    assert sum(len(trace["x"]) for trace in traces) == sum(map(len, plan.timeline.starts))
    assert sum(sum(trace["x"]) for trace in traces) == pytest.approx(sum(plan.estimate.busy), rel=1e-9)
    assert layout["xaxis"]["range"] == [0, pytest.approx(plan.estimate.pipeline)]


def test_of_a_long_pipeline_begin_and_end_are_drawn_and_said_to_be():
    (plan,) = plans_of(Layout(dp=4, pp=4), batch=4 * 400)
    starts, stops = sum(plan.timeline.starts, ()), sum(plan.timeline.ends, ())
    page = page_of([plan])
    drawn = charts(page)
    for name, inside in (
        ("chart-pipeline-first", lambda begin, end: sum(start < end for start in starts)),
        ("chart-pipeline-last", lambda begin, end: sum(stop > begin * (1 + 1e-9) for stop in stops)),
    ):
        traces, layout = drawn[name]
        passes = sum(len(trace["x"]) for trace in traces)
        assert passes <= 1000 and inside(*layout["xaxis"]["range"]) == passes
    assert f"Of {len(starts):,} passes those of the first" in page


def test_nothing_is_loaded_from_elsewhere_and_names_are_text(full):
    class Loads(HTMLParser):
        found = []

        def handle_starttag(self, tag, attributes):
            self.found += [(tag, key) for key, _ in attributes if key in ("src", "href", "srcset", "data", "action")]
            assert tag not in ("link", "iframe", "base", "marquee")

    (plan,) = plans_of(Layout(dp=16))
    page = report('<marquee>"&', [plan], Result([plan.estimate], []), [])
    parser = Loads()
    parser.feed(page)
    assert parser.found == [] and "url(" not in full[1] and "@import" not in full[1]
    assert "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'" in page
    assert len(page.encode()) < 6e6
