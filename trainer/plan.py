"""`busway plan`: the best layout of a recipe on a machine, as a table, plan.yaml, report.html and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from models.checks import ConfigError, check_at_least
from parallel.memory import room_rows
from parallel.planner import Plan, Problem, Result, Search
from parallel.planner.explain import NAMES, Sensitivity, break_even, lost_by, nested, nestings, sensitivity
from trainer.callbacks.console import plain_table, short, terminal
from trainer.compose import Composed, compose_recipe
from trainer.errors import EXIT_DONE
from trainer.files import write_text
from trainer.machine import writing_to
from trainer.planning import problem_of, search, with_layout
from trainer.recipe import resolved
from trainer.train import add_recipe, recipe_of

SET_OUT = "set plan.out to"
WHAT_IF = ("plan.ranks=", "plan.without=", "plan.nodes=", "topology.")
"""How words begin that ask what if the machine were another. `topology.rank` alone, of which all is made, does not."""


class Answer(NamedTuple):
    """What `busway plan` found."""

    composed: Composed
    plans: list[Plan]
    """The best first, at least two where there are as many."""
    result: Result
    changes: list[Sensitivity]
    idle: int
    """Ranks that are left unused."""
    whole: Plan | None
    """What the machine would do without the words that ask what if, where there are any."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `busway plan`."""
    add_recipe(parser)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts in the table (default 5)")
    parser.add_argument("--sensitivity", action="store_true", help="what more bandwidth, memory or batch would buy")
    parser.add_argument("--json", action="store_true", help="JSON alone on stdout; files only if plan.out is given")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print, and write the plan's files."""
    check_at_least("--top", args.top, 1)
    name, overrides = recipe_of(args)
    composed = compose_recipe(name, overrides, plan=True)
    progress = Console(stderr=True, highlight=False)
    with progress.status("planning") as status:
        question = problem_of(composed.recipe, composed.given)
        problem, result = search(question, max(args.top, 2), composed.recipe.plan.allow_idle, status.update)
        plans = [Plan(problem, found) for found in result.best]
        answer = Answer(
            composed, plans, result, sensitivity(problem, plans[0]) if args.sensitivity else [],
            question.ranks - problem.ranks, _whole(name, overrides, question),
        )  # fmt: skip
    out = Path(composed.recipe.plan.out).expanduser() / composed.name
    if args.json:
        print(json.dumps(document(answer)))
    else:
        show(terminal(tables=True), answer, args.top)
    if not args.json or any(word.startswith("plan.out=") for word in overrides):
        _write(out, answer)
        print(f"{out}/plan.yaml runs with `busway train {out}/plan.yaml`; look at {out}/report.html", file=sys.stderr)
    return EXIT_DONE


def _whole(name: str, overrides: list[str], question: Problem) -> Plan | None:
    """The plan without the words that ask what if. None where none asks, or asks nothing, or nothing can be said."""
    asks = [word for word in overrides if word.lstrip("+~").startswith(WHAT_IF)]
    if all(word.lstrip("+~").startswith("topology.rank.") for word in asks):
        return None
    try:
        composed = compose_recipe(name, [word for word in overrides if word not in asks], plan=True)
        problem = problem_of(composed.recipe, composed.given)
    except ConfigError:  # a machine of any size, which says no number of ranks
        return None
    best = Search(problem, keep=1).run().best if problem != question else []
    return Plan(problem, best[0]) if best else None


def _write(out: Path, answer: Answer) -> None:
    from trainer.plan_report import report

    composed, plans, result, changes = answer[:4]
    with writing_to(out, SET_OUT):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "plan.yaml", resolved(with_layout(composed, plans[0]).recipe), SET_OUT)
    write_text(out / "report.html", report(composed.name, plans, result, changes), SET_OUT)


def document(answer: Answer) -> dict[str, Any]:
    """The answer as JSON: the best plan in full, the others by what tells them apart."""
    composed, plans, result, changes, idle, whole = answer
    return {
        "recipe": composed.name,
        "plan": plans[0].prediction(),
        "others": [
            {"layout": other.layout_keys(), "step_s": other.estimate.step, "memory_gib": other.estimate.peak / 2**30}
            | {"why": lost_by(plans[0], other)}
            for other in plans[1:]
        ],
        "pareto": [
            {"step_s": found.step, "memory_gib": found.peak / 2**30, "layout": found.layout.product()}
            for found in result.front
        ],
        "sensitivity": [{"change": c.change, "gain": c.gain, "layout": c.plan and c.plan.product()} for c in changes],
        "break_even": overtaking(plans) if plans[1:] else None,
        "placement": placement(plans[0]),
        "idle_ranks": idle,
        "without_what_if": whole and {
            "layout": whole.layout_keys(), "ranks": whole.problem.ranks, "step_s": whole.estimate.step,
            "tokens_per_s": whole.tokens_per_s,
        },
        "search": {
            "coarse": result.coarse, "ranked": result.ranked, "fitting": result.fitting,
            "simulated": result.simulated, "seconds": result.seconds,
        },
    }  # fmt: skip


