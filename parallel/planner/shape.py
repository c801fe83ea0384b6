"""What of a model, and which layouts of it, the planner prices: numbers or NumPy columns, one entry a layout.

Every formula of this room takes either: scalars price one layout, columns price a whole space in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from models.config import ModelConfig
from parallel import schedules
from parallel.layout import ORDER, Layout

Column = Any
"""A number, or an array with an entry a layout."""

RECOMPUTE = ("none", "selective", "full")
ORDERS = tuple(permutations(ORDER))
"""Nestings of the axes, innermost first; the usual one is the first."""
_INSIDE = np.array([[[o.index(a) < o.index(b) for a in ORDER] for b in ORDER] for o in ORDERS])
"""[orders, axes, axes]: whether the second axis lies inside the first."""
KINDS = ("embedding", "dense", "sparse", "head")
"""What a pipeline stage is made of: the embedding, layers without and with experts, the head."""


@dataclass(frozen=True)
class Shape:
    """The widths of a model that cost time and memory."""

    hidden: Column
    ffn: Column
    heads: Column
    kv_heads: Column
    head_dim: Column
    vocab: Column
    gates: Column = 2
    """Matrices into the feed-forward's inner width: 2 with a gate (SwiGLU), 1 without."""
    tied: Column = False
    qk_norm: Column = False
    sandwich: Column = False
    q_rank: Column = 0
    kv_rank: Column = 0
    """Latent attention's; 0: grouped-query attention."""
    nope: Column = 0
    rope: Column = 0
    value: Column = 0
    experts: Column = 0
    top_k: Column = 0
    expert_ffn: Column = 0
    shared: Column = 0
    """Shared experts, each as wide as a routed one."""
    further: Column = 0
    """Modules of multi-token prediction."""
    biased: Column = False
    """Whether routers have a bias of the choice."""

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """The widths of `config`."""
        moe, latent = config.moe, config.latent
        return cls(
            config.hidden, config.ffn, config.heads, config.kv_heads, config.head_width if not latent.kv_rank else 0,
            config.vocab, 2, config.tied_embeddings, config.qk_norm, config.sandwich_norm, latent.q_rank or 0,
            latent.kv_rank, latent.nope, latent.rope, latent.value, moe.experts, moe.top_k if moe.experts else 0,
            moe.ffn, moe.shared, config.mtp.depth, moe.biased,
        )  # fmt: skip

    @property
    def query(self) -> Column:
        """Width of all heads' queries, as attention's core multiplies them."""
        return self.heads * np.where(self.kv_rank, self.nope + self.rope, self.head_dim)

    @property
    def values(self) -> Column:
        """Width of all heads' outputs."""
        return self.heads * np.where(self.kv_rank, self.value, self.head_dim)


def nestings(sizes: Mapping[str, int], order: Sequence[str] = ORDER) -> list[tuple[str, ...]]:
    """Orders that differ in how the axes of several ranks nest, `order` first; `sizes` are those of the dense axes."""
    used, rest = ([axis for axis in order if (sizes[axis] > 1) == several] for several in (True, False))
    return [(*nested, *rest) for nested in permutations(used)]


@dataclass(frozen=True)
class Candidates:
    """Layouts as columns, all of one schedule, pp and vpp."""

    schedule: str
    pp: int
    """A column in what does not depend on the pipeline's shape (`price.Pricing`)."""
    vpp: int
    dp: Column
    cp: Column
    ulysses: Column
    """Ranks of cp that exchange heads; the others form rings."""
    tp: Column
    ep: Column
    etp: Column
    zero: Column
    shards: Column
    """Ranks of dp x cp that share one set of pieces under ZeRO."""
    micro_batch: Column
    micro_batches: Column
    sequence_parallel: Column
    recompute: Column
    """Index into `RECOMPUTE`."""
    order: Column | None = 0
    """Index into `ORDERS`; None: every axis as near as can be, for bounds."""

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    def stride(self, axis: str) -> Column:
        """Ranks from one to its neighbour along a dense axis, as the axes nest."""
        found, inside = 1, _INSIDE[self.order, ORDER.index(axis)]
        for index, other in enumerate(ORDER):
            found = found * np.where(inside[..., index], getattr(self, other), 1)
        return found

    @property
    def edp(self) -> Column:
        """Copies of each expert in one pipeline stage."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def expert_shards(self) -> Column:
        """Ranks that cut an expert's weights under ZeRO (`parallel.memory.shard_counts`)."""
        whole = self.shards == self.dp * self.cp
        return np.where(whole, self.edp, np.gcd(self.edp, self.shards)) * (self.zero > 0) + (self.zero == 0)

    def __len__(self) -> int:
        return len(np.atleast_1d(self.tp))

    def take(self, rows: Any) -> Candidates:
        """Those of `rows` (indices or a mask)."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: c[rows] for name, c in columns.items() if isinstance(c, np.ndarray)})

    def layout(self, row: int, base: Mapping[str, Any], order: tuple[str, ...]) -> Layout:
        """The layout of one row, nested in an `order`; `base` has the keys that the planner does not choose."""
        cp, ulysses = int(self.cp[row]), int(self.ulysses[row])
        method = "ring" if ulysses == 1 else "ulysses" if ulysses == cp else "hybrid"
        given = {name: int(getattr(self, name)[row]) for name in ("dp", "cp", "tp", "ep", "etp", "zero", "micro_batch")}
        group = int(self.shards[row])
        whole = group == given["dp"] * cp or not given["zero"]
        return Layout(
            **dict(base)
            | given
            | {
                "cp_method": method,
                "cp_ulysses": ulysses if method == "hybrid" else 2,
                "pp": self.pp,
                "vpp": self.vpp,
                "schedule": self.schedule,
                "zero_group": None if whole else group,
                "sequence_parallel": bool(self.sequence_parallel[row]),
                "recompute": RECOMPUTE[int(self.recompute[row])],
                "order": order,
            }
        )


def candidate(layout: Layout, global_batch: int) -> Candidates:
    """One layout as columns of length 1."""
    shards = layout.zero_group or layout.dp * layout.cp
    name = layout.recompute if isinstance(layout.recompute, str) else "full"  # of the layers that `Contents` names
    numbers = {
        "dp": layout.dp,
        "cp": layout.cp,
        "ulysses": layout.ulysses,
        "tp": layout.tp,
        "ep": layout.ep,
        "etp": layout.etp,
        "zero": layout.zero if layout.dp * layout.cp > 1 else 0,
        "shards": shards,
        "micro_batch": layout.micro_batch,
        "micro_batches": layout.check_batch(global_batch),
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "recompute": RECOMPUTE.index(name),
        "order": ORDERS.index(layout.order),
    }
    columns = {name: np.array([number]) for name, number in numbers.items()}
    schedule, vpp = (layout.schedule, layout.vpp) if layout.pp > 1 else ("1f1b", 1)
    return Candidates(schedule, layout.pp, vpp, **columns)


def distinct(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column of small numbers, ascending, and the index of every entry's: `numpy.unique` without a
    sort."""
    there = np.bincount(column) > 0
    return np.flatnonzero(there), (np.cumsum(there) - 1)[column]


