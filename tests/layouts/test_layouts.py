"""One model, every layout, the same loss: in the fp64 reference, within the design's 1e-9 of the one-rank run.

Loss and gradient norm of every step and the final weights, for some of the layouts of `matrix.py`. `make layouts` tries
all of them for more steps, and the held-out loss too. Documents are masked, and heads of keys are fewer than ranks in
some.
"""

from __future__ import annotations

import pytest
from matrix import CI, MATRIX
from worlds import beyond, difference, predicted, run_all

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
