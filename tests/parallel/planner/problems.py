"""Small questions that the planner's tests ask."""

from __future__ import annotations

from models.config import ModelConfig
from models.shapes import ExpertsConfig
from parallel.planner import Problem
from parallel.topology import Topology
from parallel.topology import load as load_topology

DENSE = {"layers": 6, "hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 4, "vocab": 32000}
EXPERTS = ExpertsConfig(experts=8, top_k=2, ffn=512)


def dense(**changes) -> ModelConfig:
    """A small dense model."""
    return ModelConfig(**DENSE | changes)


def sparse(**changes) -> ModelConfig:
    """The same with experts in every layer."""
    return dense(moe=EXPERTS, **changes)


def machine(ranks: int = 4, memory_gib: float = 64.0, outer: float = 25.0, link: float | None = None) -> Topology:
    """Nodes of `ranks` on a fast network, or in a mesh of such links, joined by a slow one."""
    links = {"links": "mesh", "bandwidth": link} if link else {}
    levels = [
        {"name": "node", "members": ranks, "bandwidth": 160.0, "latency": 1.2, "plane": "bus", **links},
        {"name": "cluster", "members": "any", "bandwidth": outer, "latency": 6.0, "plane": "roce"},
    ]
    rank = {"name": "die", "device": "ascend910c", "memory_gib": memory_gib, "memory_bandwidth": 1600.0}
    planes = {"bus": {"injection": 196.0}, "roce": {"injection": outer}}
    peaks = {"peak_tflops": {"bfloat16": 376.0}}
    return load_topology({"name": "small", "rank": rank | peaks, "planes": planes, "levels": levels})


def problem(model=None, ranks: int = 8, batch: int = 16, seq_len: int = 2048, topology=None, **fixed) -> Problem:
    """A question whose space is small enough to be searched by hand."""
    return Problem(model or dense(), seq_len, batch, topology or machine(), tuple(range(ranks)), fixed)
