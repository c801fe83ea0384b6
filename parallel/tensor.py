"""Tensor parallelism: ranks of tp hold slices of every matrix of a layer, and sequence parallelism beside it.

Styles say how a layer is cut (`models.decoder.STYLES`). A column-parallel linear holds rows of its matrix (outputs), a
row-parallel one columns (inputs), so that a block needs one sum over the ranks where it enters (backward) and one
where it leaves (forward): Shoeybi et al., Megatron-LM, arXiv 1909.08053. With `layout.sequence_parallel` the stream
between blocks, and the norms on it, hold a piece of the tokens on each rank; sums become reduce-scatters and
all-gathers: Korthikanti et al., arXiv 2205.05198.

Shape suffixes as in `models.segments`; P ranks of tp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mindspore import ops

from models.attention import HeadNorm, Heads, SelfAttention
from models.config import ModelConfig
from models.decoder import STYLES
from models.kernels import Kernels
from models.latent import LatentAttention, SharedKey
from models.layers import Embedding, Linear, Norm, Rounding
from models.loss import CrossEntropySum
from models.prediction import Prediction
from models.segments import Branches, Chain, Segment
from models.weights import Part, Weight
from parallel.collectives import Collectives
from parallel.data import Held


class Enter(Segment):
    """x_TH is on every rank; the gradients that the ranks have for it are summed."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.all_reduce = collectives.AllReduce("tp")

    def forward(self, x, weights, context):
        """The identity."""
        return x, ()

    def backward_input(self, dy, saved, weights, context):
        """The sum over the ranks."""
        return self.all_reduce.forward(dy), ()


class Leave(Segment):
    """Every rank has a part of the sum x_TH, and gets the sum."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.all_reduce = collectives.AllReduce("tp")

    def forward(self, x, weights, context):
        """The sum over the ranks."""
        return self.all_reduce.forward(x), ()

    def backward_input(self, dy, saved, weights, context):
        """The identity."""
        return dy, ()


class Scatter(Segment):
    """Every rank has a part of the sum x_TH, and gets its T/P tokens of the sum. `rounding`: of what made the parts."""

    def __init__(self, collectives: Collectives, rounding: str) -> None:
        super().__init__()
        self.scatter, self.rounding = collectives.ReduceScatter("tp"), Rounding(rounding)

    def forward(self, x, weights, context):
        """The sum over the ranks, cut by tokens."""
        return self.scatter.forward(x), ()

    def backward_input(self, dy, saved, weights, context):
        """All tokens' gradients, rounded as the linear before takes them: fewer bytes, and the same numbers."""
        return self.scatter.backward(self.rounding.operand(dy)), ()


class GatheredLinear(Linear):
    """A column-parallel linear on a stream that is cut by tokens: x_(T/P)I to y_T(O/P).

    The input is gathered again for the weight gradient, so that only the rank's own tokens are saved. It is rounded
    before it travels. Gradients are not, here and in `Enter`: the ranks' parts of one sum are added.
    """

    def __init__(self, weights: Sequence[Weight], rounding: str, kernels: Kernels, collectives: Collectives) -> None:
        super().__init__(weights, rounding, kernels)
        self.gather = collectives.AllGather("tp")

    def forward(self, x, weights, context):
        """Saves the rank's own tokens."""
        y, _ = super().forward(self.gather.forward(self.rounding.operand(x)), weights, context)
        return y, (x,)

    def backward_input(self, dy, saved, weights, context):
        """Sums the ranks' gradients and cuts them by tokens."""
        dx, kept = super().backward_input(dy, saved, weights, context)
        return self.gather.backward(dx), kept

    def backward_weight(self, kept):
        """Gathers the input once more."""
        dy, x = kept
        return super().backward_weight((dy, self.gather.forward(self.rounding.operand(x))))


class GatheredKey(Segment):
    """What heads on all ranks share, on a stream that is cut by tokens: x_(T/P)I to x_TI."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.gather = collectives.AllGather("tp")

    def forward(self, x, weights, context):
        """All tokens'."""
        return self.gather.forward(x), ()

    def backward_input(self, dy, saved, weights, context):
        """The sum of the ranks' gradients, cut by tokens."""
        return self.gather.backward(dy), ()


class SharedRows(Segment):
    """A linear whose rows from `first` on are also held by other ranks: keys and values, with fewer heads than ranks.

    Each of those ranks has the gradient from its own queries alone; they are summed.
    """

    def __init__(self, linear: Linear, first: int, all_reduce) -> None:
        super().__init__(linear.weights)
        self.saves, self.keeps = linear.saves, linear.keeps
        self.linear, self.first, self.all_reduce = linear, first, all_reduce

    def forward(self, x, weights, context):
        """The linear's."""
        return self.linear.forward(x, weights, context)

    def backward_input(self, dy, saved, weights, context):
        """The linear's."""
        return self.linear.backward_input(dy, saved, weights, context)

    def backward_weight(self, kept):
        """Its gradients, the shared rows summed."""
        gradients = self.linear.backward_weight(kept)
        own, shared = (), ()
        for gradient in gradients:
            own = own + (gradient[: self.first],)
            shared = shared + (gradient[self.first :],)
        shared = self.all_reduce.forward(shared)
        summed = ()
        for i in range(len(gradients)):
            summed = summed + (ops.concat((own[i], shared[i])),)
        return summed


