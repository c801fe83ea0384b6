"""ZeRO: ranks that hold the same weights cut what they need not all hold.

Every weight is laid out flat, padded to a multiple of the ranks of its shard group, and cut into equal pieces; the
optimizer of a rank has one piece of each (Rajbhandari et al., arXiv 1910.02054). Stage 1 cuts the optimizer's state
(moments, and the weights that it updates), 2 the gradients too, which are reduce-scattered a micro-batch at a time, 3
the weights too (`parallel.sharded`).
The shard group is dp x cp, or a part of it (`layout.zero_group`), across whose copies pieces of gradients are summed:
HSDP (Zhao et al., arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from mindspore import Tensor, nn, ops

from models.kernels import Kernels
from models.weights import Weight
from parallel.collectives import Collectives, Group
from parallel.data import Bucketed, DataParallel, firsts


class Pieces(nn.Cell):
    """Weights laid out flat and cut over a group: `scatter` to this rank's pieces, `gather` to whole weights."""

    def __init__(
        self, weights: Sequence[Weight], group: Group, collectives: Collectives, dtype: type, limit: int = 0
    ) -> None:
        super().__init__(auto_prefix=False)
        size = len(group.ranks)
        self.shapes = tuple(weight.shape for weight in weights)
        self.sizes = tuple(weight.size for weight in weights)
        self.padding = tuple(Tensor(np.zeros(padded(n, size) - n, dtype)) if n % size else None for n in self.sizes)
        self.scatters = Bucketed(collectives.ReduceScatter(group), limit)
        self.gathers = Bucketed(collectives.AllGather(group), limit)

    def scatter(self, tensors, places):
        """Sums over the group, and takes the rank's piece [n / ranks] of each; `places` are those of the weights."""
        flat = ()
        for k, i in enumerate(places):
            tensor = tensors[k].reshape((-1,))
            flat = flat + (tensor if self.padding[i] is None else ops.concat((tensor, self.padding[i])),)
        return self.scatters.forward(flat)

    def gather(self, pieces):
        """The whole tensors of which each rank has a piece."""
        flat = self.gathers.forward(pieces)
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
        mesh, rank = collectives.mesh, collectives.rank
        ranks = mesh.group("loss", rank)
        self.stage = mesh.layout.zero
        self.publishes, self.gathers = self.stage < 3, self.stage == 3
        self.size = mesh.layout.zero_group or len(ranks)
        place = ranks.index(rank)
        self.copy, self.index = divmod(place, self.size)
        first = self.copy * self.size
        super().__init__(weights, collectives, kernels, dtype)
        group = collectives.subgroup("loss", range(first, first + self.size))
        self.over_pieces = collectives.AllReduce(group)
        self.make_pieces = partial(Pieces, group=group, collectives=collectives, dtype=dtype)
        self.pieces = self.make_pieces(weights, limit=self.limit)
        copies = collectives.subgroup("loss", range(self.index, len(ranks), self.size))
        self.over_copies = Bucketed(collectives.AllReduce(copies), self.limit)

    def collect(self, gradients, places):
        """The rank's pieces, in stage 2; stage 3 has them already."""
        return self.pieces.scatter(gradients, places) if self.stage == 2 else gradients

    def reduce(self, sums, collected):
        """The same for pieces; the loss sums go alone."""
        pieces = self.pieces.scatter(collected, self.all) if self.stage == 1 else collected
        return self.over_tokens.forward((sums,))[0], self.complete(self.over_copies.forward(pieces))

    def squares(self, gradients):
        """Over the pieces of the shard group."""
        return self.over_pieces.forward(super().squares(gradients))

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
        (piece,) = self.shape(weight)
        return min(self.index * piece, weight.size), min((self.index + 1) * piece, weight.size)

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
            if start < stop and own and self.copy == 0:
                yield f"{part.key}@{start - begin}:{stop - begin}", value[start - first : stop - first]

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """A piece with its padding."""
        return (padded(weight.size, self.size) // self.size,)

    def cut(self, weight: Weight, value: np.ndarray) -> np.ndarray:
        """The rank's piece with its padding."""
        start, stop = self.span(weight)
        result = np.zeros(self.shape(weight), value.dtype)
        result[: stop - start] = value.reshape(-1)[start:stop]
        return result


def padded(size: int, count: int) -> int:
    """The smallest multiple of `count` that is at least `size`."""
    return -(-size // count) * count
