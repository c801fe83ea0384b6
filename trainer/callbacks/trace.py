"""`metrics.trace`: where the time of a few steps went, on every rank, beside the schedule's own timeline.

Writes a Chrome trace, which chrome://tracing and Perfetto open. Its processes are the ranks and, after them, the
pipeline ranks of the schedule as simulated with the measured median time of each stage's passes.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import sub
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from parallel.mesh import Mesh
from parallel.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule, Times, bubble_formula, simulate
from parallel.trace import COMPUTE, STEPS, THREADS, Span, clock_offset
from trainer.callbacks.base import Callback
from trainer.files import PARTIAL, RUNS, write_text
from trainer.launch.rank import everywhere, from_rank_0
from trainer.machine import writing_to

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.step import Outcome

Event = dict[str, Any]
"""Of a Chrome trace."""
TRACED = range(2, 5)
"""Which steps since the start; the first one compiles."""
PASSES = {
    FORWARD: ("forward", "rail_response"),
    BACKWARD: ("backward", "thread_state_running"),
    INPUT: ("input gradient", "thread_state_running"),
    WEIGHT: ("weight gradient", "rail_idle"),
}
"""Their names, and their colours in chrome://tracing (Perfetto has its own), in the order of `Times`."""


class Trace(Callback):
    """Runs on every rank, before other callbacks, whose time is then not in the steps."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.number = 0
        self.steps: dict[int, list[Span]] = {}

    def before_step(self, loop: Loop) -> None:
        """Begins to record."""
        self.number += 1
        if self.number in TRACED:
            loop.collectives.record(True)
            self.start = time.monotonic()

    def after_step(self, loop: Loop, outcome: Outcome) -> None:
        """Ends to record, and writes the file after the last of the steps."""
        if self.number not in TRACED:
            return
        step = Span(STEPS, f"step {loop.step}", self.start, time.monotonic(), {})
        loop.collectives.record(False)
        self.steps[loop.step] = [step, *loop.collectives.spans()]
        if self.number == TRACED[-1] or loop.stopped or loop.step == loop.last_step:
            self.say(write(loop, self.steps))

    def on_end(self, loop: Loop) -> None:
        """Says why there is no file."""
        if not self.steps:
            self.say("trace: none, as it leaves out the first step, and no other was run")


def write(loop: Loop, steps: dict[int, list[Span]]) -> str:
    """Write the trace of all ranks into the run directory; a line about it. All ranks call it."""
    world, mesh, path = loop.collectives.world, loop.mesh, loop.run.trace
    parts = [path.with_name(f"{path.stem}-{rank:04}{PARTIAL}") for rank in range(world.size)]
    offset = clock_offset(world)
    start = min(span.start for spans in steps.values() for span in spans)
    zero = offset - float(world.reduce_max([offset - start])[0])

    def write_part() -> None:
        with writing_to(path, RUNS):
            parts[world.rank].write_text(_lines(_of_rank(mesh, world.rank, steps, zero)))

    def merge() -> str:
        with writing_to(path, RUNS):
            texts = [part.read_text() for part in parts]
        about = {"steps": list(steps), "layout": mesh.describe(), "collectives": loop.collectives.describe()}
        line = f"trace: {loop.run}/{path.name}"
        if not loop.collectives.timed:
            line += "; its times are those of the host, which launches graphs ahead of the device"
        elif mesh.size("pp") > 1:
            schedule = mesh.layout.pipeline(loop.recipe.train.global_batch)
            passes = [[event for event in json.loads(f"[{text}]") if "pass" in event["args"]] for text in texts]
            bubble, simulated = _beside(mesh, schedule, passes)
            about["bubble"] = bubble
            texts.append(_lines(simulated))
            shares = (f"{kind} {share:.1%}" for kind, share in bubble.items() if isinstance(share, float))
            line += f"; bubble of step {bubble['step']}: {', '.join(shares)}"
        head = f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)}, "traceEvents": [\n'
        write_text(path, head + ",\n".join(texts) + "\n]}\n", RUNS)
        for part in parts:
            part.unlink()
        return line

    everywhere(world, write_part)
    return from_rank_0(world, merge)


def _beside(mesh: Mesh, schedule: Schedule, passes: list[list[Event]]) -> tuple[dict[str, Any], list[Event]]:
    """The bubbles of the traced step of median length, and the schedule as simulated, laid beside that step.

    `passes` are the events of each rank's passes.
    """
    took: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in chain.from_iterable(passes):
        took[event["args"]["pass"], event["args"]["stage"]].append(event["dur"])
    stages = range(schedule.stages)
    times = Times(*([median(took[name, stage] or [0.0]) for stage in stages] for name, _ in PASSES.values()))
    timeline, formula = simulate(schedule, times), bubble_formula(schedule, times)
    steps = sorted({event["args"]["step"] for event in passes[0]})
    measured = sorted(_measured(mesh, passes, step) for step in steps)
    _, share, step, start = measured[len(measured) // 2]
    bubble = {"step": step, "measured": share, "simulated": timeline.bubble}
    if formula:
        bubble |= {"formula": formula.share, "formula_text": formula.text}
    events: list[Event] = []
    for rank, actions in enumerate(schedule.actions):
        events += _names(mesh.world_size + rank, f"schedule: pp {rank}, simulated")
        for action, *ends in zip(actions, timeline.starts[rank], timeline.ends[rank], strict=True):
            details = {"stage": action.stage, "micro_batch": action.micro_batch}
            span = Span(COMPUTE, action.kind, *((start + end) / 1e6 for end in ends), details)
            events.append(_event(mesh.world_size + rank, span, step, 0.0))
    return bubble, events


def _measured(mesh: Mesh, passes: list[list[Event]], step: int) -> tuple[float, float, int, float]:
    """(time from the first to the last pass, the share of it in which ranks run none, step, start) of one step, as
    means over the pipelines; the start is that of rank 0's.
    """
    own = [[event for event in events if event["args"]["step"] == step] for events in passes]
    starts = [min(own[rank][0]["ts"] for rank in group) for group in mesh.groups("pp")]
    ends = [max(own[rank][-1]["ts"] + own[rank][-1]["dur"] for rank in group) for group in mesh.groups("pp")]
    length = fmean(map(sub, ends, starts))
    return length, 1 - fmean(sum(event["dur"] for event in events) for events in own) / length, step, starts[0]


def _lines(events: Iterable[Event]) -> str:
    return ",\n".join(map(json.dumps, events))


def _of_rank(mesh: Mesh, rank: int, steps: dict[int, list[Span]], zero: float) -> Iterator[Event]:
    places = mesh.coordinates(rank)
    axes = ", ".join(f"{axis} {places[axis]}" for axis in mesh.axes("dense"))
    yield from _names(rank, f"rank {rank}: {axes}" if axes else f"rank {rank}")
    for step, spans in steps.items():
        for span in sorted(spans, key=lambda span: span.start):
            yield _event(rank, span, step, zero)


def _names(process: int, name: str) -> Iterator[Event]:
    """How a process and its threads are called, and their order."""
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
    for i, thread in enumerate(THREADS):
        yield {"ph": "M", "pid": process, "tid": i, "name": "thread_name", "args": {"name": thread}}
        yield {"ph": "M", "pid": process, "tid": i, "name": "thread_sort_index", "args": {"sort_index": i}}


def _event(process: int, span: Span, step: int, zero: float) -> Event:
    """A complete event; times are in microseconds since `zero`, the start of the first step."""
    event = {"ph": "X", "pid": process, "tid": THREADS.index(span.thread), "name": span.name}
    event |= {"ts": round((span.start - zero) * 1e6, 1), "dur": round((span.end - span.start) * 1e6, 1)}
    event["args"] = {"step": step, **span.details}
    if span.name in PASSES:
        event["args"]["pass"], event["cname"] = PASSES[span.name]
        event["name"] += f"{span.details['micro_batch']} s{span.details['stage']}"
    return event