def show(console: Console, answer: Answer, top: int) -> None:
    """The answer on a terminal, with the `top` layouts."""
    plans, result, changes, idle, whole = answer[1:]
    best = plans[0]
    console.print(headline(best))
    if idle:
        console.print(f"{best.problem.ranks:,} of {best.problem.ranks + idle:,} ranks are used, {idle:,} are idle")
    if whole:
        console.print(cost(best, whole))
    console.print("", ranking(plans[:top]), sep="\n")
    for other in plans[1:2]:
        console.print(f"runner-up: {lost_by(best, other)}")
    for part in details(best):
        console.print(part)
    if len(plans) > 1:
        found = [f"with {share:.2g} x the bandwidth of {plane}" for plane, share in overtaking(plans).items()]
        nowhere = "no bandwidth from 1/16 to 16 x lets the runner-up win"
        console.print(f"the runner-up wins {' or '.join(found)}" if found else nowhere)
    front = [*dict.fromkeys(f"{short(e.step)} s with {e.peak / 2**30:.1f} GiB" for e in result.front)]
    if len(front) > 1:
        console.print(f"no layout found beats these in time and memory: {', '.join(front)}")
    for change in changes:
        same = change.plan == best.estimate.layout
        then = "with the same layout" if same else f"with {change.plan.product()}" if change.plan else "but none fits"
        console.print(f"{change.change}: {change.gain:+.1%} tokens/s, {then}")
    console.print(
        f"searched {result.coarse:,} cuts of the model; ranked {result.ranked:,} layouts, of which {result.fitting:,} "
        f"fit; simulated {result.simulated:,}; {result.seconds:.2f} s"
    )


def headline(plan: Plan) -> str:
    """The plan in a line: layout, machine, step, throughput."""
    found, problem = plan.estimate, plan.problem
    package = next((level for level in problem.topology.levels if level.name == "package"), None)
    per = f"{plan.tokens_per_s / problem.ranks:,.0f} a {problem.topology.rank.name}"
    if package:
        per += f", {plan.tokens_per_s / problem.ranks * package.ranks:,.0f} a package (card)"
    held = f"{found.peak / 2**30:.1f} of {problem.machine.memory / 2**30:.1f} GiB"
    return (
        f"{plan.mesh.describe()}; micro-batch {found.layout.micro_batch}\n"
        f"{found.step:.4g} s a step, {plan.tokens_per_s:,.0f} tokens/s ({per}), "
        f"MFU {plan.mfu:.1%}, bubble {found.bubble:.1%}, {held}"
    )


def ranking(plans: list[Plan]) -> Table:
    """What tells plans apart, a row each."""
    sizes = ["", "tp", "pp", "vpp", "schedule", "cp", "ep", "etp", "dp", "zero", "batch", "recompute", "order"]
    table = plain_table(sizes, ["s a step", "tokens/s", "MFU", "bubble", "GiB"])
    for number, plan in enumerate(plans, 1):
        found, layout = plan.estimate, plan.estimate.layout
        tp = f"{layout.tp} sp" if layout.sequence_parallel and layout.tp > 1 else str(layout.tp)
        cp = f"{layout.cp} {layout.cp_method}" if layout.cp > 1 else "1"
        zero = f"{layout.zero} of {layout.zero_group}" if layout.zero_group else str(layout.zero)
        sizes = (
            tp,
            layout.pp,
            layout.vpp,
            layout.schedule if layout.pp > 1 else "-",
            cp,
            layout.ep,
            layout.etp,
            layout.dp,
        )
        choices = (zero, layout.micro_batch, layout.recompute, " < ".join(nested(layout)) or "-")
        figures = (f"{found.step:.4g}", f"{plan.tokens_per_s:,.0f}", f"{plan.mfu:.1%}", f"{found.bubble:.1%}")
        table.add_row(str(number), *map(str, (*sizes, *choices)), *figures, f"{found.peak / 2**30:.1f}")
    return table


