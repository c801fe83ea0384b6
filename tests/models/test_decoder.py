"""The decoder's backward against finite differences in fp64, and what it holds against its config."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from models.attention import rotary_tables
from models.config import ModelConfig
from models.decoder import decoder_segments
from models.experts import AUX, Z
from models.kernels import choose
from models.segments import Shared
from models.shapes import ExpertsConfig, LatentConfig, PredictionConfig, RopeScaling
from models.weights import initial_reader

SEQ_LEN, BATCH = 11, 2
VARIANTS = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 10},
    "mixtral, capacity": {"moe": ExpertsConfig(experts=4, top_k=2, ffn=14, capacity=0.7, aux_coef=0.3, z_coef=0.2)},
    "qwen3_moe": {"qk_norm": True, "moe": ExpertsConfig(experts=6, top_k=3, ffn=10, every=2, aux_loss="none")},
    "global, probability": {
        "moe": ExpertsConfig(
            experts=4, top_k=2, ffn=14, aux_loss="global", aux_coef=0.3, normalise=False, capacity=0.7,
            drop="probability",
        )
    },
    "deepseek": {
        "moe": ExpertsConfig(
            experts=8, top_k=2, ffn=10, shared=2, first_dense=1, score="sigmoid", groups=4, top_groups=2, scale=2.5,
            aux_coef=0.3, z_coef=0.2,
        )
    },
    "sandwich, latent": {
        "sandwich_norm": True,
        "latent": LatentConfig(kv_rank=6, nope=4, rope=6, value=8),
        "moe": ExpertsConfig(experts=4, top_k=2, ffn=14),
    },
    "two latents": {
        "latent": LatentConfig(kv_rank=6, q_rank=7, nope=4, rope=4, value=8),
        "rope_scaling": RopeScaling("yarn", factor=4.0, original_length=16, mscale_all_dim=0.7),
    },
    "further tokens": {
        "mtp": PredictionConfig(depth=2, coef=0.5),
        "moe": ExpertsConfig(experts=4, top_k=2, ffn=14, first_dense=2, aux_coef=0.3),
    },
    "a further token, tied": {"mtp": PredictionConfig(depth=1), "tied_embeddings": True},
}  # fmt: skip

QUICK = ("qwen3", "deepseek", "a further token, tied")
"""Those that every test run tries."""
UNLIKE = ("llama", "qwen3_moe", "deepseek")
"""With two layers, most of which are not alike."""

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


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in VARIANTS]
)
def test_gradients_follow_the_loss(variant):
    layers = 2 if variant in UNLIKE else 1
    config = ModelConfig(layers=layers, hidden=24, ffn=20, heads=4, kv_heads=2, vocab=50, **VARIANTS[variant])
    model = Shared(decoder_segments(config, choose("auto", "fp64", "CPU")))
    specs = {part.spec.name: part.spec for weight in model.weights for part in weight.parts}
    assert [spec for spec in specs.values() if spec.update != "tally"] == config.parameters()
    assert sum(np.prod(weight.shape) for weight in model.weights) == sum(spec.size for spec in specs.values())

    rng = np.random.default_rng(5)
    values = [w.stack(initial_reader(1, 0.3)).astype(np.float64) for w in model.weights]
    values = [value + 0.1 * rng.standard_normal(value.shape) for value in values]
    tokens = Tensor(rng.integers(0, 50, BATCH * SEQ_LEN).astype(np.int32))
    labels = Tensor(rng.integers(-1, 50, (1 + 2 * config.mtp.depth) * BATCH * SEQ_LEN).astype(np.int32))
    first_key = Tensor(np.tile(np.where(np.arange(SEQ_LEN) < 4, 0, 4), BATCH).astype(np.int32))
    both = Both(model, *rotary_tables(config, SEQ_LEN, np.float64))

    def loss(weights):
        """The tokens' losses, and those of routers and further tokens, which the tallies have."""
        value, gradients = both(tokens, labels, first_key, *map(Tensor, weights))
        total = float(value.asnumpy()[0])
        for weight, gradient in zip(model.weights, gradients, strict=True):
            if "prediction.tally" in weight.name:
                total += config.mtp.coef / config.mtp.depth * gradient.asnumpy()[0]
            elif weight.update == "tally":
                total += gradient.asnumpy()[config.moe.experts :][[AUX, Z]].sum()
        return total

    _, gradients = both(tokens, labels, first_key, *map(Tensor, values))
    for index, (weight, gradient) in enumerate(zip(model.weights, gradients, strict=True)):
        if weight.update != "adamw":
            continue
        direction, step = rng.standard_normal(weight.shape), 3e-6
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


@pytest.mark.slow
def test_the_halves_of_the_backward_give_the_bits_of_the_whole():
    config = ModelConfig(layers=2, hidden=24, ffn=20, heads=4, kv_heads=2, vocab=50, tied_embeddings=True)
    model = Shared(decoder_segments(config, choose("auto", "fp32", "CPU")))
    rng = np.random.default_rng(6)
    tokens, labels = (Tensor(rng.integers(0, 50, SEQ_LEN).astype(np.int32)) for _ in range(2))
    first_key = Tensor(np.zeros(SEQ_LEN, np.int32))
    weights = [Tensor(w.stack(initial_reader(1, 0.3))) for w in model.weights]
    gradients = [
        cell(model, *rotary_tables(config, SEQ_LEN))(tokens, labels, first_key, *weights)[1] for cell in (Both, Halves)
    ]
    for weight, whole, halves in zip(model.weights, *gradients, strict=True):
        np.testing.assert_array_equal(whole.asnumpy(), halves.asnumpy(), weight.name)
