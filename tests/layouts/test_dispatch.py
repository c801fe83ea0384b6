"""Flat and two-level dispatch on a machine of two levels: the same numbers, and fewer bytes over the slow one."""

from __future__ import annotations

import pytest
from matrix import EXPERTS, Entry
from worlds import beyond, difference, machine, predicted, run_world, slug, words

STEPS = ("train.steps=1", "train.eval_every=1", "train.eval_batches=1", "train.precision=fp64", "model.layers=1")
pytestmark = pytest.mark.slow
TOP_K = (2, 4, 8)
GROUPS = {4: 2, 8: 4}
"""Ranks of ep -> outer groups, of two ranks each."""
TOKENS, HIDDEN, ITEM = 2 * 32, 32, 8
"""Of a rank and step, with two sequences for each."""
IN_TURNS = 8
"""Experts that tokens go to in turns: so few that some tokens reach one outer group and others all."""
BOXES = {"box": (2, 100.0, "inside"), "cluster": ("any", 10.0, "outside")}
"""Two ranks each, with a network of a tenth of their bandwidth between them."""


def entry(ranks, dispatch, top_k, uniform):
    name = f"{dispatch} {ranks} ranks top {top_k}" + " uniform" * uniform
    model = (*EXPERTS.split(), f"model.moe.experts={IN_TURNS if uniform else 16}", f"model.moe.top_k={top_k}")
    model += (f"model.moe.force_uniform={str(uniform).lower()}",)
    layout = (f"layout.dp={ranks}", f"layout.ep={ranks}", f"layout.dispatch={dispatch}", "layout.micro_batch=2")
    return Entry(name, ranks, layout, model)


@pytest.fixture(scope="module")
def runs(busway):
    """(ranks, dispatch, top k, uniform) -> run."""
    topology = machine(busway.folder, BOXES)
    found = {}
    for ranks in GROUPS:
        keys = [(ranks, dispatch, k, even) for dispatch in ("flat", "auto") for k in TOP_K for even in (False, True)]
        batch = f"train.global_batch={2 * ranks}"
        run_world(busway, ranks, [words(busway, entry(*key), "dispatch", *STEPS, topology, batch) for key in keys])
        found |= {key: busway.run(slug(entry(*key).name, "dispatch")) for key in keys}
    return found


cases = pytest.mark.parametrize(("ranks", "top_k"), [(ranks, top_k) for ranks in GROUPS for top_k in TOP_K])


def over(run, level):
    """Bytes that a rank sends over a level to dispatch and combine, and back."""
    return sum(
        row["wire_bytes"]
        for row in run.summary["traffic"]
        if row["collective"] == "all_to_all_v" and row["level"] == level
    )


@cases
def test_both_dispatchers_give_the_same_numbers(runs, ranks, top_k):
    flat, two_level = (runs[ranks, dispatch, top_k, False] for dispatch in ("flat", "auto"))
    found = difference(flat, two_level)
    assert beyond({key: found[key] for key in ("loss", "grad_norm", "weights")}) == {}


@cases
@pytest.mark.parametrize("uniform", [False, True])
def test_bytes_by_level_are_the_formula_on_what_was_routed(runs, ranks, top_k, uniform):
    for dispatch in ("flat", "auto"):
        run = runs[ranks, dispatch, top_k, uniform]
        assert run.summary["traffic"] == predicted(run)


@cases
def test_two_level_dispatch_sends_less_over_the_slow_network(runs, ranks, top_k):
    flat, two_level = (over(runs[ranks, dispatch, top_k, False], "cluster") for dispatch in ("flat", "auto"))
    assert two_level < flat
    assert over(runs[ranks, "flat", top_k, False], "box") > 0


@cases
def test_in_turns_it_sends_what_a_closed_form_says(runs, ranks, top_k):
    """Of G groups with E / G experts each, k experts in a row lie in max(1, k G / E) of them. Flat dispatch sends k
    rows of each token."""
    groups = GROUPS[ranks]
    touched, elsewhere = max(1, top_k * groups // IN_TURNS), TOKENS * (groups - 1) / groups
    # There and back, forward and backward: four times the stream, with what is about a row and its gradient.
    two_level = touched * elsewhere * ITEM * (4 * HIDDEN + 2 * top_k + top_k)
    flat = top_k * elsewhere * ITEM * (4 * HIDDEN + 2 + 1)
    assert over(runs[ranks, "auto", top_k, True], "cluster") == pytest.approx(two_level)
    assert over(runs[ranks, "flat", top_k, True], "cluster") == pytest.approx(flat)
