"""The ascend column of the kernel table on stand-ins: no Ascend device is here.

A stand-in takes the place of each fused operator's class, checks every call against the signature of the class that is
installed, and computes what that operator's documentation says, in numpy. So names, order, layouts and dtypes are
tested, and the result must equal the plain kernel's; the operators themselves are not.
"""

from __future__ import annotations

import inspect
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import auto_generate

from models.kernels import KERNELS, ascend, plain, plain_experts

pytestmark = pytest.mark.usefixtures("graph_mode")
BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 9, 4, 2, 16


def array(x) -> np.ndarray:
    return x.astype(mstype.float32).asnumpy().astype(np.float64)


def tensor(x, dtype=mstype.float32) -> Tensor:
    return Tensor(np.asarray(x, np.float32)).astype(dtype)


class StandIn:
    """Replaces operator `name`; `compute(settings, inputs)` gets both by the installed class's parameter names."""

    def __init__(self, monkeypatch, name, compute):
        self.real, self.compute, self.calls = getattr(auto_generate, name), compute, []
        monkeypatch.setattr(ascend.auto_generate, name, self)

    def __call__(self, *args, **kwargs):
        settings = self.bind(self.real.__init__, args, kwargs)

        def run(*inputs, **named):
            bound = self.bind(self.real.__call__, inputs, named)
            self.calls.append((settings, bound))
            return self.compute(settings, bound)

        return run

    @staticmethod
    def bind(function, args, kwargs) -> dict:
        bound = inspect.signature(function).bind(None, *args, **kwargs)
        bound.apply_defaults()
        return {key: value for key, value in bound.arguments.items() if key != "self"}


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(array(a), array(b), rtol=0, atol=tolerance * np.abs(array(b)).max(initial=0))


def rms_norm(settings, inputs):
    x, gamma = inputs["x"], inputs["gamma"]
    assert x.dtype == gamma.dtype  # documented TypeError
    rstd = 1 / np.sqrt((array(x) ** 2).mean(-1, keepdims=True) + settings["epsilon"])
    return tensor(array(x) * rstd * array(gamma), x.dtype), tensor(rstd)


def rms_norm_grad(_, inputs):
    dy, x, rstd, gamma = (array(inputs[name]) for name in ("dy", "x", "rstd", "gamma"))
    assert inputs["rstd"].dtype == mstype.float32 and rstd.shape == x.shape[:-1] + (1,)
    x_hat, g = x * rstd, dy * gamma
    dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdims=True))
    return tensor(dx, inputs["x"].dtype), tensor((dy * x_hat).reshape(-1, x.shape[-1]).sum(0))


def test_rms_norm_and_head_norm(monkeypatch, random):
    StandIn(monkeypatch, "RmsNorm", rms_norm)
    StandIn(monkeypatch, "RmsNormGrad", rms_norm_grad)
    x, w, dy = tensor(random((5, 8))), tensor(random(8)), tensor(random((5, 8)))
    for a, b in zip(both(ascend.RMSNorm(1e-5), x, w, dy), both(plain.RMSNorm(1e-5), x, w, dy), strict=True):
        close(a, b)
    x, dy = (tensor(random((5, 8 * DIM))) for _ in range(2))
    wq, wk = tensor(random(DIM)), tensor(random(DIM))
    ours, theirs = (both(room.HeadNorm(HEADS, KV_HEADS, 1e-5), x, wq, wk, dy) for room in (ascend, plain))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def both(kernel, *inputs):
    y, gradients = kernel.forward(*inputs[:-1]), kernel.backward(*inputs)
    return y, *(gradients if isinstance(gradients, tuple) else (gradients,))


def test_swiglu(monkeypatch, random):
    def halves(x, dim):
        assert dim == -1
        return np.split(array(x), 2, -1)

    def forward(_, inputs):
        a, b = halves(inputs["input"], inputs["dim"])
        return tensor(a / (1 + np.exp(-a)) * b)

    def backward(_, inputs):
        (a, b), dy = halves(inputs["input"], inputs["dim"]), array(inputs["grad_output"])
        s = 1 / (1 + np.exp(-a))
        return tensor(np.concatenate([dy * b * s * (1 + a * (1 - s)), dy * a * s], -1))

    StandIn(monkeypatch, "Swiglu", forward)
    StandIn(monkeypatch, "SwigluGrad", backward)
    x, dy = tensor(random((5, 14))), tensor(random((5, 7)))
    for a, b in zip(both(ascend.SwiGLU(), x, dy), both(plain.SwiGLU(), x, dy), strict=True):
        close(a, b)


