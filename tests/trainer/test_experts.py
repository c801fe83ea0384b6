"""What a run says of its experts, against what it recorded of every token's routing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.traffic import step_traffic
from trainer import metrics
from trainer.compose import compose_recipe

KEYS = (
    "layout.dp=2", "layout.ep=2", "train.steps=2", "train.eval_every=0", "metrics.routing=true", "model.moe.experts=4",
    "model.moe.top_k=2", "model.moe.ffn=24", "model.moe.aux_coef=0.01", "model.moe.z_coef=0.001",
    "model.moe.bias_rate=0.01", "model.moe.capacity=0.8", "model.mtp.depth=1", "train.log_every=1",
)  # fmt: skip
FIGURES = {"load_max", "load_cv", "dead", "dropped", "entropy", "bias_min", "bias_max"}


@pytest.fixture(scope="module")
def run(busway):
    """Two ranks with half of the experts each, which have no room for all copies."""
    return busway.train("experts", *KEYS)


def routed(run, step, rank):
    """layer -> the experts [N, K] of a rank's tokens, -1 where a copy was dropped."""
    saved = np.load(run.path / "routing" / f"step-{step:06}-rank-{rank:04}.npz")
    return {int(key[6:]): saved[key].reshape(-1, 2) for key in saved.files if key.startswith("layer.")}


def test_every_row_has_each_layers_experts(run):
    for row in run.rows:
        assert set(row[metrics.EXPERTS]) == {"0", "1"}  # the layer, and that of the further token
        for figures in row[metrics.EXPERTS].values():
            assert set(figures) == FIGURES
            assert 1 <= figures["load_max"] <= 4 and 0 <= figures["entropy"] <= math.log(4) + 1e-6
            assert -0.02 - 1e-6 <= figures["bias_min"] <= figures["bias_max"] <= 0.02 + 1e-6


def test_losses_beside_the_models_own_are_of_the_size_that_a_fresh_model_has(run):
    first = run.rows[0]
    assert first[metrics.MTP_LOSS] == pytest.approx(math.log(300), rel=0.02)
    assert 2 * 0.01 <= first[metrics.AUX_LOSS] < 2 * 0.012  # even load gives 1 x the coefficient, in both layers
    assert first[metrics.Z_LOSS] == pytest.approx(2 * 0.001 * math.log(4) ** 2, rel=0.05)


def test_drops_are_those_that_were_recorded(run):
    for row in run.rows:
        chosen = [routed(run, row["step"], rank) for rank in range(2)]
        for layer, figures in row[metrics.EXPERTS].items():
            copies = np.concatenate([by_layer[int(layer)] for by_layer in chosen])
            assert figures["dropped"] == pytest.approx((copies < 0).mean(), abs=1e-6)
            assert figures["dropped"] > 0
            room = math.ceil(0.8 * chosen[0][int(layer)].size / 2 / 4)  # of a rank's copies in a micro-batch of two
            assert np.bincount(copies[copies >= 0]).max() <= room * 2 * 2


def test_dispatched_bytes_are_the_formula_on_what_was_routed(run):
    recipe = compose_recipe(str(run.path / "recipe.yaml"), []).recipe
    mesh = Mesh(recipe.parallel_layout, recipe.machine)
    for row in run.rows:
        chosen = [routed(run, row["step"], rank) for rank in range(2)]
        by_layer = {layer: [own[layer] for own in chosen] for layer in chosen[0]}
        sizes = (recipe.model, recipe.data.seq_len, recipe.train.global_batch, "float32")
        accounts = [step_traffic(mesh, rank, *sizes, routed=by_layer).rows() for rank in range(2)]
        sent = sum(r["wire_bytes"] for rows in accounts for r in rows if r["collective"] == "all_to_all_v")
        assert row[metrics.DISPATCH_BYTES] == {"machine": sent}


def test_tensorboard_has_a_curve_for_each(run):
    curves = run.curves()
    for name in ("aux_loss", "z_loss", "mtp_loss", "experts/dispatch_bytes/machine"):
        assert len(curves[name]) == 2
    assert {f"experts/{figure}/layer_00{layer}" for figure in FIGURES for layer in range(2)} <= set(curves)
    assert curves["experts/dropped/layer_001"][0][1] == pytest.approx(run.rows[0]["experts"]["1"]["dropped"])
