"""The kernels as fused operators of Ascend devices, from `mindspore.ops.auto_generate` of MindSpore 2.10.

Signatures and layouts are those of the installed package; tests compare every call with them, on stand-ins. **None of
this has been run on a device.** A kernel without a class here (`CrossEntropy`, `Embedding`, `SquareSum`) has no fused
operator that takes ids outside a rank's slice or a list of tensors, and stays plain.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import auto_generate

from models.kernels import plain

_WHOLE_SEQUENCE = 2147483647  # the operators' own default of "no limit"


@cache
def _causal_corner() -> Tensor:
    """[2048, 2048] uint8, 1 above the diagonal: the compressed mask of sparse mode 2, whatever the sequence length."""
    return Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))


def missing(name: str, precision: str) -> str:
    """Why kernel `name` has no fused form in this MindSpore at this precision; empty when it has one."""
    kernel = globals().get(name)
    if kernel is None:
        return "no fused operator"
    if precision not in kernel.PRECISIONS:
        return f"the fused operator takes {' or '.join(kernel.PRECISIONS)}"
    absent = [operator for operator in kernel.OPERATORS if not hasattr(auto_generate, operator)]
    return f"this MindSpore has no {', '.join(absent)}" if absent else ""


def _eight(lse):
    """[B, heads, S] -> [B, heads, S, 8]: the operators keep eight copies of each row's number."""
    return ops.broadcast_to(lse.reshape(lse.shape + (1,)), lse.shape + (8,))


class Matmul(plain.Matmul):
    """MatMul is the device's own."""

    OPERATORS = ("MatMul",)
    PRECISIONS = ("fp32", "bf16")