def grouped(x, ends, begin=0):
    """The rows of each group."""
    for end in ends:
        yield x[begin:end]
        begin = end


def grouped_matmul(_, inputs):
    [x], [weight], ends = inputs["x"], inputs["weight"], inputs["group_list"].asnumpy()
    assert x.dtype == weight.dtype == mstype.bfloat16 and inputs["group_list"].dtype == mstype.int64
    assert (inputs["split_item"], inputs["group_type"], inputs["group_list_type"]) == (3, 0, 0)
    assert weight.shape[:2] == (len(ends), x.shape[1]) and ends[-1] <= x.shape[0]
    others = {"x", "weight", "group_list", "split_item", "group_type", "group_list_type", "act_type"}
    assert all(value is None for name, value in inputs.items() if name not in others) and inputs["act_type"] == 0
    y = np.full((x.shape[0], weight.shape[2]), np.nan)  # what is there before
    y[: ends[-1]] = np.concatenate([a @ b for a, b in zip(grouped(array(x), ends), array(weight), strict=True)])
    return [tensor(y, mstype.bfloat16)]


def grouped_matmul_add(_, inputs):
    x, weight, out, ends = inputs["x"], inputs["weight"], inputs["out"], inputs["group_list"].asnumpy()
    assert x.dtype == weight.dtype == mstype.bfloat16 and inputs["group_list"].dtype == mstype.int64
    assert out.dtype == mstype.float32 and out.shape == (len(ends) * x.shape[1], weight.shape[1])
    pairs = zip(grouped(array(x), ends), grouped(array(weight), ends), strict=True)
    return tensor(array(out) + np.concatenate([a.T @ b for a, b in pairs]))


def test_grouped_matmul_in_one_call_each_way(monkeypatch, random):
    calls = StandIn(monkeypatch, "GroupedMatmulV4", grouped_matmul).calls
    more = StandIn(monkeypatch, "InplaceGroupedMatmulAdd", grouped_matmul_add).calls
    ours, theirs = ascend.GroupedMatmul(), plain_experts.GroupedMatmul()
    ends, rows, inner, outer = Tensor(np.array([3, 3, 8], np.int32)), 8, 6, 10
    x, dy, w = (
        tensor(random(shape), mstype.bfloat16) for shape in ((rows + 2, inner), (rows + 2, outer), (3 * outer, inner))
    )
    pairs = (
        (ours.forward(x, w, ends), theirs.forward(tensor(array(x)), tensor(array(w)), ends)),
        (ours.backward_input(dy, w, ends), theirs.backward_input(tensor(array(dy)), tensor(array(w)), ends)),
    )
    for a, b in pairs:
        assert a.dtype == mstype.bfloat16
        close(a[:rows], b[:rows], 1e-2)
    close(ours.backward_weight(dy, x, ends), theirs.backward_weight(tensor(array(dy)), tensor(array(x)), ends))
    assert (len(calls), len(more)) == (2, 1)


def rotary(_, inputs):
    x, cos, sin = (array(inputs[name]) for name in ("x", "cos", "sin"))
    assert inputs["mode"] == 0 and cos.shape == sin.shape == (1, x.shape[1], 1, x.shape[3])  # BSND takes 1S1D
    assert inputs["x"].dtype == inputs["cos"].dtype == inputs["sin"].dtype == mstype.float32
    half = x.shape[-1] // 2
    return tensor(x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin)


def test_rotary(monkeypatch, random):
    turned = StandIn(monkeypatch, "RotaryPositionEmbedding", rotary)
    qkv, dqkv = (tensor(random((BATCH * SEQ, 8 * DIM))) for _ in range(2))
    turn = np.outer(np.arange(SEQ), 1 / 10000 ** (np.arange(0, DIM, 2) / DIM))
    cos, sin = tensor(np.cos(turn)), tensor(np.sin(turn))
    for dtype, tolerance in (mstype.float32, 1e-5), (mstype.bfloat16, 1e-2):
        ours, theirs = (room.Rotary(HEADS, KV_HEADS) for room in (ascend, plain))
        for name, x in ("forward", qkv), ("backward", dqkv):
            y = getattr(ours, name)(x.astype(dtype), cos, sin)
            assert y.dtype == dtype
            close(y, getattr(theirs, name)(x, cos, sin), tolerance)
    assert len(turned.calls) == 4


