"""What a rank computes on its slice: blocks of keys make attention, slices of the vocabulary make cross-entropy and
embedding, to the last digits of float64."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from models.kernels import EMPTY_LSE, native, plain

pytestmark = pytest.mark.usefixtures("graph_mode")
NATIVE = pytest.param(native, marks=pytest.mark.skipif(bool(native.missing()), reason=native.missing()), id="native")
ROOMS = pytest.mark.parametrize("room", [pytest.param(plain, id="plain"), NATIVE])


def same(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def cuts(random, length: int, parts: int) -> list[tuple[int, int]]:
    """[0, length) in at most `parts` pieces of random lengths, in random order."""
    ends = sorted({*random.integers(1, length, parts - 1).tolist(), length})
    pieces = list(zip([0, *ends[:-1]], ends, strict=True))
    return [pieces[i] for i in random.permutation(len(pieces))]


class Ring(nn.Cell):
    """Attention at once, and over `blocks` of keys for the queries that `rows` names."""

    def __init__(self, room, heads, kv_heads, dim, blocks):
        super().__init__()
        self.attention = room.Attention(heads, kv_heads, dim**-0.5)
        self.rotary, self.block = room.Rotary(heads, kv_heads), room.BlockAttention(heads, kv_heads, dim**-0.5)
        self.blocks, self.in_order = blocks, [blocks.index(block) for block in sorted(blocks)]
        self.width = heads * dim
        self.rows, self.columns = ops.Concat(0), ops.Concat(1)

    def construct(self, do, qkv, cos, sin, first_key, do_rows, rows, first, last, o, lse, tokens):
        whole_o, whole_lse = self.attention.forward(qkv, cos, sin, first_key)
        whole_dqkv = self.attention.backward(qkv, cos, sin, first_key, whole_o, whole_lse, do)
        turned = self.rotary.forward(qkv, cos, sin)
        q, kv = ops.gather(turned[:, : self.width], rows, 0), turned[:, self.width :]
        for i, (begin, end) in enumerate(self.blocks):
            o, lse = self.block.forward(q, kv[begin:end], first[i], last[i], o, lse)
        dq, dkv = ops.zeros_like(q), ()
        for i, (begin, end) in enumerate(self.blocks):
            gradients = self.block.backward(q, kv[begin:end], first[i], last[i], o, lse, do_rows)
            dq, dkv = dq + gradients[0], dkv + (gradients[1],)
        dkv = self.rows([dkv[i] for i in self.in_order])
        dqkv = self.rotary.backward(self.columns((ops.gather(dq, tokens, 0), dkv)), cos, sin)
        return whole_o, whole_lse, whole_dqkv, o, lse, dqkv, dq


@ROOMS
@pytest.mark.parametrize("seed", range(3))
def test_attention_is_the_sum_of_its_blocks_in_any_order(room, seed):
    """Queries stand in any order too, with rows of padding that see nothing among them."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    batch, seq, kv_heads, dim = random.integers(1, [3, 150, 3, 20]) * [1, 1, 1, 2]
    heads = kv_heads * random.integers(1, 4)
    tokens, padding = batch * seq, random.integers(1, 6)
    start = np.maximum.accumulate(np.where(random.random(tokens) < 0.05, np.arange(tokens), 0))
    start = np.maximum(start, np.arange(tokens) // seq * seq)  # of each token's document, in the whole batch
    turn = np.outer(np.arange(seq), 1 / 10000 ** (np.arange(0, dim, 2) / dim))
    qkv = random.standard_normal((tokens, (heads + 2 * kv_heads) * dim))
    do = random.standard_normal((tokens + padding, heads * dim))

    rows = random.permutation(tokens + padding)  # those past the tokens are padding
    real, token = rows < tokens, np.minimum(rows, tokens - 1)
    blocks = cuts(random, tokens, 5) if tokens > 1 else [(0, 1)]
    first = np.stack([np.where(real, start[token] - begin, 1) for begin, _ in blocks])
    last = np.stack([np.where(real, np.minimum(token + 1, end) - begin, 0) for begin, end in blocks])
    ring = Ring(room, int(heads), int(kv_heads), int(dim), blocks)
    arrays = [do[:tokens], qkv, np.cos(turn), np.sin(turn), (start % seq).astype(np.int32), do[rows]]
    arrays += [index.astype(np.int32) for index in (token, first, last)]
    arrays += [np.zeros_like(do), np.full(heads * len(do), EMPTY_LSE), np.argsort(rows)[:tokens].astype(np.int32)]
    whole_o, whole_lse, whole_dqkv, o, lse, dqkv, dq = (x.asnumpy() for x in ring(*map(Tensor, arrays)))

    same(o[real], whole_o[rows[real]])
    by_token = whole_lse.reshape(batch, heads, seq).transpose(1, 0, 2).reshape(heads, tokens)
    lse = lse.reshape(heads, -1)
    same(lse[:, real], by_token[:, rows[real]])
    same(dqkv, whole_dqkv)
    assert not o[~real].any() and not dq[~real].any() and (lse[:, ~real] == EMPTY_LSE).all()


class Loss(nn.Cell):
    """lse, target and dlogits of the slices that start at `starts`, with the log-sum-exp over all of them."""

    def __init__(self, room, slices):
        super().__init__()
        self.kernel, self.slices = room.CrossEntropy(), slices
        self.columns, self.pile, self.max = ops.Concat(1), ops.Stack(0), ops.ReduceMax(keep_dims=True)
        self.sum = ops.ReduceSum()

    def construct(self, logits, labels, weight):
        lses, targets = (), ()
        for begin, end in self.slices:
            lse, target = self.kernel.forward(logits[:, begin:end], labels - begin)
            lses, targets = lses + (lse,), targets + (target,)
        lses = self.pile(lses)
        top = self.max(lses, 0)
        lse = top.reshape(-1) + ops.log(self.sum(ops.exp(lses - top), 0))
        gradients = ()
        for begin, end in self.slices:
            gradients = gradients + (self.kernel.backward(logits[:, begin:end], labels - begin, lse, weight),)
        return lse, self.sum(self.pile(targets), 0), self.columns(gradients)


class Lookup(nn.Cell):
    def __init__(self, room, slices):
        super().__init__()
        self.kernel, self.slices, self.rows = room.Embedding(), slices, ops.Concat(0)

    def construct(self, ids, table, dx):
        x, gradients = ops.zeros_like(dx), ()
        for begin, end in self.slices:
            x = x + self.kernel.forward(ids - begin, table[begin:end])
            gradients = gradients + (self.kernel.backward(ids - begin, dx, table[begin:end]),)
        return x, self.rows(gradients)


@ROOMS
def test_slices_of_the_vocabulary_make_the_whole_loss_and_the_whole_embedding(room, random):
    """Against numpy; a label of -1 belongs to no slice, and neither does an id past the vocabulary."""
    tokens, vocab, hidden = 40, 50, 7
    slices = [(0, 13), (13, 14), (14, 50)]
    labels = np.arange(tokens, dtype=np.int32) * 7 % vocab
    labels[[3, 20]] = -1, vocab
    inside = (labels >= 0) & (labels < vocab)
    hit = np.eye(vocab)[labels % vocab] * inside[:, None]

    logits, weight = random((tokens, vocab)) * 5, random(tokens)
    lse, target, gradient = (x.asnumpy() for x in Loss(room, slices)(*map(Tensor, (logits, labels, weight))))
    same(lse, np.log(np.exp(logits).sum(1)))
    same(target, (logits * hit).sum(1))
    same(gradient, (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - hit) * weight[:, None])

    table, dx = random((vocab, hidden)), random((tokens, hidden))
    x, dtable = (y.asnumpy() for y in Lookup(room, slices)(*map(Tensor, (labels, table, dx))))
    same(x, hit @ table)
    same(dtable, hit.T @ dx)
