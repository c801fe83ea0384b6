"""Expert parallelism: the experts of a layer are spread over ranks, and copies of tokens travel to them and back.

The ranks of one pipeline stage are seen in another way here (`parallel.mesh`, expert view): `ep` of them hold other
experts, `etp` of them slices of the same ones. Every rank routes tokens of its own: where ranks of tp have the same
tokens, each takes a share of them (`SharedTokens`). What a router counts is added up over the ranks that a balance is
kept over.

A dispatcher brings copies to the rows of this rank's experts:

- `FlatDispatcher`: each copy goes to its expert's rank.
- `TwoLevelDispatcher`: the ranks of a group are cut into outer groups. A token goes once to each outer group that has
  an expert of it, to the rank at its own place there, which spreads copies inside; on the way back that rank adds up
  what the token gets there (as in DeepEP and Megatron's hybrid expert parallelism). Where the outer level is slow, it
  moves one row where flat dispatch moves several.

Graphs have static shapes: a rank has room for the most that may come, every token of the group to all that this rank
has of its top_k experts. Operators touch the rows that did come, so that room costs address space and not memory on a
CPU. Nothing is dropped; more rows than there is room for, which cannot be, would end the run.

Shape suffixes as in `models.experts`; P ranks of the group, L experts of one.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from models.config import ModelConfig
from models.experts import LocalDispatcher, RoutedExperts, Router, bounds
from models.kernels import Kernels
from models.segments import Chain, Segment
from models.weights import Part, Weight
from parallel.collectives import Collectives, Group, Room
from parallel.data import Held


def lengths(ends):
    """How many rows each bucket has, from where each ends."""
    return ends - ops.concat((ops.zeros_like(ends[:1]), ends[:-1]))


class SharedTokens(Chain):
    """Ranks of tp have the same tokens; each computes a share, and all get what came of all."""

    def __init__(self, segments, collectives: Collectives) -> None:
        super().__init__(segments)
        self.collectives = collectives
        self.place, self.count = collectives.mesh.index("tp", collectives.rank), collectives.mesh.size("tp")
        self.gather = collectives.AllGather("tp")

    def rebuilt(self, segments):
        """The same around other segments."""
        return SharedTokens(segments, self.collectives)

    def forward(self, x, weights, context):
        """The outputs of all shares."""
        y, saved = super().forward(self.share(x), weights, context)
        return self.gather.forward(y), saved

    def backward_input(self, dy, saved, weights, context):
        """The input gradients of all shares."""
        dx, kept = super().backward_input(self.share(dy), saved, weights, context)
        return self.gather.forward(dx), kept

    def share(self, x):
        """This rank's rows."""
        rows = x.shape[0] // self.count
        return x[self.place * rows : (self.place + 1) * rows]


