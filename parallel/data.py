"""Data parallelism: ranks of dp and cp compute different tokens, and their gradients are summed.

`DataParallel` keeps weights, gradients and moments whole on every rank; `parallel.zero` cuts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops

from models.kernels import Kernels
from models.weights import Weight
from parallel.collectives import Collectives, Primitive
from parallel.collectives.packing import size_of
from parallel.layout import buckets

_buckets = ops.constexpr(buckets)


@dataclass(frozen=True)
class Held(Weight):
    """A weight as one rank of several holds it."""

    replicas: tuple[int, ...]
    """For each part, how many ranks of a replica of the model (pp x tp) hold the same region."""
    firsts: tuple[bool, ...]
    """For each part, whether this rank is the first of those."""
    summed: bool = False
    """Each rank of tp computes a part of the gradient."""
    tied: bool = False
    """The first and the last stage have it, each with a part of the gradient."""
    axes: str = "loss"
    """Ranks along these have the same of it, and read other tokens: ``loss``, or of an expert ``edp``."""


class Bucketed(nn.Cell):
    """A collective on a tuple of tensors in messages of up to `limit` elements, each waiting for its own tensors alone:
    the gradients of the last layers, which are there first, are under way while others are computed.
    """

    def __init__(self, primitive: Primitive, limit: int) -> None:
        super().__init__(auto_prefix=False)
        self.primitive, self.limit, self.map = primitive, limit, ops.HyperMap()

    def forward(self, tensors):
        """The collective of each tensor."""
        spans = _buckets(self.map(size_of, tensors), self.limit)
        results = ()
        for start, stop in spans:
            results = self.primitive.forward(tensors[start:stop]) + results
        return results


class Families(nn.Cell):
    """Weights by the axes over which their gradients are summed: `places` of each in a list of weights."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(auto_prefix=False)
        axes = [axes_of(weight) for weight in weights]
        self.axes = tuple(sorted(set(axes), key=("loss", "edp").index))
        self.places = tuple(tuple(i for i, own in enumerate(axes) if own == kind) for kind in self.axes)

    def chosen(self, family, tensors, places):
        """Those of `tensors` that are of a family; `places` are those of their weights."""
        chosen = ()
        for k in _members(places, self.places[family]):
            chosen = chosen + (tensors[k],)
        return chosen

    def in_order(self, tensors, places):
        """Tensors of all families, one family after another, in the order of `places`."""
        ordered = ()
        for k in _order(places, self.places):
            ordered = ordered + (tensors[k],)
        return ordered


@ops.constexpr
def _members(places: tuple, family: tuple) -> tuple:
    return tuple(k for k, place in enumerate(places) if place in family)


@ops.constexpr
def _order(places: tuple, families: tuple) -> tuple:
    listed = [place for family in families for place in places if place in family]
    return tuple(listed.index(place) for place in places)


