"""A plan: a layout, where it lies on the machine, and what is predicted of it, as plain data for files and screens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from models.config import FLOPS_CONVENTION
from parallel.layout import ORDER
from parallel.mesh import Mesh
from parallel.planner.communication import BETWEEN, LevelTraffic
from parallel.planner.evaluate import Estimate
from parallel.planner.problem import CHOSEN, Problem
from parallel.schedules import Timeline, Times, simulate
from parallel.traffic import Traffic, step_rows

EXACT_RANKS = 64
"""Worlds of up to as many ranks have their traffic counted rank by rank; larger ones at ranks that lie at edges."""


@dataclass(frozen=True)
class Plan:
    """One estimate of one problem, and what follows from its place on the machine."""

    problem: Problem
    estimate: Estimate
    routed: Sequence[Mapping[int, np.ndarray]] | None = None
    """Of each rank, by layer, the experts [N, K] that its tokens of a step go to; None: experts in turn."""

    @cached_property
    def mesh(self) -> Mesh:
        """The layout on the machine's places."""
        return Mesh(self.estimate.layout, self.problem.topology, self.problem.positions)

    @property
    def tokens_per_s(self) -> float:
        return self.problem.global_batch * self.problem.seq_len / self.estimate.step

    @property
    def mfu(self) -> float:
        """By `models.config.FLOPS_CONVENTION`."""
        peak = self.problem.machine.flops * self.problem.ranks
        return self.problem.flops_per_token * self.tokens_per_s / peak

    @cached_property
    def terms(self) -> dict[str, float]:
        """Seconds of a step by what they go to, in the mean over pipeline ranks. They add up to the step."""
        found = self.estimate
        prices, layout = found.prices, found.layout
        m = layout.check_batch(self.problem.global_batch)
        terms = {name: m * float(value[0].sum()) / layout.pp for name, value in prices.terms.items()}
        terms["bubble"] = found.pipeline - float(found.busy.mean())
        last = int((prices.traffic[0] + prices.update[0]).argmax())
        terms["dp"], terms["optimizer"] = float(prices.traffic[0, last]), float(prices.update[0, last])
        terms["other"] = float(prices.step[0])
        terms["stragglers"] = found.step - found.pipeline - float(prices.behind[0])
        return {name: seconds for name, seconds in terms.items() if abs(seconds) > 1e-9 * found.step}

    @cached_property
    def timeline(self) -> Timeline | None:
        """When every pass of a step runs, in seconds; None without a pipeline."""
        layout = self.estimate.layout
        if layout.pp == 1:
            return None
        times = Times(*(column[0].tolist() for column in vars(self.estimate.prices.times).values()))
        return simulate(layout.pipeline(self.problem.global_batch), times)

    @cached_property
    def traffic(self) -> list[dict[str, Any]]:
        """Rows of payload and wire bytes by axis, collective and level, as `summary.json` counts them."""
        return self._rows(Traffic)

    def _rows(self, kind: type[Traffic]) -> list[dict[str, Any]]:
        problem = self.problem
        sizes = (problem.model, problem.seq_len, problem.global_batch, *problem.dtypes)
        return step_rows(self.mesh, *sizes, routed=self.routed, ranks=self._ranks(), kind=kind)

    def _ranks(self) -> Sequence[int]:
        """Ranks among which every level sees its largest traffic: all, or those at edges of blocks and of groups."""
        world = self.mesh.world_size
        if world <= EXACT_RANKS:
            return range(world)
        strides, stride = [1], 1
        for axis in self.estimate.layout.order:
            stride *= getattr(self.estimate.layout, axis)
            strides.append(stride)
        blocks = [block for block in self.problem.machine.blocks if block < world] + [world]
        edges = {0, *(block - s for block in blocks for s in strides if s <= block)}
        places = {self.mesh.index("pp", rank) for rank in edges}
        edges |= {self.mesh.group("pp", 0)[p] for p in range(self.estimate.layout.pp) if p not in places}
        return sorted(edges)

    @cached_property
    def axes(self) -> list[dict[str, Any]]:
        """Of every axis with more than one rank: its size, the outermost level that its groups reach, the most blocks
        of each level that one group lies in, its bytes and the seconds that are not hidden."""
        layout, found = self.estimate.layout, []
        seconds = {"tp": ("tp",), "cp": ("cp",), "ep": ("ep",), "dp": ("dp", "zero"), "pp": ("pp",)}
        for axis in (*ORDER, "ep", "etp", "edp"):
            if getattr(layout, axis) == 1 or axis == "edp" and not self.problem.model.moe.experts:
                continue
            places = self.mesh.places(axis)
            ends = {*zip(places.min(1).tolist(), places.max(1).tolist(), strict=True)}
            widest = max((self.mesh.topology.level_of(a, b) for a, b in ends), key=lambda level: level.index)
            rows = [row for row in self.traffic if axis in row["axis"].split(" x ")]
            found.append(
                {
                    "axis": axis,
                    "size": getattr(layout, axis),
                    "level": widest.name,
                    "blocks": {level.name: _blocks(places, level.ranks) for level in self.mesh.topology.levels},
                    "payload_bytes": sum(row["payload_bytes"] for row in rows),
                    "seconds": sum(self.terms.get(term, 0.0) for term in seconds.get(axis, ())),
                }
            )
        return found

    @cached_property
    def sent(self) -> list[dict[str, Any]]:
        """The same rows with wire bytes as they are priced: by the algorithms that run at each level."""
        return self._rows(LevelTraffic)

    @cached_property
    def levels(self) -> dict[str, int]:
        """Bytes that go over each level in a step as they are priced, of the rank that sends most of each kind."""
        return self._by_level(self.sent)

    @property
    def counted(self) -> dict[str, int]:
        """The same as a run counts them, each collective one ring over its whole group."""
        return self._by_level(self.traffic)

    def _by_level(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        found = {level.name: 0 for level in self.mesh.topology.levels}
        for row in rows:
            found[row["level"]] += row["wire_bytes"]
        return found

    @property
    def algorithms(self) -> str | None:
        """`HCCL_ALGO`: what prices assume at HCCL's levels 1 and 2, where its defaults may differ; None elsewhere."""
        if not self.problem.topology.rank.device.startswith("ascend"):
            return None
        names = [level.name for level in self.problem.machine.levels]
        outside = any(name in ("supernode",) for name in names)
        level1 = f"level0:NA;level1:{BETWEEN}"
        return f"{level1};level2:{BETWEEN}" if outside and names[-1] != "supernode" else level1

    def memory(self) -> list[dict[str, float]]:
        """GiB by what holds them, of every pipeline rank."""
        parts = asdict(self.estimate.memory)
        return [
            {name: float(value[place]) / 2**30 for name, value in parts.items()}
            for place in range(len(parts["weights"]))
        ]

    def layout_keys(self) -> dict[str, Any]:
        """The keys of `layout` in a recipe that runs this."""
        keys = asdict(self.estimate.layout)
        chosen = {key: keys[key] for key in (*CHOSEN, "stages")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}

    def prediction(self) -> dict[str, Any]:
        """Everything, as JSON takes it. Seconds, bytes, GiB; a rank is a die on Ascend."""
        found, problem = self.estimate, self.problem
        return {
            "layout": self.layout_keys(),
            "dtypes": list(problem.dtypes),
            "topology": problem.topology.name,
            "ranks": problem.ranks,
            "step_s": found.step,
            "bound_s": found.bound,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_rank": self.tokens_per_s / problem.ranks,
            "mfu": self.mfu,
            "mfu_convention": FLOPS_CONVENTION,
            "bubble": found.bubble,
            "terms_s": self.terms,
            "memory_gib": found.peak / 2**30,
            "memory_limit_gib": problem.machine.memory / 2**30,
            "fits": found.fits,
            "memory_by_stage_gib": self.memory(),
            "axes": self.axes,
            "sent_bytes_by_level": self.levels,
            "wire_bytes_by_level": self.counted,
            "traffic": self.traffic,
            "hccl_algo": self.algorithms,
            "constants": problem.fit.chosen,
            "constants_error": dict(problem.fit.error),
        }


def _blocks(places: np.ndarray, ranks: int | None) -> int:
    """The most blocks of `ranks` ranks in which one row of `places` lies."""
    if ranks is None:
        return 1
    blocks = np.sort(places // ranks, axis=1)
    return 1 + int((np.diff(blocks, axis=1) > 0).sum(1).max())
