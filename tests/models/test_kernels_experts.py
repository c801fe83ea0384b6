"""The kernels of experts, plain and native, against numpy in float64, and backwards against MindSpore's gradient."""

from __future__ import annotations

from functools import cache

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from models.kernels import native, native_experts, plain_experts
from models.kernels.plain_experts import Rule

pytestmark = pytest.mark.usefixtures("graph_mode")
SEED = 31
ROOMS = [
    pytest.param(plain_experts, id="plain"),
    pytest.param(
        native_experts, id="native", marks=pytest.mark.skipif(bool(native.missing()), reason=native.missing())
    ),
]
RULES = {
    "mixtral": (8, Rule(2)),
    "one": (3, Rule(1, normalise=False)),
    "all": (4, Rule(4)),
    "qwen": (16, Rule(4, normalise=False)),
    "deepseek": (16, Rule(4, groups=4, top_groups=2, sigmoid=True, scale=2.5)),
    "single groups": (6, Rule(2, groups=6, top_groups=3, sigmoid=True, normalise=False)),
    "uniform": (8, Rule(2, uniform=True)),
}
SEQUENCES, EVERY, PART = 3, 8, (1, 4)  # the second quarter lies in two sequences
TOKENS = SEQUENCES * EVERY // PART[1]
FIRST = PART[0] * TOKENS
COS = np.zeros((EVERY, 2))


def reference(logits, bias, rule):
    """What `Routing.forward` is to give, a token at a time."""
    experts = logits.shape[1]
    scores = 1 / (1 + np.exp(-logits)) if rule.sigmoid else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    shares = scores / scores.sum(1, keepdims=True)
    indices, weights = np.zeros((TOKENS, rule.top_k), int), np.zeros((TOKENS, rule.top_k))
    for t in range(TOKENS):
        choice = (scores[t] + bias).reshape(rule.groups, -1)
        worth = np.sort(choice, 1)[:, -2:].sum(1)
        kept = np.argsort(-worth, kind="stable")[: rule.top_groups]
        if rule.top_groups < rule.groups:
            choice = np.where(np.isin(np.arange(rule.groups), kept)[:, None], choice, -np.inf)
        indices[t] = np.argsort(-choice.reshape(-1), kind="stable")[: rule.top_k]
        if rule.uniform:
            indices[t] = ((FIRST + t) * rule.top_k + np.arange(rule.top_k)) % experts
        weights[t] = scores[t, indices[t]] * rule.scale
        if rule.normalise:
            weights[t] /= scores[t, indices[t]].sum()
    load = np.zeros((SEQUENCES, 2 * experts))
    for t in range(TOKENS):
        sequence = (FIRST + t) // EVERY
        load[sequence, indices[t]] += 1
        load[sequence, experts:] += shares[t]
    return indices, weights, load, -(shares * np.log(shares)).sum()


class RoutingBoth(nn.Cell):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def construct(self, logits, bias, dweights, dmass, cos):
        indices, weights, load, entropy = self.kernel.forward(logits, bias, cos)
        return indices, weights, load, entropy, self.kernel.backward(logits, indices, dweights, dmass, cos)


class RoutingLoss(nn.Cell):
    """What `backward` is the gradient of, by MindSpore."""

    def __init__(self, rule):
        super().__init__()
        self.kernel = plain_experts.Routing(rule, PART)

    def construct(self, logits, bias, dweights, dmass, cos):
        _, weights, load, _ = self.kernel.forward(logits, bias, cos)
        return (weights * dweights).sum() + (load[:, logits.shape[1] :] * dmass).sum()


