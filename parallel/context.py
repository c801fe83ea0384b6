"""Context parallelism: ranks of cp share the tokens of every sequence, and attention brings them together.

The ranks form a grid: `cp_ulysses` of them inside, the rest a ring outside (`layout.cp_method`: `ring` has 1 inside,
`ulysses` all, `hybrid` both: Fang and Zhao, USP, arXiv 2405.07719).

- Ring (Liu et al., arXiv 2310.01889): blocks of keys and values travel round the ring, and each rank carries its
  softmax on over them. A causal mask gives later tokens more work, so that a place on a ring of R holds chunks r and
  2R-1-r of 2R (zigzag).
- Ulysses (Jacobs et al., arXiv 2309.14509): an all-to-all turns a rank's tokens of all heads into all tokens of the
  place on the ring, for a share of the heads, and another turns the output back.

Everything but attention works on a rank's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from mindspore import Tensor, ops

from models.attention import Heads, SelfAttention
from models.kernels import EMPTY_LSE, Kernels
from models.segments import COS, FIRST_KEY, SIN, Chain, Segment
from parallel.collectives import Collectives
from parallel.layout import Layout


def place(layout: Layout, index: int) -> tuple[int, int]:
    """(place on the ring, place inside) of the rank at `index` along cp; ranks inside are neighbours."""
    return divmod(index, layout.ulysses)


def ring_positions(layout: Layout, ring_place: int, seq_len: int) -> np.ndarray:
    """Positions in the sequence of the tokens at a place on the ring, in ascending order, int64."""
    places = layout.cp // layout.ulysses
    if places == 1:
        return np.arange(seq_len)
    chunk = seq_len // (2 * places)
    starts = (ring_place * chunk, (2 * places - 1 - ring_place) * chunk)
    return np.concatenate([np.arange(start, start + chunk) for start in starts])


def positions(layout: Layout, index: int, seq_len: int) -> np.ndarray:
    """Positions in the sequence of the tokens of the rank at `index` along cp, int64 [seq_len / cp]."""
    ring_place, inside = place(layout, index)
    return np.split(ring_positions(layout, ring_place, seq_len), layout.ulysses)[inside]


class ContextAttention(Segment):
    """Packed qkv of a rank's own tokens to the heads' outputs for them.

    In `context`, `COS` and `SIN` are those of the rank's own positions, and `FIRST_KEY` is of whole sequences. Layers
    share one, as its constants are as large as an output.
    """

    saves = 4

    def __init__(
        self, kernels: Kernels, collectives: Collectives, sequences: int, seq_len: int, dtype: type, heads: Heads
    ) -> None:
        super().__init__()
        layout, index = collectives.mesh.layout, collectives.mesh.index("cp", collectives.rank)
        self.inside, self.places = layout.ulysses, layout.cp // layout.ulysses
        ring_place, inside_place = place(layout, index)
        whole = range(ring_place * self.inside, (ring_place + 1) * self.inside)
        self.exchange = collectives.AllToAll(collectives.subgroup("cp", whole))
        self.shift = collectives.Shift(collectives.subgroup("cp", range(inside_place, layout.cp, self.inside)))
        self.sequences, self.documents = sequences, kernels.documents
        self.rotary = kernels.Rotary(heads.queries, heads.keys)
        self.share = replace(heads, queries=heads.queries // self.inside, keys=max(1, heads.keys // self.inside))
        self.kernel = kernels.BlockAttention(self.share.queries, self.share.keys, heads.scale)
        self.query_width, key_width = self.share.queries * heads.width, self.share.keys * heads.width
        self.share_width = self.query_width + 2 * key_width
        self.columns, self.copies = _shares(heads, self.inside), max(1, self.inside // heads.keys)
        self.shared = ((0, self.query_width), (self.query_width, self.query_width + key_width))
        self.shared += ((self.query_width + key_width, self.share_width),)
        self.outputs = tuple((i * self.query_width, (i + 1) * self.query_width) for i in range(self.inside))

        own = ring_positions(layout, ring_place, seq_len)
        self.own = Tensor(_rows(own, sequences, seq_len))
        self.start = (
            Tensor(np.zeros((sequences * len(own), self.query_width), dtype)),
            Tensor(np.full(self.share.queries * sequences * len(own), EMPTY_LSE, dtype)),
        )
        self.base = Tensor(_rows(np.zeros(len(own), np.int64), sequences, len(own)))
        blocks = [ring_positions(layout, (ring_place - step) % self.places, seq_len) for step in range(self.places)]
        self.chunk = len(own) if self.places == 1 else len(own) // 2
        self.starts = tuple((int(block[0]), int(block[self.chunk % len(block)])) for block in blocks)
        ends = [np.searchsorted(block, own, "right") for block in blocks]
        self.last = tuple(Tensor(_rows(end, sequences, len(own))) for end in ends)

    def forward(self, x, weights, context):
        """Saves the turned queries, the rank's own keys and values, the output and its log-sum-exp."""
        qkv = self.to_heads(self.rotary.forward(x, context[COS], context[SIN]))
        q, kv = qkv[:, : self.query_width], qkv[:, self.query_width :]
        first_key = ops.gather(context[FIRST_KEY], self.own, 0)
        o, lse = self.start
        block = kv
        for step in range(self.places):
            if step > 0:
                block = self.shift.forward(block)
            o, lse = self.kernel.forward(q, block, self.first(first_key, step), self.last[step], o, lse)
        return self.to_tokens(o), (q, kv, o, lse)

    def backward_input(self, dy, saved, weights, context):
        """The blocks go round again, each with the gradient that it has gathered so far."""
        q, kv, o, lse = saved
        do = self.from_tokens(dy)
        first_key = ops.gather(context[FIRST_KEY], self.own, 0)
        block = kv
        dq, travelling = self.kernel.backward(q, block, self.first(first_key, 0), self.last[0], o, lse, do)
        for step in range(1, self.places):
            block, travelling = self.shift.forward((block, travelling))
            more, here = self.kernel.backward(q, block, self.first(first_key, step), self.last[step], o, lse, do)
            dq, travelling = dq + more, travelling + here
        if self.places > 1:
            travelling = self.shift.forward(travelling)
        dqkv = self.from_heads(ops.concat((dq, travelling), 1))
        return self.rotary.backward(dqkv, context[COS], context[SIN]), ()

    def first(self, first_key, step):
        """The first row of the block that each query sees: rows before its document's first key are hidden."""
        if not self.documents:
            return self.base
        low, high = self.starts[step]
        rows = ops.clamp(first_key - low, 0, self.chunk)
        if self.places > 1:
            rows = rows + ops.clamp(first_key - high, 0, self.chunk)
        return rows + self.base

    def to_heads(self, x):
        """[own tokens, all columns] to [tokens of the place, the columns of a share of the heads]."""
        if self.inside == 1:
            return x
        shares = ()
        for i in range(self.inside):
            shares = shares + (ops.concat(_columns(x, self.columns[i]), 1),)
        return self.join(self.exchange.forward(ops.concat(shares, 0)))

    def from_heads(self, dx):
        """The transpose of `to_heads`: columns that several ranks were given add up."""
        if self.inside == 1:
            return dx
        shares = ops.unstack(self.exchange.backward(self.part(dx)).reshape((self.inside, -1, self.share_width)), 0)
        queries, keys, values = (), (), ()
        for i in range(self.inside):
            q, k, v = _columns(shares[i], self.shared)
            queries = queries + (q,)
            if i % self.copies == 0:
                keys, values = keys + (k,), values + (v,)
            else:
                keys, values = keys[:-1] + (keys[-1] + k,), values[:-1] + (values[-1] + v,)
        return ops.concat(queries + keys + values, 1)

    def to_tokens(self, o):
        """[tokens of the place, a share of the heads] to [own tokens, all heads]."""
        if self.inside == 1:
            return o
        o = self.exchange.forward(self.part(o)).reshape((self.inside, -1, self.query_width))
        return ops.concat(ops.unstack(o, 0), 1)

    def from_tokens(self, do):
        """The transpose of `to_tokens`."""
        if self.inside == 1:
            return do
        return self.join(self.exchange.backward(ops.concat(_columns(do, self.outputs), 0)))

    def join(self, x):
        """[inside x own tokens, columns] to [tokens of the place, columns]: what every rank has of a sequence together.

        Unstacked and stacked again: on CPU a transposition takes one and a half times as long.
        """
        if self.sequences == 1:
            return x
        parts = ops.unstack(x.reshape((self.inside, self.sequences, -1, x.shape[1])), 0)
        return ops.stack(parts, 1).reshape(x.shape)

    def part(self, x):
        """The inverse of `join`."""
        if self.sequences == 1:
            return x
        parts = ops.unstack(x.reshape((self.sequences, self.inside, -1, x.shape[1])), 1)
        return ops.stack(parts, 0).reshape(x.shape)


