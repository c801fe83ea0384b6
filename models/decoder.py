"""The dense decoder: embedding, layers, final norm, head and loss as one chain of segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.attention import attention_block
from models.config import ModelConfig
from models.feed_forward import feed_forward_block
from models.kernels import Kernels
from models.layers import Embedding, Linear, Norm
from models.loss import CrossEntropySum
from models.segments import Chain, Segment
from models.weights import weights_of

STYLES = {
    "qkv_proj": "column", "o_proj": "row", "gate_up_proj": "column", "down_proj": "row",
    "head": "column", "embedding": "column",
}  # fmt: skip
"""How tensor parallelism cuts each linear's matrix: by its rows (outputs) or its columns (inputs). A tied head is the
embedding's matrix."""

MakeLayer = Callable[[ModelConfig, int, Kernels, str], Segment]


def decoder_layer(config: ModelConfig, layer: int, kernels: Kernels, rounding: str) -> Chain:
    """Layer number `layer`: attention, then feed-forward."""
    return Chain([block(config, layer, kernels, rounding) for block in (attention_block, feed_forward_block)])


def decoder_segments(
    config: ModelConfig, kernels: Kernels, rounding: str = "none", make_layer: MakeLayer = decoder_layer
) -> list[Segment]:
    """Embedding, layers, and final norm with head and loss: what a pipeline may cut between.

    `rounding` is how linears take their operands (`models.layers.Rounding`); `make_layer` makes each layer, from the
    parameters that `config.layer_parameters` lists.
    """
    specs = config.parameters()
    head = weights_of([specs[0] if config.tied_embeddings else specs[-1]])
    norm = weights_of([next(spec for spec in specs if spec.name == "norm.weight")])
    return [
        Embedding(weights_of(specs[:1]), kernels),
        *(make_layer(config, layer, kernels, rounding) for layer in range(config.layers)),
        Chain([Norm(norm, config.norm_eps, kernels), Linear(head, rounding), CrossEntropySum(kernels)]),
    ]


class Decoder(Chain):
    """Consecutive ones of `decoder_segments`. `weights` lists each tensor once: a tied head reads the first.

    All of them take the context in and give the sum of token losses [1].
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        names = [weight.name for weight in self.weights]
        self.tied = len(set(names)) < len(names)
        if self.tied:
            self.weights = self.weights[:-1]

    def forward(self, x, weights, context):
        """The last segment's output and what was saved."""
        return super().forward(x, self.untied(weights), context)

    def backward_input(self, dy, saved, weights, context):
        """The gradient of the first segment's input, and what the weights' gradients need."""
        return super().backward_input(dy, saved, self.untied(weights), context)

    def backward_weight(self, kept):
        """Gradients in the order of `weights`; a tied head's joins the embedding's."""
        gradients = super().backward_weight(kept)
        if self.tied:
            gradients = (gradients[0] + gradients[-1],) + gradients[1:-1]
        return gradients

    def untied(self, weights):
        """The weights with the tied one in both of its places."""
        return weights + (weights[0],) if self.tied else weights