@cache
def routing_case(name, dtype):
    """Inputs of a rule's routing, and the gradient of the logits."""
    experts, rule = RULES[name]
    random = np.random.default_rng(SEED).standard_normal
    logits, bias = random((TOKENS, experts)), 0.1 * random(experts)
    dweights, dmass = random((TOKENS, rule.top_k)), random((SEQUENCES, experts))
    inputs = [Tensor(x.astype(dtype)) for x in (logits, bias, dweights, dmass, COS)]
    ms.set_context(mode=ms.PYNATIVE_MODE)  # which has nothing to compile
    wanted = ops.GradOperation(get_all=True)(RoutingLoss(rule))(*inputs)[0].asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    return logits, bias, inputs, wanted


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, np.float64) for name in RULES), ("qwen", np.float32), ("deepseek", np.float32)]
)
def test_a_token_goes_to_the_experts_of_the_rule(room, name, dtype):
    rule = RULES[name][1]
    logits, bias, inputs, wanted = routing_case(name, dtype)
    *found, dlogits = RoutingBoth(room.Routing(rule, PART))(*inputs)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    for one, other in zip(found, reference(logits, bias, rule), strict=True):
        np.testing.assert_allclose(one.asnumpy().reshape(np.shape(other)), other, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dlogits.asnumpy(), wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", ["qwen", "deepseek"])
def test_a_score_that_is_rounded_to_zero_spoils_no_gradient(room, name):
    rule = RULES[name][1]
    _, bias, inputs, _ = routing_case(name, np.float32)
    logits = inputs[0].asnumpy().copy()
    logits[:, 0] = -200.0
    *_, dlogits = RoutingBoth(room.Routing(rule, PART))(Tensor(logits), *inputs[1:])
    dlogits = dlogits.asnumpy()
    assert np.isfinite(dlogits).all() and (dlogits[:, 0] == 0).all() and dlogits[:, 1:].any()


class Sorted(nn.Cell):
    def __init__(self, room, buckets):
        super().__init__()
        self.sort, self.rows = room.SortPlaces(buckets), room.Rows()

    def construct(self, keys, bounds, x, dy):
        places, ends = self.sort.forward(keys, bounds)
        rows = self.rows.spread(x, places)
        return places, ends, rows, self.rows.collect(rows, places, x), self.rows.collect(dy, places, x)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("tokens", "each", "buckets", "first", "there"), [(5, 3, 4, 0, 15), (9, 2, 3, 2, 11), (4, 1, 2, 0, 0)]
)
def test_copies_are_sorted_by_expert_in_their_order_and_collected_again(
    random, room, tokens, each, buckets, first, there
):
    rng = np.random.default_rng(SEED)
    keys = rng.integers(-1, buckets + first + 1, tokens * each).astype(np.int32)
    x, dy = random((tokens, 6)), random((tokens * each, 6))
    bounds = Tensor(np.array([first, there], np.int32))
    places, ends, rows, back, collected = (
        y.asnumpy() for y in Sorted(room, buckets)(Tensor(keys), bounds, Tensor(x), Tensor(dy))
    )
    wanted = [i for e in range(buckets) for i in range(there) if keys[i] - first == e]
    assert [list(places).index(row) for row in range(len(wanted))] == wanted
    assert (np.delete(places, wanted) == -1).all()
    np.testing.assert_array_equal(ends, np.cumsum([sum(keys[i] - first == e for i in wanted) for e in range(buckets)]))
    np.testing.assert_array_equal(rows[: len(wanted)], x[np.array(wanted, int) // each])
    copies = np.bincount(np.array(wanted, int) // each, minlength=tokens)
    np.testing.assert_allclose(back, x * copies[:, None], rtol=1e-14, atol=1e-14)
    sums = np.zeros_like(x)
    for row, i in enumerate(wanted):
        sums[i // each] += dy[row]
    np.testing.assert_allclose(collected, sums, rtol=1e-14, atol=1e-14)


class Expert(nn.Cell):
    def __init__(self, room):
        super().__init__()
        self.matmul, self.swiglu = room.GroupedMatmul(), room.ExpertSwiGLU()

    def construct(self, x, w, weight, ends, dy):
        gate_up = self.matmul.forward(x, w, ends)
        dgate_up, dweight, again = self.swiglu.backward(gate_up, weight, ends, dy)
        return (
            gate_up, self.swiglu.forward(gate_up, weight, ends), again, dweight,
            self.matmul.backward_input(dgate_up, w, ends), self.matmul.backward_weight(dgate_up, x, ends),
        )  # fmt: skip


class DenseExpert(nn.Cell):
    """Differentiable, with the expert of each row given."""

    def __init__(self, owners, experts):
        super().__init__()
        self.hot = Tensor(np.eye(experts)[owners][:, :, None])
        self.experts = experts

    def construct(self, x, w, weight):
        every = ops.matmul(x, w.reshape((self.experts, -1, x.shape[1])).swapaxes(1, 2)).swapaxes(0, 1)
        gate_up = (every * ops.cast(self.hot, x.dtype)).sum(1)
        half = gate_up.shape[1] // 2
        return ops.silu(gate_up[:, :half]) * gate_up[:, half:] * weight.reshape((-1, 1))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("ends", "dtype"),
    [
        ((3, 3, 10), np.float64),
        ((300, 301, 700), np.float64),
        ((0, 0, 0), np.float64),
        ((0, 0, 4), np.float32),
    ],
)
def test_experts_multiply_their_own_rows(random, room, dtype, ends):
    rows, inner, width, beyond = ends[-1], 10, 7, 5
    owners = np.searchsorted(ends, np.arange(rows), "right")
    draw = lambda *shape: random(shape).astype(dtype)  # noqa: E731
    x, weight, dy = draw(rows + beyond, inner), draw(rows + beyond), draw(rows + beyond, width)
    w = draw(3 * 2 * width, inner)
    found = Expert(room)(*map(Tensor, (x, w, weight, np.array(ends, np.int32), dy)))
    gate_up, h, again, dweight, dx, dw = (y.asnumpy() for y in found)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == np.float64 else {"rtol": 2e-5, "atol": 2e-4}
    if rows:
        dense = DenseExpert(owners, 3)
        inputs = [Tensor(x[:rows]), Tensor(w), Tensor(weight[:rows])]
        np.testing.assert_allclose(h[:rows], dense(*inputs).asnumpy(), **tolerance)
        gradients = ops.GradOperation(get_all=True, sens_param=True)(dense)(*inputs, Tensor(dy[:rows]))
        for one, other in zip((dx[:rows], dw, dweight[:rows]), gradients, strict=True):
            np.testing.assert_allclose(one, other.asnumpy(), **tolerance)
        np.testing.assert_allclose(again[:rows], h[:rows], **tolerance)
        assert gate_up.shape == (rows + beyond, 2 * width)
    else:
        assert not dw.any()
