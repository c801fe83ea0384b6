"""How fast the planner ranks, simulates and searches, on one core.

    taskset -c 0 python benchmarks/planner_speed.py

`layouts_per_s`: time and memory of all layouts of the cuts whose bounds are least (qwen3_30b_a3b on 768 ranks of
cloudmatrix384), every schedule, ZeRO stage and recompute of them, the making of columns and of bounds included.
`simulated_per_s`: the best of each schedule priced and played, by batches, with nothing cached before. A search's
seconds are from the question to the ranked best, imports and recipe apart. Peers' rates are published ones
(docs/planner.md); none is run here, as none prices experts and placement.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel.planner import Problem, Search
from parallel.planner.bounds import FineBounds, coarse_bounds
from parallel.planner.cuts import cuts
from parallel.planner.price import price
from parallel.planner.shape import Candidates
from parallel.planner.space import Space
from parallel.schedules import price as play
from trainer.compose import compose_recipe
from trainer.planning import problem_of

SEARCHES = {
    "deepseek_v3_768": ("deepseek_v3", "cloudmatrix384", 768),
    "llama3_405b_16384": ("llama3_405b", "dgx_h100", 16384),
    "llama3_405b_16384_supernodes": ("llama3_405b", "cloudmatrix384_roce", 16384),
}
FIRST, PLAYED = 2048, 64
"""Coarse rows of each pp that are ranked, and layouts of each schedule that are simulated."""


def question(recipe: str, topology: str, ranks: int) -> Problem:
    """The problem of a packaged recipe on a packaged machine."""
    composed = compose_recipe(recipe, [f"topology={topology}", f"plan.ranks={ranks}"], plan=True)
    return problem_of(composed.recipe, composed.given)


def ranking(problem: Problem) -> tuple[float, float]:
    """(layouts ranked, layouts simulated) a second."""
    space, ranked = Space(problem), 0
    groups: list[Candidates] = []
    begin = time.perf_counter()
    found, segments = cuts(space)
    for pp, rows in found:
        bounds = coarse_bounds(space, pp, rows, segments)[0].min((0, 1))
        first = np.argsort(bounds)[:FIRST]
        own = {name: column[first] for name, column in rows.items()}
        base, owners = space.fine(pp, own)
        weighed = FineBounds(space, base, segments.take(own["cut"][owners]))
        for name, vpp in space.pipelines(pp):
            seconds, held = weighed.scheduled(name, vpp)
            ranked += int(np.isfinite(held).sum())
            best = np.argsort(seconds)[:PLAYED]
            if np.isfinite(held[best]).all():
                groups.append(replace(base.take(best), schedule=name, vpp=vpp, order=np.zeros(len(best), int)))
    rate = ranked / (time.perf_counter() - begin)
    begin, played = time.perf_counter(), 0
    for c in groups:
        parts = problem.contents(c.stages)
        prices = price(problem.shape, problem.seq_len, c, parts, problem.machine, problem.constants)
        play(c.schedule, c.pp, c.vpp, c.micro_batches, prices.times)
        played += len(c)
    return rate, played / (time.perf_counter() - begin)


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
