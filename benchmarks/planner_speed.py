"""How fast the planner ranks, simulates and searches, on one core.

    taskset -c 0 python benchmarks/planner_speed.py

`layouts_per_s`: time and memory of all fine layouts of the coarse rows whose bounds are least (qwen3_30b_a3b on 768
ranks of cloudmatrix384), in one process, columns made and priced. `simulated_per_s`: the same layouts' schedules
played, by batches, with nothing cached before. A search's seconds are from the question to the ranked best, imports and
recipe apart. Peers' rates are published ones (docs/planner.md); none is run here, as none prices experts and placement.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel.planner import Problem, Search
from parallel.planner.bounds import coarse_bounds
from parallel.planner.evaluate import price_candidates
from parallel.planner.memory import Holding
from parallel.planner.price import Pricing
from parallel.planner.shape import contents
from parallel.planner.space import Space
from parallel.schedules import price as play
from trainer.compose import compose_recipe
from trainer.planning import problem_of

SEARCHES = {
    "deepseek_v3_768": ("deepseek_v3", "cloudmatrix384", 768),
    "llama3_405b_16384": ("llama3_405b", "dgx_h100", 16384),
    "llama3_405b_16384_supernodes": ("llama3_405b", "cloudmatrix384_roce", 16384),
}
RANKED = 200_000


def question(recipe: str, topology: str, ranks: int) -> Problem:
    """The problem of a packaged recipe on a packaged machine."""
    composed = compose_recipe(recipe, [f"topology={topology}", f"plan.ranks={ranks}"], plan=True)
    return problem_of(composed.recipe, composed.given)


def ranking(problem: Problem) -> tuple[float, float]:
    """(layouts ranked, layouts simulated) a second."""
    space, groups, count = Space(problem), [], 0
    begin = time.perf_counter()
    rows = []
    for pp, columns in space.coarse():
        bounds = coarse_bounds(space, pp, columns).min((0, 1))
        rows.append((pp, columns, np.argsort(bounds)[:2048]))
    for pp, columns, first in rows:
        base = space.fine(pp, {name: column[first] for name, column in columns.items()})
        pricing = Pricing(problem.shape, problem.seq_len, base, problem.machine, problem.constants)
        holding = Holding(problem.shape, problem.seq_len, base, problem.constants)
        for group, taken in space.scheduled(base):
            if count < RANKED:
                parts = contents(problem.model, group.stages)
                _ = holding.memory(group, parts, taken).total.max(1)
                groups.append(pricing.prices(group, parts, taken))
                _ = groups[-1].bound
                count += len(group)
    ranked = count / (time.perf_counter() - begin)
    begin, played = time.perf_counter(), 0
    for prices in groups[::8]:
        first = dataclasses.replace(prices.candidates)
        some = price_candidates(problem, first.take(np.arange(min(64, len(first)))))
        c = some.candidates
        play(c.schedule, c.pp, c.vpp, c.micro_batches, some.times)
        played += len(some.candidates)
    return ranked, played / (time.perf_counter() - begin)


def main() -> None:
    ranked, simulated = ranking(question("qwen3_30b_a3b", "cloudmatrix384", 768))
    found: dict[str, float] = {"layouts_per_s": ranked, "simulated_per_s": simulated}
    print(f"{'search':32s} {'seconds':>8s} {'cuts':>9s} {'ranked':>10s} {'simulated':>9s}  best")
    for name, words in SEARCHES.items():
        result = Search(question(*words)).run()
        best = result.best[0]
        counts = f"{result.coarse:9,} {result.ranked:10,} {result.simulated:9,}"
        print(f"{name:32s} {result.seconds:8.2f} {counts}  {best.layout.product()}, {best.step:.3f} s a step")
        found |= {f"{name}_s": result.seconds, f"{name}_coarse": result.coarse, f"{name}_ranked": result.ranked}
        found |= {f"{name}_simulated": result.simulated}
    print(f"ranked {ranked:,.0f} layouts a second, simulated {simulated:,.0f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