class FlatDispatcher(nn.Cell):
    """Copies to the ranks of `group`, of which every `slices` neighbours hold slices of the same experts.

    `first` is the number of the group's first expert: copies to experts of other groups stay away.
    """

    plans = 4

    def __init__(
        self, experts: int, top_k: int, group: Group, slices: int, kernels: Kernels, collectives: Collectives,
        first: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.top_k, self.slices, self.first, self.ranks = top_k, slices, first, len(group.ranks)
        self.experts, self.local = experts, experts * slices // self.ranks
        self.by_rank, self.by_expert = kernels.SortPlaces(experts * slices), kernels.SortPlaces(self.local)
        self.rows = kernels.Rows()
        self.counts = collectives.AllToAll(group)
        self.exchange = collectives.Exchange(group, Room(self.ranks * min(top_k, self.local), top_k * slices))
        self.shift = Tensor(np.arange(slices, dtype=np.int32) * self.local)

    def dispatch(self, x, indices, weights):
        """As `LocalDispatcher.dispatch`."""
        keys = self.keys(indices)
        places, ends = self.by_rank.forward(keys, bounds(0, keys.shape[0]))
        last = ends.reshape((self.ranks, self.local))[:, self.local - 1 :].reshape((-1,))
        gives = lengths(last)
        takes = self.counts.forward(gives)
        numbers = ops.cast(keys % self.local, weights.dtype).reshape((-1, 1))
        about = ops.concat((numbers, ops.repeat_elements(weights.reshape((-1, 1)), self.slices, 0)), 1)
        came = self.exchange.forward(self.rows.spread(x, places), gives, takes)
        about = self.exchange.forward(self.rows.spread(about, places), gives, takes)
        there = ops.concat((ops.zeros_like(last[:1]), takes.sum().reshape((1,))))
        order, ends = self.by_expert.forward(ops.cast(about[:, 0], mstype.int32), ops.cast(there, mstype.int32))
        chosen = self.rows.spread(about[:, 1:], order).reshape((-1,))
        return self.rows.spread(came, order), chosen, ends, (places, order, gives, takes)

    def combine(self, rows, plan, like):
        """As `LocalDispatcher.combine`."""
        places, order, gives, takes = plan
        return self.rows.collect(self.exchange.backward(self.rows.take(rows, order), gives, takes), places, like)

    def combine_backward(self, dy, plan):
        """As `LocalDispatcher.combine_backward`."""
        places, order, gives, takes = plan
        return self.rows.spread(self.exchange.forward(self.rows.spread(dy, places), gives, takes), order)

    def dispatch_backward(self, drows, dweights, plan, like):
        """As `LocalDispatcher.dispatch_backward`."""
        places, order, gives, takes = plan
        dx = self.combine(drows, plan, like)
        back = self.exchange.backward(self.rows.take(dweights.reshape((-1, 1)), order), gives, takes)
        each = ops.zeros((places.shape[0], 1), drows.dtype)
        return dx, self.rows.collect(back, places, each).reshape((-1, self.top_k, self.slices)).sum(2)

    def keys(self, indices):
        """[T K slices] int32: for each copy to each slice of its expert, by rank the expert there; -1: nowhere."""
        expert = indices.reshape((-1, 1)) - self.first
        here = ops.logical_and(expert >= 0, expert < self.experts)
        keys = (expert // self.local * self.slices) * self.local + expert % self.local + self.shift
        return ops.select(ops.broadcast_to(here, keys.shape), keys, ops.zeros_like(keys) - 1).reshape((-1,))


class TwoLevelDispatcher(nn.Cell):
    """A token once to each of `outer` groups, and from there flat inside."""

    def __init__(
        self, experts: int, top_k: int, group: Group, slices: int, kernels: Kernels, collectives: Collectives,
        outer: int,
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.top_k, self.outer, self.each = top_k, outer, experts // outer
        inside = len(group.ranks) // outer
        number, place = divmod(group.place, inside)
        across = collectives.subgroup(group, range(place, len(group.ranks), inside))
        within = collectives.subgroup(group, range(number * inside, (number + 1) * inside))
        self.sort, self.rows = kernels.SortPlaces(outer), kernels.Rows()
        self.counts, self.exchange = collectives.AllToAll(across), collectives.Exchange(across, Room(1, 1))
        first = number * self.each
        if inside > 1:
            self.inner = FlatDispatcher(self.each, top_k, within, slices, kernels, collectives, first)
        else:
            self.inner = LocalDispatcher(self.each, top_k, kernels, first)
        self.plans = 3 + self.inner.plans
        self.numbers = Tensor(np.arange(outer, dtype=np.int32))

    def dispatch(self, x, indices, weights):
        """As `LocalDispatcher.dispatch`."""
        places, ends = self.sort.forward(self.keys(indices), bounds(0, indices.shape[0] * self.outer))
        gives = lengths(ends)
        takes = self.counts.forward(gives)
        about = self.rows.spread(ops.concat((ops.cast(indices, weights.dtype), weights), 1), places)
        came = self.exchange.forward(self.rows.spread(x, places), gives, takes)
        about = self.exchange.forward(about, gives, takes)
        there = ops.cast(ops.arange(0, came.shape[0]), mstype.int32) < takes.sum()
        indices = ops.cast(about[:, : self.top_k], mstype.int32)
        there = ops.broadcast_to(there.reshape((-1, 1)), indices.shape)
        indices = ops.select(there, indices, ops.zeros_like(indices) - 1)
        rows, chosen, ends, plan = self.inner.dispatch(came, indices, about[:, self.top_k :])
        return rows, chosen, ends, (places, gives, takes) + plan

    def combine(self, rows, plan, like):
        """As `LocalDispatcher.combine`."""
        places, gives, takes = plan[:3]
        room = ops.zeros((places.shape[0], like.shape[1]), like.dtype)
        return self.rows.collect(
            self.exchange.backward(self.inner.combine(rows, plan[3:], room), gives, takes), places, like
        )

    def combine_backward(self, dy, plan):
        """As `LocalDispatcher.combine_backward`."""
        places, gives, takes = plan[:3]
        return self.inner.combine_backward(self.exchange.forward(self.rows.spread(dy, places), gives, takes), plan[3:])

    def dispatch_backward(self, drows, dweights, plan, like):
        """As `LocalDispatcher.dispatch_backward`."""
        places, gives, takes = plan[:3]
        room = ops.zeros((places.shape[0], like.shape[1]), like.dtype)
        dcame, dchosen = self.inner.dispatch_backward(drows, dweights, plan[3:], room)
        dx = self.rows.collect(self.exchange.backward(dcame, gives, takes), places, like)
        each = ops.zeros((like.shape[0], self.top_k), drows.dtype)
        return dx, self.rows.collect(self.exchange.backward(dchosen, gives, takes), places, each)

    def keys(self, indices):
        """[T outer] int32: the number of each outer group that a token goes to, in its place; -1: not there."""
        group = ops.expand_dims(ops.select(indices < 0, ops.zeros_like(indices) - 1, indices // self.each), 2)
        there = ops.cast(group == self.numbers.reshape((1, 1, -1)), mstype.int32).sum(1) > 0
        numbers = ops.broadcast_to(self.numbers.reshape((1, -1)), there.shape)
        return ops.select(there, numbers, ops.zeros_like(numbers) - 1).reshape((-1,))


class ExpertParallel:
    """Swaps routed experts for the forms that this rank runs."""

    def __init__(self, config: ModelConfig, collectives: Collectives, kernels: Kernels) -> None:
        self.moe, self.collectives, self.kernels = config.moe, collectives, kernels
        self.mesh, self.rank = collectives.mesh, collectives.rank
        self.layout = self.mesh.layout

    def apply(self, segment: Segment) -> Segment:
        """`segment`, which may nest others, in this rank's form."""
        if isinstance(segment, RoutedExperts):
            return self._experts(segment)
        if isinstance(segment, Chain):
            return segment.rebuilt([self.apply(piece) for piece in segment.segments])
        return segment

    def _experts(self, segment: RoutedExperts) -> Segment:
        tp, index = self.mesh.size("tp"), self.mesh.index("tp", self.rank)
        router = Router(self.moe, self.kernels, (index, tp), self.collectives.AllReduce(self._balanced()))
        weights = [self._shared(weight) for weight in segment.weights[:-2]] + [
            self._own(weight) for weight in segment.weights[-2:]
        ]
        rounding = segment.rounding.kind
        experts = RoutedExperts(weights, self.moe, self.kernels, rounding, router, self._dispatcher())
        if tp > 1 and not self.layout.sequence_parallel:
            return SharedTokens([experts], self.collectives)
        return experts

    def _balanced(self) -> tuple[str, ...]:
        return ("dp", "cp", "tp") if self.moe.aux_loss == "global" else ("cp", "tp")

    def _dispatcher(self):
        group, slices = self.collectives.group(("ep", "etp")), self.layout.etp
        sizes = (self.moe.experts, self.moe.top_k)
        if len(group.ranks) == 1:
            return LocalDispatcher(*sizes, self.kernels)
        outer, _ = self.mesh.dispatch()
        if outer > 1:
            return TwoLevelDispatcher(*sizes, group, slices, self.kernels, self.collectives, outer)
        return FlatDispatcher(*sizes, group, slices, self.kernels, self.collectives)

    def _shared(self, weight: Weight) -> Weight:
        """A router's: ranks of tp have it whole, and route other tokens."""
        size, first = self.mesh.size("tp"), self.mesh.index("tp", self.rank) == 0
        parts = len(weight.parts)
        return Held(weight.name, weight.parts, (size,) * parts, (first,) * parts, summed=size > 1)

    def _own(self, weight: Weight) -> Held:
        """The matrices of this rank's experts, cut along their ffn where slices of them lie on several ranks."""
        ep, etp = self.mesh.index("ep", self.rank), self.mesh.index("etp", self.rank)
        count = len(weight.parts) // self.layout.ep
        dim = int(".down_proj." in weight.name)
        parts = tuple(self._slice(part, dim, etp) for part in weight.parts[ep * count : (ep + 1) * count])
        return Held(weight.name, parts, (1,) * len(parts), (True,) * len(parts), axes="edp")

    def _slice(self, part: Part, dim: int, etp: int) -> Part:
        return part.cut(dim, etp, self.layout.etp) if self.layout.etp > 1 else part
