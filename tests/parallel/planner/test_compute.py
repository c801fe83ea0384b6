"""What the planner's passes move against the traffic that a run counts."""

from __future__ import annotations

import math

import pytest

from models.config import ModelConfig
from models.shapes import ExpertsConfig, LatentConfig
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.planner.communication import LevelTraffic
from parallel.planner.constants import Constants
from parallel.planner.machine import ANYWHERE, Machine
from parallel.planner.price import price
from parallel.planner.shape import Shape, candidate, contents
from parallel.topology import Level, Plane, Rank, Topology
from parallel.traffic import DTYPE_BYTES, Traffic, maximum, step_traffic

SEQ_LEN, GLOBAL_BATCH = 512, 8
PLANE = Plane("wires", 1e-9)
TOPOLOGY = Topology("any", Rank("device", 1.0, 1.0, {}), (PLANE,), (Level("machine", 0, None, None, 1e-9, 0.0, PLANE),))
MACHINE = Machine(TOPOLOGY, TOPOLOGY.levels, (2**40,), (1.0,), (math.inf,), (0.0,), 1e300, 1e300, 1.0)
"""Moves a byte a second and computes at once, so that seconds are bytes."""
BARE = Constants(
    kernel=0, call=0, call_far=0, hide_tp=0, hide_dp=0, hide_cp=0, hide_pp=0, message_bytes=4, stream_bytes=4
)  # fmt: skip
PRECISIONS = {"bf16": ("float32", "bfloat16"), "fp32": ("float32", "float32"), "fp64": ("float64", "float64")}
"""Dtypes of weights and gradients, and of what linears take."""
SHAPES = {"layers": 4, "hidden": 512, "ffn": 1024, "heads": 8, "kv_heads": 8, "head_dim": 64, "vocab": 1024}
MODELS = {
    "dense": {},
    "experts": {"moe": ExpertsConfig(experts=4, top_k=2, ffn=256, aux_loss="none")},
    "latent experts": {
        "moe": ExpertsConfig(experts=4, top_k=2, ffn=256, shared=1, aux_loss="none"),
        "latent": LatentConfig(kv_rank=64, q_rank=96, nope=32, rope=16, value=32),
    },
}
LAYOUTS = {
    "tp": Layout(dp=1, tp=4),
    "sequence parallel": Layout(dp=1, tp=4, sequence_parallel=True, recompute="full"),
    "ring": Layout(dp=1, cp=4),
    "ulysses": Layout(dp=1, cp=4, cp_method="ulysses"),
    "dp": Layout(dp=4),
    "zero 1": Layout(dp=4, zero=1),
    "zero 2": Layout(dp=2, cp=2, zero=2),
    "zero 3": Layout(dp=4, zero=3),
    "pp": Layout(dp=1, pp=4),
    "ep": Layout(dp=4, ep=4),
    "ep and etp": Layout(dp=2, tp=2, ep=2, etp=2, sequence_parallel=True),
}


NESTED = {
    "dp": Layout(dp=16),
    "dp, tp, zero 1": Layout(dp=8, tp=2, zero=1),
    "dp x cp, zero 2": Layout(dp=4, cp=4, zero=2),
    "zero 3 in blocks that cut groups": Layout(dp=12, zero=3),
    "hsdp": Layout(dp=8, tp=2, zero=3, zero_group=4),
    "tp, sequence parallel": Layout(dp=2, tp=8, sequence_parallel=True),
}
"""On packages of 2 and nodes of 8."""
BLOCKS = {"package": 2, "node": 8, "cluster": None}


def counted(
    config: ModelConfig, layout: Layout, dtypes: tuple[str, str], topology: Topology = TOPOLOGY,
    kind: type[Traffic] = Traffic, level: str = "machine", batch: int = GLOBAL_BATCH,
) -> dict[str, float]:  # fmt: skip
    """Bytes that the busiest rank sends in a step over a level along each axis."""
    mesh, found = Mesh(layout, topology), {}
    accounts = (
        step_traffic(mesh, rank, config, SEQ_LEN, batch, *dtypes, kind=kind) for rank in range(layout.world_size)
    )
    for key, wire in maximum(accounts).wire.items():
        axis = {"dp x cp": "dp", "edp": "dp", "ep x etp": "ep"}.get(key.axis, key.axis)
        if axis == "cp" and key.collective in ("all_reduce", "reduce_scatter", "all_gather"):
            axis = "dp"  # gradients, where dp is 1
        found[axis] = found.get(axis, 0.0) + sum(size for (_, name), size in wire.items() if name == level)
    return found


def priced(
    config: ModelConfig, layout: Layout, dtypes: tuple[str, str], machine: Machine = MACHINE, batch: int = GLOBAL_BATCH
) -> dict[str, float]:
    """Seconds of a step's traffic along each axis."""
    one = candidate(layout, batch)
    constants = BARE.of_numbers(*(DTYPE_BYTES[dtype] for dtype in dtypes))
    parts = contents(config, one.stages)
    prices = price(Shape.of(config), SEQ_LEN, one, parts, machine, constants, terms=True)
    m = int(one.micro_batches[0])
    found = {axis: m * prices.terms[axis].sum() for axis in ("tp", "cp", "ep", "zero")}
    found["dp"] = prices.traffic.max() + found.pop("zero")
    found["pp"] = 2 * m * prices.transfer.max() if layout.pp > 1 else 0.0
    found["tp"] += m * prices.terms["recompute"].sum()
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_seconds_are_the_bytes_that_a_run_counts(model, name, precision):
    config, layout = ModelConfig(**SHAPES, **MODELS[model]), LAYOUTS[name]
    if layout.ep * layout.etp > 1 and not config.moe.experts:
        pytest.skip("no experts")
    found, wanted = (of(config, layout, PRECISIONS[precision]) for of in (priced, counted))
    for axis, size in found.items():
        # Not priced: the sum over tp of routers', norms' and latents' gradients, once a step.
        assert size == pytest.approx(wanted.get(axis, 0.0), rel=0.03, abs=1e5), axis


@pytest.mark.parametrize("slow", BLOCKS)
@pytest.mark.parametrize("name", NESTED)
def test_seconds_at_a_level_are_the_bytes_that_a_plan_shows_there(name, slow):
    planes = {level: Plane(level, None) for level in BLOCKS}
    levels = tuple(Level(k, i, None, ranks, 1e-9, 0.0, planes[k]) for i, (k, ranks) in enumerate(BLOCKS.items()))
    topology = Topology("nested", TOPOLOGY.rank, tuple(planes.values()), levels)
    blocks = tuple(ranks or ANYWHERE for ranks in BLOCKS.values())
    rates = tuple(1.0 if level == slow else 1e300 for level in BLOCKS)
    machine = Machine(topology, levels, blocks, rates, (math.inf,) * 3, (0.0,) * 3, 1e300, 1e300, 1.0)
    config, layout, dtypes, batch = ModelConfig(**SHAPES), NESTED[name], PRECISIONS["bf16"], 48
    found = priced(config, layout, dtypes, machine, batch)
    wanted = counted(config, layout, dtypes, topology, LevelTraffic, slow, batch)
    for axis in ("tp", "dp"):
        assert found[axis] == pytest.approx(wanted.get(axis, 0.0), rel=0.03, abs=1e5), axis
