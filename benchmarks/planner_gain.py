"""The announced gain: a supernode beside the same dies in a traditional cluster, the best layout of each.

    python benchmarks/planner_gain.py

Announced at KADC 2025-05-23: 2.5 x (dense) and 3 x (experts) "over traditional clusters", without model, layout or
batch (docs/planner.md). Both machines have 768 dies of one kind and the same constants; the traditional
one joins nodes of 16 dies by RoCE. Then what crosses RoCE between supernodes: under the plan, with ranks in the plain
order of axes, and with hosts in the order in which a scheduler happened to start them. All of it is predicted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel.layout import ORDER
from parallel.planner import Plan, Problem, Search, evaluate
from parallel.planner.explain import NAMES, difference
from trainer.compose import compose_recipe
from trainer.planning import problem_of

RANKS, SEED = 768, 1
RECIPES = {"llama3_70b": 2.5, "llama3_405b": 2.5, "qwen3_235b_a22b": 3.0, "deepseek_v3": 3.0}
"""Recipe -> the announced gain of its kind."""


def best(recipe: str, topology: str, ranks: int) -> Plan:
    """The plan of a packaged recipe on a packaged machine."""
    composed = compose_recipe(recipe, [f"topology={topology}", f"plan.ranks={ranks}"], plan=True)
    problem = problem_of(composed.recipe, composed.given)
    return Plan(problem, Search(problem, keep=1).run().best[0])


def crossing(problem: Problem, plan: Plan, order: tuple[str, ...], positions: tuple[int, ...]) -> int:
    """Bytes that a rank sends over the outermost level in a step, with axes and hosts in other orders."""
    layout = replace(plan.estimate.layout, order=order)
    placed = replace(problem, positions=positions)
    return list(Plan(placed, evaluate(problem, [layout])[0]).levels.values())[-1]


def shuffled(problem: Problem) -> tuple[int, ...]:
    """Places whose nodes come in the order of a scheduler that knows no supernode."""
    node = next(level.ranks for level in problem.topology.levels if level.name == "node")
    blocks = np.array(problem.positions).reshape(-1, node)
    return tuple(blocks[np.random.default_rng(SEED).permutation(len(blocks))].ravel().tolist())


def main() -> None:
    found: dict[str, float] = {}
    print(
        f"{'recipe':18s} {'supernode':>10s} {'cluster':>10s} {'ratio':>6s} {'announced':>9s}  what the cluster loses by"
    )
    for recipe, announced in RECIPES.items():
        inside, outside = best(recipe, "cloudmatrix384", RANKS), best(recipe, "ascend910c_roce", RANKS)
        cards = [2 * plan.tokens_per_s / RANKS for plan in (inside, outside)]
        worse = [f"{NAMES[n]} {b - a:+.3g} s" for n, a, b in difference(inside, outside)][:3]
        ratio = cards[0] / cards[1]
        print(f"{recipe:18s} {cards[0]:10,.0f} {cards[1]:10,.0f} {ratio:6.2f} {announced:9.1f}  {', '.join(worse)}")
        for name, plan in (("supernode", inside), ("cluster", outside)):
            print(
                f"    {name}: {plan.estimate.layout.product()}, {plan.estimate.layout.techniques()}, MFU {plan.mfu:.1%}"
            )
        found |= {f"{recipe}_tokens_per_s_per_card": cards[0], f"{recipe}_ratio": ratio}
    print(f"\n{'over RoCE, GB a step and rank':30s} {'plan':>8s} {'plain order':>11s} {'hosts in any order':>18s}")
    for recipe in RECIPES:
        plan = best(recipe, "cloudmatrix384_roce", 4 * RANKS)
        problem, layout = plan.problem, plan.estimate.layout
        own, plain = (crossing(problem, plan, o, problem.positions) for o in (layout.order, ORDER))
        any_order = crossing(problem, plan, ORDER, shuffled(problem))
        print(f"{recipe:30s} {own / 1e9:8.3f} {plain / 1e9:11.3f} {any_order / 1e9:18.3f}  {layout.product()}")
        found |= {
            f"{recipe}_roce_bytes": own,
            f"{recipe}_roce_bytes_plain": plain,
            f"{recipe}_roce_bytes_any": any_order,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
