"""A timeline as text: a line for each rank, time to the right."""

from __future__ import annotations

from parallel.schedules.check import peaks
from parallel.schedules.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from parallel.schedules.simulate import Timeline, bubble_formula

STYLES = {FORWARD: "black on cyan", BACKWARD: "black on green", INPUT: "black on green", WEIGHT: "black on yellow"}


def draw(timeline: Timeline, width: int = 120, colour: bool = False) -> str:
    """`timeline` in at most `width` columns: the ranks, a legend, and a line of figures.

    A cell is the kind of the pass (F, B, I, W) and the number of the micro-batch, where there is room for it; in a
    narrow cell the number's last digit alone, or nothing. Odd virtual stages of a rank are in lower case; with more
    than two, a letter says which (a, b, c, …). `colour` adds rich's markup, by kind.
    """
    schedule = timeline.schedule
    margin = len(str(schedule.pp - 1)) + 1
    scale = _columns(timeline, width - margin)
    lines = []
    for rank, actions in enumerate(schedule.actions):
        line, column = str(rank).rjust(margin - 1) + " ", 0
        for action, start, end in zip(actions, timeline.starts[rank], timeline.ends[rank], strict=True):
            first, last = round(start * scale), round(end * scale)
            cell = _cell(action, action.stage // schedule.pp, schedule.vpp, last - first)
            line += "." * (first - column) + (f"[{STYLES[action.kind]}]{cell}[/]" if colour and cell else cell)
            column = last
        lines.append(line + "." * (round(timeline.makespan * scale) - column))
    return "\n".join([*lines, _legend(timeline), _figures(timeline)])


def _columns(timeline: Timeline, width: int) -> float:
    """Columns for a unit of time: a whole number for the shortest pass where two or more fit, so that cells align."""
    scale = width / timeline.makespan
    pairs = zip(timeline.starts, timeline.ends, strict=True)
    shortest = min(e - s for starts, ends in pairs for s, e in zip(starts, ends, strict=True) if e > s)
    whole = int(shortest * scale + 1e-9)
    return whole / shortest if whole >= 2 else scale


def _cell(action: Action, chunk: int, chunks: int, width: int) -> str:
    kind = action.kind.lower() if chunk % 2 else action.kind
    label = f"{kind}{action.micro_batch}"
    names = [label, f"{kind}{action.micro_batch % 10}", kind, ""]
    if chunks > 2:
        names.insert(0, label + chr(ord("a") + chunk))
    return next(name for name in names if len(name) <= width).ljust(width)


def _legend(timeline: Timeline) -> str:
    kinds = {action.kind for actions in timeline.schedule.actions for action in actions}
    names = {FORWARD: "forward", BACKWARD: "backward", INPUT: "input gradient", WEIGHT: "weight gradient"}
    parts = [f"{kind} {name}" for kind, name in names.items() if kind in kinds] + [". idle"]
    if timeline.schedule.vpp == 2:
        parts.append("lower case: a rank's second stage")
    elif timeline.schedule.vpp > 2:
        parts.append("a b c …: a rank's stages, every second one in lower case")
    return ", ".join(parts)


def _figures(timeline: Timeline) -> str:
    formula = bubble_formula(timeline.schedule, timeline.times)
    bubble = f"bubble {timeline.bubble:.1%}"
    if formula:
        bubble += f" ({formula.text}: {formula.share:.1%})"
    held = " ".join(str(peak) for peak in peaks(timeline.schedule))
    return f"makespan {timeline.makespan:.4g}, {bubble}, peak live activations by rank {held}"
