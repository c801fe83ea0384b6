"""What the planner is asked: a model, a batch, a machine, and what the user fixed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np

from models.checks import check, check_at_least
from models.config import ModelConfig
from parallel.layout import Layout
from parallel.planner.communication import Network
from parallel.planner.constants import Constants, Fit, constants, tables
from parallel.planner.machine import Machine, machine
from parallel.planner.memory import heaviest, shares_ends
from parallel.planner.shape import Contents, Load, Shape, contents, load
from parallel.topology import Level, Topology
from parallel.traffic import DTYPE_BYTES

CHOSEN = (
    "tp", "sequence_parallel", "pp", "vpp", "schedule", "cp", "cp_method", "cp_ulysses", "ep", "etp", "dp", "zero",
    "zero_group", "micro_batch", "recompute", "order",
)  # fmt: skip
"""Keys of a layout that the planner chooses unless they are fixed."""
MIXED = ("float32", "bfloat16")
"""Of weights and gradients, and of what linears take, under bf16 on a device."""


@dataclass(frozen=True)
class Problem:
    """One question. Raises `models.checks.ConfigError` for what cannot be planned."""

    model: ModelConfig
    seq_len: int
    global_batch: int
    topology: Topology
    positions: tuple[int, ...]
    """Where on the machine ranks may run, ascending: all of it, or what a scheduler or a fault leaves."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `Layout` that the user gave: of `CHOSEN`, they are not searched over; others are passed on."""
    dtypes: tuple[str, str] = MIXED
    """Of weights and gradients, and of what linears take and give."""
    peak: str = "bfloat16"
    """Key of the topology's `peak_tflops`."""
    hide: Mapping[str, float] = field(default_factory=dict)
    """Overlap by kind of traffic (tp, dp, ep, cp, pp), 0 to 1, over what the constants say."""
    imbalance: float | None = None
    """The busiest rank's rows of experts over the mean, over what the constants say."""

    def __post_init__(self) -> None:
        check_at_least("plan.ranks", len(self.positions), 1)
        check_known(self.topology)

    @property
    def ranks(self) -> int:
        return len(self.positions)

    @cached_property
    def fit(self) -> Fit:
        """The constants of mixed precision, and how well they fit."""
        found = constants(self.topology.rank.device, "busway")
        changed = {f"hide_{kind}": float(share) for kind, share in self.hide.items()}
        if self.imbalance is not None:
            changed["imbalance"] = self.imbalance
        return replace(found, constants=replace(found.constants, **changed))

    @cached_property
    def constants(self) -> Constants:
        """Those of the question's own precision."""
        return self.fit.constants.of_numbers(*(DTYPE_BYTES[dtype] for dtype in self.dtypes))

    @cached_property
    def machine(self) -> Machine:
        """The levels as prices see them: blocks of what is there, the same for every group."""
        return machine(usable(self.topology, self.positions), self.constants, self.peak)

    @cached_property
    def network(self) -> Network:
        """Prices of groups whose nesting is open."""
        return Network(self.machine, self.constants, least=True)

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self.model)

    @cached_property
    def contents(self) -> Callable[..., Contents]:
        """`shape.contents` of the model, kept: of a number of stages, and their sizes where they are given."""
        return cache(partial(contents, self.model))

    @cached_property
    def load(self) -> Callable[..., Load]:
        """`shape.load` of the model, kept: of a schedule, pp and vpp."""
        return cache(lambda schedule, pp, vpp: load(self.contents(pp * vpp), schedule, pp, vpp))

    @cached_property
    def heaviest(self) -> Callable[[str, int, int, tuple[int, ...]], np.ndarray]:
        """`memory.heaviest` of the model, kept: of a schedule, pp, vpp and `memory.flights`."""
        shared = bool(shares_ends(self.shape))
        return cache(lambda *pipeline: heaviest(self.load(*pipeline[:3]), *pipeline, shared))

    @cached_property
    def flops_per_token(self) -> int:
        """By `models.config.FLOPS_CONVENTION`. Kept: of a model with many experts it takes most of a second."""
        return self.model.flops_per_token(self.seq_len)

    def check(self, layout: Layout) -> None:
        """Raise `ConfigError` unless `layout` is legal for this model, batch and number of ranks."""
        layout.check_world(self.ranks)
        layout.check_batch(self.global_batch)
        layout.check_model(self.model, self.seq_len)
        layout.pipeline(self.global_batch)


def check_known(topology: Topology) -> None:
    """Raise `ConfigError` unless it is known what the machine is made of."""
    device = topology.rank.device or ""
    check(
        device in tables() or device.endswith(".yaml"),
        f"topology {topology.name}: rank.device",
        f"is {device} and has no constants" if device else "is not known, and a plan needs its constants",
        f"name one of {', '.join(tables())} in the topology file, or choose another topology",
    )


def usable(topology: Topology, positions: Sequence[int]) -> Topology:
    """`topology` with the blocks that every group of consecutive ranks on `positions` can count on.

    Where blocks of a level hold different numbers of free ranks, that is their greatest common divisor: what lies
    inside such a block lies inside one of the machine's. One block that holds all of them has as many as there are, so
    that every group lies inside it, whatever its size.
    """
    levels: list[Level] = []
    for level in topology.levels:
        if level.ranks is None:
            ranks = len(positions)
        else:
            ranks = math.gcd(*Counter(position // level.ranks for position in positions).values())
        levels.append(replace(level, ranks=ranks))
    return replace(topology, levels=tuple(levels))
