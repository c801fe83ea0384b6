"""One model, every layout, the same loss: in the fp64 reference, within the design's 1e-9 of the one-rank run.

Loss and gradient norm of every step and the final weights, for some of the layouts of `matrix.py`. `make layouts` tries
all of them for more steps, and the held-out loss too. Documents are masked, and heads of keys are fewer than ranks in
some.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from matrix import CI, MATRIX
from worlds import beyond, difference, flipped, predicted, run_all

STEPS = 3
ENTRIES = [MATRIX[name] for name in CI]


@pytest.fixture(scope="module")
def runs(busway):
    """Name of a layout, or keys of a model -> its run."""
    steps = (f"train.steps={STEPS}", "train.eval_every=0", "train.precision=fp64")
    return run_all(busway, ENTRIES, "some", *steps)


@pytest.mark.parametrize("entry", ENTRIES, ids=CI)
def test_a_layout_trains_the_model_of_one_rank(runs, entry):
    first, other = runs[" ".join(entry.model)], runs[entry.name]
    assert [row["step"] for row in other.rows] == list(range(1, STEPS + 1))
    assert other.summary["world_size"] == entry.ranks
    assert beyond(difference(first, other)) == {}


@pytest.mark.parametrize("entry", ENTRIES, ids=CI)
def test_what_a_step_moves_is_the_formula(runs, entry):
    assert runs[entry.name].summary["traffic"] == predicted(runs[entry.name])


def test_tokens_with_other_experts_are_counted_by_set_and_wherever_they_were_routed(tmp_path):
    one, two = (SimpleNamespace(path=tmp_path / name, rows=[{}]) for name in ("one", "two"))
    chosen = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    other = np.array([[1, 0], [2, 3], [4, 6], [7, 6]])  # one set of four is another
    for run in (one, two):
        (run.path / "routing").mkdir(parents=True)
    np.savez(one.path / "routing" / "step-000001-rank-0000.npz", tokens=np.arange(4), **{"layer.0": chosen})
    for rank, own in enumerate(([3, 0], [1, 2])):
        file = two.path / "routing" / f"step-000001-rank-{rank:04}.npz"
        np.savez(file, tokens=np.array(own), **{"layer.0": other[own]})
    assert flipped(one, two) == "1 of 4"
    assert flipped(one, one) == "0 of 4"
