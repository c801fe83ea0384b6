"""What a rank holds, for columns of layouts: the formulas of `parallel.memory` over arrays, and what a device adds.

With the constants of Busway they equal `parallel.memory` to the byte (a test does it over a grid); other frameworks
keep other numbers of bytes of the same tensors.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from models.config import TALLIES
from parallel import schedules
from parallel.planner.constants import Constants
from parallel.planner.shape import KINDS, RECOMPUTE, Candidates, Column, Contents, Load, Shape, distinct, places

GIB = 2**30
ANY_NUMBER = 2**62
EMBEDDING, HEAD = KINDS.index("embedding"), KINDS.index("head")
LAYERS = [KINDS.index(kind) for kind in ("dense", "sparse")]
ALONE = np.array([[float(kind != "embedding")] for kind in KINDS])
"""[kinds, 1]: all but the embedding."""


@dataclass(frozen=True)
class Weights:
    """Elements of one kind of segments on one rank, by what shards them."""

    dense: Column
    experts: Column = 0
    counted: Column = 0
    """Of `dense`, what has no moments: routers' biases of the choice and tallies."""


def weights(shape: Shape, c: Candidates) -> dict[str, Weights]:
    """Of each of `KINDS`."""
    s = shape
    keys = np.maximum(s.kv_heads // c.tp, 1) * s.head_dim
    latent = np.asarray(s.kv_rank) > 0
    queries = np.where(
        np.asarray(s.q_rank) > 0,
        s.hidden * s.q_rank + s.q_rank + s.q_rank * s.query // c.tp,
        s.hidden * s.query // c.tp,
    )
    narrow = queries + s.hidden * (s.kv_rank + s.rope) + s.kv_rank
    narrow = narrow + s.kv_rank * s.heads * (s.nope + s.value) // c.tp
    wide = s.hidden * (s.query // c.tp + 2 * keys) + 2 * s.head_dim * np.asarray(s.qk_norm)
    attention = np.where(latent, narrow, wide) + s.values // c.tp * s.hidden
    norms = 2 * s.hidden * (1 + np.asarray(s.sandwich))
    block = (s.gates + 1) * s.hidden
    matrix = s.vocab // c.tp * s.hidden
    shared = block * s.shared * s.expert_ffn // c.tp
    routed = s.experts // c.ep * block * s.expert_ffn // c.etp
    counted = s.experts * (1 + np.asarray(s.biased)) + TALLIES
    sparse = Weights(attention + norms + s.experts * s.hidden + shared + counted, routed, counted)
    dense = Weights(attention + norms + block * s.ffn // c.tp)
    further = np.asarray(s.further)
    joins = further * (2 * s.hidden * s.hidden + 3 * s.hidden + 2)
    behind = sparse if np.any(s.experts) else dense
    counted = further * (2 + behind.counted)
    ends = matrix * (1 + ((further > 0) & np.logical_not(s.tied)))  # modules of prediction look tokens up too
    head = Weights(s.hidden + ends + joins + further * behind.dense, further * behind.experts, counted)
    return {"embedding": Weights(matrix), "dense": dense, "sparse": sparse, "head": head}


def saved(shape: Shape, seq_len: Column, c: Candidates, imbalance: Column = 1.0) -> dict[str, tuple[Column, Column]]:
    """(elements that a micro-batch leaves of a segment, what its backward brings back) of each of `KINDS`.

    See `parallel.memory.saved_elements`; logits are not in the head's, as their loss keeps them in another precision.
    Rows of experts are the busiest rank's, `imbalance` times the even share.
    """
    s = shape
    tokens = c.micro_batch * seq_len // c.cp
    stream = np.where(c.sequence_parallel, tokens // c.tp, tokens) * s.hidden
    heads, share = s.heads // c.tp, np.where(c.sequence_parallel, c.tp, 1)
    keys = np.maximum(s.kv_heads // c.tp, 1)
    query = heads * s.head_dim
    qkv = query + 2 * keys * s.head_dim
    exchanged = query + 2 * c.ulysses * np.maximum(keys // c.ulysses, 1) * s.head_dim
    core = exchanged + query + heads + query * (c.ulysses > 1)
    width = s.nope + s.rope
    latents = 2 * (s.q_rank + s.kv_rank) // share + 3 * heads * width + heads * s.value
    full, selective = (np.asarray(c.recompute) == RECOMPUTE.index(name) for name in ("full", "selective"))
    latent = np.asarray(s.kv_rank) > 0
    normed = qkv * np.asarray(s.qk_norm)
    whole = np.where(latent, latents + heads * width + heads, core + normed)
    without = np.where(latent, latents, qkv + normed)
    own = tokens // c.tp
    copies = own * s.top_k * c.etp * imbalance
    routed = own * (s.experts + s.top_k) + c.micro_batch * 2 * s.experts + 1
    routed = routed + copies * (s.hidden + s.gates * s.expert_ffn // c.etp + 2) + s.experts // c.ep
    routed = routed + np.where((c.tp > 1) & np.logical_not(c.sequence_parallel), own * s.hidden, 0)
    routed = routed + tokens * (s.gates + 1) * s.shared * s.expert_ffn // c.tp
    blocks = {"dense": tokens * (s.gates + 1) * s.ffn // c.tp, "sparse": routed}
    found = {"embedding": (0, 0)}
    for kind, block in blocks.items():
        norms = 4 * stream + 2 * stream * np.asarray(s.sandwich) + block
        everything = norms + tokens * whole
        kept = np.where(full, stream, np.where(selective, norms + tokens * without, everything))
        found[kind] = (kept, everything - kept)
    kept, back = found["sparse" if np.any(s.experts) else "dense"]
    further = np.asarray(s.further)
    found["head"] = (
        2 * stream * (1 + further) + tokens + further * (np.where(full, 0, 3 * stream + kept) + tokens + 1),
        further * back,
    )
    return found


def enough(schedule: str, pp: int) -> int:
    """Micro-batches beyond which more prolong the middle of a schedule alone, so that no more are in flight."""
    return {"gpipe": ANY_NUMBER, "1f1b": pp, "zb_h1": pp}.get(schedule, 2 * pp)


@lru_cache(maxsize=16384)
def live(schedule: str, pp: int, vpp: int, micro_batches: int) -> np.ndarray:
    """float [pp, S]: of each rank's stages, the micro-batches in flight at the peak of their number.

    Where a rank's stages weigh differently it may hold more at another moment, never less.
    """
    rank = np.arange(pp)[:, None]
    chunk, place = divmod(np.arange(pp * vpp), pp)
    if schedule in schedules.V_SHAPED:
        down = 2 * pp - rank - (schedule == "zb_v")
        most = np.where(chunk == 0, down, rank + 1)
        return np.where(np.where(chunk == 0, place, pp - 1 - place) == rank, np.minimum(most, micro_batches), 0.0)
    turn = pp if schedule == "interleaved" else 1  # micro-batches that pass one chunk before the next
    warm_up = {"gpipe": micro_batches, "zb_h1": pp - 1, "interleaved": 2 * (pp - rank - 1) + (vpp - 1) * pp}
    forwards = np.minimum(warm_up.get(schedule, pp - rank - 1) + 1, micro_batches * vpp)
    rounds, rest = np.divmod(forwards, turn * vpp)
    return np.where(place == rank, rounds * turn + np.clip(rest - chunk * turn, 0, turn), 0).astype(float)


@dataclass(frozen=True)
class Memory:
    """Bytes of each pipeline rank, arrays [N, pp]."""

    weights: np.ndarray
    gradients: np.ndarray
    optimizer: np.ndarray
    activations: np.ndarray
    passing: np.ndarray
    """What comes and goes: gathered weights, a micro-batch's gradients, logits, what recompute brings back."""
    fixed: np.ndarray
    """Framework, driver, communicators and fragments."""

    @property
    def total(self) -> np.ndarray:
        return self.weights + self.gradients + self.optimizer + self.activations + self.passing + self.fixed


def communicators(c: Candidates) -> Column:
    """Groups of ranks that talk: tp, the two of cp, dp x cp, of experts three, pipeline neighbours, and the world's."""
    found = sum(np.asarray(size > 1, float) for size in (c.tp, c.ulysses, c.cp // c.ulysses, c.dp * c.cp, c.edp))
    found = found + np.asarray(c.ep * c.etp > 1, float) + (np.asarray(c.tp) * c.pp > 1)
    found = found + np.where((c.zero > 0) & (c.shards < c.dp * c.cp), 2.0, 0.0)
    return found + np.minimum(c.pp - 1, 2)


def memory(shape: Shape, seq_len: Column, c: Candidates, parts: Contents, k: Constants) -> Memory:
    """What every pipeline rank holds at its peak."""
    return Holding(shape, seq_len, c, k).memory(c, parts, exact=True)


class Holding:
    """What layouts of one pp hold by kind of segment, whatever their schedule. Arrays [N, kinds]."""

    def __init__(self, shape: Shape, seq_len: Column, base: Candidates, k: Constants) -> None:
        self.shape, self.k, self.rows = shape, k, len(base)
        self.seq_len, self.base = seq_len, base
        held = weights(shape, base)
        self.dense = self.table({kind: w.dense for kind, w in held.items()})
        self.experts = self.table({kind: w.experts for kind, w in held.items()})
        self.counted = self.table({kind: w.counted for kind, w in held.items()})
        tokens = base.micro_batch * seq_len // base.cp
        self.logits = np.asarray(tokens * (shape.vocab // base.tp), float)[:, None]
        self.scores = np.asarray(tokens * seq_len * (shape.heads / base.tp) * np.asarray(k.score_bytes))[:, None]
        self._keep(base)

    def _keep(self, base: Candidates) -> None:
        kept = saved(self.shape, self.seq_len, base, self.k.imbalance)
        self.saved = self.table({kind: numbers for kind, (numbers, _) in kept.items()})
        self.back = self.table({kind: numbers for kind, (_, numbers) in kept.items()})
        k, further = self.k, np.asarray(self.shape.further)
        self.unit = self.saved * self.column(k.item_bytes * np.asarray(k.saved))
        """Bytes that a micro-batch leaves of a segment, with logits and scores."""
        self.unit[:, HEAD] += (self.logits * self.column((1 + further) * np.asarray(k.logit_bytes)))[:, 0]
        again = np.asarray(base.recompute) > 0
        self.unit[:, LAYERS] += np.where(again[:, None] if again.ndim else again, 0.0, self.scores)

    def under(self, code: int) -> Holding:
        """The same under another recompute (index into `RECOMPUTE`)."""
        found = copy(self)
        found._keep(replace(self.base, recompute=np.asarray(code)))
        return found

    def table(self, per_kind: dict[str, Column]) -> np.ndarray:
        """[N, kinds]"""
        found = np.zeros((self.rows, len(KINDS)))
        for kind, value in per_kind.items():
            found[:, KINDS.index(kind)] = value
        return found

    def column(self, value: Column) -> Column:
        """A number, or [N, 1]."""
        return value if np.ndim(value) == 0 else np.asarray(value, float)[:, None]

    def memory(
        self, c: Candidates, parts: Contents, rows: Any = slice(None), exact: bool = False,
        ranks: np.ndarray | None = None,
    ) -> Memory:  # fmt: skip
        """Of those `rows` of the base that are `c`, under its schedule, with stages of `parts`: of all pipeline ranks,
        or of some.

        Unless it is to be `exact`, activations are those of one moment (`live`): no more than at the peak.
        """
        k = self.k
        counts, by_rank = _by_rank(c, parts)  # [kinds, S] or [N, kinds, S], and by rank
        by_rank = by_rank if ranks is None else by_rank[..., ranks]

        def column(value: Column) -> Column:
            found = self.column(value)
            return found[rows] if np.ndim(found) else found

        def own(value: Column) -> Column:
            return value if np.ndim(value) == 0 else value[:, None]

        dense, experts = spread(self.dense[rows], by_rank), spread(self.experts[rows], by_rank)
        ends = (by_rank[..., EMBEDDING, :] > 0) & (by_rank[..., HEAD, :] > 0)
        once = column(shares_ends(self.shape))  # what both ends use
        dense = dense - ends * once * self.dense[rows, :1]
        whole = dense + experts
        zero = own(np.where(c.dp * c.cp > 1, c.zero, 0))
        cut = dense / own(c.shards) + experts / own(c.expert_shards)
        pieces = np.where(zero > 0, cut, whole)
        accumulates = (own(c.micro_batches) > 1) | (c.pp > 1) | (zero == 3)
        held = np.where(zero == 3, pieces, whole) * column(k.weight_bytes)
        gradients = np.where(zero >= 2, pieces, whole) * (column(k.gradient_bytes) * accumulates)
        owned = column(k.optimizer_bytes) + np.where((zero == 1) | (zero == 2), column(k.own_bytes), 0.0)
        counted = spread(self.counted[rows], by_rank) / np.where(zero > 0, own(c.shards), 1)
        optimizer = pieces * owned - counted * column(k.optimizer_bytes)
        activations, passing = self._activations(c, parts, counts, by_rank, rows, exact, ranks)
        widest = largest((self.dense + self.experts)[rows], by_rank) * column(k.weight_bytes)
        beside = np.where(zero == 3, widest, whole * column(k.weight_bytes))
        copies = np.where(own(c.dp * c.cp) > 1, column(k.gradient_copies), np.minimum(column(k.gradient_copies), 1.0))
        passing = passing + np.where(zero == 3, widest, 0.0) + beside * copies
        allocated = held + gradients + optimizer + activations + passing
        fixed = GIB * (column(k.reserve) + column(k.buffers) * own(communicators(c))) + column(k.fragments) * allocated
        return Memory(held, gradients, optimizer, activations, passing, fixed)

    def _activations(
        self, c: Candidates, parts: Contents, counts: np.ndarray, by_rank: np.ndarray, rows: Any, exact: bool,
        ranks: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """(saved, coming and going) bytes of every rank, or of `ranks`."""
        k = self.k
        item, last = (
            value[rows] if np.ndim(value) else value
            for value in map(self.column, (k.item_bytes * np.asarray(k.saved), k.logits * np.asarray(k.item_bytes)))
        )
        unit, logits, scores, back = self.unit[rows], self.logits[rows], self.scores[rows], self.back[rows] * item
        again = np.asarray(c.recompute) > 0
        again = again[:, None] if again.ndim else again
        beside = back.copy()
        beside[:, LAYERS] += scores * again
        if exact:
            stage = spread(unit, counts)
            for index, number in enumerate(LAYERS if parts.again is not None else ()):
                # Of the layers that recompute does not name everything is saved.
                rest = 1 - np.asarray(parts.again[index])
                stage = stage + counts[..., number, :] * rest * (back[:, number, None] + np.where(again, scores, 0.0))
            kept = schedules.peak_live(c.schedule, c.pp, c.vpp, c.micro_batches, stage, stage)
        else:
            kept = np.empty((len(c), by_rank.shape[-1]))
            numbers = np.broadcast_to(np.minimum(c.micro_batches, enough(c.schedule, c.pp)), (len(c),))
            for m in np.unique(numbers):
                flying = counts @ live(c.schedule, c.pp, c.vpp, int(m)).T
                same = numbers == m
                kept[same] = unit[same] @ (flying if ranks is None else flying[:, ranks])
        last = (by_rank[..., HEAD, :] > 0) * (logits * last)
        return kept, np.maximum(largest(beside, by_rank), last)


def shares_ends(shape: Shape) -> Column:
    """Whether the embedding and the head use one matrix where they lie on one rank."""
    return np.asarray(shape.tied) | (np.asarray(shape.further) > 0)


def flights(c: Candidates) -> tuple[int, ...]:
    """Numbers of micro-batches that `live` tells apart."""
    return tuple(distinct(np.minimum(c.micro_batches, enough(c.schedule, c.pp)))[0].tolist())


def heaviest(load: Load, schedule: str, pp: int, vpp: int, numbers: tuple[int, ...], shared: bool) -> np.ndarray:
    """Pipeline ranks of which, whatever the rest of a layout, one holds the most: no other has as many of every kind of
    segments, and as many of them in flight with any of these `numbers` of micro-batches. `shared` is whether both ends
    of the model use one matrix."""
    own = load.own.T
    if shared:
        own = own * np.where((own[EMBEDDING] > 0) & (own[HEAD] > 0), ALONE, 1)
    held = np.concatenate([own, *(load.stages.T @ live(schedule, pp, vpp, m).T for m in numbers)]).T
    more = (held[:, None] >= held).all(2)  # [i, j]: i holds no less than j
    first = np.arange(pp)[:, None] < np.arange(pp)
    return np.flatnonzero(~(more & (~more.T | first)).any(0))


def _by_rank(c: Candidates, parts: Contents) -> tuple[np.ndarray, np.ndarray]:
    """How many of each kind stages, and pipeline ranks, have: [kinds, S] and [kinds, pp], or with N before."""
    counts = np.stack([parts.counts(kind) for kind in KINDS], -2).astype(float)
    place, _ = places(c.schedule, c.pp, c.stages + 1)
    return counts, counts @ (place[:, None] == np.arange(c.pp)).astype(float)


def largest(table: np.ndarray, by_rank: np.ndarray) -> np.ndarray:
    """Of what each rank has any of, the most by a table [N, kinds]: [N, ranks]."""
    found = np.zeros((len(table), by_rank.shape[-1]))
    for kind in range(len(KINDS)):
        np.maximum(found, (by_rank[..., kind, :] > 0) * table[:, kind, None], out=found)
    return found


def spread(table: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[N, kinds] over [kinds, S] or [N, kinds, S]: [N, S]."""
    return table @ counts if counts.ndim == 2 else np.einsum("nk,nks->ns", table, counts)
