"""`metrics.trace`: what the trace of a run says against its schedule and its account."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from trainer.compose import compose_recipe

STEPS = {"begun": [2, 3], "resumed": [5, 6, 7]}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


class Trace:
    """A run's trace, and its events by process."""

    def __init__(self, run) -> None:
        self.run = run
        whole = json.loads((run.path / "trace.json").read_text())
        self.about, events = whole["otherData"], whole["traceEvents"]
        names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
        self.processes = {name: defaultdict(list) for name in names.values()}
        for event in events:
            if event["ph"] == "X":
                self.processes[names[event["pid"]]][threads[event["pid"], event["tid"]]].append(event)

    def ranks(self):
        """(name, events by thread) of every rank."""
        return [(name, threads) for name, threads in self.processes.items() if name.startswith("rank")]

    def passes(self, name, step):
        """Events of a process in one step, in order."""
        return [e for e in self.processes[name]["compute"] if "pass" in e["args"] and e["args"]["step"] == step]

    def bubble(self, names, step):
        """The idle share of processes between their first and their last pass."""
        passes = [self.passes(name, step) for name in names]
        length = max(p[-1]["ts"] + p[-1]["dur"] for p in passes) - min(p[0]["ts"] for p in passes)
        return 1 - sum(event["dur"] for own in passes for event in own) / (len(names) * length)


@pytest.fixture(scope="module")
def pipelines(busway):
    """A pipeline of two ranks that is traced, begun and resumed."""
    keys = ("layout.pp=2", "layout.schedule=zb_h1", "layout.micro_batch=1", "metrics.trace=true", "train.steps=8")
    begun = Trace(busway.train("pipeline", *keys, "train.stop_at=3"))
    return {"begun": begun, "resumed": Trace(busway.train("pipeline", *keys, "checkpoint.resume=auto"))}


@pytest.fixture(scope="module")
def replicas(busway):
    """Two ranks that accumulate gradients and cut the optimizer's state."""
    keys = ("layout.dp=2", "layout.zero=1", "layout.micro_batch=1", "metrics.trace=true", "train.steps=3")
    return Trace(busway.train("replicas", *keys))


@pytest.fixture(params=[*STEPS, "replicas"])
def trace(request):
    """Each of the traces."""
    if request.param == "replicas":
        return request.getfixturevalue("replicas")
    return request.getfixturevalue("pipelines")[request.param]


@pytest.mark.parametrize("start", STEPS)
def test_the_second_to_the_fourth_step_of_a_start_are_traced(pipelines, start):
    trace = pipelines[start]
    assert trace.about["steps"] == STEPS[start]
    assert [name for name, _ in trace.ranks()] == ["rank 0: pp 0", "rank 1: pp 1"]
    for _, threads in trace.ranks():
        assert [event["name"] for event in threads["steps"]] == [f"step {step}" for step in STEPS[start]]


@pytest.mark.parametrize("start", STEPS)
def test_the_passes_of_a_rank_are_its_actions_of_the_schedule(pipelines, start):
    trace = pipelines[start]
    recipe = compose_recipe(str(trace.run.path / "recipe.yaml"), []).recipe
    schedule = recipe.parallel_layout.pipeline(recipe.train.global_batch)
    for rank, actions in enumerate(schedule.actions):
        expected = [(NAMES[kind], micro_batch, stage) for kind, micro_batch, stage in actions]
        shown = [(f"rank {rank}: pp {rank}", step) for step in STEPS[start]]
        shown.append((f"schedule: pp {rank}, simulated", trace.about["bubble"]["step"]))
        for process, step in shown:
            passes = [event["args"] for event in trace.passes(process, step)]
            assert [(a["pass"], a["micro_batch"], a["stage"]) for a in passes] == expected


def test_events_take_time_lie_in_their_step_and_do_not_overlap(trace):
    for threads in trace.processes.values():
        steps = {event["args"]["step"]: event for event in threads.pop("steps", [])}
        for events in threads.values():
            assert all(event["dur"] >= 0 for event in events)
            ends = [event["ts"] + event["dur"] for event in events]
            assert all(end <= event["ts"] + 0.2 for end, event in zip(ends, events[1:], strict=False))  # rounded
            for event, end in zip(events, ends, strict=True):
                if steps:
                    step = steps[event["args"]["step"]]
                    assert step["ts"] <= event["ts"] + 0.2 and end <= step["ts"] + step["dur"] + 0.2


def test_the_bytes_of_collectives_and_sends_add_up_to_the_account(trace):
    most = Counter()
    for _, threads in trace.ranks():
        moved = Counter()
        for event in threads["collectives"]:
            about = event["args"]
            moved[about["step"], about["axis"], about["collective"], about["dtype"]] += about["bytes"]
        for event in threads["messages"]:
            if event["name"].startswith("send "):
                moved[event["args"]["step"], "pp", "send", event["args"]["dtype"]] += event["args"]["bytes"]
        most |= moved
    account = Counter()
    for row in trace.run.summary["traffic"]:
        for step in trace.about["steps"]:
            account[step, row["axis"], row["collective"], row["dtype"]] += row["payload_bytes"]
    assert most == account


def test_the_bubbles_are_those_of_the_events_and_of_the_formula(pipelines):
    trace = pipelines["resumed"]
    told, step = trace.about["bubble"], trace.about["bubble"]["step"]
    ranks, simulated = (sorted(n for n in trace.processes if n.startswith(kind)) for kind in ("rank", "schedule"))
    assert told["measured"] == pytest.approx(trace.bubble(ranks, step), abs=1e-3)
    assert told["simulated"] == pytest.approx(trace.bubble(simulated, step), abs=1e-3)
    assert told["formula_text"] == "(p-1)(F+I-W) idle" and told["formula"] < 1
    assert trace.passes(simulated[0], step)[0]["ts"] == trace.passes(ranks[0], step)[0]["ts"]
    shares = ", ".join(f"{kind} {told[kind]:.1%}" for kind in ("measured", "simulated", "formula"))
    assert f"trace: runs/pipeline/trace.json; bubble of step {step}: {shares}\n" in trace.run.stdout


def test_without_a_pipeline_the_graphs_of_a_step_are_shown(replicas):
    for _, threads in replicas.ranks():
        graphs = [event["name"] for event in threads["compute"]]
        assert graphs == ["data", "accumulate", "accumulate", "finish", "publish"] * 2
    assert set(replicas.processes) == {"rank 0: dp 0", "rank 1: dp 1"} and "bubble" not in replicas.about


@pytest.mark.slow
def test_a_run_of_one_step_says_that_there_is_nothing_to_trace(busway):
    run = busway.train("one", "metrics.trace=true", "train.steps=1")
    assert "trace: none, as it leaves out the first step" in run.stdout and not (run.path / "trace.json").exists()
