"""Checkpoints carry the optimizer's state from layout to layout, and bit for bit back into the same one."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from worlds import beyond, routing, run_world, slug, worst

from models.weights import weights_of
from trainer.weight_files import read_weights

BALANCED = (
    "model.moe.experts=4", "model.moe.top_k=2", "model.moe.ffn=24", "model.moe.score=sigmoid",
    "model.moe.bias_rate=0.004",
)  # fmt: skip
"""The bias of the choice moves so far that it changes what some tokens choose."""
CUT = {
    "zero 2": ["layout.dp=2", "layout.zero=2"],
    "ep x zero 3": ["layout.dp=2", "layout.ep=2", "layout.zero=3", "metrics.routing=true", *BALANCED],
}
COMMON = ("train.precision=fp64", "optimizer.lr=3e-4", "train.steps=4", "checkpoint.every=2", "train.eval_every=0")


OTHER = {
    "zero 2": ["layout.pp=2", "layout.micro_batch=1"],
    "ep x zero 3": ["layout.tp=2", *BALANCED],
}
"""Layouts of two ranks that go on."""
AGAIN = ("ep x zero 3",)
each_cut = pytest.mark.parametrize(
    "name",
    [
        pytest.param("zero 2", marks=pytest.mark.slow, id="slices of zero as stages of a pipeline"),
        pytest.param("ep x zero 3", id="experts' pieces and biases over tp"),
    ],
)


def started(busway, name, *keys):
    """The command line of a run."""
    return ["train", *busway.words(name, "launcher.kind=none", *COMMON, *keys)]


def resumed(busway, name, before, *keys):
    """That of a run of its own that goes on from the second step of another."""
    return started(busway, name, *keys, f"checkpoint.resume={busway.run(before).path}/checkpoints/step-00000002")


@pytest.fixture(scope="module")
def runs(busway):
    """(whether it is whole, goes on in another layout or in its own; name) -> run. A name's runs are made in one world
    when one of them is first asked for."""

    @cache
    def made(name):
        kinds = ("whole", "other", "again") if name in AGAIN else ("whole", "other")
        whole, *_ = named = [slug(kind, name) for kind in kinds]
        goes_on = zip(named[1:], (OTHER[name], CUT[name]), strict=False)
        lines = [started(busway, whole, *CUT[name]), *(resumed(busway, own, whole, *keys) for own, keys in goes_on)]
        run_world(busway, 2, lines)
        return {kind: busway.run(own) for kind, own in zip(kinds, named, strict=True)}

    return lambda kind, name: made(name)[kind]


@each_cut
def test_moments_and_biases_go_on_under_another_layout(runs, name):
    first, other = runs("whole", name), runs("other", name)
    assert [row["step"] for row in other.rows] == [3, 4]
    rows = first.rows[2:], other.rows
    found = {key: worst(*([row[key] for row in some] for some in rows)) for key in ("loss", "grad_norm")}
    weights = other.weights()
    for name, value in first.weights().items():
        found[name] = np.max(np.abs(value - weights[name])) / np.max(np.abs(value))
    assert beyond(found) == {}


def test_a_bias_goes_its_rate_toward_experts_with_less_than_the_even_share_of_the_global_batch(runs):
    """By what was recorded of every token's routing, as are the figures of a row (Wang et al., arXiv 2408.15664)."""
    run, bias = runs("whole", "ep x zero 3"), np.zeros(4)
    assert len(run.rows) == 4
    for row in run.rows:
        chosen = np.concatenate([routing(run, row["step"], rank)[1][0] for rank in range(2)])
        counts = np.bincount(chosen.reshape(-1), minlength=4)
        bias += 0.004 * np.sign(counts.mean() - counts)
        (figures,) = row["experts"].values()
        wanted = {"load_max": counts.max() / counts.mean(), "load_cv": counts.std() / counts.mean(), "dropped": 0.0}
        wanted |= {"dead": (counts == 0).sum(), "bias_min": bias.min(), "bias_max": bias.max()}
        assert {key: figures[key] for key in wanted} == pytest.approx(wanted, rel=1e-12)
    np.testing.assert_allclose(run.weights()["layers.0.feed_forward.router.bias"], bias, rtol=1e-12)
    assert bias.any()


@each_cut
def test_a_checkpoint_in_slices_and_runs_is_a_weight_directory(runs, name):
    run = runs("whole", name)
    stored = read_weights(run.newest)
    weights = {weight.name: weight.stack(stored.read) for weight in weights_of(stored.config.parameters())}
    assert all(np.array_equal(value, weights[key]) for key, value in run.weights().items())


@pytest.mark.parametrize("name", AGAIN)
def test_a_layout_goes_on_from_its_own_checkpoint_bit_for_bit(runs, name):
    first, other = runs("whole", name), runs("again", name)
    assert [row["step"] for row in other.rows] == [3, 4]
    assert [row["loss"] for row in other.rows] == [row["loss"] for row in first.rows[2:]]
    weights = other.weights()
    assert all(np.array_equal(value, weights[key]) for key, value in first.weights().items())
