"""The plain kernels, which define the others: forward against numpy in float64, backward against MindSpore's own
gradient of the forward."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from models.kernels import plain

pytestmark = pytest.mark.usefixtures("graph_mode")
SEQ, BATCH, HEADS, KV_HEADS, DIM = 7, 2, 4, 2, 6
FIRST_KEY = np.array([0, 0, 0, 2, 2, 5, 5] + [0] * 7, np.int32)  # documents start at 0, 2 (seen late) and 5


def tensor(array) -> Tensor:
    return Tensor(np.ascontiguousarray(array))


class Forward(nn.Cell):
    def __init__(self, kernel, pick=None):
        super().__init__()
        self.kernel, self.pick = kernel, pick

    def construct(self, *inputs):
        y = self.kernel.forward(*inputs)
        if self.pick == "first":
            return y[0]
        if self.pick == "difference":
            return y[0] - y[1]
        return y


class Compare(nn.Cell):
    """Forward, hand-written backward and MindSpore's gradient, in one graph."""

    def __init__(self, kernel, pick=None):
        super().__init__()
        self.kernel, self.forward_alone = kernel, Forward(kernel, pick)
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)
        self.pick = pick

    def construct(self, dy, *inputs):
        y = self.kernel.forward(*inputs)
        automatic = self.gradient(self.forward_alone)(*inputs, dy)
        if self.pick == "first":
            ours = self.kernel.backward(*inputs, y[0], y[1], dy)
        elif self.pick == "difference":
            ours = self.kernel.backward(*inputs, y[0], dy)
        else:
            ours = self.kernel.backward(*inputs, dy)
        return y, ours, automatic


class CompareEmbedding(Compare):
    def construct(self, dy, ids, table):
        automatic = self.gradient(self.forward_alone)(ids, table, dy)
        return self.kernel.forward(ids, table), self.kernel.backward(ids, dy, table), automatic


def array(x) -> np.ndarray:
    return x.asnumpy() if isinstance(x, Tensor) else x


def same(actual, expected, tolerance=1e-13):
    actual, expected = array(actual), array(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=0))


