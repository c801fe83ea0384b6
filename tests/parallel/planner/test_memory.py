"""Memory of columns of layouts against the account of one rank that a run is checked with."""

from __future__ import annotations

import numpy as np
import pytest

from models.checks import ConfigError
from models.config import ModelConfig
from models.shapes import ExpertsConfig, LatentConfig, PredictionConfig
from parallel.layout import Layout
from parallel.memory import Share, peak_saved_elements, state_bytes
from parallel.planner.constants import Constants
from parallel.planner.memory import enough, live, memory
from parallel.planner.shape import Shape, candidate, contents
from parallel.planner.space import runs
from parallel.schedules import NAMES, make, peaks
from trainer.machine import _needed_bytes

SEQ_LEN, GLOBAL_BATCH = 32, 16
SHAPES = {"layers": 6, "hidden": 48, "ffn": 96, "heads": 8, "kv_heads": 2, "head_dim": 8, "vocab": 64}
LATENT = {
    "moe": ExpertsConfig(experts=4, top_k=2, ffn=24, shared=1, first_dense=1),
    "latent": LatentConfig(kv_rank=8, q_rank=12, nope=4, rope=4, value=6),
}
MODELS = {
    "grouped queries": {},
    "tied, norms behind": {"tied_embeddings": True, "sandwich_norm": True},
    "experts": {"qk_norm": True, "moe": ExpertsConfig(experts=4, top_k=2, ffn=24)},
    "latent experts": LATENT,
    "further tokens": LATENT | {"mtp": PredictionConfig(depth=1)},
}
AXES = {
    "dp": (1, 2), "cp": (1, 2), "cp_method": ("ring", "ulysses"), "tp": (1, 2, 4), "pp": (1, 2, 3),
    "schedule": ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v", "dualpipe_v"), "zero": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"), "ep": (1, 2), "etp": (1, 2), "sequence_parallel": (False, True),
    "micro_batch": (1, 2),
}  # fmt: skip
BUSWAY = Constants(
    weight_bytes=4, gradient_bytes=4, optimizer_bytes=8, own_bytes=4, saved=2.0, gradient_copies=3, reserve=0,
    fragments=0,
)  # fmt: skip
"""What `parallel.memory` counts in fp32, nothing that a device adds."""


def drawn(config: ModelConfig, count: int, seed: int) -> list[Layout]:
    """Legal layouts of a model."""
    generator, found = np.random.default_rng(seed), []
    while len(found) < count:
        keys = {name: values[generator.integers(len(values))] for name, values in AXES.items()}
        try:
            layout = Layout(**keys, vpp=2 if keys["schedule"] == "interleaved" else 1)
            layout.check_model(config, SEQ_LEN)
            layout.pipeline(GLOBAL_BATCH)
        except ConfigError:
            continue
        found.append(layout)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_of_the_run(model):
    seed = np.random.SeedSequence().entropy % 2**32
    print("seed", seed)
    config = ModelConfig(**SHAPES, **MODELS[model])
    for layout in drawn(config, 30, seed):
        one = candidate(layout, GLOBAL_BATCH)
        found = memory(Shape.of(config), SEQ_LEN, one, contents(config, one.stages), BUSWAY)
        for place in range(layout.pp):
            share = Share(config, layout, GLOBAL_BATCH, place)
            state = state_bytes(share, 4)
            padding = 12 * share.shards * bool(config.mtp.depth)  # of a tally of two numbers
            for figure, wanted in (
                (found.weights, state.weights),
                (found.gradients, state.gradients),
                (found.optimizer, state.optimizer),
                (found.activations, 4 * peak_saved_elements(share, SEQ_LEN)),
                (found.total, _needed_bytes(share, SEQ_LEN, 4)),
            ):
                assert figure[0, place] == pytest.approx(wanted, rel=1e-12, abs=padding), layout


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("pp", [2, 3, 5, 8])
def test_micro_batches_in_flight_are_those_of_the_schedule(schedule, pp):
    vpp, checked = {"interleaved": 3, "zb_v": 2, "dualpipe_v": 2}.get(schedule, 1), 0
    for micro_batches in range(1, 3 * pp + 1):
        if not runs(schedule, pp, np.array(micro_batches)):
            continue
        most = peaks(make(schedule, pp, vpp, micro_batches))
        found = live(schedule, pp, vpp, min(micro_batches, enough(schedule, pp)))
        assert found.sum(1).tolist() == list(most), (micro_batches, found, most)
        checked += 1
    assert checked
