"""The SwiGLU feed-forward block as segments."""

from __future__ import annotations

from collections.abc import Sequence

from models.config import ModelConfig, ParameterSpec
from models.kernels import Kernels
from models.layers import Linear, Norm
from models.segments import Residual, Segment
from models.weights import weights_of


class SwiGLU(Segment):
    """silu(gate) * up over the packed pair [T, 2 ffn]."""

    saves = 1

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernel = kernels.SwiGLU()

    def forward(self, x, weights, context):
        """Saves its input."""
        return self.kernel.forward(x), (x,)

    def backward_input(self, dy, saved, weights, context):
        """No weights: nothing is kept."""
        return self.kernel.backward(saved[0], dy), ()


def gated(specs: Sequence[ParameterSpec], kernels: Kernels, rounding: str) -> list[Segment]:
    """Gate and up projection, SwiGLU, down projection; `specs` are those of the three matrices."""
    gate_up = weights_of(specs[:2], ("gate_up_proj.weight", ("gate_proj.weight", "up_proj.weight")))
    return [Linear(gate_up, rounding, kernels), SwiGLU(kernels), Linear(weights_of(specs[2:]), rounding, kernels)]


def feed_forward_block(config: ModelConfig, layer: int, kernels: Kernels, rounding: str) -> Residual:
    """norm and `gated` around a skip connection."""
    norm, *matrices = config.block_parameters(layer, "feed_forward")
    return Residual([Norm(weights_of([norm]), config.norm_eps, kernels), *gated(matrices, kernels, rounding)])