def rms(x, w, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def angles():
    turn = np.outer(np.arange(SEQ), 1 / 10000 ** (np.arange(0, DIM, 2) / DIM))
    return np.cos(turn), np.sin(turn)


def turned(x, cos, sin, t):
    """rotate_half as in transformers' modeling_llama.py."""
    half = np.concatenate([-x[DIM // 2 :], x[: DIM // 2]])
    return x * np.tile(cos[t], 2) + half * np.tile(sin[t], 2)


def attention(qkv, cos, sin, first_key, scale):
    """One sequence, head and query at a time."""

    def rotate(x, t):
        return turned(x, cos, sin, t)

    x = qkv.reshape(BATCH, SEQ, HEADS + 2 * KV_HEADS, DIM)
    o, lse = np.zeros((BATCH, SEQ, HEADS, DIM)), np.zeros((BATCH, HEADS, SEQ))
    for b, h, t in np.ndindex(BATCH, HEADS, SEQ):
        group = h // (HEADS // KV_HEADS)
        seen = range(first_key[b * SEQ + t], t + 1)
        keys = np.array([rotate(x[b, j, HEADS + group], j) for j in seen])
        score = np.exp(keys @ rotate(x[b, t, h], t) * scale)
        lse[b, h, t] = np.log(score.sum())
        o[b, t, h] = score / score.sum() @ x[b, seen, HEADS + KV_HEADS + group]
    return o.reshape(BATCH * SEQ, -1), lse.reshape(-1)


def test_rms_norm_is_the_formula_and_its_gradient(random):
    x, w, dy = random((6, 8)), random(8), random((6, 8))
    y, ours, automatic = Compare(plain.RMSNorm(1e-6))(*map(tensor, (dy, x, w)))
    same(y, rms(x, w))
    for a, b in zip(ours, automatic, strict=True):
        same(a, b)


def test_head_norm_touches_queries_and_keys_alone(random):
    x, wq, wk = random((6, 8, DIM)), random(DIM), random(DIM)
    dy = random((6, 8 * DIM))
    inputs = map(tensor, (dy, x.reshape(6, -1), wq, wk))
    y, ours, automatic = Compare(plain.HeadNorm(HEADS, KV_HEADS, 1e-6))(*inputs)
    same(y, np.concatenate([rms(x[:, :4], wq), rms(x[:, 4:6], wk), x[:, 6:]], 1).reshape(6, -1))
    for a, b in zip(ours, automatic, strict=True):
        same(a, b)


def test_attention_is_rotary_causal_grouped_and_stays_in_its_document(random):
    qkv = random((BATCH * SEQ, (HEADS + 2 * KV_HEADS) * DIM))
    do = random((BATCH * SEQ, HEADS * DIM))
    cos, sin = angles()
    kernel = plain.Attention(HEADS, KV_HEADS, 0.3)
    (o, lse), dqkv, automatic = Compare(kernel, "first")(*map(tensor, (do, qkv, cos, sin, FIRST_KEY)))
    expected_o, expected_lse = attention(qkv, cos, sin, FIRST_KEY, 0.3)
    same(o, expected_o)
    same(lse, expected_lse)
    same(dqkv, automatic[0])


def test_attention_without_documents_is_attention_with_all_first_keys_0(random):
    inputs = random((BATCH * SEQ, (HEADS + 2 * KV_HEADS) * DIM)), *angles(), np.zeros(BATCH * SEQ, np.int32)
    kernel = plain.Attention(HEADS, KV_HEADS, 0.3, documents=False)
    for ours, expected in zip(Forward(kernel)(*map(tensor, inputs)), attention(*inputs, 0.3), strict=True):
        same(ours, expected)


class CompareRotary(Compare):
    def construct(self, dy, qkv, cos, sin):
        automatic = self.gradient(self.forward_alone)(qkv, cos, sin, dy)
        return self.kernel.forward(qkv, cos, sin), self.kernel.backward(dy, cos, sin), automatic


def test_rotary_turns_queries_and_keys_by_their_position_and_passes_values(random):
    qkv, dy = random((BATCH * SEQ, HEADS + 2 * KV_HEADS, DIM)), random((BATCH * SEQ, (HEADS + 2 * KV_HEADS) * DIM))
    cos, sin = angles()
    inputs = map(tensor, (dy, qkv.reshape(BATCH * SEQ, -1), cos, sin))
    y, ours, automatic = CompareRotary(plain.Rotary(HEADS, KV_HEADS))(*inputs)
    expected = qkv.copy()
    for t, h in np.ndindex(BATCH * SEQ, HEADS + KV_HEADS):
        expected[t, h] = turned(qkv[t, h], cos, sin, t % SEQ)
    same(y, expected.reshape(y.shape))
    same(ours, automatic[0])


class CompareBlock(Compare):
    """The backward of a single block, which is the whole gradient."""

    def construct(self, do, q, kv, first, last, o, lse):
        y = self.kernel.forward(q, kv, first, last, o, lse)
        automatic = self.gradient(self.forward_alone)(q, kv, first, last, o, lse, do)
        return y, self.kernel.backward(q, kv, first, last, y[0], y[1], do), automatic


def block_attention(q, kv, first, last, scale):
    """One head and query at a time, over [first, last)."""
    q, kv = q.reshape(-1, HEADS, DIM), kv.reshape(-1, 2 * KV_HEADS, DIM)
    o, lse = np.zeros_like(q), np.full((HEADS, len(q)), plain.EMPTY_LSE)
    for t, h in np.ndindex(len(q), HEADS):
        if first[t] < last[t]:
            group, seen = h // (HEADS // KV_HEADS), slice(first[t], last[t])
            score = np.exp(kv[seen, group] @ q[t, h] * scale)
            o[t, h], lse[h, t] = score / score.sum() @ kv[seen, KV_HEADS + group], np.log(score.sum())
    return o.reshape(len(q), -1), lse.reshape(-1)


def test_block_attention_sees_its_range_and_a_query_without_one_gives_zeros(random):
    first, last = np.array([0, 2, 5, 3, 0], np.int32), np.array([9, 4, 5, 1, 1], np.int32)
    q, kv, do = random((5, HEADS * DIM)), random((9, 2 * KV_HEADS * DIM)), random((5, HEADS * DIM))
    start = np.zeros_like(q), np.full(HEADS * 5, plain.EMPTY_LSE)
    kernel = plain.BlockAttention(HEADS, KV_HEADS, 0.3)
    (o, lse), ours, automatic = CompareBlock(kernel, "first")(*map(tensor, (do, q, kv, first, last, *start)))
    expected_o, expected_lse = block_attention(q, kv, first, last, 0.3)
    same(o, expected_o)
    seen = np.tile(first < last, HEADS)
    same(lse.asnumpy()[seen], expected_lse[seen])
    assert (lse.asnumpy()[~seen] == plain.EMPTY_LSE).all()
    assert not o.asnumpy()[2:4].any() and not ours[0].asnumpy()[2:4].any()
    for a, b in zip(ours, automatic, strict=False):
        same(a, b)


def test_swiglu_gates_with_the_first_half(random):
    x, dy = random((5, 14)), random((5, 7))
    y, ours, automatic = Compare(plain.SwiGLU())(tensor(dy), tensor(x))
    same(y, x[:, :7] / (1 + np.exp(-x[:, :7])) * x[:, 7:])
    same(ours, automatic[0])


def test_cross_entropy_leaves_labels_outside_the_vocabulary_alone(random):
    logits, weight = random((5, 11)) * 5, random(5)
    labels = np.array([0, 10, -1, 11, 4], np.int32)
    kernel = plain.CrossEntropy()
    (lse, target), ours, automatic = Compare(kernel, "difference")(*map(tensor, (weight, logits, labels)))
    same(lse, np.log(np.exp(logits).sum(-1)))
    same(target, np.array([logits[0, 0], logits[1, 10], 0, 0, logits[4, 4]]))
    same(ours, automatic[0])


def test_embedding_gives_zero_rows_outside_the_table_and_adds_repeats(random):
    table, dy = random((9, 4)), random((5, 4))
    ids = np.array([0, 3, 3, -1, 9], np.int32)
    y, ours, automatic = CompareEmbedding(plain.Embedding())(*map(tensor, (dy, ids, table)))
    same(y, np.stack([table[0], table[3], table[3], np.zeros(4), np.zeros(4)]))
    same(ours, automatic[1])


class Norm(nn.Cell):
    def __init__(self):
        super().__init__()
        self.kernel = plain.SquareSum()

    def construct(self, *gradients):
        return self.kernel.forward(gradients)


def test_square_sum_adds_over_all_tensors_empty_ones_too(random):
    a, b, empty = random((3, 4)), random(1), np.zeros(0)
    same(Norm()(*map(tensor, (empty, a, b))), np.array([(a * a).sum() + (b * b).sum()]))
    same(Norm()(tensor(empty)), np.zeros(1))


class Update(nn.Cell):
    """An optimizer step as the trainer makes it: what the kernel returns is all that orders it."""

    def __init__(self, kernel, weights, decays):
        super().__init__()
        self.kernel = kernel
        self.weights, self.first, self.second = (
            ms.ParameterTuple([Parameter(tensor(w * keep), name=f"{name}{i}") for i, w in enumerate(weights)])
            for name, keep in (("w", 1), ("m", 0), ("v", 0))
        )
        self.decays = tensor(decays)

    def construct(self, factor, lr, step, *gradients):
        return self.kernel.forward(self.weights, self.first, self.second, gradients, self.decays, factor, lr, step)


def adamw(weights, moments, gradients, decays, lr, t, beta1=0.9, beta2=0.999, eps=1e-8):
    """One step of torch.optim.AdamW (torch/optim/adamw.py, single tensor), in float64."""
    for i, g in enumerate(gradients):
        m, v = moments[i]
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        moments[i] = m, v
        denominator = np.sqrt(v) / np.sqrt(1 - beta2**t) + eps
        weights[i] = weights[i] * (1 - lr * decays[i]) - lr / (1 - beta1**t) * m / denominator


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.9, 0.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-14), (np.float32, 1e-6)])
def test_adamw_makes_torch_s_steps(random, dtype, tolerance, betas):
    shapes = (3, 4), 5, 1, 0  # slices of a rank may be flat, of one element or of none
    weights, decays = [random(shape) for shape in shapes], np.array([0.1, 0.0, 0.2, 0.1])
    update = Update(plain.AdamW(*betas, 1e-8), [w.astype(dtype) for w in weights], decays.astype(dtype))
    moments = [(0.0, 0.0)] * len(shapes)
    for t in range(1, 5):
        gradients = [random(shape) for shape in shapes]
        numbers = (np.array([x], dtype) for x in (0.5, 1e-2, t))
        update(*map(tensor, numbers), *(tensor(g.astype(dtype)) for g in gradients))
        adamw(weights, moments, [0.5 * g for g in gradients], decays, 1e-2, t, *betas)
    ours, expected = (np.concatenate([w.ravel() for w in some]) for some in (map(array, update.weights), weights))
    same(ours, expected, tolerance)