def contextual(segment: Segment, attention: Callable[[Heads], ContextAttention]) -> Segment:
    """`segment`, which may nest others, with attention over the ranks of cp."""
    if isinstance(segment, Chain):
        return segment.rebuilt([contextual(piece, attention) for piece in segment.segments])
    return attention(segment.heads) if isinstance(segment, SelfAttention) else segment


def _shares(heads: Heads, ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Of each rank the columns of packed qkv that go to it: begin and end of its queries, its keys and its values.

    With fewer heads of keys than ranks, several ranks are given the same.
    """
    queries, keys = heads.queries // ranks, max(1, heads.keys // ranks)
    shares = []
    for rank in range(ranks):
        key = rank * keys if heads.keys >= ranks else rank * heads.keys // ranks
        firsts = (rank * queries, heads.queries + key, heads.queries + heads.keys + key)
        counts = (queries, keys, keys)
        shares.append(tuple((f * heads.width, (f + n) * heads.width) for f, n in zip(firsts, counts, strict=True)))
    return tuple(shares)


def _columns(x, ranges):
    """Columns of a matrix, for each of `ranges` a tensor."""
    parts = ()
    for begin, end in ranges:
        parts = parts + (x[:, begin:end],)
    return parts


def _rows(values: np.ndarray, sequences: int, length: int) -> np.ndarray:
    """`values` of one sequence for each of several that lie one after another, `length` rows apart, int32."""
    return (values[None] + np.arange(sequences)[:, None] * length).reshape(-1).astype(np.int32)
