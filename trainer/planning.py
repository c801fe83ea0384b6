"""Between recipes and the planner: a recipe becomes a question, and a plan becomes a recipe that trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from models.checks import ConfigError, check, check_at_least
from parallel.allocation import positions, together
from parallel.layout import Layout
from parallel.planner import Plan, Problem, Result, Search
from parallel.planner.explain import LARGEST, contradiction, smallest, too_large
from parallel.planner.problem import CHOSEN, check_known
from trainer.compose import Composed
from trainer.precision import Precision, choose
from trainer.recipe import Recipe, layout_keys, typed

Say = Callable[[str], None]


def problem_of(
    recipe: Recipe, given: frozenset[str] = frozenset(), places: tuple[int, ...] | None = None, device: str = "Ascend"
) -> Problem:  # fmt: skip
    """What a recipe asks of the planner; `given` are the keys of its layout that are held.

    `places` are those where ranks may run, by default what the recipe leaves of the machine. What `train.precision`
    means is that of `device`.
    """
    check(
        "stages" not in given or recipe.layout.stages is None,
        "layout.stages",
        "is a split that the planner does not search over",
        "leave it out, or look at one layout with `busway explain`",
    )
    check_known(recipe.machine)
    keys = layout_keys(recipe.layout)
    if places is None:
        _check_held({key: keys[key] for key in given if keys.get(key) is not None})
    passed = {key: keys[key] for key in keys if key not in (*CHOSEN, "stages")}
    held = {key: keys[key] for key in CHOSEN if key in given and keys[key] is not None}
    if "order" in held:
        held["order"] = tuple(held["order"])
    settings = recipe.plan
    if places is None:
        ranks = settings.ranks or recipe.launcher.ranks
        places = positions(recipe.machine, ranks, settings.without, settings.nodes)
    hide = {kind: share for kind, share in vars(settings.overlap).items() if share is not None}
    return Problem(
        recipe.model, recipe.data.seq_len, recipe.train.global_batch, recipe.machine, places,
        passed | held, dtypes_of(recipe, device), chosen(recipe, device).peak, hide, settings.imbalance,
    )  # fmt: skip


def _check_held(held: dict[str, Any]) -> None:
    """Raise `ConfigError` unless each key that is held is one that a layout may have."""
    listed, remedy = not isinstance(held.get("recompute", ""), str), "look at one layout with `busway explain`"
    check(not listed, "layout.recompute", "is a list, which the planner does not search over", remedy)
    sizes = ("dp", "cp", "tp", "ep", "etp", "zero_group", "outer_groups")  # which hold for each other
    Layout(**{key: value for key, value in held.items() if key not in sizes} | {"dp": 1})
    for key in sizes:
        check_at_least(f"layout.{key}", held.get(key, 1), 1)


def problem_of_layout(recipe: Recipe, device: str = "Ascend") -> Problem:
    """The question whose ranks are those of the recipe's own layout."""
    if recipe.layout.auto:
        raise ConfigError("layout.auto is true, so there is no layout to explain; use `busway plan`, or name a layout")
    keys = dataclasses.asdict(recipe.parallel_layout)
    problem = problem_of(recipe, places=recipe.placement, device=device)
    return dataclasses.replace(problem, fixed={key: keys[key] for key in problem.fixed})


def search(problem: Problem, keep: int, allow_idle: bool, say: Say) -> tuple[Problem, Result]:
    """The best layouts of a problem, and the problem with as many ranks as they use.

    Raises `ConfigError` where nothing is legal, or nothing fits.
    """
    result = Search(problem, keep, say).run()
    best = problem, result
    if allow_idle:
        for fewer in _fewer(problem):
            limit = best[1].best[0].step if best[1].best else None
            other = Search(fewer, keep, say, limit=limit).run()
            if other.best and (limit is None or other.best[0].step < limit):
                best = fewer, other
    if not best[1].best:
        raise ConfigError(_nothing(*best))
    return best


def _fewer(problem: Problem) -> list[Problem]:
    """The same on fewer ranks, at least half of them: by whole nodes, or by ranks of one."""
    node = next((level.ranks for level in problem.topology.levels if level.name == "node"), None) or 1
    node = node if problem.ranks > node else 1
    counts = range((problem.ranks - 1) // node * node, (problem.ranks + 1) // 2 - 1, -node)
    places = (together(problem.positions, count, problem.topology) for count in counts)
    return [dataclasses.replace(problem, positions=own) for own in places]


def _nothing(problem: Problem, result: Result) -> str:
    where = f"{problem.ranks:,} ranks of {problem.topology.name}"
    if result.nearest is None:
        held = " ".join(f"layout.{key}={value}" for key, value in problem.fixed.items() if key in CHOSEN)
        reason = f"with {held}" if held else f"for a global batch of {problem.global_batch}"
        remedy = "hold fewer keys, or change train.global_batch or plan.ranks (plan.allow_idle=true leaves some unused)"
        return f"no layout of {where} is legal {reason}: {contradiction(problem) or remedy}"
    enough = smallest(problem)
    size = f"{enough:,} ranks of such a machine are the fewest that could" if enough else f"nor into {LARGEST:,}"
    most = problem.topology.capacity
    size += f", and it holds {most:,}" if most and enough and most < enough else ""
    return (
        f"no layout fits into {where}, {size}: the nearest, {result.nearest.layout.product()}, "
        f"{too_large(problem, result.nearest)}"
    )


def with_layout(composed: Composed, plan: Plan) -> Composed:
    """The recipe that runs `plan`: every key of its layout, its ranks, and what was predicted."""
    config = composed.config.copy()
    keys = plan.layout_keys()
    settings: dict[str, Any] = {"auto": False, **keys}
    if plan.estimate.layout.pp == 1:
        settings["stages"] = None
    for key, value in settings.items():
        OmegaConf.update(config, f"layout.{key}", value, merge=False, force_add=True)
    OmegaConf.update(config, "launcher.ranks", plan.problem.ranks, force_add=True)
    OmegaConf.update(config, "plan.prediction", plan.prediction(), merge=False, force_add=True)
    return dataclasses.replace(composed, config=config, recipe=typed(config))


def planned(composed: Composed, say: Say) -> Composed:
    """A recipe whose layout is known: `composed`, or with `layout=auto` the planner's best."""
    if not composed.recipe.layout.auto:
        return composed
    problem, result = search(
        problem_of(composed.recipe, composed.given), 1, composed.recipe.plan.allow_idle, lambda _: None
    )
    plan = Plan(problem, result.best[0])
    found = plan.estimate
    say(f"plan: {found.layout.product()}, {found.step:.3g} s a step predicted, of {result.ranked:,} layouts ranked")
    return with_layout(composed, plan)


def chosen(recipe: Recipe, device: str) -> Precision:
    """The recipe's precision on `device`; fp64 is on every device what it is on CPU."""
    name = recipe.train.precision
    return choose(name, "CPU" if name == "fp64" else device)


def dtypes_of(recipe: Recipe, device: str) -> tuple[str, str]:
    """Of weights and gradients, and of what linears take and give."""
    found = chosen(recipe, device)
    own = np.dtype(found.dtype).name
    return own, "bfloat16" if found.rounding == "native" else own
