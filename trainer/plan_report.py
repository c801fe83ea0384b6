"""`report.html` of `busway plan`: a plan in pictures, and why it is the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from html import escape
from typing import Any

from rich.filesize import decimal

from models.config import FLOPS_CONVENTION
from parallel.layout import Layout
from parallel.planner import Plan, Result
from parallel.planner.explain import HELD, NAMES, Sensitivity, lost_by
from parallel.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from trainer.page import bars, chart, legend, page, paler, section, table, tiles, words
from trainer.plan import placement, ranking

PASSES = 1000
"""Of a longer pipeline as many passes are drawn of its begin and of its end; more where a rank begins later."""
PALEST = 0.6
"""How far to white the last stage of a rank is drawn."""

COLOURS = {
    "matmul": "#1d4f8b", "attention": "#3a7cc2", "passes": "#7fb0dc", "kernels": "#b5d0ea", "recompute": "#6b5b95",
    "tp": "#b5452c", "cp": "#d9822b", "ep": "#e3b23c", "etp": "#a8801f", "pp": "#8c6d46", "dp": "#2f7d6b",
    "edp": "#67a99a", "zero": "#8cc5b6", "optimizer": "#5a6b3b", "bubble": "#a3a9b1", "stragglers": "#c9cdd2",
    "other": "#6f7680", "weights": "#1d4f8b", "gradients": "#3a7cc2", "activations": "#e3b23c", "passing": "#d9822b",
    "fixed": "#a3a9b1", FORWARD: "#3a7cc2", BACKWARD: "#2f7d6b", INPUT: "#2f7d6b", WEIGHT: "#e3b23c",
}  # fmt: skip
"""Of terms of time (blue: computation, warm: traffic, green: over dp, grey: waiting), axes, memory, and passes."""

Pass = tuple[float, float, int, Action]
"""Start, end, pipeline rank and what it does."""

PASS_NAMES = {FORWARD: "forward", BACKWARD: "backward", INPUT: "input gradient", WEIGHT: "weight gradient"}


def report(name: str, plans: list[Plan], result: Result, changes: list[Sensitivity]) -> str:
    """The page of a search's `plans`, the best first; parts that have no data are left out."""
    best = plans[0]
    title = f"{name} on {best.problem.topology.name}"
    where = f'<div class="pair">{_machine(best)}{_axes(best)}</div>'
    parts = [
        _head(title, best), _ranked(plans), _times(plans), where, _memory(best), _pipeline(best), _front(best, result),
        _changes(changes), _search(best, result), _foot(best),
    ]  # fmt: skip
    return page(f"{title}: plan", parts)


def _head(title: str, plan: Plan) -> str:
    found, problem, gib = plan.estimate, plan.problem, 2**30
    die, each = problem.topology.rank.name, plan.tokens_per_s / problem.ranks
    packages = [level.ranks for level in problem.topology.levels if level.name == "package"]
    figures = [
        ("step", f"{found.step:.4g} s", "predicted"), ("throughput", f"{plan.tokens_per_s:,.0f}", "tokens/s"),
        (f"of a {die}", f"{each:,.0f}", "tokens/s"),
        *(("of a package", f"{each * dies:,.0f}", "tokens/s") for dies in packages),
        ("MFU", f"{plan.mfu:.1%}", f"of {problem.machine.flops / 1e12:.4g} TFLOPS"),
        ("bubble", f"{found.bubble:.1%}", "of ranks' time"),
        ("memory", f"{found.peak / gib:.1f} GiB", f"of {problem.machine.memory / gib:.1f} a {die}"),
    ]  # fmt: skip
    layout, *rest = map(escape, plan.mesh.describe().split("; "))
    lines = f"<h1>{escape(title)}</h1><p><strong>{layout}</strong><br>{'; '.join(rest)}</p>"
    return f"<header>{lines}{tiles(figures)}</header>"