class VocabularyCrossEntropy(CrossEntropySum):
    """Token cross-entropy over logits_T(V/P): the ranks exchange a log-sum-exp and a target a token, never logits."""

    def __init__(self, kernels: Kernels, whole: CrossEntropySum, first: int, collectives: Collectives) -> None:
        super().__init__(kernels, whole.ahead, whole.coef)
        self.first = first
        self.gather = collectives.AllGather("tp")
        self.largest = ops.ReduceMax()

    def statistics(self, logits, labels):
        """Over the whole vocabulary; one rank has the label's logit, the others zero."""
        lse, target = super().statistics(logits, labels)
        lse, target = self.gather.forward((lse.reshape((1, -1)), target.reshape((1, -1))))
        largest = self.largest(lse, 0)
        return largest + ops.log(self.sum(ops.exp(lse - largest), 0)), self.sum(target, 0)

    def columns(self, labels):
        """Counted from the rank's first entry; labels of other ranks fall outside."""
        return labels - self.first


class TensorParallel:
    """Swaps the segments of a model for the forms that this rank of tp runs."""

    def __init__(self, config: ModelConfig, collectives: Collectives, kernels: Kernels, sequence: bool) -> None:
        mesh, rank = collectives.mesh, collectives.rank
        self.collectives, self.kernels, self.sequence = collectives, kernels, sequence
        self.kv_heads, self.entries = config.kv_heads, config.vocab // mesh.size("tp")
        self.size, self.index = mesh.size("tp"), mesh.index("tp", rank)

    def apply(self, segment: Segment) -> Segment:
        """`segment`, which may nest others, in this rank's form."""
        pieces = self._pieces(segment)
        return pieces[0] if len(pieces) == 1 else Chain(pieces)

    def _pieces(self, segment: Segment) -> list[Segment]:
        kernels, weights = self.kernels, segment.weights
        if isinstance(segment, Branches | LatentAttention):
            return [segment.rebuilt([self.apply(child) for child in segment.segments])]
        if isinstance(segment, Prediction):
            pieces = [piece for child in segment.segments for piece in self._pieces(child)]
            return [segment.rebuilt(pieces, *self._whole([segment.tally], summed=False))]
        if isinstance(segment, Chain):
            return [segment.rebuilt([piece for child in segment.segments for piece in self._pieces(child)])]
        if isinstance(segment, Linear):
            style = {"column": self._column, "row": self._row, "whole": self._everywhere}
            return style[STYLES[_role(weights[0])]](segment)
        if isinstance(segment, SharedKey):
            return [GatheredKey(self.collectives) if self.sequence else Enter(self.collectives)]
        if isinstance(segment, Embedding):
            return [segment.rebuilt(self._cut(weights, 0), kernels), self._leave("none")]
        if isinstance(segment, Norm):
            return [Norm(self._whole(weights, summed=self.sequence), segment.eps, kernels)]
        if isinstance(segment, HeadNorm):
            heads = self._heads(segment.heads)
            return [HeadNorm(self._whole(weights, summed=True), heads, segment.eps, kernels)]
        if isinstance(segment, SelfAttention):
            return [SelfAttention(self._heads(segment.heads), kernels)]
        if isinstance(segment, CrossEntropySum):
            return [VocabularyCrossEntropy(kernels, segment, self.index * self.entries, self.collectives)]
        return [segment]

    def _column(self, linear: Linear) -> list[Segment]:
        weights = self._cut(linear.weights, 0)
        kind = linear.rounding.kind
        if self.sequence:
            pieces: list[Segment] = [GatheredLinear(weights, kind, self.kernels, self.collectives)]
        else:
            pieces = [Enter(self.collectives), Linear(weights, kind, self.kernels)]
        shared = weights[0].replicas[-1]
        if shared > 1:
            index = self.index // shared * shared
            group = self.collectives.subgroup("tp", range(index, index + shared))
            pieces[-1] = SharedRows(pieces[-1], weights[0].parts[0].shape[0], self.collectives.AllReduce(group))
        return pieces

    def _row(self, linear: Linear) -> list[Segment]:
        kind = linear.rounding.kind
        return [Linear(self._cut(linear.weights, 1), kind, self.kernels), self._leave(kind)]

    def _everywhere(self, linear: Linear) -> list[Segment]:
        return [Linear(self._whole(linear.weights, summed=self.sequence), linear.rounding.kind, self.kernels)]

    def _leave(self, rounding: str) -> Segment:
        return Scatter(self.collectives, rounding) if self.sequence else Leave(self.collectives)

    def _heads(self, heads: Heads) -> Heads:
        return replace(heads, queries=heads.queries // self.size, keys=max(1, heads.keys // self.size))

    def _whole(self, weights: Sequence[Weight], summed: bool) -> list[Held]:
        count = [len(weight.parts) for weight in weights]
        return [
            Held(w.name, w.parts, (self.size,) * n, (self.index == 0,) * n, summed)
            for w, n in zip(weights, count, strict=True)
        ]

    def _cut(self, weights: Sequence[Weight], dim: int) -> list[Held]:
        """Each part cut along `dim`; a part with fewer heads than ranks is held by several."""
        cut = []
        for weight in weights:
            pieces = [self._piece(part, dim) for part in weight.parts]
            parts, replicas = zip(*pieces, strict=True)
            cut.append(Held(weight.name, parts, replicas, tuple(self.index % count == 0 for count in replicas)))
        return cut

    def _piece(self, part: Part, dim: int) -> tuple[Part, int]:
        count = min(self.size, self.kv_heads) if re.search(r"\.[kv]_proj\.", part.spec.name) else self.size
        replicas = self.size // count
        return part.cut(dim, self.index // replicas, count), replicas


def _role(weight: Weight) -> str:
    """``qkv_proj`` of ``layers.0.attention.qkv_proj.weight``."""
    return weight.name.split(".")[-2]
