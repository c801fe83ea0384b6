"""The decoder: embedding, layers, final norm, head and loss as one chain of segments."""

from __future__ import annotations

from collections.abc import Callable

from models.attention import attention_block
from models.config import ModelConfig
from models.experts import experts_block
from models.feed_forward import feed_forward_block
from models.kernels import Kernels
from models.latent import latent_block
from models.layers import Embedding, Norm
from models.prediction import head_segment
from models.segments import Chain, Segment
from models.weights import weights_of

STYLES = {
    "qkv_proj": "column", "o_proj": "row", "gate_up_proj": "column", "down_proj": "row",
    "head": "column", "embedding": "column", "q_proj": "column", "q_b_proj": "column", "kv_b_proj": "column",
    "q_a_proj": "whole", "kv_a_proj": "whole", "join_proj": "whole",
}  # fmt: skip
"""How tensor parallelism cuts each linear's matrix: by its rows (outputs) or its columns (inputs), or whole on every
rank. A tied head is the embedding's matrix."""

MakeLayer = Callable[[ModelConfig, int, Kernels, str], Segment]


def decoder_layer(config: ModelConfig, layer: int, kernels: Kernels, rounding: str) -> Chain:
    """Layer number `layer`: attention, then feed-forward or experts."""
    attention = latent_block if config.latent.kv_rank else attention_block
    blocks = (attention, experts_block if config.moe.in_layer(layer) else feed_forward_block)
    made = [block(config, layer, kernels, rounding) for block in blocks]
    if config.sandwich_norm:
        specs = [spec for spec in config.layer_parameters(layer) if "_out_norm." in spec.name]
        norms = [Norm(weights_of([spec]), config.norm_eps, kernels) for spec in specs]
        made = [block.rebuilt([*block.segments, norm]) for block, norm in zip(made, norms, strict=True)]
    return Chain(made)


def decoder_segments(
    config: ModelConfig, kernels: Kernels, rounding: str = "none", make_layer: MakeLayer = decoder_layer
) -> list[Segment]:
    """Embedding, layers, and final norm with head, multi-token prediction and loss: what a pipeline may cut between.

    `rounding` is how linears take their operands (`models.layers.Rounding`); `make_layer` makes each layer, from the
    parameters that `config.layer_parameters` lists.
    """
    return [
        Embedding(weights_of(config.parameters()[:1]), kernels),
        *(make_layer(config, layer, kernels, rounding) for layer in range(config.layers)),
        head_segment(config, kernels, rounding, make_layer),
    ]