class RMSNorm(nn.Cell):
    """`RmsNorm(epsilon)(x, gamma) -> (y, rstd)`, `RmsNormGrad()(dy, x, rstd, gamma) -> (dx, dgamma float32)`.

    rstd is computed again in the backward, so that a norm saves its input alone as everywhere else.
    """

    OPERATORS = ("RmsNorm", "RmsNormGrad")
    PRECISIONS = ("fp32", "bf16")

    def __init__(self, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.norm = auto_generate.RmsNorm(eps)
        self.norm_grad = auto_generate.RmsNormGrad()

    def forward(self, x, w):
        return self.norm(x, ops.cast(w, x.dtype))[0]

    def backward(self, x, w, dy):
        gamma = ops.cast(w, x.dtype)
        rstd = self.norm(x, gamma)[1]
        dx, dw = self.norm_grad(dy, x, rstd, gamma)
        return dx, ops.cast(dw, w.dtype)


class HeadNorm(plain.HeadNorm):
    """`RMSNorm` above over the heads of q and k."""

    OPERATORS = RMSNorm.OPERATORS
    PRECISIONS = RMSNorm.PRECISIONS

    def __init__(self, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__(heads, kv_heads, eps)
        self.norm = RMSNorm(eps)


class Rotary(nn.Cell):
    """`RotaryPositionEmbedding()(x, cos, sin, mode)` with mode 0 (rotate_half), x [B, S, heads, D], cos [1, S, 1, D].
    It runs in fp32: bf16 keeps too few digits of an angle.
    """

    OPERATORS = ("RotaryPositionEmbedding",)
    PRECISIONS = ("fp32", "bf16")

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__(auto_prefix=False)
        self.turned, self.all = heads + kv_heads, heads + 2 * kv_heads
        self.rotary = auto_generate.RotaryPositionEmbedding()

    def forward(self, qkv, cos, sin):
        whole = (1, cos.shape[0], 1, 2 * cos.shape[1])
        cos = ops.cast(ops.concat((cos, cos), 1), mstype.float32).reshape(whole)
        sin = ops.cast(ops.concat((sin, sin), 1), mstype.float32).reshape(whole)
        x = qkv.reshape(qkv.shape[0] // whole[1], whole[1], self.all, whole[3])
        turned = self.rotary(ops.cast(x[:, :, : self.turned], mstype.float32), cos, sin, 0)
        return ops.concat((ops.cast(turned, qkv.dtype), x[:, :, self.turned :]), 2).reshape(qkv.shape)

    def backward(self, dqkv, cos, sin):
        return self.forward(dqkv, cos, -sin)


class Attention(nn.Cell):
    """`Rotary` above, then `FlashAttentionScore(...)(query, key, value, real_shift, drop_mask, padding_mask, attn_mask,
    ...) -> (softmax_max, softmax_sum, softmax_out, attention_out)` and `FlashAttentionScoreGrad(...)(query, key, value,
    dy, pse_shift, drop_mask, padding_mask, atten_mask, softmax_max, softmax_sum, softmax_in, attention_in, ...) -> (dq,
    dk, dv, dpse)` in layout BSND and in bf16.

    With documents the mask is whole, one byte a pair of tokens, because first keys are data; next_tokens 0 lets the
    operator skip what is above the diagonal. Without, sparse mode 2 (causal from the upper left) takes a small mask of
    fixed size: a whole one of 128k tokens is 16 GiB. The gradient takes exp(s - softmax_max) / softmax_sum, so the
    saved log-sum-exp serves as a maximum beside a sum of 1.
    """

    OPERATORS = ("RotaryPositionEmbedding", "FlashAttentionScore", "FlashAttentionScoreGrad")
    PRECISIONS = ("bf16",)

    def __init__(self, heads: int, kv_heads: int, scale: float, documents: bool = True) -> None:
        super().__init__(auto_prefix=False)
        self.heads, self.kv_heads = heads, kv_heads
        self.causal = None if documents else _causal_corner()
        # head_num, keep_prob, scale_value, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode
        settings = (heads, 1.0, scale, _WHOLE_SEQUENCE, 0, 0, "BSND", 0 if documents else 2)
        self.rotary = Rotary(heads, kv_heads)
        self.attend = auto_generate.FlashAttentionScore(*settings)
        self.attend_grad = auto_generate.FlashAttentionScoreGrad(*settings)

    def forward(self, qkv, cos, sin, first_key):
        q, k, v = self.split(qkv, cos, sin)
        top, total, _, o = self.attend(q, k, v, None, None, None, self.hidden(first_key, cos.shape[0]))
        lse = (top + ops.log(total))[..., 0]
        return ops.cast(o, qkv.dtype).reshape(qkv.shape[0], -1), ops.cast(lse, qkv.dtype).reshape(-1)

    def backward(self, qkv, cos, sin, first_key, o, lse, do):
        q, k, v = self.split(qkv, cos, sin)
        top = _eight(ops.cast(lse, mstype.float32).reshape(q.shape[0], self.heads, q.shape[1]))
        hidden = self.hidden(first_key, cos.shape[0])
        dy, y = ops.cast(do, q.dtype).reshape(q.shape), ops.cast(o, q.dtype).reshape(q.shape)
        dq, dk, dv, _ = self.attend_grad(q, k, v, dy, None, None, None, hidden, top, ops.ones_like(top), None, y)
        dqkv = ops.cast(ops.concat((dq, dk, dv), 2), mstype.float32).reshape(qkv.shape)
        return ops.cast(self.rotary.backward(dqkv, cos, sin), qkv.dtype)

    def split(self, qkv, cos, sin):
        """-> q, k turned, v as bf16 [B, S, heads, D]."""
        seq = cos.shape[0]
        turned = ops.cast(self.rotary.forward(qkv, cos, sin), mstype.bfloat16)
        x = turned.reshape(qkv.shape[0] // seq, seq, self.heads + 2 * self.kv_heads, -1)
        return x[:, :, : self.heads], x[:, :, self.heads : -self.kv_heads], x[:, :, -self.kv_heads :]

    def hidden(self, first_key, seq):
        """[B, 1, S, S] uint8, 1 where query t must not see key j; without documents the compressed mask."""
        if self.causal is not None:
            return self.causal
        key = ops.arange(0, seq).astype(mstype.int32).reshape(1, 1, seq)
        before = key < first_key.reshape(-1, seq, 1)
        return ops.cast(ops.logical_or(before, key > key.reshape(1, seq, 1)), mstype.uint8).reshape(-1, 1, seq, seq)


class BlockAttention(nn.Cell):
    """`FlashAttentionScore` over one block, as in `Attention`, merged into the blocks before it by their log-sum-exps.

    The mask is whole, one byte a pair of the block's tokens, as ranges are data. What the operators give for a query
    whose row is masked out whole is not documented, so nothing of it is used: its output is replaced in the forward,
    and a log-sum-exp far above any score takes its probabilities to 0 in the backward.
    """

    OPERATORS = ("FlashAttentionScore", "FlashAttentionScoreGrad")
    PRECISIONS = ("bf16",)

    def __init__(self, heads: int, kv_heads: int, scale: float) -> None:
        super().__init__(auto_prefix=False)
        self.heads, self.kv_heads = heads, kv_heads
        settings = (heads, 1.0, scale, _WHOLE_SEQUENCE, _WHOLE_SEQUENCE, 0, "BSND", 0)
        self.attend = auto_generate.FlashAttentionScore(*settings)
        self.attend_grad = auto_generate.FlashAttentionScoreGrad(*settings)

    def forward(self, q, kv, first, last, o, lse):
        hidden, blind = self.mask(first, last, kv.shape[0])
        queries, keys, values = self.split(q, kv)
        top, total, _, o_block = self.attend(queries, keys, values, None, None, None, hidden)
        lse_block = ops.masked_fill((top + ops.log(total))[..., 0], blind, plain.MASKED)
        o_block = ops.masked_fill(ops.cast(o_block, mstype.float32), blind.reshape(1, -1, 1, 1), 0.0)
        before = ops.cast(lse, mstype.float32).reshape(lse_block.shape)
        top = ops.maximum(before, lse_block)
        kept, added = ops.exp(before - top), ops.exp(lse_block - top)
        total = kept + added
        merged = o_block * self.by_token(added / total)
        merged = merged + ops.cast(o, mstype.float32).reshape(merged.shape) * self.by_token(kept / total)
        return ops.cast(merged, o.dtype).reshape(o.shape), ops.cast(top + ops.log(total), lse.dtype).reshape(-1)

    def backward(self, q, kv, first, last, o, lse, do):
        hidden, blind = self.mask(first, last, kv.shape[0])
        queries, keys, values = self.split(q, kv)
        top = ops.cast(lse, mstype.float32).reshape(1, self.heads, -1)
        top = _eight(ops.masked_fill(top, blind, -plain.MASKED))
        one = ops.ones_like(top)
        dy, y = ops.cast(do, queries.dtype).reshape(queries.shape), ops.cast(o, queries.dtype).reshape(queries.shape)
        dq, dk, dv, _ = self.attend_grad(queries, keys, values, dy, None, None, None, hidden, top, one, None, y)
        return ops.cast(dq, q.dtype).reshape(q.shape), ops.cast(ops.concat((dk, dv), 2), kv.dtype).reshape(kv.shape)

    def split(self, q, kv):
        """-> q, k, v as bf16 [1, tokens, heads, D]."""
        x = ops.cast(kv, mstype.bfloat16).reshape(1, kv.shape[0], 2 * self.kv_heads, -1)
        q = ops.cast(q, mstype.bfloat16).reshape(1, q.shape[0], self.heads, -1)
        return q, x[:, :, : self.kv_heads], x[:, :, self.kv_heads :]

    def mask(self, first, last, keys):
        """-> uint8 [1, 1, T, U], 1 where query t must not see key u; bool [1, 1, T], the queries that see none."""
        first, last = ops.maximum(first, 0), ops.minimum(last, keys)
        key = ops.arange(0, keys).astype(mstype.int32).reshape(1, 1, 1, keys)
        hidden = ops.logical_or(key < first.reshape(1, 1, -1, 1), key >= last.reshape(1, 1, -1, 1))
        return ops.cast(hidden, mstype.uint8), (first >= last).reshape(1, 1, -1)

    def by_token(self, x):
        """[1, heads, T] -> [1, T, heads, 1]."""
        return x.transpose(0, 2, 1).reshape(1, -1, self.heads, 1)


class SwiGLU(nn.Cell):
    """`Swiglu()(input, dim)`, `SwigluGrad()(grad_output, input, dim)`: the first half gates."""

    OPERATORS = ("Swiglu", "SwigluGrad")
    PRECISIONS = ("fp32", "bf16")

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.gate = auto_generate.Swiglu()
        self.gate_grad = auto_generate.SwigluGrad()

    def forward(self, gate_up):
        return self.gate(gate_up, -1)

    def backward(self, gate_up, dy):
        return self.gate_grad(dy, gate_up, -1)


class GroupedMatmul(nn.Cell):
    """`GroupedMatmulV4()([x], [weight [E, I, O]], ..., group_list int64 [E], ...) -> [y]` with split_item 3 and
    group_type 0, where group_list holds the ends of the groups; `InplaceGroupedMatmulAdd()(x [R, K], weight [R, N],
    group_list, out [E K, N] float32)` adds x_e^T weight_e, in graphs at jit level O0 alone (kernel by kernel).

    Rows past the last end are left as they are. The documentation of the first asks for group lists that increase, of
    the second for ascending ones; an expert without a token makes two ends equal.
    """

    OPERATORS = ("GroupedMatmulV4", "InplaceGroupedMatmulAdd")
    PRECISIONS = ("bf16",)

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.matmul = auto_generate.GroupedMatmulV4()
        self.matmul_add = auto_generate.InplaceGroupedMatmulAdd()

    def forward(self, x, w, ends):
        return self.multiply(x, self.matrices(w, ends).transpose(0, 2, 1), ends)

    def backward_input(self, dy, w, ends):
        return self.multiply(dy, self.matrices(w, ends), ends)

    def backward_weight(self, dy, x, ends):
        out = ops.zeros((ends.shape[0] * dy.shape[1], x.shape[1]), mstype.float32)
        dy, x = ops.cast(dy, mstype.bfloat16), ops.cast(x, mstype.bfloat16)
        return self.matmul_add(dy, x, ops.cast(ends, mstype.int64), out)

    def multiply(self, x, matrices, ends):
        """x_e matrices_e for the rows of each expert e."""
        x, matrices = ops.cast(x, mstype.bfloat16), ops.cast(matrices, mstype.bfloat16)
        groups = ops.cast(ends, mstype.int64)
        # x, weight, six of quantisation, group_list, three of activations, split_item, group_type, group_list_type, ...
        none = (None,) * 6
        return self.matmul([x], [matrices], *none, groups, None, None, None, 3, 0, 0, 0)[0]

    def matrices(self, w, ends):
        """[E, O, I]."""
        return w.reshape(ends.shape[0], w.shape[0] // ends.shape[0], w.shape[1])


class AdamW(plain.AdamW):
    """`AdamWeightDecay()(var, m, v, lr, beta1, beta2, epsilon, decay, gradient)`, which corrects no bias:
    w -= lr (m / (sqrt(v) + epsilon) + decay w). With c1 = 1 - beta1^t and r2 = sqrt(1 - beta2^t), torch's step is
    lr r2 / c1, epsilon r2 and decay c1 / r2. (`AdamW` of the same module corrects it but takes lr as a number, and a
    number that changes is compiled again.)
    """

    OPERATORS = ("AdamWeightDecay",)
    PRECISIONS = ("fp32", "bf16")

    def __init__(self, beta1: float, beta2: float, eps: float) -> None:
        super().__init__(beta1, beta2, eps)
        self.update = auto_generate.AdamWeightDecay()
        # The operator takes 1 - beta in fp32, 1.3e-5 off for 0.999. Corrections by the rounded beta cancel that.
        self.log1, self.log2 = (plain.log(float(np.float32(beta))) for beta in (beta1, beta2))

    def forward(self, weights, first, second, gradients, decays, factor, lr, step):
        dtype = mstype.float32
        done, step = step, ops.cast(step, dtype).reshape(())
        correct1 = -ops.expm1(step * ops.cast(self.log1, dtype))
        root2 = ops.sqrt(-ops.expm1(step * ops.cast(self.log2, dtype)))
        rate = ops.cast(lr, dtype).reshape(()) * root2 / correct1
        beta1, beta2, eps = ops.cast(self.beta1, dtype), ops.cast(self.beta2, dtype), ops.cast(self.eps, dtype) * root2
        for i in range(len(gradients)):
            if 0 in gradients[i].shape:
                continue
            decay = ops.cast(decays[i], dtype) * correct1 / root2
            g = gradients[i] * ops.cast(factor, dtype)
            updated = self.update(weights[i], first[i], second[i], rate, beta1, beta2, eps, decay, g)
            done = ops.depend(done, updated)
        return done
