"""The decoder's backward against finite differences in fp64, and what it holds against its config."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from models.attention import rotary_tables
from models.config import ModelConfig
from models.decoder import Decoder, decoder_segments
from models.kernels import choose
from models.weights import initial_reader

SEQ_LEN, BATCH = 11, 2
VARIANTS = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 10},
}

pytestmark = pytest.mark.usefixtures("graph_mode")


class Both(nn.Cell):
    """Loss and gradients with the weights as inputs."""

    def __init__(self, model, cos, sin):
        super().__init__(auto_prefix=False)
        self.model, self.cos, self.sin = model, Tensor(cos), Tensor(sin)

    def construct(self, tokens, labels, first_key, *weights):
        context = (tokens, labels, first_key, self.cos, self.sin)
        loss, saved = self.model.forward(tokens, weights, context)
        _, gradients = self.model.backward(loss, saved, weights, context)
        return loss, gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_follow_the_loss(variant):
    config = ModelConfig(layers=2, hidden=24, ffn=20, heads=4, kv_heads=2, vocab=50, **VARIANTS[variant])
    model = Decoder(decoder_segments(config, choose("auto", "fp64", "CPU")))
    assert sum(np.prod(weight.shape) for weight in model.weights) == config.parameter_count

    rng = np.random.default_rng(5)
    values = [w.stack(initial_reader(1, 0.3)).astype(np.float64) for w in model.weights]
    values = [value + 0.1 * rng.standard_normal(value.shape) for value in values]
    tokens = Tensor(rng.integers(0, 50, BATCH * SEQ_LEN).astype(np.int32))
    labels = Tensor(rng.integers(-1, 50, BATCH * SEQ_LEN).astype(np.int32))
    first_key = Tensor(np.tile(np.where(np.arange(SEQ_LEN) < 4, 0, 4), BATCH).astype(np.int32))
    both = Both(model, *rotary_tables(config, SEQ_LEN, np.float64))

    def loss(weights):
        return float(both(tokens, labels, first_key, *map(Tensor, weights))[0].asnumpy()[0])

    _, gradients = both(tokens, labels, first_key, *map(Tensor, values))
    for index, (weight, gradient) in enumerate(zip(model.weights, gradients, strict=True)):
        direction, step = rng.standard_normal(weight.shape), 1e-5
        moved = [[v + s * step * direction if i == index else v for i, v in enumerate(values)] for s in (1, -1)]
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        assert slope == pytest.approx(float((gradient.asnumpy() * direction).sum()), rel=1e-5, abs=1e-6), weight.name


class Halves(Both):
    """The same, with all weight gradients after all input gradients."""

    def construct(self, tokens, labels, first_key, *weights):
        context = (tokens, labels, first_key, self.cos, self.sin)
        loss, saved = self.model.forward(tokens, weights, context)
        _, kept = self.model.backward_input(loss, saved, weights, context)
        return loss, self.model.backward_weight(kept)


def test_the_halves_of_the_backward_give_the_bits_of_the_whole():
    config = ModelConfig(layers=2, hidden=24, ffn=20, heads=4, kv_heads=2, vocab=50, tied_embeddings=True)
    model = Decoder(decoder_segments(config, choose("auto", "fp32", "CPU")))
    rng = np.random.default_rng(6)
    tokens, labels = (Tensor(rng.integers(0, 50, SEQ_LEN).astype(np.int32)) for _ in range(2))
    first_key = Tensor(np.zeros(SEQ_LEN, np.int32))
    weights = [Tensor(w.stack(initial_reader(1, 0.3))) for w in model.weights]
    gradients = [
        cell(model, *rotary_tables(config, SEQ_LEN))(tokens, labels, first_key, *weights)[1] for cell in (Both, Halves)
    ]
    for weight, whole, halves in zip(model.weights, *gradients, strict=True):
        np.testing.assert_array_equal(whole.asnumpy(), halves.asnumpy(), weight.name)
