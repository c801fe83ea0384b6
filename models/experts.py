"""A mixture of experts as one segment: a router sends each token to some experts and adds up what they give.

The steps, each with its transpose in the backward: the router's logits and the choice, dispatch of the tokens' copies
to rows that lie sorted by expert, two grouped matmuls around SwiGLU, which takes in the copies' weights, and combine, a
plain sum. Weights are taken in by the experts, and not where copies come together, so that a dispatcher may add copies
up on their way. What moves copies is a dispatcher; this module's stays on one device.

Shape suffixes: T tokens, H hidden, E experts, K of them chosen by a token, B sequences, R rows: copies of tokens sorted
by expert; those past the last expert's end are not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from models.config import TALLIES, ModelConfig
from models.feed_forward import gated
from models.kernels import Kernels
from models.kernels.plain_experts import Rule
from models.layers import Norm, Rounding
from models.segments import COS, Branches, Chain, Residual, Segment, labels_of
from models.shapes import ExpertsConfig
from models.weights import Weight, stacked, weights_of

AUX, Z, ENTROPY, DROPPED = range(TALLIES)
"""What stands in a router's tally behind the experts' counts, each summed over tokens."""


class Alone(nn.Cell):
    """What a router learns of the other ranks where there are none."""

    def forward(self, load):
        """`load` itself."""
        return load


class Capacity(nn.Cell):
    """Takes the copies out that an expert has no room for: more than `factor` times its even share of those at hand."""

    def __init__(self, moe: ExpertsConfig) -> None:
        super().__init__(auto_prefix=False)
        self.factor, self.drop = moe.capacity, moe.drop
        self.numbers = Tensor(np.arange(moe.experts, dtype=np.int32))

    def forward(self, indices, weights):
        """indices [T, K] with -1 in the place of those dropped."""
        keys = indices.reshape((-1,))
        room = math.ceil(self.factor * keys.shape[0] / self.numbers.shape[0])
        order = ops.arange(0, keys.shape[0])
        if self.drop == "probability":
            order = ops.argsort(-weights.reshape((-1,)))
        ordered = ops.gather(keys, order, 0)
        member = ops.cast(ops.expand_dims(ordered, 1) == ops.expand_dims(self.numbers, 0), mstype.int32)
        before = (ops.cumsum(member, 0) * member).sum(1)
        kept = ops.select(before <= room, ordered, ops.zeros_like(ordered) - 1)
        if self.drop == "probability":
            kept = ops.tensor_scatter_elements(kept, ops.cast(order, mstype.int32), kept)
        return kept.reshape(indices.shape)


class Router(nn.Cell):
    """Chooses experts and pulls toward balance.

    `part` is (place, count): the tokens at hand are those at one place of a micro-batch's, cut into so many runs.
    `over` sums the load over all ranks whose tokens a balance is kept over.
    """

    def __init__(self, moe: ExpertsConfig, kernels: Kernels, part: tuple[int, int] = (0, 1), over=None) -> None:
        super().__init__(auto_prefix=False)
        self.moe, self.part, self.over = moe, part, over or Alone()
        sigmoid = moe.score == "sigmoid"
        rule = Rule(moe.top_k, moe.groups, moe.top_groups, sigmoid, moe.normalise, moe.scale, moe.force_uniform)
        self.routing = kernels.Routing(rule, part)
        self.record = None
        """An operator that looks at what was chosen, once a training pass."""
        self.capacity = Capacity(moe) if moe.capacity else None
        self.balances, self.per_sequence = moe.aux_loss != "none" and moe.aux_coef > 0, moe.aux_loss == "sequence"
        self.no_bias = Tensor(np.zeros(moe.experts))
        self.aux = Tensor(np.array([moe.aux_coef * moe.experts / moe.top_k]))
        self.z = Tensor(np.array([moe.z_coef]))
        self.nothing = Tensor(np.zeros(1))
        self.matmul, self.input_matmul = ops.MatMul(transpose_b=True), ops.MatMul()
        self.weight_matmul = ops.MatMul(transpose_a=True)

    def forward(self, x, weights, context):
        """`(indices [T, K], weights [T, K], saved)` of x [T, H]; `weights` are the router's matrix and its bias."""
        matrix = weights[0]
        logits = self.matmul(ops.cast(x, matrix.dtype), matrix)
        bias = weights[1] if self.moe.biased else ops.cast(self.no_bias, matrix.dtype)
        indices, chosen, load, entropy = self.routing.forward(logits, bias, context[COS])
        kept = indices if self.capacity is None else self.capacity.forward(indices, chosen)
        return kept, chosen, (logits, indices, kept, load, entropy)

    def backward_input(self, dweights, x, saved, weights, context):
        """`(dx [T, H], (dlogits, tally))`."""
        logits, indices, kept, load, entropy = saved
        experts = self.moe.experts
        counts, mass = load[:, :experts], load[:, experts:]
        aux, z = ops.cast(self.nothing, logits.dtype), ops.cast(self.nothing, logits.dtype)
        dmass = ops.zeros_like(mass)
        if self.balances:
            dmass = ops.broadcast_to(self.pull(counts, context), mass.shape)
            aux = (dmass * mass).sum().reshape((1,))
        dlogits = self.routing.backward(logits, indices, dweights, dmass, context[COS])
        if self.moe.z_coef > 0:
            lse = ops.logsumexp(logits, 1, True)
            factor = ops.cast(self.z, logits.dtype) * self.valid(context, logits)
            z = (factor * lse * lse).sum().reshape((1,))
            dlogits = dlogits + 2 * factor * lse * ops.exp(logits - lse)
        dropped = ops.cast(kept < 0, logits.dtype).sum().reshape((1,))
        tally = ops.concat((counts.sum(0), aux, z, entropy, dropped))
        if self.record is not None:
            tally = ops.depend(tally, self.record(kept))
        return ops.cast(self.input_matmul(dlogits, weights[0]), x.dtype), (dlogits, tally)

    def pull(self, counts, context):
        """Gradients [B or 1, E] of the balance loss by the shares' sums.

        Of a sequence of S tokens the loss is aux_coef x E sum_e (counts_e / K S) (mass_e / S): 1 x aux_coef where all
        is even (Fedus et al., arXiv 2101.03961, eq. 4; DeepSeek-V3, arXiv 2412.19437, eq. 17). It counts once for each
        of the sequence's tokens that has a label, as all losses are divided by their number.
        """
        labels = labels_of(context).reshape((-1, context[COS].shape[0]))
        valid = ops.cast(labels >= 0, counts.dtype).sum(1).reshape((-1, 1))
        if self.part[0] > 0:
            valid = ops.zeros_like(valid)  # counted at the first place
        load = ops.concat((counts, valid), 1)
        if not self.per_sequence:
            load = load.sum(0).reshape((1, -1))
        load = self.over.forward(load)
        counts, valid = load[:, :-1], load[:, -1:]
        tokens = counts.sum(1).reshape((-1, 1)) / self.moe.top_k
        return ops.cast(self.aux, counts.dtype) * valid * counts / (tokens * tokens)

    def valid(self, context, logits):
        """[T, 1]: 1 for tokens at hand that have a label."""
        place, tokens = self.part[0], logits.shape[0]
        labels = labels_of(context)[place * tokens : (place + 1) * tokens]
        return ops.cast(labels >= 0, logits.dtype).reshape((-1, 1))

    def backward_weight(self, dlogits, x):
        """The gradient of the router's matrix."""
        return self.weight_matmul(dlogits, ops.cast(x, dlogits.dtype))