def _ranked(plans: list[Plan]) -> str:
    problem, columns = plans[0].problem, ranking(plans).columns
    right = [i for i, column in enumerate(columns) if column.justify == "right"]
    rows = zip(*(column.cells for column in columns), strict=True)
    body = table([column.header for column in columns], rows, right, "first")
    if lost := "".join(f"<li>{escape(lost_by(plans[0], other))}</li>" for other in plans[1:]):
        body += f'<p>Why the others lost:</p><ol start="2">{lost}</ol>'
    lead = f"Global batch {problem.global_batch:,} sequences of {problem.seq_len:,} tokens."
    return section("Ranked layouts", lead, body)


def _times(plans: list[Plan]) -> str:
    terms = [name for name in NAMES if any(name in plan.terms for plan in plans)]
    steps, numbers = [plan.estimate.step for plan in plans], [str(i) for i in range(1, len(plans) + 1)]
    traces = [
        bars(
            [plan.terms.get(term, 0.0) for plan in plans], numbers, COLOURS[term], orientation="h",
            customdata=[plan.terms.get(term, 0.0) / plan.estimate.step for plan in plans],
            hovertemplate=f"{NAMES[term]}: %{{x:.3g}} s, %{{customdata:.1%}}<extra>layout %{{y}}</extra>",
        )
        for term in terms
    ]  # fmt: skip
    totals = words(steps, numbers, [f" {step:.4g} s" for step in steps], textposition="middle right")
    figure = chart(
        "chart-step", [*traces, totals], 80 + 34 * len(plans), "Seconds of a step by term, for each ranked layout",
        xaxis={"title": "seconds a step", "range": [0, 1.2 * max(steps)]},
        yaxis={"title": "layout", "autorange": "reversed", "type": "category", "ticksuffix": " "},
    )  # fmt: skip
    own = plans[0].terms
    shown = legend((COLOURS[term], NAMES[term], f"{own[term]:.3g} s" if term in own else "–") for term in terms)
    lead = "In the mean over pipeline ranks; the terms add up to the step. The legend gives the best layout's."
    return section("Where a step goes", lead, shown + figure)


def _machine(plan: Plan) -> str:
    levels, sent = plan.mesh.topology.levels, [size / 1e9 for size in plan.levels.values()]
    rates = plan.problem.machine.bandwidth
    busy = [f"{size * 1e9 / rate / plan.estimate.step:.1%}" for size, rate in zip(sent, rates, strict=True)]
    names = [level.name for level in levels]
    wire: dict[str, Counter[str]] = {}
    for row in plan.sent:
        wire.setdefault(row["axis"], Counter())[row["level"]] += row["wire_bytes"]
    axes = {axis: sizes for axis, sizes in wire.items() if sizes.total() > 1e9 * sum(sent) / 1000}
    colours = {axis: COLOURS[axis.split(" x ")[0]] for axis in axes}
    traces = [
        bars([sizes[name] / 1e9 for name in names], names, colours[axis], orientation="h",
             hovertemplate=f"{axis} over %{{y}}: %{{x:.3g}} GB<extra></extra>")
        for axis, sizes in axes.items()
    ]  # fmt: skip
    figure = chart(
        "chart-machine", [*traces, words(sent, names, [f" {part}" for part in busy], textposition="middle right")],
        70 + 48 * len(levels), "Bytes sent by level of the machine and axis",
        xaxis={"title": "GB that a rank sends in a step", "range": [0, 1.25 * max(*sent, 1e-3)]},
        yaxis={"type": "category", "ticksuffix": " "},
    )  # fmt: skip
    rows = [
        (level.name, f"{level.ranks or plan.problem.ranks:,}", level.plane.name, f"{level.bandwidth:g}",
         "–" if level.latency is None else f"{level.latency:g}", decimal(plan.levels[level.name]), part)
        for level, part in reversed([*zip(levels, busy, strict=True)])
    ]  # fmt: skip
    head = ("level", f"{plan.problem.topology.rank.name}s", "plane", "GB/s", "µs", "sent", "busy")
    lead = (
        "Of the rank that sends most over each level, by the algorithms that are priced; the figure is the share of "
        "the step for which this keeps its links busy at the bandwidth that prices count on, hidden or not."
    )
    shown = legend((colours[axis], axis, "") for axis in axes)
    return section("The machine and its traffic", lead, shown + figure + table(head, rows, (1, 3, 4, 5, 6)))


