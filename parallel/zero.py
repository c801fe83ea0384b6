"""ZeRO: ranks that hold the same weights cut what they need not all hold.

Every weight is laid out flat, padded to a multiple of the ranks of its shard group, and cut into equal pieces; the
optimizer of a rank has one piece of each (Rajbhandari et al., arXiv 1910.02054). Stage 1 cuts the optimizer's state
(moments, and the weights that it updates), 2 the gradients too, which are reduce-scattered a micro-batch at a time, 3
the weights too (`parallel.sharded`).
The shard group is dp x cp, or a part of it (`layout.zero_group`), across whose copies pieces of gradients are summed:
HSDP (Zhao et al., arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mindspore import Tensor, nn, ops

from models.kernels import Kernels
from models.weights import Weight
from parallel.collectives import Collectives, Group
from parallel.data import Bucketed, DataParallel, Families, axes_of, firsts
from parallel.memory import shard_counts


@dataclass(frozen=True)
class Cut:
    """The ranks that cut one family of weights among them."""

    group: Group
    copies: Group
    """Those that have the same pieces, one of each shard group."""
    copy: int
    """Number of this rank's shard group."""

    @property
    def size(self) -> int:
        """Pieces of a weight."""
        return len(self.group.ranks)

    @property
    def index(self) -> int:
        """Which of them this rank has."""
        return self.group.place


def cut_over(axes: str, collectives: Collectives) -> Cut:
    """Along `axes`, in groups of `layout.zero_group` ranks; of experts, as many of these as divide their copies."""
    mesh, rank = collectives.mesh, collectives.rank
    ranks, size = mesh.group(axes, rank), shard_counts(mesh.layout)[axes == "edp"]
    copy, index = divmod(ranks.index(rank), size)
    group = collectives.subgroup(axes, range(copy * size, (copy + 1) * size))
    return Cut(group, collectives.subgroup(axes, range(index, len(ranks), size)), copy)