@ops.constexpr
def bounds(first: int, count: int) -> Tensor:
    """[2] int32: the first bucket's key, and how many keys there are (`SortPlaces`)."""
    return Tensor(np.array([first, count], np.int32))


class LocalDispatcher(nn.Cell):
    """Copies of tokens to the rows of experts that are all here, from number `first` on; others' stay away."""

    plans = 1
    """Tensors of a plan: what the way back needs to know."""

    def __init__(self, experts: int, top_k: int, kernels: Kernels, first: int = 0) -> None:
        super().__init__(auto_prefix=False)
        self.sort, self.rows = kernels.SortPlaces(experts), kernels.Rows()
        self.top_k, self.first = top_k, first

    def dispatch(self, x, indices, weights):
        """x [T, H], indices and weights [T, K] -> (rows [R, H], weights [R], ends [E], plan)."""
        keys = indices.reshape((-1,))
        places, ends = self.sort.forward(keys, bounds(self.first, keys.shape[0]))
        chosen = self.rows.spread(weights.reshape((-1, 1)), places).reshape((-1,))
        return self.rows.spread(x, places), chosen, ends, (places,)

    def combine(self, rows, plan, like):
        """The sum [T, H] of each token's rows; `like` has that shape."""
        return self.rows.collect(rows, plan[0], like)

    def combine_backward(self, dy, plan):
        """dy [T, H] -> [R, H]."""
        return self.rows.spread(dy, plan[0])

    def dispatch_backward(self, drows, dweights, plan, like):
        """-> (dx [T, H], dweights [T, K])."""
        dx = self.combine(drows, plan, like)
        each = ops.zeros((plan[0].shape[0], 1), drows.dtype)
        return dx, self.rows.collect(dweights.reshape((-1, 1)), plan[0], each).reshape((-1, self.top_k))


