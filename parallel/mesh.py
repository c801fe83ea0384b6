"""Rank arithmetic: which ranks form which groups, and where on the machine they sit.

Pure arithmetic; communicators are made from it in `parallel.collectives`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from models.checks import nearest_divisor
from parallel.layout import Layout
from parallel.topology import Level, Topology

DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "edp", "ep", "etp")
VIEWS = {"data": ("dp",), "dense": DENSE, "expert": EXPERT, "loss": ("dp", "cp")}

Axes = str | Iterable[str]


class Mesh:
    """The ranks of a `layout`, placed on a `topology`.

    Ranks are counted through the axes in `layout.order`, the innermost fastest. The axes:

    - ``pp``: pipeline stages; a rank holds the layers of one stage.
    - ``dp``: replicas; ranks along it hold the same slices of the dense weights and read other samples.
    - ``cp``: ranks along it hold the same weights and share the tokens of each sequence.
    - ``tp``: ranks along it hold slices of every matrix of a layer.
    - ``ep``: ranks along it hold other experts of a layer.
    - ``etp``: ranks along it hold slices of every matrix of one expert.
    - ``edp``: ranks along it hold the same slices of the same experts.

    Four views name sets of them:

    - ``data`` (dp): which samples a rank reads is its index here.
    - ``dense`` (pp, dp, cp, tp): all ranks, as the dense layers see them.
    - ``expert`` (pp, edp, ep, etp): all ranks, as the experts see them. The ranks of one pipeline stage, in their
      order, are counted through etp, ep and edp, etp the fastest; stages are those of the dense view.
    - ``loss`` (dp, cp): over which the loss, its count of tokens and the gradients of dense weights are summed.

    Wherever `axes` is asked for it may be one axis, several, or the name of a view. A group is a tuple of ranks
    in ascending order. `placement[rank]` is the position on the machine (counted in ranks along the topology)
    where a rank runs; by default rank r runs at position r.
    """

    def __init__(self, layout: Layout, topology: Topology, placement: Sequence[int] | None = None) -> None:
        self.layout = layout
        self.topology = topology
        self.world_size = layout.world_size
        topology.check_fits(self.world_size)
        self.placement = tuple(range(self.world_size) if placement is None else placement)
        if len(set(self.placement)) != self.world_size or len(self.placement) != self.world_size:
            raise ValueError(f"placement must give {self.world_size} ranks a position each, but is {self.placement}")
        for position in (min(self.placement), max(self.placement)):
            topology.level_of(position, position)

        outermost_first = layout.order[::-1]
        ranks = np.arange(self.world_size).reshape([getattr(layout, axis) for axis in outermost_first])
        self._dense = ranks.transpose([outermost_first.index(axis) for axis in DENSE])
        stages = np.moveaxis(ranks, outermost_first.index("pp"), 0)
        self._expert = stages.reshape(layout.pp, layout.edp, layout.ep, layout.etp)
        self._tables: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}

    def axes(self, axes: Axes) -> tuple[str, ...]:
        """The single axes that `axes` stands for, outermost first as in its view, those of size 1 left out.

        Raises ValueError for an unknown name and for a mixture of dense and expert axes.
        """
        names = VIEWS.get(axes, (axes,)) if isinstance(axes, str) else tuple(axes)
        for view in (DENSE, EXPERT):
            if set(names) <= set(view):
                return tuple(axis for axis in view if axis in names and getattr(self.layout, axis) > 1)
        raise ValueError(
            f"no axes of one view: {', '.join(names)}; known are the axes {', '.join(DENSE)}, or {', '.join(EXPERT)}, "
            f"and the views {', '.join(VIEWS)}"
        )

    def label(self, axes: Axes) -> str:
        """`axes` as the traffic account names them: ``dp``, ``dp x cp``, or ``none`` when all have size 1."""
        return " x ".join(self.axes(axes)) or "none"

    def size(self, axes: Axes) -> int:
        """Ranks in one group of `axes`."""
        return int(np.prod([getattr(self.layout, axis) for axis in self.axes(axes)], dtype=int))

    def coordinates(self, rank: int) -> dict[str, int]:
        """The index of `rank` along every axis of the dense and the expert view."""
        dense = np.argwhere(self._dense == self._checked(rank))[0]
        expert = np.argwhere(self._expert == rank)[0]
        return dict(zip(DENSE + EXPERT, map(int, (*dense, *expert)), strict=True))

    def groups(self, axes: Axes) -> tuple[tuple[int, ...], ...]:
        """All groups of `axes`, by their first rank. Ranks of one group differ along `axes` alone."""
        return tuple(map(tuple, self._table(axes)[0].tolist()))

    def group(self, axes: Axes, rank: int) -> tuple[int, ...]:
        """The group of `axes` that `rank` belongs to."""
        table, row_of = self._table(axes)
        return tuple(table[row_of[self._checked(rank)]].tolist())

    def places(self, axes: Axes) -> np.ndarray:
        """[groups, ranks of a group]: the positions on the machine of the ranks of every group of `axes`."""
        return np.asarray(self.placement)[self._table(axes)[0]]

    def _table(self, axes: Axes) -> tuple[np.ndarray, np.ndarray]:
        """[groups, ranks of a group], and the row of every rank. Kept as arrays: worlds have tens of thousands."""
        axes = self.axes(axes)
        if axes not in self._tables:
            view, ranks = (DENSE, self._dense) if set(axes) <= set(DENSE) else (EXPERT, self._expert)
            kept = [view.index(axis) for axis in view if axis not in axes]
            varied = [view.index(axis) for axis in axes]
            table = np.sort(ranks.transpose(kept + varied).reshape(-1, self.size(axes)), axis=1)
            table = table[np.argsort(table[:, 0])]
            row_of = np.empty(self.world_size, int)
            row_of[table] = np.arange(len(table))[:, None]
            self._tables[axes] = table, row_of
        return self._tables[axes]

    def index(self, axes: Axes, rank: int) -> int:
        """The place of `rank` in its group of `axes`, from 0."""
        return self.group(axes, rank).index(rank)

    def level_of(self, a: int, b: int) -> Level:
        """The innermost level of the machine that holds both ranks."""
        return self.topology.level_of(self.placement[self._checked(a)], self.placement[self._checked(b)])

    def span(self, group: Sequence[int]) -> Level:
        """The outermost level that traffic inside `group` touches."""
        positions = [self.placement[rank] for rank in group]  # a level holds all positions between two that it holds
        return self.topology.level_of(min(positions), max(positions))

    def dispatch(self) -> tuple[int, str]:
        """(outer groups, why) of the dispatch to experts: one outer group is flat dispatch."""
        layout = self.layout
        if layout.ep == 1:
            return 1, ""
        blocks, why = self._blocks()
        if layout.dispatch == "flat":
            return 1, "flat dispatch, as asked"
        if layout.dispatch == "two_level":
            split = blocks if blocks > 1 else nearest_divisor(layout.ep, 2, lambda count: count > 1)
            return layout.outer_groups or split, "two-level, as asked"
        if blocks > 1:
            return layout.outer_groups or blocks, f"two-level: {why}"
        return 1, f"flat dispatch: {why}" + "; outer_groups has no effect" * bool(layout.outer_groups)

    def _blocks(self) -> tuple[int, str]:
        """Blocks of equal size, joined by another and slower plane than the ranks inside, in which each group of
        experts lies, 1 where there are none; and why that is so."""
        found = set()
        for group in self.groups(("ep", "etp")):
            positions = [self.placement[rank] for rank in group]
            outermost = self.topology.level_of(min(positions), max(positions))
            found.add((outermost.index, *self._blocks_of(positions, outermost)))
        widest, count, why = max(found)
        if self.layout.ep % count:
            return 1, f"{count} blocks on {self.topology.levels[widest].name} do not divide ep {self.layout.ep}"
        if len({count for _, count, _ in found}) > 1:
            return 1, f"ep lies in unequal blocks on {self.topology.levels[widest].name}, or not in its order"
        return count, why

    def _blocks_of(self, positions: Sequence[int], outermost: Level) -> tuple[int, str]:
        """The same of one group, which reaches the level `outermost`."""
        inner = [level for level in self.topology.levels[: outermost.index] if level.plane != outermost.plane]
        if not inner:
            return 1, "no slower network inside ep"
        if outermost.reach is None or inner[-1].reach is None:
            return 1, f"the bandwidth of {outermost.name} or of {inner[-1].name} is not known"
        if 2 * outermost.reach > inner[-1].reach:
            return 1, f"{outermost.name} has more than half the bandwidth of {inner[-1].name}"
        blocks = [position // inner[-1].ranks for position in positions]
        count = len({*blocks})
        if len({blocks.count(block) for block in blocks}) > 1 or blocks != sorted(blocks):
            return 1, f"ep lies in unequal blocks on {outermost.name}, or not in its order"
        return count, f"{count} blocks of ep are joined by a slower network"

    def describe(self) -> str:
        """One line for the banner: the product identity, the machine and what each axis spans there."""
        noun = "rank" if self.world_size == 1 else "ranks"
        parts = [f"{self.layout.product()} {noun} on {self.topology.name}"]
        axes = self.layout.order
        if self.layout.ep * self.layout.etp > 1:
            parts.append(f"experts edp {self.layout.edp} x ep {self.layout.ep} x etp {self.layout.etp}")
            axes += ("etp", "ep", "edp")
        for axis in axes:
            if getattr(self.layout, axis) > 1:
                widest = max((self.span(group) for group in self.groups(axis)), key=lambda level: level.index)
                parts.append(f"{axis} in one {widest.name}")
        if techniques := self.layout.techniques():
            parts.append(techniques)
        if self.layout.ep > 1:
            outer, why = self.dispatch()
            parts.append(f"{why} ({outer} outer groups)" if outer > 1 else why)
        return "; ".join(parts)

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the world of {self.world_size} ranks")
        return rank
