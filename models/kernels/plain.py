"""The kernels in MindSpore's stock operators: what every other implementation is compared with.

They run on CPU in fp32 and fp64 and on Ascend. Shape suffixes: T tokens (B sequences of S), H hidden, C = (heads +
2 kv_heads) D packed projections, D head dim, R = D/2, F feed-forward, V vocabulary, N = B heads S rows of attention.

A kernel is a Cell with two plain methods, `forward` and `backward`, that other Cells call inside their graph. Nothing
is differentiated automatically. Constants are fp64 tensors that are cast in the graph: MindSpore rounds a Python float
to fp32 before it meets an fp64 tensor.
"""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

EMPTY_LSE = -1e30
"""The log-sum-exp of a query that has seen no key yet: finite, so that no inf - inf is made, and the same number in
every dtype."""

MASKED = -1e32
"""A score that exp takes to 0 beside any log-sum-exp, `EMPTY_LSE` too."""


def constant(value: float) -> Tensor:
    """A number that keeps its digits until it meets a tensor of a known dtype."""
    return Tensor(value, mstype.float64)


def log(beta: float) -> Tensor:
    """log beta; -inf for 0, of which expm1 makes -1: a bias correction of 1."""
    return constant(math.log(beta) if beta else -math.inf)


class Matmul(nn.Cell):
    """y = x w^T, a linear's, and its gradients."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.run_forward = ops.MatMul(transpose_b=True)
        self.run_input = ops.MatMul()
        self.run_weight = ops.MatMul(transpose_a=True)

    def forward(self, x, w):
        """x [T, I], w [O, I] -> y [T, O]."""
        return self.run_forward(x, w)

    def backward_input(self, dy, w):
        """-> dx [T, I] = dy w."""
        return self.run_input(dy, w)

    def backward_weight(self, dy, x):
        """-> dw [O, I] = dy^T x."""
        return self.run_weight(dy, x)


class RMSNorm(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.eps = constant(eps)
        self.mean = ops.ReduceMean(keep_dims=True)
        self.sum = ops.ReduceSum()

    def forward(self, x, w):
        """x [..., H], w [H] -> y like x."""
        return x * self.inverse_rms(x) * w

    def backward(self, x, w, dy):
        """-> (dx like x, dw [H])."""
        r = self.inverse_rms(x)
        x_hat = x * r
        g = dy * w
        dx = r * (g - x_hat * self.mean(g * x_hat, -1))
        dw = self.sum((dy * x_hat).reshape(-1, w.shape[0]), 0)
        return dx, dw

    def inverse_rms(self, x):
        return 1 / ops.sqrt(self.mean(x * x, -1) + ops.cast(self.eps, x.dtype))


class HeadNorm(nn.Cell):
    """`RMSNorm` over each head of q and of k inside packed projections; v passes (Qwen3's q_norm and k_norm)."""

    def __init__(self, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.heads, self.kv_heads = heads, kv_heads
        self.norm = RMSNorm(eps)
        self.concat = ops.Concat(1)

    def forward(self, qkv, wq, wk):
        """qkv [T, C], wq [D], wk [D] -> [T, C]."""
        q, k, v = self.split(qkv, wq.shape[0])
        y = self.concat((self.norm.forward(q, wq), self.norm.forward(k, wk), v))
        return y.reshape(qkv.shape)

    def backward(self, qkv, wq, wk, dy):
        """-> (dqkv [T, C], dwq [D], dwk [D])."""
        q, k, _ = self.split(qkv, wq.shape[0])
        dyq, dyk, dv = self.split(dy, wq.shape[0])
        dq, dwq = self.norm.backward(q, wq, dyq)
        dk, dwk = self.norm.backward(k, wk, dyk)
        return self.concat((dq, dk, dv)).reshape(qkv.shape), dwq, dwk

    def split(self, packed, dim):
        x = packed.reshape(packed.shape[0], -1, dim)
        first_v = self.heads + self.kv_heads
        return x[:, : self.heads], x[:, self.heads : first_v], x[:, first_v:]


class Rotary(nn.Cell):
    """Rotary embedding of the queries and keys inside packed projections, in Hugging Face's half-split convention
    (rotate_half): dims i and i + R of a head turn together. Values pass. Row t takes row t % S of the tables.
    """

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__(auto_prefix=False)
        self.turned, self.all = heads + kv_heads, heads + 2 * kv_heads
        self.join_halves, self.join_heads = ops.Concat(-1), ops.Concat(2)

    def forward(self, qkv, cos, sin):
        """qkv [T, C], cos and sin [S, R] -> [T, C]."""
        seq, half = cos.shape
        x = qkv.reshape(qkv.shape[0] // seq, seq, self.all, 2 * half)
        c, s = cos.reshape(1, seq, 1, half), sin.reshape(1, seq, 1, half)
        low, high = x[:, :, : self.turned, :half], x[:, :, : self.turned, half:]
        turned = self.join_halves((low * c - high * s, high * c + low * s))
        return self.join_heads((turned, x[:, :, self.turned :])).reshape(qkv.shape)

    def backward(self, dqkv, cos, sin):
        """-> the gradient of the unturned projections [T, C]: a turn by the opposite angles."""
        return self.forward(dqkv, cos, -sin)


class _GroupedAttention(nn.Cell):
    """Softmax attention of grouped heads: query head h reads key head h // (heads / kv_heads).

    Works on rows: queries [B kv_heads, (heads / kv_heads) S, D] against keys and values [B kv_heads, U, D].
    """

    def __init__(self, heads: int, kv_heads: int, scale: float) -> None:
        super().__init__(auto_prefix=False)
        self.heads, self.kv_heads = heads, kv_heads
        self.scale, self.masked = constant(scale), constant(MASKED)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.weigh = ops.BatchMatMul()
        self.weigh_t = ops.BatchMatMul(transpose_a=True)
        self.max = ops.ReduceMax(keep_dims=True)
        self.sum = ops.ReduceSum(keep_dims=True)

    def masked_scores(self, q, k, seen):
        """Scaled scores, those outside `seen` far below the rest."""
        scores = self.scores(q, k) * ops.cast(self.scale, q.dtype)
        return ops.select(seen, scores, ops.cast(self.masked, q.dtype))

    def gradients(self, q, k, v, p, o, do):
        """-> dq, dk, dv from probabilities p."""
        delta = self.sum(do * o, -1)
        ds = p * (self.scores(do, v) - delta) * ops.cast(self.scale, q.dtype)
        return self.weigh(ds, k), self.weigh_t(ds, q), self.weigh_t(p, do)

    def seen_by_heads(self, seen, batch):
        """[B or 1, S, U] -> rows [B kv_heads, (heads / kv_heads) S, U]."""
        _, seq, keys = seen.shape
        seen = ops.broadcast_to(seen.reshape(-1, 1, seq, keys), (batch, self.heads, seq, keys))
        return seen.reshape(batch * self.kv_heads, -1, keys)

    def heads_to_rows(self, x):
        """[B, S, heads, D] -> [B kv_heads, (heads / kv_heads) S, D]."""
        return x.transpose(0, 2, 1, 3).reshape(x.shape[0] * self.kv_heads, -1, x.shape[3])

    def rows_to_heads(self, x, seq):
        """The inverse of `heads_to_rows`."""
        batch = x.shape[0] // self.kv_heads
        return x.reshape(batch, -1, seq, x.shape[2]).transpose(0, 2, 1, 3)

    def tokens_to_rows(self, x, seq):
        return self.heads_to_rows(x.reshape(x.shape[0] // seq, seq, self.heads, -1))

    def rows_to_tokens(self, x, seq):
        return self.rows_to_heads(x, seq).reshape(x.shape[0] // self.kv_heads * seq, -1)


class Attention(_GroupedAttention):
    """`Rotary` and causal grouped-query attention on packed projections.

    Query head h reads key head h // (heads / kv_heads). Token t of a sequence sees keys first_key[t] <= j <= t of its
    own sequence; 0 <= first_key[t] <= t must hold. `documents` False promises that first_key is 0 everywhere.
    """

    def __init__(self, heads: int, kv_heads: int, scale: float, documents: bool = True) -> None:
        super().__init__(heads, kv_heads, scale)
        self.documents = documents
        self.rotary = Rotary(heads, kv_heads)
        self.join_heads = ops.Concat(2)

    def forward(self, qkv, cos, sin, first_key):
        """qkv [T, C], cos and sin [S, R], first_key [T] int32 -> (o [T, heads D], lse [N])."""
        q, k, v = self.split(qkv, cos, sin)
        s = self.masked_scores(q, k, self.seen(first_key, cos.shape[0]))
        top = self.max(s, -1)
        p = ops.exp(s - top)
        total = self.sum(p, -1)
        o = self.rows_to_tokens(self.weigh(p, v) / total, cos.shape[0])
        return o, (top + ops.log(total)).reshape(-1)

    def backward(self, qkv, cos, sin, first_key, o, lse, do):
        """-> dqkv [T, C]. Probabilities come back from the saved lse (Dao 2022, arXiv:2205.14135, section 3.1)."""
        seq = cos.shape[0]
        q, k, v = self.split(qkv, cos, sin)
        s = self.masked_scores(q, k, self.seen(first_key, seq))
        p = ops.exp(s - lse.reshape(s.shape[0], s.shape[1], 1))
        dq, dk, dv = self.gradients(q, k, v, p, self.tokens_to_rows(o, seq), self.tokens_to_rows(do, seq))
        parts = (self.rows_to_heads(dq, seq), self.rows_to_heads(dk, seq), self.rows_to_heads(dv, seq))
        return self.rotary.backward(self.join_heads(parts).reshape(qkv.shape), cos, sin)

    def split(self, qkv, cos, sin):
        """-> turned q as rows [B kv_heads, groups S, D], turned k and v [B kv_heads, S, D]."""
        seq = cos.shape[0]
        x = self.rotary.forward(qkv, cos, sin).reshape(qkv.shape[0] // seq, seq, self.heads + 2 * self.kv_heads, -1)
        q, k, v = x[:, :, : self.heads], x[:, :, self.heads : -self.kv_heads], x[:, :, -self.kv_heads :]
        return self.heads_to_rows(q), self.heads_to_rows(k), self.heads_to_rows(v)

    def seen(self, first_key, seq):
        """-> bool rows [B kv_heads, groups S, S]: which keys each query sees."""
        batch = first_key.shape[0] // seq
        position = ops.arange(0, seq).astype(mstype.int32)
        seen = position.reshape(1, 1, seq) <= position.reshape(1, seq, 1)
        if self.documents:
            seen = ops.logical_and(seen, position.reshape(1, 1, seq) >= first_key.reshape(batch, seq, 1))
        return self.seen_by_heads(seen, batch)


class BlockAttention(_GroupedAttention):
    """Attention of turned queries over one block of turned keys and values, carried on from earlier blocks: a step of
    ring attention (Liu et al. 2023, arXiv:2310.01889).

    Query t sees rows first[t] <= u < last[t] of the block, none when first >= last; what lies outside [0, U) is not
    there. Blocks may come in any order. Before the first, o is 0 and lse is `EMPTY_LSE`; a query that no block shows a
    key keeps both, and its gradients are 0. In the backward o and lse are those after the last block, and the
    gradients of all blocks add up. lse is head by head, [heads T]: `Attention`'s layout for one sequence.
    """

    def __init__(self, heads: int, kv_heads: int, scale: float) -> None:
        super().__init__(heads, kv_heads, scale)
        self.join = ops.Concat(1)

    def forward(self, q, kv, first, last, o, lse):
        """q [T, heads D], kv [U, 2 kv_heads D] (keys, then values), first and last [T] int32, o [T, heads D],
        lse [heads T] -> (o, lse) with this block.
        """
        seq, keys = q.shape[0], kv.shape[0]
        q, k, v = self.split(q, kv)
        s = self.masked_scores(q, k, self.seen(first, last, keys))
        before = lse.reshape(s.shape[0], s.shape[1], 1)
        top = ops.maximum(self.max(s, -1), before)
        p, kept = ops.exp(s - top), ops.exp(before - top)
        total = self.sum(p, -1) + kept
        o = (self.weigh(p, v) + self.tokens_to_rows(o, seq) * kept) / total
        return self.rows_to_tokens(o, seq), (top + ops.log(total)).reshape(-1)

    def backward(self, q, kv, first, last, o, lse, do):
        """-> (dq [T, heads D], dkv [U, 2 kv_heads D]) of this block."""
        seq, keys = q.shape[0], kv.shape[0]
        q, k, v = self.split(q, kv)
        s = self.masked_scores(q, k, self.seen(first, last, keys))
        p = ops.exp(s - lse.reshape(s.shape[0], s.shape[1], 1))
        dq, dk, dv = self.gradients(q, k, v, p, self.tokens_to_rows(o, seq), self.tokens_to_rows(do, seq))
        dkv = self.join((self.rows_to_tokens(dk, keys), self.rows_to_tokens(dv, keys)))
        return self.rows_to_tokens(dq, seq), dkv

    def split(self, q, kv):
        """-> q, k, v as rows of a batch of 1."""
        x = kv.reshape(1, kv.shape[0], 2 * self.kv_heads, -1)
        k, v = x[:, :, : self.kv_heads], x[:, :, self.kv_heads :]
        return self.tokens_to_rows(q, q.shape[0]), self.heads_to_rows(k), self.heads_to_rows(v)

    def seen(self, first, last, keys):
        """-> bool rows [kv_heads, groups T, U]."""
        key = ops.arange(0, keys).astype(mstype.int32).reshape(1, 1, keys)
        return self.seen_by_heads(ops.logical_and(key >= first.reshape(1, -1, 1), key < last.reshape(1, -1, 1)), 1)


class SwiGLU(nn.Cell):
    """y = silu(gate) * up, with gate the first half of the last dim (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.concat = ops.Concat(-1)

    def forward(self, gate_up):
        """[T, 2F] -> [T, F]."""
        half = gate_up.shape[-1] // 2
        gate = gate_up[:, :half]
        return gate * ops.sigmoid(gate) * gate_up[:, half:]

    def backward(self, gate_up, dy):
        """-> [T, 2F]."""
        half = gate_up.shape[-1] // 2
        gate = gate_up[:, :half]
        s = ops.sigmoid(gate)
        silu = gate * s
        return self.concat((dy * gate_up[:, half:] * (s + silu * (1 - s)), dy * silu))


class CrossEntropy(nn.Cell):
    """The two halves of -log softmax(logits)[label]: log-sum-exp and the label's logit.

    The logits may be a rank's slice of the vocabulary, labels counted from the slice's first row. A label outside
    [0, V) is another rank's or an ignored token's (-1): its target is 0 and it takes nothing off the gradient. The loss
    of a token is lse - target over the whole vocabulary: log-sum-exp of the ranks' lse, the sum of their targets; the
    backward takes that lse. Both combinations are the caller's.
    """

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.max = ops.ReduceMax(keep_dims=True)
        self.sum = ops.ReduceSum(keep_dims=True)

    def forward(self, logits, labels):
        """logits [T, V], labels [T] int32 -> (lse [T], target [T])."""
        top = self.max(logits, -1)
        lse = top + ops.log(self.sum(ops.exp(logits - top), -1))
        column = ops.clip_by_value(labels, 0, logits.shape[1] - 1)
        target = ops.gather_d(logits, 1, column.reshape(-1, 1)).reshape(-1)
        return lse.reshape(-1), ops.select(labels == column, target, ops.zeros_like(target))

    def backward(self, logits, labels, lse, weight):
        """lse [T] (over the whole vocabulary), weight [T] = d loss / d token loss -> dlogits [T, V]."""
        column = ops.arange(0, logits.shape[1]).astype(mstype.int32)
        hit = ops.cast(labels.reshape(-1, 1) == column.reshape(1, -1), logits.dtype)
        return (ops.exp(logits - lse.reshape(-1, 1)) - hit) * weight.reshape(-1, 1)


class Embedding(nn.Cell):
    """Rows of a table, which may be a rank's slice of the vocabulary, ids counted from the slice's first row. An id
    outside [0, V) is another rank's: its row is zero and it adds nothing to the gradient.
    """

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.segment_sum = ops.UnsortedSegmentSum()

    def forward(self, ids, table):
        """ids [T] int32, table [V, H] -> [T, H]."""
        row = ops.clip_by_value(ids, 0, table.shape[0] - 1)
        return ops.gather(table, row, 0) * ops.cast(ids == row, table.dtype).reshape(-1, 1)

    def backward(self, ids, dx, table):
        """-> dtable [V, H]; of `table` only the shape counts."""
        row = ops.clip_by_value(ids, 0, table.shape[0] - 1)
        dx = dx * ops.cast(ids == row, dx.dtype).reshape(-1, 1)
        return self.segment_sum(dx, row, table.shape[0])


class SquareSum(nn.Cell):
    """The sum of the squares of all elements of all gradients, the square of their global norm. A tensor may be empty,
    as a rank's slice of a small parameter is.
    """

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.sum = ops.ReduceSum()

    def forward(self, gradients):
        """A tuple of tensors -> [1] in their dtype."""
        total = ops.zeros((1,), gradients[0].dtype)
        for gradient in gradients:
            if 0 not in gradient.shape:
                total = total + self.sum(gradient * gradient)
        return total


class AdamW(nn.Cell):
    """One step of AdamW with bias correction and decoupled weight decay (Loshchilov and Hutter 2019,
    arXiv:1711.05101), in the order of operations of torch.optim.AdamW; weights and moments change in place. An
    empty tensor has nothing to update.
    """

    def __init__(self, beta1: float, beta2: float, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.beta1, self.rest1 = constant(beta1), constant(1 - beta1)
        self.beta2, self.rest2 = constant(beta2), constant(1 - beta2)
        # 1 - beta^t as -expm1(t log beta): in fp32 the subtraction would lose up to five digits of it.
        self.log1, self.log2 = log(beta1), log(beta2)
        self.eps = constant(eps)

    def forward(self, weights, first, second, gradients, decays, factor, lr, step):
        """Tuples of n Parameters (weights, first, second) and n gradients; decays [n]; factor [1] multiplies each
        gradient; lr [1]; step [1], 1 at the first. Returns a [1] tensor that is there once the update is done.
        """
        dtype = gradients[0].dtype
        beta1, rest1 = ops.cast(self.beta1, dtype), ops.cast(self.rest1, dtype)
        beta2, rest2 = ops.cast(self.beta2, dtype), ops.cast(self.rest2, dtype)
        eps, factor, lr = ops.cast(self.eps, dtype), ops.cast(factor, dtype), ops.cast(lr, dtype)
        done, step = step, ops.cast(step, dtype)
        correct1 = -ops.expm1(step * ops.cast(self.log1, dtype))
        root2 = ops.sqrt(-ops.expm1(step * ops.cast(self.log2, dtype)))
        for i in range(len(gradients)):
            if 0 in gradients[i].shape:
                continue
            g = gradients[i] * factor
            m = first[i] * beta1 + g * rest1
            v = second[i] * beta2 + g * g * rest2
            decayed = weights[i] * (1 - lr * ops.cast(decays[i], dtype))
            w = decayed - lr / correct1 * m / (ops.sqrt(v) / root2 + eps)
            done = ops.depend(done, ops.assign(first[i], m))
            done = ops.depend(done, ops.assign(second[i], v))
            done = ops.depend(done, ops.assign(weights[i], w))
        return done
