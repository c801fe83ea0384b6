"""What tp, pp, dp and cp over two ranks cost on this machine: `python benchmarks/layouts.py [NAME …]`, names of `RUNS`.

Weak scaling of the Llama shape of `benchmarks/step.py`, fp32, one thread a rank: two ranks train 8 sequences a step,
one rank 4. Every rank is bound to a core of its own, Busway's by itself and those of the peers by mpiexec, as MindSpore
takes as many threads as there are cores for it, whatever OMP_NUM_THREADS says. For each layout, in turn in one run:

    one rank    the trainer without a layout, in micro-batches of 4 sequences; `efficiency` is its step time over the
                layout's. For pipelines also in micro-batches of 1, as theirs are: `micro` is what that leaves
    two beside  two such runs at once that know nothing of each other: what two ranks take from each other without a
                message (memory bandwidth, cache, clock). Its efficiency is the `ceiling` of any layout
    busway      the trainer under the layout
    free        the same with its ranks on both cores: `bound` is what binding them is worth
    bare        a script for this model and this technique alone: the same kernels, one hand-written graph and plain MPI
                calls (`steps/bare_layout.py`). The losses of its first steps must be Busway's, to 1e-5

`collectives` is the share of the step in collectives and messages, and `waiting` the part of that in which a rank only
waits for the other: what a collective takes longer than on the rank that came last, and waits for messages. Both, and
`bubble` (the passes' idle share, beside that of the schedule simulated with the passes' times), are means over the
ranks of the three steps that `metrics.trace` records.

What bounds each layout, beside the ceiling:

- tp: its 18 all-reduces of the whole stream a step (2 MiB each), which nothing overlaps, and narrower matmuls;
- pp: the slower stage, which has the head, for m + 1 micro-batches instead of m (`simulated` against (p-1)/(m+p-1)),
  and small micro-batches (`micro`);
- dp: one sum of all gradients a step (14 MiB), whatever the batch;
- cp: keys and values round the ring, with their gradients (8 MiB a layer), and attention in two blocks. Zigzag chunks
  give both ranks the same part of the causal mask.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import numpy as np
from steps.runs import write_tokens
from timing import Worker, ratio

HERE = Path(__file__).resolve().parent
ROUNDS, STEPS, FIRST_STEPS = 11, 4, 4
TOLERANCE = 1e-5
"""Relative, between Busway's loss and the bare script's."""

COMMON = ("train.global_batch=8", "metrics.trace=true")
RUNS = {
    "tp": (["layout.tp=2", "layout.micro_batch=8"], "tp"),
    "tp_sequence": (["layout.tp=2", "layout.sequence_parallel=true", "layout.micro_batch=8"], None),
    "pp": (["layout.pp=2", "layout.micro_batch=1"], "pp"),
    "pp_zb_h1": (["layout.pp=2", "layout.schedule=zb_h1", "layout.micro_batch=1"], None),
    "pp_interleaved": (["layout.pp=2", "layout.schedule=interleaved", "layout.vpp=2", "layout.micro_batch=1"], None),
    "dp": (["layout.dp=2", "layout.micro_batch=4"], "dp"),
    "cp": (["layout.cp=2", "layout.micro_batch=8"], "cp"),
    "cp_ulysses": (["layout.cp=2", "layout.cp_method=ulysses", "layout.micro_batch=8"], None),
}
"""name -> its keys, and the bare script's name for it."""