def _axes(plan: Plan) -> str:
    if not plan.axes:
        return ""
    levels = [level.name for level in plan.mesh.topology.levels]
    names = [f"{axis['axis']} {axis['size']}" for axis in plan.axes]
    reach = [levels.index(axis["level"]) + 1 for axis in plan.axes]
    ends = bars(
        reach, names, [COLOURS[axis["axis"]] for axis in plan.axes], orientation="h",
        customdata=[axis["level"] for axis in plan.axes], hovertemplate="%{y}: %{customdata}<extra></extra>",
    )  # fmt: skip
    x, y, text, ink = [], [], [], []
    for axis, name, far in zip(plan.axes, names, reach, strict=True):
        for place, level in enumerate(levels):
            x, y, text = [*x, place + 0.5], [*y, name], [*text, f"{axis['blocks'][level]:,}"]
            ink.append("#fff" if place < far and axis["axis"] in ("tp", "dp", "pp") else "#1b2430")
    figure = chart(
        "chart-axes", [ends, words(x, y, text, textfont={"color": ink})], 60 + 40 * len(names),
        "The levels that the groups of each axis reach",
        xaxis={"range": [0, len(levels)], "tickvals": x[: len(levels)], "ticktext": levels, "side": "top",
               "showgrid": False, "tickfont": {"size": 12}},
        yaxis={"type": "category", "autorange": "reversed", "ticksuffix": " "},
    )  # fmt: skip
    rows = [
        (axis["axis"], f"{axis['size']:,}", axis["level"], decimal(axis["payload_bytes"]), f"{axis['seconds']:.3g} s")
        for axis in plan.axes
    ]
    body = figure + table(("axis", "ranks", "reaches", "payload a step", "exposed"), rows, (1, 3, 4))
    algorithms = f" <code>HCCL_ALGO={escape(plan.algorithms)}</code>" if plan.algorithms else ""
    notes = f'<p class="soft">{escape(placement(plan).capitalize())}.{algorithms}</p>'
    lead = "A bar runs to the outermost level that a group's messages cross; numbers are blocks that a group lies in."
    return section("Where each axis lies", lead, body + notes)