def flash_inputs(settings, inputs, mask, masked):
    """Query, repeated keys and values as [B, N1, S, D], and scores, `masked` where hidden; checks what the
    documentation demands."""
    assert settings["input_layout"] == "BSND" and settings["keep_prob"] == 1.0
    assert settings["pre_tokens"] >= SEQ
    for name in ("query", "key", "value"):
        assert inputs[name].dtype == mstype.bfloat16
    q, k, v = (array(inputs[name]).transpose(0, 2, 1, 3) for name in ("query", "key", "value"))
    assert q.shape[1] == settings["head_num"]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    hidden = inputs[mask]
    assert hidden.dtype == mstype.uint8
    hidden = hidden.asnumpy()
    if settings["sparse_mode"] == 2:  # causal from the upper left; every block takes its mask from this one
        np.testing.assert_array_equal(hidden, np.triu(np.ones((2048, 2048)), 1))
        hidden = np.triu(np.ones((SEQ, SEQ)), 1)
    else:
        assert settings["sparse_mode"] == 0 and hidden.shape == (q.shape[0], 1, q.shape[2], k.shape[2])
    scores = q @ k.transpose(0, 1, 3, 2) * settings["scale_value"]
    return q, k, v, np.where(hidden == 1, masked, scores)


def flash(settings, inputs, masked=-np.inf):
    q, _, v, scores = flash_inputs(settings, inputs, "attn_mask", masked)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    o = np.exp(scores - top) / total @ v
    eight = q.shape[:3] + (8,)
    return (
        tensor(np.broadcast_to(top, eight)),
        tensor(np.broadcast_to(total, eight)),
        tensor(0),
        tensor(o.transpose(0, 2, 1, 3), mstype.bfloat16),
    )