class Pieces(nn.Cell):
    """Weights laid out flat and cut over their shard groups: `scatter` to this rank's pieces, `gather` to whole
    weights."""

    def __init__(
        self, weights: Sequence[Weight], cuts: Mapping[str, Cut], collectives: Collectives, dtype: type,
        limit: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.families = Families(weights)
        self.shapes = tuple(weight.shape for weight in weights)
        self.sizes = tuple(weight.size for weight in weights)
        counts = [cuts[axes_of(weight)].size for weight in weights]
        missing = [padded(n, count) - n for n, count in zip(self.sizes, counts, strict=True)]
        self.padding = tuple(Tensor(np.zeros(n, dtype)) if n else None for n in missing)
        groups = [cuts[axes].group for axes in self.families.axes]
        self.scatters = nn.CellList([Bucketed(collectives.ReduceScatter(g), limit) for g in groups], auto_prefix=False)
        self.gathers = nn.CellList([Bucketed(collectives.AllGather(g), limit) for g in groups], auto_prefix=False)
        self.all = tuple(range(len(weights)))

    def scatter(self, tensors, places):
        """Sums over the group, and takes the rank's piece [n / ranks] of each; `places` are those of the weights."""
        flat = ()
        for k, i in enumerate(places):
            tensor = tensors[k].reshape((-1,))
            flat = flat + (tensor if self.padding[i] is None else ops.concat((tensor, self.padding[i])),)
        pieces = ()
        for family, scatter in enumerate(self.scatters):
            pieces = pieces + scatter.forward(self.families.chosen(family, flat, places))
        return self.families.in_order(pieces, places)

    def gather(self, pieces):
        """The whole tensors of which each rank has a piece."""
        flat = ()
        for family, gather in enumerate(self.gathers):
            flat = flat + gather.forward(self.families.chosen(family, pieces, self.all))
        flat = self.families.in_order(flat, self.all)
        tensors = ()
        for i in range(len(pieces)):
            tensor = flat[i] if self.padding[i] is None else flat[i][: self.sizes[i]]
            tensors = tensors + (tensor.reshape(self.shapes[i]),)
        return tensors


class Zero(DataParallel):
    """ZeRO in the place of plain data parallelism."""

    def __init__(
        self, weights: Sequence[Weight], collectives: Collectives, kernels: Kernels, dtype: type = np.float32
    ) -> None:
        self.stage = collectives.mesh.layout.zero
        self.publishes, self.gathers = self.stage < 3, self.stage == 3
        self.cuts = {axes: cut_over(axes, collectives) for axes in sorted({axes_of(w) for w in weights})}
        super().__init__(weights, collectives, kernels, dtype)
        self.make_pieces = partial(Pieces, cuts=self.cuts, collectives=collectives, dtype=dtype)
        self.pieces = self.make_pieces(weights, limit=self.limit)
        families = [self.cuts[axes] for axes in self.families.axes]
        self.over_pieces = nn.CellList([collectives.AllReduce(f.group) for f in families], auto_prefix=False)
        self.over_copies = nn.CellList(
            [Bucketed(collectives.AllReduce(f.copies), self.limit) for f in families], auto_prefix=False
        )

    def collect(self, gradients, places):
        """The rank's pieces, in stage 2; stage 3 has them already."""
        return self.pieces.scatter(gradients, places) if self.stage == 2 else gradients

    def reduce(self, sums, collected):
        """The same for pieces; the loss sums go alone."""
        pieces = self.pieces.scatter(collected, self.all) if self.stage == 1 else collected
        reduced = ()
        for family, over in enumerate(self.over_copies):
            reduced = reduced + over.forward(self.families.chosen(family, pieces, self.all))
        return self.over_tokens.forward(sums), self.complete(self.families.in_order(reduced, self.all))

    def squares(self, family, gradients):
        """Over the pieces of the shard group."""
        return self.over_pieces[family].forward(super().squares(family, gradients))

    def publish(self, masters, values):
        """Gathers the optimizer's pieces into the weights; a tensor that is there once that is done.

        In a graph of its own: a Parameter that is read after an update in the same graph comes out rounded to fp32
        (MindSpore 2.10).
        """
        whole = self.pieces.gather(masters)
        done = self.nothing
        for i in range(len(values)):
            done = ops.depend(done, ops.assign(values[i], whole[i]))
        return done

    def span(self, weight: Weight) -> tuple[int, int]:
        """The rank's piece, less its padding."""
        (piece,), index = self.shape(weight), self.cuts[axes_of(weight)].index
        return min(index * piece, weight.size), min((index + 1) * piece, weight.size)

    def collected(self, weight: Weight) -> tuple[int, ...]:
        """A piece from stage 2 on."""
        return weight.shape if self.stage == 1 else self.shape(weight)

    def weight_entries(self, weight: Weight, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Runs, where the rank has pieces of weights alone."""
        return self.entries(weight, value) if self.gathers else super().weight_entries(weight, value)

    def entries(self, weight: Weight, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Runs of the parts, laid out flat: ``head.weight@0:512``, each held by one rank of a shard group."""
        first, last = self.span(weight)
        end = 0
        for part, own in zip(weight.parts, firsts(weight), strict=True):
            begin, end = end, end + part.size
            start, stop = max(begin, first), min(end, last)
            if start < stop and own and self.cuts[axes_of(weight)].copy == 0:
                yield f"{part.key}@{start - begin}:{stop - begin}", value[start - first : stop - first]

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """A piece with its padding."""
        count = self.cuts[axes_of(weight)].size
        return (padded(weight.size, count) // count,)

    def cut(self, weight: Weight, value: np.ndarray) -> np.ndarray:
        """The rank's piece with its padding."""
        start, stop = self.span(weight)
        result = np.zeros(self.shape(weight), value.dtype)
        result[: stop - start] = value.reshape(-1)[start:stop]
        return result


def padded(size: int, count: int) -> int:
    """The smallest multiple of `count` that is at least `size`."""
    return -(-size // count) * count
