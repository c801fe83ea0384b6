"""Every layout of `matrix.py` against one rank: `make layouts`, which writes docs/equality.md.

In the fp64 reference over 10 steps within 1e-9. In fp32 over 20 steps within the larger of 1e-5 and three times what
a control run does, the one-rank run from a start that is perturbed by one rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
from matrix import BALANCED, FP32, MATRIX, MODEL, Entry, entry
from worlds import beyond, difference, flipped, predicted, run_all, run_world, slug, words

from models.weights import initial_reader, weights_of
from trainer.compose import compose_recipe
from trainer.weight_files import CONFIG, save_safetensors, yaml_of_config

pytestmark = pytest.mark.layouts
SEED = 11


@pytest.fixture(scope="module")
def exact(busway):
    """Runs in fp64."""
    steps = ("train.steps=10", "train.eval_every=5", "train.eval_batches=1", "train.precision=fp64")
    return run_all(busway, MATRIX.values(), "fp64", *steps)


@pytest.fixture(scope="module")
def rounded(busway):
    """Runs in fp32, and what a control run does to loss and gradient norm, by the model's overrides."""
    steps = ("train.steps=20", "train.eval_every=10", "train.eval_batches=1", "train.precision=fp32")
    runs = run_all(busway, [MATRIX[name] for name in FP32], "fp32", *steps)
    controls = {}
    for model in {MATRIX[name].model: None for name in FP32}:
        base = " ".join(model)
        control = Entry(f"control {base}", 1, ("layout.micro_batch=1",), model)
        start = perturbed(busway, model)
        run_world(busway, 1, [words(busway, control, "fp32", *steps, f"checkpoint.init_from={start}")])
        run = busway.run(slug(control.name, "fp32"))
        controls[base] = difference(runs[base], run) | {"flipped": flipped(runs[base], run)}
    return runs, controls


def perturbed(busway, model):
    """A folder of the model's initial weights, each moved to a neighbouring number, up or down by chance."""
    print(f"seed {SEED}")
    recipe = compose_recipe(str(busway.recipe), [*MODEL, *model]).recipe
    rng, read = np.random.default_rng(SEED), initial_reader(recipe.train.seed, recipe.model.init_std)
    values = {w.name: np.float32(w.stack(read)) for w in weights_of(recipe.model.parameters())}
    values = {n: np.nextafter(v, np.float32(rng.choice((-9, 9), v.shape))) for n, v in values.items()}
    folder = busway.folder / slug("perturbed", *model)
    folder.mkdir()
    save_safetensors(folder / "model.safetensors", values)
    (folder / CONFIG).write_text(yaml_of_config(recipe.model))
    return folder


@pytest.mark.parametrize("name", MATRIX)
def test_a_layout_trains_the_model_of_one_rank(exact, name, table):
    entry, run = MATRIX[name], exact[name]
    found = difference(exact[" ".join(entry.model)], run)
    table.fp64(entry, found)
    assert run.summary["world_size"] == entry.ranks
    assert len(run.rows) == 10
    assert beyond(found) == {}


@pytest.mark.parametrize("name", ["zb_h1, recompute full", "1f1b, late receive"])
def test_no_order_of_passes_and_no_split_backward_changes_a_bit(exact, name):
    first, other = exact["gpipe"], exact[name]
    assert [row["loss"] for row in first.rows] == [row["loss"] for row in other.rows]
    assert [row["grad_norm"] for row in first.rows] == [row["grad_norm"] for row in other.rows]
    weights = other.weights()
    assert all(np.array_equal(value, weights[key]) for key, value in first.weights().items())


@pytest.mark.parametrize("form", BALANCED)
def test_layouts_that_share_what_a_balance_counts_over_train_the_same(busway, form):
    """It is not that of a run whose micro-batches have one sequence."""
    entries = [entry(name, *given) for name, given in BALANCED[form].items()]
    runs = run_all(busway, entries, "balance", "train.steps=5", "train.eval_every=0", "train.precision=fp64")
    alone = runs[" ".join(entries[0].model)]
    first, *others = (runs[one.name] for one in entries)
    assert [beyond(difference(first, other)) for other in others] == [{}] * len(others)
    assert difference(first, alone)["loss"] > 1e-9


@pytest.mark.parametrize("name", MATRIX)
def test_what_a_step_moves_is_the_formula(exact, name):
    assert exact[name].summary["traffic"] == predicted(exact[name])


@pytest.mark.parametrize("name", FP32)
def test_in_fp32_a_layout_differs_by_no_more_than_rounding(rounded, name, table):
    runs, controls = rounded
    base = " ".join(MATRIX[name].model)
    found = difference(runs[base], runs[name]) | {"flipped": flipped(runs[base], runs[name])}
    allowed = {key: max(1e-5, 3 * controls[base][key]) for key in ("loss", "grad_norm")}
    table.fp32(MATRIX[name], found, controls[base])
    assert len(runs[name].rows) == 20
    assert {key: found[key] for key in allowed if not found[key] <= allowed[key]} == {}