class RoutedExperts(Segment):
    """x_TH to the sum over each token's experts. `weights`: the router's matrix, its bias where it has one, its tally
    (of which the gradient is what the router counted), the experts' gate and up matrices one below another, and their
    down matrices.
    """

    def __init__(
        self, weights: Sequence[Weight], moe: ExpertsConfig, kernels: Kernels, rounding: str, router: Router, dispatcher
    ) -> None:
        super().__init__(weights)
        self.moe, self.router, self.dispatcher, self.rounding = moe, router, dispatcher, Rounding(rounding)
        self.matmul, self.swiglu = kernels.GroupedMatmul(), kernels.ExpertSwiGLU()
        self.saves, self.keeps = 10 + dispatcher.plans, 8

    def forward(self, x, weights, context):
        """Saves its input, what the router chose and counted, and the rows of experts around their first matmul."""
        gate_up_proj, down_proj = weights[-2:]
        indices, chosen, routed = self.router.forward(x, weights, context)
        rows, row_weights, ends, plan = self.dispatcher.dispatch(self.rounding.operand(x), indices, chosen)
        gate_up = self.matmul.forward(rows, self.rounding.operand(gate_up_proj), ends)
        h = self.swiglu.forward(gate_up, row_weights, ends)
        out = self.matmul.forward(self.rounding.operand(h), self.rounding.operand(down_proj), ends)
        return self.dispatcher.combine(out, plan, x), (x, *routed, rows, row_weights, gate_up, ends, *plan)

    def backward_input(self, dy, saved, weights, context):
        """Keeps what the matrices' gradients need."""
        x, rows, row_weights, gate_up, ends = saved[0], saved[6], saved[7], saved[8], saved[9]
        routed, plan = saved[1:6], saved[10:]
        dout = self.dispatcher.combine_backward(self.rounding.operand(dy), plan)
        dh = self.matmul.backward_input(dout, self.rounding.operand(weights[-1]), ends)
        dgate_up, drow_weights, h = self.swiglu.backward(gate_up, row_weights, ends, dh)
        dgate_up, h = self.rounding.operand(dgate_up), self.rounding.operand(h)
        drows = self.matmul.backward_input(dgate_up, self.rounding.operand(weights[-2]), ends)
        dx, dchosen = self.dispatcher.dispatch_backward(drows, drow_weights, plan, x)
        more, (dlogits, tally) = self.router.backward_input(dchosen, x, routed, weights, context)
        return dx + more, (dlogits, x, tally, dgate_up, rows, dout, h, ends)

    def backward_weight(self, kept):
        """Gradients; the bias and the tally get what was counted."""
        dlogits, x, tally, dgate_up, rows, dout, h, ends = kept
        drouter = self.router.backward_weight(dlogits, x)
        counted = (tally[: self.moe.experts], tally) if self.moe.biased else (tally,)
        dgate_up_proj = self.rounding.master(self.matmul.backward_weight(dgate_up, rows, ends))
        return (drouter, *counted, dgate_up_proj, self.rounding.master(self.matmul.backward_weight(dout, h, ends)))


def experts_block(config: ModelConfig, layer: int, kernels: Kernels, rounding: str) -> Residual:
    """norm, then the routed experts and beside them those that every token meets, around a skip connection."""
    moe = config.moe
    norm, *specs = config.block_parameters(layer, "feed_forward")
    shared = [spec for spec in specs if ".shared." in spec.name]
    experts = [spec for spec in specs if ".experts." in spec.name]
    router, prefix = specs[: -len(experts + shared)], norm.name.removesuffix("_norm.weight")
    weights = [
        *weights_of(router),
        stacked(f"{prefix}.experts.gate_up_proj.weight", experts[: 2 * moe.experts]),
        stacked(f"{prefix}.experts.down_proj.weight", experts[2 * moe.experts :]),
    ]
    dispatcher = LocalDispatcher(moe.experts, moe.top_k, kernels)
    branches = [RoutedExperts(weights, moe, kernels, rounding, Router(moe, kernels), dispatcher)]
    if shared:
        branches.append(Chain(gated(shared, kernels, rounding)))
    block = Branches(branches) if shared else branches[0]
    return Residual([Norm(weights_of([norm]), config.norm_eps, kernels), block])