def flash_grad(settings, inputs, masked=-np.inf):
    q, k, v, scores = flash_inputs(settings, inputs, "atten_mask", masked)
    top, total = inputs["softmax_max"], inputs["softmax_sum"]
    assert top.dtype == total.dtype == mstype.float32 and top.shape == total.shape == q.shape[:3] + (8,)
    assert inputs["dy"].shape == inputs["attention_in"].shape == inputs["query"].shape
    p = np.exp(scores - array(top)[..., :1]) / array(total)[..., :1]
    dy, y = (array(inputs[name]).transpose(0, 2, 1, 3) for name in ("dy", "attention_in"))
    ds = p * (dy @ v.transpose(0, 1, 3, 2) - (dy * y).sum(-1, keepdims=True)) * settings["scale_value"]
    shared = (q.shape[0], KV_HEADS, HEADS // KV_HEADS, k.shape[2], DIM)
    dk = (ds.transpose(0, 1, 3, 2) @ q).reshape(shared).sum(2)
    dv = (p.transpose(0, 1, 3, 2) @ dy).reshape(shared).sum(2)
    return *(tensor(g.transpose(0, 2, 1, 3), mstype.bfloat16) for g in (ds @ k, dk, dv)), tensor(0)


@pytest.mark.parametrize("documents", [True, False])
def test_attention_in_bsnd_with_a_whole_mask_for_documents_alone(monkeypatch, random, documents):
    turned = StandIn(monkeypatch, "RotaryPositionEmbedding", rotary)
    forward = StandIn(monkeypatch, "FlashAttentionScore", flash)
    backward = StandIn(monkeypatch, "FlashAttentionScoreGrad", flash_grad)
    turn = np.outer(np.arange(SEQ), 1 / 10000 ** (np.arange(0, DIM, 2) / DIM))
    first = Tensor(documents * np.tile([0, 0, 0, 3, 3, 3, 3, 7, 7], BATCH).astype(np.int32))
    inputs = tensor(random((BATCH * SEQ, 8 * DIM))), tensor(np.cos(turn)), tensor(np.sin(turn)), first
    do = tensor(random((BATCH * SEQ, HEADS * DIM)))
    results = []
    for room in (ascend, plain):
        kernel = room.Attention(HEADS, KV_HEADS, 0.25, documents)
        o, lse = kernel.forward(*inputs)
        results.append((o, lse, kernel.backward(*inputs, o, lse, do)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == mstype.float32
        close(a, b, 2e-2)  # bf16 has 8 bits
    assert (len(turned.calls), len(forward.calls), len(backward.calls)) == (3, 1, 1)
    settings = forward.calls[0][0]
    assert settings == backward.calls[0][0] and settings["next_tokens"] == 0
    assert settings["sparse_mode"] == (0 if documents else 2)


@pytest.mark.parametrize("masked", [-np.inf, -3e38])
@np.errstate(invalid="ignore")
def test_block_attention_takes_nothing_from_a_row_that_is_masked_out_whole(monkeypatch, random, masked):
    """With -inf such a row's softmax is NaN, with a finite number the mean of what is hidden: both may be."""
    forward = StandIn(monkeypatch, "FlashAttentionScore", partial(flash, masked=masked))
    backward = StandIn(monkeypatch, "FlashAttentionScoreGrad", partial(flash_grad, masked=masked))
    queries, keys = 5, 11
    first = np.array([[0, 3, 9, 4, -2], [2, 2, 0, 0, 5]], np.int32)
    last = np.array([[11, 4, 3, 4, 20], [7, 2, 12, 0, 6]], np.int32)  # the fourth query sees nothing at all
    q, do = (tensor(random((queries, HEADS * DIM))) for _ in range(2))
    kv = [tensor(random((keys, 2 * KV_HEADS * DIM))) for _ in range(2)]
    results = []
    for room in (ascend, plain):
        kernel = room.BlockAttention(HEADS, KV_HEADS, 0.25)
        o, lse = ops.zeros_like(q), tensor(np.full(HEADS * queries, plain.EMPTY_LSE))
        blocks = [(q, kv[i], Tensor(first[i]), Tensor(last[i])) for i in range(2)]
        for block in blocks:
            o, lse = kernel.forward(*block, o, lse)
        gradients = [g for block in blocks for g in kernel.backward(*block, o, lse, do)]
        never = lse == plain.EMPTY_LSE
        results.append((o, never, lse.masked_fill(never, 0), *gradients))
    for a, b in zip(*results, strict=True):
        close(a, b, 2e-2)
    for settings, _ in forward.calls + backward.calls:
        assert settings["next_tokens"] >= keys and settings["pre_tokens"] >= queries


class Update(nn.Cell):
    def __init__(self, kernel, weights):
        super().__init__()
        self.kernel, self.decays = kernel, Tensor(np.array([0.1, 0.0, 0.1], np.float32))
        self.weights, self.first, self.second = (
            ms.ParameterTuple([Parameter(Tensor(w * keep), name=f"{name}{i}") for i, w in enumerate(weights)])
            for name, keep in (("w", 1), ("m", 0), ("v", 0))
        )

    def construct(self, factor, lr, step, *gradients):
        return self.kernel.forward(self.weights, self.first, self.second, gradients, self.decays, factor, lr, step)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.9, 0.0)], ids=str)
def test_adamw_out_of_an_operator_without_bias_correction(random, betas):
    """`AdamWeightDecay` has a CPU form too, so this one runs."""
    shapes = (3, 4), 5, 0
    weights = [random(shape).astype(np.float32) for shape in shapes]
    ours, theirs = (Update(room.AdamW(*betas, 1e-8), weights) for room in (ascend, plain))
    for step in range(1, 4):
        gradients = [tensor(random(shape)) for shape in shapes]
        for update in (ours, theirs):
            update(tensor([0.5]), tensor([1e-2]), tensor([step]), *gradients)
    for group, tolerance in ("weights", 1e-6), ("first", 1e-6), ("second", 2e-5):  # it rounds 1 - beta2
        for a, b in zip(getattr(ours, group), getattr(theirs, group), strict=True):
            close(a, b, tolerance)


def test_the_operators_named_are_in_the_installed_mindspore():
    kernels = [rooms["ascend"] for rooms in KERNELS.values() if "ascend" in rooms]
    assert len(kernels) >= 7
    for operator in {name for kernel in kernels for name in kernel.OPERATORS}:
        assert hasattr(auto_generate, operator), operator
