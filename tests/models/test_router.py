"""What a router counts and pulls toward balance with, against the published formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn

from models.config import ModelConfig
from models.experts import AUX, DROPPED, ENTROPY, Router, Z, experts_block
from models.kernels import choose
from models.shapes import ExpertsConfig

pytestmark = pytest.mark.usefixtures("pynative")
SEQUENCES, LENGTH, HIDDEN, EXPERTS, TOP_K = 3, 8, 6, 4, 2
TOKENS = SEQUENCES * LENGTH


class Routed(nn.Cell):
    """Logits, what was kept, and the tally."""

    def __init__(self, moe, precision):
        super().__init__()
        self.router = Router(moe, choose("auto", precision, "CPU"))

    def construct(self, x, matrix, bias, dweights, tokens, labels, cos):
        context, weights = (tokens, labels, tokens, cos, cos), (matrix, bias)
        kept, _, saved = self.router.forward(x, weights, context)
        _, (_, tally) = self.router.backward_input(dweights, x, saved, weights, context)
        return saved[0], kept, tally


@pytest.fixture
def inputs(random):
    """x, the router's matrix and bias, and labels, of which the sequences have some, one and all."""
    labels = np.zeros((SEQUENCES, LENGTH), np.int32)
    labels[0, 3:], labels[1, 1:] = -1, -1
    return random((TOKENS, HIDDEN)), random((EXPERTS, HIDDEN)), random(EXPERTS), labels.reshape(-1)


def routed(inputs, precision="fp64", **keys):
    """(logits, kept, tally) of what `Routed` gives."""
    moe = ExpertsConfig(experts=EXPERTS, top_k=TOP_K, ffn=8, **keys)
    *floats, labels = inputs
    dtype = np.float64 if precision == "fp64" else np.float32
    tokens, cos = np.zeros(TOKENS, np.int32), np.zeros((LENGTH, 2), dtype)
    given = [*(value.astype(dtype) for value in floats), np.zeros((TOKENS, TOP_K), dtype), tokens, labels, cos]
    return [value.asnumpy() for value in Routed(moe, precision)(*map(Tensor, given))]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["sequence", "global", "micro_batch", "none"])
def test_a_tally_has_the_published_losses_of_the_tokens_with_labels(inputs, form, score):
    """f_e and P_e as in Fedus et al., arXiv 2101.03961, eq. 4 to 6, and DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20;
    the z-loss as in Zoph et al., arXiv 2202.08906, eq. 5."""
    x, matrix, bias, labels = inputs
    logits, kept, tally = routed(inputs, score=score, aux_loss=form, aux_coef=0.3, z_coef=0.2)
    np.testing.assert_allclose(logits, x @ matrix.T, rtol=1e-12)
    scores = np.exp(logits) if score == "softmax" else 1 / (1 + np.exp(-logits))
    shares = scores / scores.sum(1, keepdims=True)
    choice = scores + bias if score == "sigmoid" else scores
    chosen = np.zeros_like(shares)
    np.put_along_axis(chosen, np.argsort(-choice, 1)[:, :TOP_K], 1.0, 1)
    np.testing.assert_array_equal(np.sort(kept, 1), np.sort(np.argsort(-choice, 1)[:, :TOP_K], 1))

    valid = labels >= 0
    runs = LENGTH if form == "sequence" else TOKENS
    fraction, mean = (part.reshape(-1, runs, EXPERTS).mean(1) for part in (chosen / TOP_K, shares))
    each = 0.3 * EXPERTS * (fraction * mean).sum(1) * valid.reshape(-1, runs).sum(1)
    assert tally[EXPERTS + AUX] == pytest.approx(each.sum() * (form != "none"), rel=1e-12)
    lse = np.log(np.exp(logits).sum(1))
    assert tally[EXPERTS + Z] == pytest.approx(0.2 * (lse**2)[valid].sum(), rel=1e-12)
    assert tally[EXPERTS + ENTROPY] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    np.testing.assert_array_equal(tally[:EXPERTS], chosen.sum(0))
    assert tally[EXPERTS + DROPPED] == 0


def test_copies_without_room_are_counted_and_load_is_what_was_asked_for(inputs):
    _, kept, tally = routed(inputs, capacity=0.5)
    _, chosen, load = routed(inputs)
    assert tally[EXPERTS + DROPPED] == (kept < 0).sum() > 0
    np.testing.assert_array_equal(tally[:EXPERTS], load[:EXPERTS])
    np.testing.assert_array_equal(kept[kept >= 0], chosen[kept >= 0])
    assert np.bincount(kept[kept >= 0]).max() == 0.5 * TOKENS * TOP_K / EXPERTS


class Logits(nn.Cell):
    """Those of a block of experts."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def construct(self, x, weights, tokens, cos):
        return self.experts.forward(x, weights, (tokens, tokens, tokens, cos, cos))[1][1]


def test_a_router_multiplies_in_the_precision_of_its_master_weights(inputs):
    """Where linears round to bf16, 8 bits of a number."""
    moe = ExpertsConfig(experts=EXPERTS, top_k=TOP_K, ffn=8)
    config = ModelConfig(layers=1, hidden=HIDDEN, ffn=8, heads=3, kv_heads=3, vocab=16, moe=moe)
    experts = experts_block(config, 0, choose("auto", "bf16", "CPU"), "emulated").segments[1]
    x, matrix = (value.astype(np.float32) for value in inputs[:2])
    weights = [matrix, *(np.zeros(weight.shape, np.float32) for weight in experts.weights[1:])]
    given = (x, tuple(map(Tensor, weights)), np.zeros(TOKENS, np.int32), np.zeros((LENGTH, 2), np.float32))
    logits = Logits(experts)(Tensor(given[0]), given[1], *map(Tensor, given[2:])).asnumpy()
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, x.astype(np.float64) @ matrix.T.astype(np.float64), rtol=1e-5, atol=1e-5)