def details(plan: Plan) -> list[Any]:
    """Where a step's time goes, what each axis does where, and what ranks hold."""
    found = plan.estimate
    terms = plain_table(["where the step goes"], ["s", "share"])
    for name, seconds in sorted(plan.terms.items(), key=lambda term: -term[1]):
        terms.add_row(NAMES[name], short(seconds), f"{seconds / found.step:.1%}")
    axes = plain_table(["axis", "reaches"], ["ranks", "payload GB a step", "exposed s"])
    for axis in plan.axes:
        numbers = short(axis["payload_bytes"] / 1e9), short(axis["seconds"])
        axes.add_row(axis["axis"], axis["level"], f"{axis['size']:,}", *numbers)
    levels = plain_table(["GB that a rank sends in a step"], ["as priced", "as a run counts, in rings"])
    for name, size in plan.levels.items():
        levels.add_row(name, short(size / 1e9), short(plan.counted[name] / 1e9))
    memory = plan.memory()
    held = plain_table(["GiB of pipeline rank"], [*memory[0], "in all"])
    for place in sorted({0, len(memory) // 2, len(memory) - 1}):
        parts = memory[place]
        held.add_row(str(place), *(f"{value:.2f}" for value in parts.values()), f"{sum(parts.values()):.2f}")
    notes = [f"HCCL_ALGO={plan.algorithms}"] if plan.algorithms else []
    notes += [f"placement: {placement(plan)}", f"constants: {constants(plan)}"]
    notes += room(plan)
    return ["", terms, *["", axes] * bool(plan.axes), "", levels, "", held, "", *notes]


def room(plan: Plan) -> list[str]:
    """What memory does not count where experts are spread over ranks of Ascend."""
    layout, problem = plan.estimate.layout, plan.problem
    if layout.ep * layout.etp == 1 or not problem.topology.rank.device.startswith("ascend"):
        return []
    rows, moe = room_rows(problem.model, layout, problem.seq_len), problem.model.moe
    times = layout.ep * min(moe.top_k, moe.experts // layout.ep) / moe.top_k
    size = rows * problem.model.hidden * 2 / 2**30
    return [
        f"memory counts experts' rows at {problem.constants.imbalance:g} x the even share; static shapes on Ascend "
        f"have room for {times:.3g} x it, {size:.1f} GiB for each buffer of rows in bf16"
    ]


def placement(plan: Plan) -> str:
    """Whether the nesting of axes matters on this machine."""
    steps = {tuple(nested(found.layout)): found.step for found in nestings(plan)}
    if len(steps) < 2:
        return "no two axes have several ranks, so that there is nothing to nest"
    own, best, worst = plan.estimate.step, min(steps, key=steps.get), max(steps, key=steps.get)
    more, less = steps[worst] / own - 1, 1 - steps[best] / own
    if steps[worst] < steps[best] * (1 + 5e-4):
        return f"it makes no difference: all {len(steps)} nestings of the axes take as long"
    line = f"axes nest, innermost first, {' < '.join(nested(plan.estimate.layout))}; of {len(steps)} nestings the"
    if less > 5e-4:
        return f"{line} best, {' < '.join(best)}, takes {less:.1%} less"
    return f"{line} worst, {' < '.join(worst)}, takes {more:.1%} more" + (", which is little" if more < 0.02 else "")


def constants(plan: Plan) -> str:
    """Whose constants a plan has, and by how much they miss what was published."""
    fit = plan.problem.fit
    if "median_abs_err" not in fit.error:
        return f"{fit.chosen}, which are not fitted"
    rows, error = fit.error["rows"], fit.error["median_abs_err"]
    runs = f"{rows:,} measured {'run' if rows == 1 else 'runs'}"
    other = "" if plan.problem.peak == "bfloat16" else f", none of them in {plan.problem.peak}"
    return f"{fit.chosen}, which miss {runs} by {error:.1%} in the median{other}"


def overtaking(plans: list[Plan]) -> dict[str, float]:
    """By plane, the share of its bandwidth at which the runner-up wins, where there is one."""
    problem, (best, other) = plans[0].problem, (plan.estimate.layout for plan in plans[:2])
    shares = {plane.name: break_even(problem, best, other, plane.name) for plane in problem.topology.planes}
    return {plane: share for plane, share in shares.items() if share is not None}


def cost(plan: Plan, whole: Plan) -> str:
    """What the words that ask what if cost, or bring."""
    rates, ranks = plan.tokens_per_s / whole.tokens_per_s - 1, plan.problem.ranks / whole.problem.ranks - 1
    changes = [
        f"{abs(share):.1%} {'more' if share > 0 else 'fewer'} {what}"
        for share, what in ((rates, "tokens/s"), (ranks, "ranks"))
    ]
    return (
        f"without what is asked there are {whole.problem.ranks:,} ranks, {short(whole.estimate.step)} s a step with "
        f"{whole.estimate.layout.product()}: this is {' on '.join(changes)}"
    )