class World(Worker):
    """A worker of `ranks` ranks that runs `script` of `steps/`."""

    def __init__(self, name: str, ranks: int, script: str, *words: str) -> None:
        mpiexec = shutil.which("mpiexec", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
        if mpiexec is None:
            sys.exit("layouts.py needs mpiexec, which the mpich package brings")
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        env = {**os.environ, **threads, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join(paths)}
        # Busway binds its own ranks, unless a launcher has: mpiexec must leave them to it.
        bound = () if script == "busway_layout.py" and ranks == int(words[1]) > 1 else ("-bind-to", "core")
        command = [mpiexec, *bound, "-n", str(ranks), sys.executable, "-P", str(HERE / "steps" / script)]
        super().__init__(name, [*command, *words], env)

    def first_losses(self) -> list[float]:
        """The losses of the first steps, whose times do not count."""
        losses = []
        for _ in range(FIRST_STEPS):
            self.run(1)
            losses.append(self.value)
        self.times.clear()
        return losses


def alone(name: str, folder: str, ranks: int, micro_batch: int) -> World:
    """Runs of one rank each, beside each other."""
    words = (f"train.name={name}", "train.global_batch=4", f"layout.micro_batch={micro_batch}")
    return World(name, ranks, "busway_layout.py", folder, "1", "bound", *words)


def measure(name: str, folder: str, peers: list[World]) -> dict[str, float]:
    """One row of the table."""
    words, technique = RUNS[name]
    busway, free = (
        World(cores, 2, "busway_layout.py", folder, "2", cores, *words, *COMMON, f"train.name={name}-{cores}")
        for cores in ("bound", "free")
    )
    worlds, losses = [*peers, busway, free], busway.first_losses()
    free.first_losses()
    if "layout.micro_batch=1" in words:
        worlds.append(alone(f"{name}_micro", folder, 1, 1))
        worlds[-1].first_losses()
    if technique:
        worlds.append(World(f"bare {technique}", 2, "bare_layout.py", folder, technique))
        bare = worlds[-1].first_losses()
        if not np.allclose(losses, bare, rtol=TOLERANCE):
            sys.exit(f"{name}: the losses of the first steps are {losses}, but the bare script's {bare}")
    for first in range(ROUNDS):
        for place in range(len(worlds)):  # another one begins each round, so that none always follows the same one
            worlds[(first + place) % len(worlds)].run(STEPS)
    one, beside = peers
    row = {"ms": 1e3 * median(busway.times), "one_ms": 1e3 * median(one.times), "bound": ratio(busway, free)}
    row |= {"efficiency": ratio(busway, one), "ceiling": ratio(beside, one)}
    if "layout.micro_batch=1" in words:
        row["micro"] = ratio(worlds[4], one)
    row |= where_time_goes(Path(folder) / f"{name}-bound" / "trace.json")
    if technique:
        row |= {"bare_ms": 1e3 * median(worlds[-1].times), "ratio_bare": ratio(worlds[-1], busway)}
    for world in worlds[2:]:
        world.close()
    for world in peers:
        world.times.clear()
    return row


def where_time_goes(path: Path) -> dict[str, float]:
    """Shares of the step, from the trace of a run on two ranks."""
    trace = json.loads(path.read_text())
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            times[threads[event["pid"], event["tid"]], event["pid"]].append(event["dur"])
    step, collectives, messages = (
        fmean(sum(times[thread, rank]) for rank in (0, 1)) for thread in ("steps", "collectives", "messages")
    )
    moving = sum(map(min, times["collectives", 0], times["collectives", 1]))
    shares = {"collectives": (collectives + messages) / step, "waiting": (collectives - moving + messages) / step}
    bubble = trace["otherData"].get("bubble")
    return shares | ({"bubble": bubble["measured"], "simulated": bubble["simulated"]} if bubble else {})


def main() -> None:
    """Measure, and print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (all)")
    arguments = parser.parse_args()
    names = arguments.names or list(RUNS)
    if unknown := sorted(set(names) - set(RUNS)):
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(RUNS)}")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder)
        peers = [alone("one", folder, 1, 4), alone("beside", folder, 2, 4)]
        for world in peers:
            world.first_losses()
        for name in names:
            rows[name] = measure(name, folder, peers)
            print(f"measured {name} …", flush=True)
        for world in peers:
            world.close()
    report(rows)


def report(rows: dict[str, dict[str, float]]) -> None:
    """Print the table and the line of JSON."""
    titles = {key: key for row in rows.values() for key in row} | {"ms": "ms/step", "ratio_bare": "busway/bare"}
    print(f"{'layout':16}" + "".join(f"{title:>13}" for title in titles.values()))
    for name, row in rows.items():
        cells = (f"{row[key]:.{1 if key.endswith('ms') else 3}f}" if key in row else "" for key in titles)
        print(f"{name:16}" + "".join(f"{cell:>13}" for cell in cells))
    print(json.dumps({name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}))


if __name__ == "__main__":
    main()
