"""The kernels of experts in MindSpore's stock operators; see `models.kernels.plain`.

Shape suffixes beyond those of `plain`: E experts, K of them chosen by a token, B sequences, N copies of tokens, R rows
of experts: copies sorted by expert, expert e's before ends[e] and behind ends[e-1]. R may be more than there are
copies; what lies past the last end is not there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from models.kernels.plain import SwiGLU, constant

TINY = 1e-20
"""Added to a sum of scores, as transformers does."""


class Rule(NamedTuple):
    """How a token chooses; see `models.shapes.ExpertsConfig`."""

    top_k: int
    groups: int = 1
    top_groups: int = 1
    sigmoid: bool = False
    normalise: bool = True
    scale: float = 1.0
    uniform: bool = False


class Routing(nn.Cell):
    """Which experts a token goes to, and with which weight.

    Scores are the softmax of the logits or their sigmoids; a bias is added for the choice alone. Of the groups of
    experts the best `top_groups` stay, by the sum of each one's two best, and of their experts the best `top_k`. `part`
    is (place, count): these are the tokens at one place when those of B whole sequences are cut into so many runs.
    Sequences are as long as the rotary tables [S, R].
    """

    def __init__(self, rule: Rule, part: tuple[int, int] = (0, 1)) -> None:
        super().__init__(auto_prefix=False)
        self.rule, self.part = rule, part
        self.scale, self.tiny = constant(rule.scale), constant(TINY)
        self.softmax, self.sum = ops.Softmax(-1), ops.ReduceSum(keep_dims=True)
        self.top, self.top_two, self.top_groups = (ops.TopK(sorted=True) for _ in range(3))

    def forward(self, logits, bias, cos):
        """logits [T, E], bias [E], cos [S, R] -> (indices [T, K] int32, weights [T, K], load [B, 2 E], entropy [1]).

        load: of each sequence how many copies each expert gets, and the sum of the tokens' shares of it (the scores
        over their sum). entropy: the sum over tokens of that of their shares.
        """
        scores, shares = self.scores(logits)
        indices = self.choose(scores + bias)
        chosen = ops.gather_d(scores, 1, indices)
        weights = chosen * ops.cast(self.scale, chosen.dtype)
        if self.rule.normalise:
            weights = weights / (self.sum(chosen, 1) + ops.cast(self.tiny, chosen.dtype))
        own = self.members(logits, cos)
        picks = ops.cast(self.picks(indices, logits), logits.dtype)
        load = ops.concat((ops.matmul(own, picks.sum(1)), ops.matmul(own, shares)), 1)
        logs = ops.log(ops.maximum(shares, ops.cast(self.tiny, shares.dtype)))
        return indices, weights, load, -(shares * logs).sum().reshape((1,))

    def backward(self, logits, indices, dweights, dmass, cos):
        """dmass [B, E]: gradients of the shares' sums -> dlogits [T, E]."""
        scores, shares = self.scores(logits)
        chosen = ops.gather_d(scores, 1, indices)
        dchosen = dweights * ops.cast(self.scale, dweights.dtype)
        if self.rule.normalise:
            total = self.sum(chosen, 1) + ops.cast(self.tiny, chosen.dtype)
            dchosen = (dchosen - self.sum(dchosen * chosen, 1) / total) / total
        dshares = ops.matmul(self.members(logits, cos).T, dmass)
        spread = (ops.cast(self.picks(indices, logits), logits.dtype) * ops.expand_dims(dchosen, 2)).sum(1)
        if not self.rule.sigmoid:
            dscores = dshares + spread
            return (dscores - self.sum(dscores * scores, 1)) * scores
        dscores = spread + (dshares - self.sum(dshares * shares, 1)) / self.sum(scores, 1)
        return dscores * scores * (1 - scores)

    def scores(self, logits):
        """Scores, and shares, which add up to 1."""
        if not self.rule.sigmoid:
            scores = self.softmax(logits)
            return scores, scores
        scores = 1 / (1 + ops.exp(-logits))
        return scores, scores / self.sum(scores, 1)

    def choose(self, choice):
        """indices [T, K] of the best of `choice` [T, E]."""
        tokens, experts = choice.shape
        rule = self.rule
        if rule.uniform:
            copies = ops.arange(0, tokens * rule.top_k) + self.part[0] * tokens * rule.top_k
            return ops.cast((copies % experts).reshape((tokens, rule.top_k)), mstype.int32)
        if rule.top_groups < rule.groups:
            groups = choice.reshape((tokens, rule.groups, -1))
            worth = self.top_two(groups, min(2, experts // rule.groups))[0].sum(-1)
            _, best = self.top_groups(worth, rule.top_groups)
            numbers = ops.cast(ops.arange(0, rule.groups), mstype.int32).reshape((1, 1, -1))
            kept = ops.cast(ops.expand_dims(best, 2) == numbers, mstype.int32).sum(1) > 0
            lowest = ops.cast(constant(-np.inf), choice.dtype)
            choice = ops.select(ops.broadcast_to(ops.expand_dims(kept, 2), groups.shape), groups, lowest)
            choice = choice.reshape((tokens, experts))
        return self.top(choice, rule.top_k)[1]

    def picks(self, indices, logits):
        """bool [T, K, E]."""
        numbers = ops.cast(ops.arange(0, logits.shape[1]), mstype.int32)
        return ops.expand_dims(indices, 2) == numbers.reshape((1, 1, -1))

    def members(self, logits, cos):
        """[B, T]: 1 where a token is of the sequence."""
        place, count = self.part
        tokens, every = logits.shape[0], cos.shape[0]
        sequence = ops.cast((ops.arange(0, tokens) + place * tokens) // every, mstype.int32)
        numbers = ops.cast(ops.arange(0, tokens * count // every), mstype.int32)
        return ops.cast(ops.expand_dims(sequence, 0) == ops.expand_dims(numbers, 1), logits.dtype)


class SortPlaces(nn.Cell):
    """Where keys stand once they are sorted: those of a bucket together, in their order."""

    def __init__(self, buckets: int) -> None:
        super().__init__(auto_prefix=False)
        self.numbers = Tensor(np.arange(buckets, dtype=np.int32))

    def forward(self, keys, bounds):
        """keys [N] int32, bounds [2] int32 (the first bucket's key, and how many of the keys are there) ->
        (places [N] int32, ends [E] int32); -1 for a key of no bucket.
        """
        there = ops.arange(0, keys.shape[0]) < bounds[1]
        keys = ops.select(there, keys - bounds[0], ops.zeros_like(keys) - 1)
        member = ops.cast(ops.expand_dims(keys, 1) == ops.expand_dims(self.numbers, 0), mstype.int32)
        ends = ops.cast(ops.cumsum(member.sum(0), 0), mstype.int32)
        begins = ends - member.sum(0)
        place = (member * (ops.cumsum(member, 0) - 1 + begins)).sum(1)
        return ops.cast(ops.select(member.sum(1) > 0, place, ops.zeros_like(place) - 1), mstype.int32), ends


class Rows(nn.Cell):
    """Copies of tokens to their places among the experts' rows, and back. Each is the other's transpose."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.sum_by_place = ops.UnsortedSegmentSum()

    def spread(self, x, places):
        """x [T, H], places [T K] int32 -> rows [T K, H]: copy i of token i / K at its place; -1: nowhere."""
        copies = places.shape[0]
        tokens = ops.cast(ops.arange(0, copies), mstype.int32) // (copies // x.shape[0])
        return self.sum_by_place(ops.gather(x, tokens, 0), places, copies)

    def collect(self, rows, places, like):
        """The sum [T, H] of the rows of each token; `like` has that shape."""
        found = ops.gather(rows, ops.maximum(places, ops.zeros_like(places)), 0)
        found = ops.select(ops.broadcast_to((places >= 0).reshape((-1, 1)), found.shape), found, ops.zeros_like(found))
        return found.reshape((like.shape[0], -1, like.shape[1])).sum(1)

    def take(self, rows, places):
        """rows [R, H], places [N] int32 -> [N, H]: the row at each place; where that is -1 nothing is there."""
        return ops.gather(rows, ops.maximum(places, ops.zeros_like(places)), 0)


class GroupedMatmul(nn.Cell):
    """y = x w_e^T for the rows of each expert e. w [E O, I] has the experts' matrices one below another."""

    def forward(self, x, w, ends):
        """x [R, I], ends [E] int32 -> [R, O]."""
        total = 0
        for e in range(ends.shape[0]):
            total = total + ops.matmul(x * self.member(e, ends, x), self.matrix(e, w, ends).T)
        return total

    def backward_input(self, dy, w, ends):
        """dy [R, O] -> dx [R, I]."""
        total = 0
        for e in range(ends.shape[0]):
            total = total + ops.matmul(dy * self.member(e, ends, dy), self.matrix(e, w, ends))
        return total

    def backward_weight(self, dy, x, ends):
        """-> dw [E O, I]."""
        parts = ()
        for e in range(ends.shape[0]):
            parts = parts + (ops.matmul((dy * self.member(e, ends, dy)).T, x * self.member(e, ends, x)),)
        return ops.concat(parts)

    def member(self, e, ends, like):
        """[R, 1]: 1 for rows of expert e."""
        row = ops.cast(ops.arange(0, like.shape[0]), mstype.int32)
        inside = row < ends[e]
        if e > 0:
            inside = ops.logical_and(inside, row >= ends[e - 1])
        return ops.cast(inside, like.dtype).reshape((-1, 1))

    def matrix(self, e, w, ends):
        rows = w.shape[0] // ends.shape[0]
        return w[e * rows : (e + 1) * rows]


class ExpertSwiGLU(nn.Cell):
    """`SwiGLU` of the rows of experts, times each row's weight."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.swiglu = SwiGLU()

    def forward(self, gate_up, weight, ends):
        """gate_up [R, 2F], weight [R], ends [E] int32 -> [R, F]."""
        return self.swiglu.forward(gate_up) * weight.reshape((-1, 1))

    def backward(self, gate_up, weight, ends, dy):
        """-> (dgate_up [R, 2F], dweight [R], y [R, F])."""
        plain = self.swiglu.forward(gate_up)
        dgate_up = self.swiglu.backward(gate_up, dy * weight.reshape((-1, 1)))
        return dgate_up, (dy * plain).sum(1), plain * weight.reshape((-1, 1))