def joined(rows: Sequence[Candidates]) -> Candidates:
    """Columns one behind the other, of one schedule, pp and vpp; or, for what does not depend on these, pp as a column
    too."""
    names = [name for name, value in vars(rows[0]).items() if isinstance(value, np.ndarray)]
    columns = {name: np.concatenate([getattr(row, name) for row in rows]) for name in names}
    if any(row.pp != rows[0].pp for row in rows):
        columns["pp"] = np.repeat([row.pp for row in rows], [len(row) for row in rows])
    return replace(rows[0], **columns)


@dataclass(frozen=True)
class Contents:
    """How many of each kind every virtual stage has: arrays [S], or [N, S] where layouts differ in it."""

    embedding: np.ndarray
    dense: np.ndarray
    sparse: np.ndarray
    head: np.ndarray
    again: tuple[np.ndarray, np.ndarray] | None = None
    """Of the layers without and with experts, the share that `recompute` names: where a list of layers does."""

    def counts(self, kind: str) -> np.ndarray:
        """Of one of `KINDS`."""
        return getattr(self, kind)


def places(schedule: str, pp: int, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """The pipeline ranks of stages 0 to `stages` - 2, and of the ones behind them."""
    stage = np.arange(stages)
    folded = (stage >= pp) & (schedule in schedules.V_SHAPED)
    place = np.where(folded, 2 * pp - 1 - stage, stage % pp)
    return place[:-1], place[1:]


def contents(config: ModelConfig, stages: int, sizes: tuple[int, ...] | None = None) -> Contents:
    """What each of `stages` virtual stages holds of a model, cut as the trainer cuts it (`parallel.schedules.cut`)."""
    table = np.zeros((len(KINDS), stages))
    for stage, span in enumerate(schedules.cut(config.layers, stages, sizes)):
        for segment in span:
            if segment == 0:
                kind = "embedding"
            elif segment > config.layers:
                kind = "head"
            else:
                kind = "sparse" if config.moe.in_layer(segment - 1) else "dense"
            table[KINDS.index(kind), stage] += 1
    return Contents(*table)


class Load(NamedTuple):
    """What each rank of a pipeline holds of a model."""

    own: np.ndarray
    """[pp, kinds] segments."""
    busy: np.ndarray
    """[ranks, 2 x kinds + 3], of ranks that hold the same the last one: its own segments, and the messages between two
    ranks that a micro-batch takes in one direction to and from them, halved; then, of the stages that the first
    micro-batch goes through before, the segments, these messages, and how many stages they are."""
    stages: np.ndarray
    """[stages, kinds]: what each virtual stage holds."""


def load(parts: Contents, schedule: str, pp: int, vpp: int) -> Load:
    """Of a schedule whose virtual stages hold `parts`."""
    counts = np.stack([parts.counts(kind) for kind in KINDS], -1)
    place, following = places(schedule, pp, pp * vpp + 1)
    crossed = place[:-1] != following[:-1]
    own = (place[:, None] == np.arange(pp)).T @ counts
    sends = sum(np.bincount(side[:-1][crossed], minlength=pp) for side in (place, following)) / 2
    held = np.column_stack([own, sends])
    through = np.column_stack([counts[:pp], sends, np.ones(pp)])
    _, last = np.unique(own[::-1], axis=0, return_index=True)
    return Load(own, np.hstack([held, np.cumsum(through, 0) - through])[pp - 1 - last], counts)