def _memory(plan: Plan) -> str:
    memory, limit = plan.memory(), plan.problem.machine.memory / 2**30
    traces = [
        bars([*range(len(memory))], [parts[part] for parts in memory], COLOURS[part],
             hovertemplate=f"{part}: %{{y:.2f}} GiB<extra>pipeline rank %{{x}}</extra>")
        for part in HELD
    ]  # fmt: skip
    over = {"xref": "paper", "y0": limit, "y1": limit, "line": {"color": "#b00020", "width": 1.5, "dash": "dash"}}
    label = {"x": 1, "xanchor": "right", "yanchor": "bottom", "showarrow": False, "font": {"color": "#b00020"}}
    figure = chart(
        "chart-memory", traces, 330, "Memory of each pipeline rank against the limit",
        xaxis={"title": "pipeline rank", "tickformat": "d", "dtick": max(1, len(memory) // 16)},
        yaxis={"title": "GiB a rank", "rangemode": "tozero"}, bargap=0.3 if len(memory) > 3 else 0.75,
        shapes=[{"type": "line", "x0": 0, "x1": 1, **over}],
        annotations=[{"xref": "paper", "y": limit, "text": f"limit {limit:.1f} GiB", **label}],
    )  # fmt: skip
    lead = f"The fullest rank holds {plan.estimate.peak / 2**30:.1f} GiB of {limit:.1f}."
    return section("Memory", lead, legend((COLOURS[part], HELD[part], "") for part in HELD) + figure)


def _pipeline(plan: Plan) -> str:
    timeline = plan.timeline
    if timeline is None:
        return ""
    end, schedule = timeline.makespan, timeline.schedule
    passes = [
        (start, stop, rank, action)
        for rank in range(schedule.pp)
        for start, stop, action in zip(timeline.starts[rank], timeline.ends[rank], schedule.actions[rank], strict=True)
    ]
    lead = f"{schedule.name}, {schedule.micro_batches:,} micro-batches, {end:.4g} s from the first pass to the last."
    windows, most = [("", passes, 0.0, end)], min(PASSES, schedule.pp * max(48, 4 * schedule.stages))
    begun = max(starts[0] for starts in timeline.starts)  # by the last rank too
    most = max(most, sum(start <= begun for start, *_ in passes) + 2 * schedule.pp)
    if len(passes) > 2 * most:
        by_start, by_end = sorted(passes), sorted(passes, key=lambda one: one[1])
        until, since = by_start[most][0], by_end[-most - 1][1]
        windows = [("first", by_start[:most], 0.0, until), ("last", by_end[-most:], since, end)]
        lead += (
            f" Of {len(passes):,} passes those of the first {until:.3g} s and the last {end - since:.3g} s are drawn."
        )
    lead += " Numbers are micro-batches" + ("; later stages of a rank are paler." if schedule.vpp > 1 else ".")
    lead += " Drag to look closer, double-click to return."
    shown = legend((COLOURS[kind], PASS_NAMES[kind], "") for kind in _kinds(passes))
    charts = "".join(_passes(schedule.pp, *window) for window in windows)
    return section("The pipeline", lead, f'{shown}<div class="scroll wide">{charts}</div>')


def _kinds(passes: list[Pass]) -> list[str]:
    return [kind for kind in PASS_NAMES if any(action.kind == kind for *_, action in passes)]


def _passes(pp: int, part: str, passes: list[Pass], begin: float, end: float) -> str:
    """The passes of all ranks between two seconds."""
    traces, last = [], max(1, *(action.stage // pp for *_, action in passes))
    for kind in _kinds(passes):
        starts, stops, ranks, actions = zip(*(one for one in passes if one[3].kind == kind), strict=True)
        traces.append(
            bars(
                [stop - start for start, stop in zip(starts, stops, strict=True)], ranks,
                [paler(COLOURS[kind], PALEST * (action.stage // pp) / last) for action in actions],
                orientation="h", base=starts,
                text=[str(action.micro_batch) for action in actions], textposition="inside", textangle=0,
                insidetextanchor="middle", customdata=[action.stage for action in actions],
                hovertemplate=f"{PASS_NAMES[kind]} of micro-batch %{{text}}, stage %{{customdata}}: %{{base:.4g}} s"
                "<extra>rank %{y}</extra>",
            )
        )  # fmt: skip
    name = f"chart-pipeline{part and '-' + part}"
    return chart(
        name, traces, min(80 + 26 * pp, 640), f"Passes of the pipeline, {part or 'all'}",
        xaxis={"title": f"{part} seconds".strip(), "range": [begin, end], "fixedrange": False},
        yaxis={"title": "pipeline rank", "range": [pp - 0.5, -0.5], "dtick": max(1, pp // 16), "ticksuffix": " "},
        barmode="overlay", bargap=0.12, dragmode="zoom", uniformtext={"minsize": 9, "mode": "hide"},
    )  # fmt: skip


def _front(best: Plan, result: Result) -> str:
    if not result.front:
        return ""
    front = sorted(result.front, key=lambda found: found.peak)
    points = {
        "type": "scatter", "mode": "lines+markers", "marker": {"size": 8, "color": "#3a7cc2"},
        "x": [found.peak / 2**30 for found in front], "y": [found.step for found in front],
        "line": {"shape": "hv", "color": "#7fb0dc", "width": 1.5}, "hovertext": [_named(one.layout) for one in front],
        "hovertemplate": "%{hovertext}<br>%{x:.1f} GiB, %{y:.4g} s<extra></extra>",
    }  # fmt: skip
    own = words(
        [best.estimate.peak / 2**30], [best.estimate.step], ["the plan"], mode="markers+text",
        marker={"size": 12, "color": "#1d4f8b"}, textposition="top center",
    )  # fmt: skip
    axes = {"xaxis": {"title": "GiB on the fullest rank"}, "yaxis": {"title": "seconds a step"}}
    figure = chart("chart-front", [points, own], 320, "Step time against memory", **axes)
    return section(
        "Time against memory", "Layouts that no other beats in both: what less memory costs in time.", figure
    )


def _changes(changes: list[Sensitivity]) -> str:
    if not changes:
        return ""
    ordered = sorted(changes, key=lambda change: -abs(change.gain))
    names, gains = [change.change for change in ordered], [change.gain for change in ordered]
    labels = [f"{gain:+.1%}" if change.plan else "no layout fits" for gain, change in zip(gains, ordered, strict=True)]
    gained = bars(
        gains, names, ["#2f7d6b" if gain >= 0 else "#b5452c" for gain in gains], orientation="h", text=labels,
        textposition="outside", cliponaxis=False, hoverinfo="skip",
    )  # fmt: skip
    span = max(*map(abs, gains), 0.01)
    above = {"xref": "paper", "x": 0, "xanchor": "left", "yshift": 19, "showarrow": False}
    figure = chart(
        "chart-changes", [gained], 60 + 48 * len(names), "Gain of tokens/s by change",
        xaxis={"tickformat": "+.0%", "range": [min(*gains, 0) * 1.3 - 0.02 * span, span * 1.3], "nticks": 6},
        yaxis={"type": "category", "autorange": "reversed", "showticklabels": False}, bargap=0.62,
        annotations=[{"text": escape(name), "y": name, **above} for name in names],
    )  # fmt: skip
    layouts = [_named(change.plan) if change.plan else "–" for change in ordered]
    rows = zip(names, labels, layouts, strict=True)
    body = figure + table(("change", "tokens/s", "best layout then"), rows, (1,))
    return section("What a change would buy", "Tokens/s over the plan's, each with a search of its own.", body)


def _search(plan: Plan, result: Result) -> str:
    fit = plan.problem.fit
    counts = [
        ("cuts of the model", f"{result.coarse:,}"), ("layouts ranked", f"{result.ranked:,}"),
        ("of these fit into memory", f"{result.fitting:,}"), ("simulated", f"{result.simulated:,}"),
        ("seconds", f"{result.seconds:.2f}"), ("lower bound of the plan's step", f"{plan.estimate.bound:.4g} s"),
    ]  # fmt: skip
    error = table((), [(name.replace("_", " "), _said(name, value)) for name, value in fit.error.items()])
    known = f", and how well they fit:</p>{error}" if fit.error else ": not fitted, so their error is not known.</p>"
    constants = [(name, f"{value:g}") for name, value in asdict(plan.problem.constants).items()]
    body = f"{table((), counts, (1,))}<p>Constants <code>{escape(fit.chosen)}</code>{known}"
    body += f"<details><summary>{len(constants)} constants</summary>{table((), constants, (1,))}</details>"
    return section("Search and constants", "", body)


def _said(name: str, value: Any) -> str:
    """An entry of a fit's error: shares as such, and sources with their rows."""
    if isinstance(value, dict):
        return "; ".join(f"{source}: {rows:,}" for source, rows in value.items())
    return f"{value:.1%}" if name.endswith("_err") else str(value)


def _foot(plan: Plan) -> str:
    return (
        "<footer><p>Everything here is predicted, from the topology file, the constants and the simulated schedule; "
        "nothing was measured. Busway itself has not been run on Ascend hardware. A rank is a "
        f"{escape(plan.problem.topology.rank.name)}. MFU: {escape(FLOPS_CONVENTION)}.</p></footer>"
    )


def _named(layout: Layout) -> str:
    experts = f"ep {layout.ep} x etp {layout.etp}" if layout.ep * layout.etp > 1 else ""
    parts = (layout.product(), experts, layout.techniques(), f"micro-batch {layout.micro_batch}")
    return ", ".join(part for part in parts if part)
