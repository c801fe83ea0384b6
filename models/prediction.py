"""Multi-token prediction as segments: modules behind the layers, each of which predicts one token further.

Module k joins what the head takes of the module before it (the model itself for k = 1) with the embedding of the k-th
token from here, sends that through a layer of its own and a norm, and lets the model's head predict the token after
(DeepSeek-V3, arXiv 2412.19437, section 2.2). Embedding and head are the model's. A module's loss counts for gradients
and not for the loss: it leaves as what its tally (a weight that is none, as a router's) gets for a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mindspore import dtype as mstype
from mindspore import ops

from models.config import ModelConfig
from models.kernels import Kernels
from models.layers import Embedding, Linear, Norm
from models.loss import CrossEntropySum
from models.segments import Branches, Chain, Segment, Shared, labels_of, later_tokens
from models.weights import Weight, weights_of


class LaterEmbedding(Embedding):
    """The rows of the tokens that come `ahead` tokens from here; zeros behind the sequence."""

    def __init__(self, weights: Sequence[Weight], kernels: Kernels, ahead: int) -> None:
        super().__init__(weights, kernels)
        self.ahead = ahead

    def rebuilt(self, weights: Sequence[Weight], kernels: Kernels) -> LaterEmbedding:
        """The same with other weights."""
        return LaterEmbedding(weights, kernels, self.ahead)

    def rows(self, context):
        """Of the later tokens."""
        return later_tokens(context, self.ahead) - self.first_row


class Widened(Segment):
    """The stream in the dtype of the master weights: a matmul in bf16 gives bf16, and what follows adds to it."""

    def forward(self, x, weights, context):
        """No narrower than fp32."""
        return ops.cast(x, mstype.float32) if x.dtype == mstype.bfloat16 else x, ()

    def backward_input(self, dy, saved, weights, context):
        """As it comes: linears cast what they take."""
        return dy, ()


class Joined(Branches):
    """What two segments make, side by side. The first reads tokens, and nothing of the input."""

    def forward(self, x, weights, context):
        """x_TH to x_T(2H)."""
        middle = self.weight_spans[0][1]
        first, saved = self.segments[0].forward(x, weights[:middle], context)
        second, more = self.segments[1].forward(x, weights[middle:], context)
        return ops.concat((first, second), 1), saved + more

    def backward_input(self, dy, saved, weights, context):
        """The input gradient of the second."""
        middle, end, width = self.weight_spans[0][1], self.saved_spans[0][1], dy.shape[1] // 2
        _, kept = self.segments[0].backward_input(dy[:, :width], saved[:end], weights[:middle], context)
        dx, more = self.segments[1].backward_input(dy[:, width:], saved[end:], weights[middle:], context)
        return dx, kept + more


class Prediction(Chain):
    """A module, from what the head takes to the sum of losses, which it keeps for itself: its own output is zero.

    `ahead` is its number k; `tally` gets [sum of losses, tokens that have one].
    """

    def __init__(self, segments: Sequence[Segment], tally: Weight, ahead: int) -> None:
        super().__init__(segments)
        self.weights, self.tally, self.ahead = (*self.weights, tally), tally, ahead
        self.saves, self.keeps = self.saves + 1, self.keeps + 1

    def rebuilt(self, segments, tally=None):
        """The same around other segments."""
        return Prediction(segments, tally or self.tally, self.ahead)

    def forward(self, x, weights, context):
        """Saves the sum of losses."""
        loss, saved = super().forward(x, weights[:-1], context)
        return ops.zeros_like(loss), saved + (loss,)

    def backward_input(self, dy, saved, weights, context):
        """The gradient by `model.mtp.coef`."""
        loss = saved[-1]
        dx, kept = super().backward_input(dy, saved[:-1], weights[:-1], context)
        valid = ops.cast(labels_of(context, self.ahead) >= 0, loss.dtype).sum().reshape((1,))
        return dx, kept + (ops.concat((loss, valid)),)

    def backward_weight(self, kept):
        """The chain's, and what was counted."""
        return super().backward_weight(kept[:-1]) + (kept[-1],)


def head_segment(
    config: ModelConfig, kernels: Kernels, rounding: str, make_layer: Callable[[ModelConfig, int, Kernels, str], Chain]
) -> Chain:
    """Final norm, head and loss, and the modules of `config.mtp` between them."""
    specs = {spec.name: spec for spec in config.all_parameters()}
    head = [specs["embedding.weight" if config.tied_embeddings else "head.weight"]]

    def norm(name: str) -> Norm:
        return Norm(weights_of([specs[name]]), config.norm_eps, kernels)

    def loss(ahead: int) -> list[Segment]:
        """What follows a norm: head and loss, and beside them the next module."""
        coef = config.mtp.coef / config.mtp.depth if ahead else 1.0
        own = [Linear(weights_of(head), rounding, kernels), CrossEntropySum(kernels, ahead, coef)]
        return own if ahead == config.mtp.depth else [Branches([Chain(own), module(ahead + 1)])]

    def module(ahead: int) -> Prediction:
        layer = config.layers + ahead - 1
        name = f"layers.{layer}"
        embedding = LaterEmbedding(weights_of([specs["embedding.weight"]]), kernels, ahead)
        joined = Joined([Chain([embedding, norm(f"{name}.embedding_norm.weight")]), norm(f"{name}.stream_norm.weight")])
        linear = Linear(weights_of([specs[f"{name}.join_proj.weight"]]), rounding, kernels)
        body = Chain([joined, linear, Widened(), make_layer(config, layer, kernels, rounding)])
        [tally] = weights_of([specs[f"{name}.prediction.tally"]])
        return Prediction([body, norm(f"{name}.norm.weight"), *loss(ahead)], tally, ahead)

    segments = [norm("norm.weight"), *loss(0)]
    return Shared(segments) if config.mtp.depth else Chain(segments)