class DataParallel(nn.Cell):
    """What a step does with gradients between the backward pass and the optimizer, and with weights after it.

    `weights` are those of this rank, in the order of the gradients. Gradients are sums over the rank's own tokens;
    the trainer divides by the global count afterwards, so that plain sums suffice.
    """

    publishes = False
    """Whether the optimizer has pieces of its own, of which graphs read the whole weights."""
    gathers = False
    """Whether there are pieces alone, and graphs read weights that are gathered when they are needed."""

    def __init__(
        self, weights: Sequence[Weight], collectives: Collectives, kernels: Kernels, dtype: type = np.float32
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weights = tuple(weights)
        self.all = tuple(range(len(self.weights)))
        self.families = Families(self.weights)
        mesh, rank = collectives.mesh, collectives.rank
        self.first = {axes: mesh.index(axes, rank) == 0 for axes in self.families.axes}
        self.over_tp = collectives.AllReduce("tp")
        self.limit = collectives.mesh.layout.bucket_elements(np.dtype(dtype).itemsize)
        self.over_tokens = collectives.AllReduce("loss")
        self.over_axes = nn.CellList(
            [Bucketed(collectives.AllReduce(axes), self.limit) for axes in self.families.axes], auto_prefix=False
        )
        self.over_experts = collectives.AllReduce(("ep", "etp"))
        self.over_stages = collectives.AllReduce("pp")
        self.over_model = collectives.AllReduce(("pp", "tp"))
        self.summed = tuple(i for i, weight in enumerate(weights) if getattr(weight, "summed", False))
        self.tied = tuple(i for i, weight in enumerate(weights) if getattr(weight, "tied", False))
        ends = (0, mesh.size("pp") - 1)
        self.over_ends = collectives.AllReduce(collectives.subgroup("pp", ends)) if self.tied else None
        # Ranks of tp have the same losses and counts, and one of them counts; each has its own wish to stop.
        counts = mesh.index("tp", rank) == 0
        self.nothing = Tensor(np.zeros(1, dtype))
        self.counted = Tensor(np.array([counts, counts, 1], dtype))
        self.once = Tensor(np.array([counts], dtype))
        self.square_sum = kernels.SquareSum()
        self.copies = tuple(self._copies(family) for family in self.families.places)

    def collect(self, gradients, places):
        """What is added up over micro-batches of one micro-batch's gradients: here they themselves.

        `places` are those of the gradients' weights in `weights`.
        """
        return gradients

    def reduce(self, sums, collected):
        """`(sums, gradients)` added up over all ranks that have a part of them.

        sums: [loss sum, valid tokens, wishes to stop]; gradients: a tensor a weight, as the optimizer takes them.
        """
        reduced = ()
        for i in range(len(self.over_axes)):
            chosen = self.families.chosen(i, collected, self.all)
            if i == 0:
                chosen = self.over_axes[i].forward(chosen + (sums,))
                sums, chosen = chosen[-1], chosen[:-1]
            else:
                chosen = self.over_axes[i].forward(chosen)
            reduced = reduced + chosen
        return sums, self.complete(self.families.in_order(reduced, self.all))

    def evaluation(self, sums):
        """[loss sum, valid tokens] over all tokens, of a pass without gradients."""
        return self.over_stages.forward(self.over_tokens.forward(sums))

    def complete(self, gradients):
        """The gradients with those summed of which the ranks of one replica of the model have parts."""
        if len(self.summed) > 0:
            gradients = _added(gradients, self.summed, self.over_tp)
        if len(self.tied) > 0:
            gradients = _added(gradients, self.tied, self.over_ends)
        return gradients

    def total(self, sums, gradients):
        """`sums` over all stages, and the square sum [1] of the whole model's gradients."""
        square = self.squares(0, gradients)
        if len(self.copies) > 1:
            square = square + self.over_experts.forward(self.squares(1, gradients)) * self.once
        return self.over_model.forward((sums * self.counted, square))

    def squares(self, family, gradients):
        """The square sum [1] of this rank's gradients of a family. What several ranks hold counts once among them."""
        square = self.nothing
        for copies, pieces in self.copies[family]:
            chosen = ()
            for i, start, stop in pieces:
                whole = start == 0 and stop == gradients[i].size
                chosen = chosen + (gradients[i] if whole else gradients[i].reshape((-1,))[start:stop],)
            part = self.square_sum.forward(chosen)
            square = square + (part if copies == 1 else part / copies)
        return square

    def span(self, weight: Weight) -> tuple[int, int]:
        """(start, stop) of what the optimizer has here of a weight, counted in elements of the weight laid out flat."""
        return 0, weight.size

    def cut(self, weight: Weight, value: np.ndarray) -> np.ndarray:
        """What the optimizer has here of a weight's value."""
        return value

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Shape of what the optimizer has here of a weight."""
        return weight.shape

    def collected(self, weight: Weight) -> tuple[int, ...]:
        """Shape of what `collect` gives for a weight."""
        return weight.shape

    def weight_entries(self, weight: Weight, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """What this rank writes of a weight into a checkpoint, (key, values): what it holds first of all ranks."""
        for (part, rows), first in zip(weight.split(value), firsts(weight), strict=True):
            if first and self.first[axes_of(weight)]:
                yield part.key, rows

    def entries(self, weight: Weight, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The same of a tensor of the optimizer."""
        return self.weight_entries(weight, value)

    def _copies(self, family: Sequence[int]) -> tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]:
        """How many ranks hold an element -> (weight, start, stop) of the runs of such elements in the gradients."""
        runs: dict[int, list[tuple[int, int, int]]] = {}
        for i, weight in enumerate(self.weights):
            if i not in family or weight.update != "adamw":
                continue
            first, last = self.span(weight)
            end = 0
            for part, copies in zip(weight.parts, getattr(weight, "replicas", (1,) * len(weight.parts)), strict=True):
                begin, end = end, end + part.size
                start, stop = max(begin, first) - first, min(end, last) - first
                if start >= stop:
                    continue
                same = runs.setdefault(copies, [])
                if same and same[-1][0] == i and same[-1][2] == start:
                    start = same.pop()[1]
                same.append((i, start, stop))
        return tuple((copies, tuple(pieces)) for copies, pieces in sorted(runs.items()))


def axes_of(weight: Weight) -> str:
    """The axes along which ranks have the same of a weight and read other tokens."""
    return weight.axes if isinstance(weight, Held) else "loss"


def firsts(weight: Weight) -> tuple[bool, ...]:
    """For each part of a weight, whether this rank is the first of its replica of the model that holds it."""
    return weight.firsts if isinstance(weight, Held) else (True,) * len(weight.parts)


def _added(tensors, places, all_reduce):
    """`tensors`, those at `places` summed over the group, in one message."""
    parts = ()
    for i in places:
        parts = parts + (tensors[i],)
    parts = all_reduce.forward(parts)
    for k, i in enumerate(places):
        tensors = tensors[:i] + (parts[k],) + tensors[i + 1 :]
    return tensors
