"""The traffic account: what collectives move, by axis, collective, dtype and level of the machine.

Two columns. *Payload* is the bytes that a rank hands to a primitive. *Wire* is the bytes that a rank sends, computed
from payload, the placement of the group and one algorithm per collective (`ALGORITHMS`). The collectives measure with
this account and the planner predicts with it.

Algorithms, with B the payload of a rank, n the ranks of a group, in ascending order around the ring; cost formulas as
in Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1), 2005,
and for the all-reduce Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
JPDC 69(2), 2009:

- ``all_reduce``: ring; a rank sends 2 (n-1)/n B to its next neighbour.
- ``reduce_scatter``: ring; (n-1)/n B to its next neighbour.
- ``all_gather``: ring; B is the rank's own part, and (n-1) B go to its next neighbour.
- ``all_to_all``: pairwise exchange; B/n to each of the others.
- ``broadcast``: pipelined chain along the ring from the first rank; B to the next, nothing from the last.
- ``send``: B to the peer.
- ``all_to_all_v``: pairwise, what goes to each of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from models.config import ModelConfig
from parallel.dispatch import Moves, Routed, even, moves
from parallel.layout import buckets
from parallel.memory import Share, is_expert
from parallel.mesh import Axes, Mesh
from parallel.topology import Level

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "int32": 4}


def _ring(factor: Callable[[int], float]) -> Callable[[int, int, int], dict[int, float]]:
    return lambda payload, n, index: {(index + 1) % n: factor(n) * payload}


def _chain(payload: int, n: int, index: int) -> dict[int, float]:
    return {index + 1: payload} if index + 1 < n else {}


# collective -> (payload, ranks of the group, index of the sender) -> bytes sent, by index of the receiver.
ALGORITHMS: dict[str, Callable[[int, int, int], dict[int, float]]] = {
    "all_reduce": _ring(lambda n: 2 * (n - 1) / n),
    "reduce_scatter": _ring(lambda n: (n - 1) / n),
    "all_gather": _ring(lambda n: n - 1),
    "all_to_all": lambda payload, n, index: {peer: payload / n for peer in range(n) if peer != index},
    "broadcast": _chain,
}


class Key(NamedTuple):
    """What a row of the account is about."""

    axis: str
    """As `Mesh.label` writes it: ``dp``, ``dp x cp``."""
    collective: str
    dtype: str


class Traffic:
    """The account of one rank, or the maximum over several."""

    def __init__(self) -> None:
        self.payload: dict[Key, tuple[int, int]] = {}
        """Payload bytes and calls."""
        self.wire: dict[Key, dict[tuple[int, str], float]] = {}
        """Bytes sent, by (index, name) of the level."""

    def add(
        self, mesh: Mesh, rank: int, axes: Axes, collective: str, dtype: str, payload: int, calls: int = 1,
        peer: int | None = None, ranks: tuple[int, ...] | None = None, sent: dict[int, float] | None = None,
    ) -> None:  # fmt: skip
        """Count `calls` of one primitive over the group of `axes`, `payload` bytes in all, handed in by `rank`.

        ``send`` names the rank that receives as `peer`, and ``all_to_all_v`` what it `sent` to each place; `ranks` are
        those of a part of the group where it is one. A group of one rank moves nothing and has no row.
        """
        group = ranks or mesh.group(axes, rank)
        if len(group) == 1:
            return
        if collective == "send":
            sent = {group.index(peer): float(payload)}
        key = Key(mesh.label(axes), collective, dtype)
        before, calls_before = self.payload.get(key, (0, 0))
        self.payload[key] = (before + payload, calls_before + calls)
        span = mesh.span(group)
        levels = self.wire.setdefault(key, {})
        levels.setdefault((span.index, span.name), 0.0)
        for level, size in self.by_level(mesh, rank, group, collective, payload, sent):
            levels[level.index, level.name] = levels.get((level.index, level.name), 0.0) + size

    def by_level(
        self, mesh: Mesh, rank: int, group: Sequence[int], collective: str, payload: int, sent: dict[int, float] | None
    ) -> Iterable[tuple[Level, float]]:  # fmt: skip
        """Bytes that `rank` sends at levels of the machine: by `ALGORITHMS` where it is not given what it `sent`."""
        if sent is None:
            sent = ALGORITHMS[collective](payload, len(group), group.index(rank))
        return ((mesh.level_of(rank, group[receiver]), size) for receiver, size in sent.items())

    def rows(self) -> list[dict[str, str | int]]:
        """The account as `summary.json` holds it, one row for each key and level.

        Payload and calls belong to the key, not to a level: they stand in the row of its outermost level and are 0
        in the others, so that a sum over rows counts nothing twice.
        """
        rows = []
        for key in sorted(self.payload):
            payload, calls = self.payload[key]
            outermost = max(self.wire[key])
            for level, wire in sorted(self.wire[key].items()):
                counted = (payload, calls) if level == outermost else (0, 0)
                rows.append(
                    {
                        **key._asdict(),
                        "level": level[1],
                        "payload_bytes": counted[0],
                        "wire_bytes": round(wire),
                        "calls": counted[1],
                    }
                )
        return rows


def maximum(accounts: Iterable[Traffic]) -> Traffic:
    """The largest of every figure over the accounts of several ranks."""
    result = Traffic()
    for account in accounts:
        for key, (payload, calls) in account.payload.items():
            largest = result.payload.get(key, (0, 0))
            result.payload[key] = (max(payload, largest[0]), max(calls, largest[1]))
            levels = result.wire.setdefault(key, {})
            for level, wire in account.wire[key].items():
                levels[level] = max(wire, levels.get(level, 0.0))
    return result


def step_traffic(
    mesh: Mesh, rank: int, config: ModelConfig, seq_len: int, global_batch: int, dtype: str,
    linears: str | None = None, routed: Routed | None = None, kind: type[Traffic] = Traffic,
) -> Traffic:  # fmt: skip
    """What `rank` hands to primitives in one training step: from shapes alone, what a run counts.

    `dtype` is that of weights and gradients; `linears` that of what linears take and give, where it is another
    (bfloat16 on Ascend). Ranks at one place of the pipeline have the same payload, but of what is dispatched to
    experts; their wire depends on the placement. `routed` is what the ranks of this one's group of experts routed
    where; left out, experts take turns. `kind` says which level bytes go over.
    """
    return _Step(mesh, rank, config, seq_len, global_batch, dtype, linears or dtype, routed, kind()).account


def step_rows(
    mesh: Mesh, config: ModelConfig, seq_len: int, global_batch: int, dtype: str, linears: str | None = None,
    routed: Sequence[Mapping[int, np.ndarray]] | None = None, ranks: Iterable[int] | None = None,
    kind: type[Traffic] = Traffic,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of `summary.json`: the maximum of `step_traffic` over `ranks`, by default all.

    `routed` has of each rank, by layer, the experts [N, K] that its N tokens went to; left out, experts take turns.
    """

    def account(rank: int) -> Traffic:
        own = None
        if routed is not None:
            group = mesh.group(("ep", "etp"), rank)
            own = {layer: [routed[other][layer] for other in group] for layer in routed[rank]}
        return step_traffic(mesh, rank, config, seq_len, global_batch, dtype, linears, own, kind)

    return maximum(map(account, range(mesh.world_size) if ranks is None else ranks)).rows()


@lru_cache(maxsize=64)
def _moves_in_turn(
    tokens: int, top_k: int, experts: int, places: tuple[int, ...], slices: int, outer: int, place: int
) -> list[Moves]:
    """Of one micro-batch; `places` of the group's ranks among those of tp."""
    return moves([even(tokens, top_k, experts, own) for own in places], experts, slices, outer, place)


class _Step:
    """One rank's account of one step, a method for each technique.

    In formulas: M micro-batches; T tokens of one on this rank, H hidden, P ranks of tp, L layers of this rank.
    """

    def __init__(
        self, mesh: Mesh, rank: int, config: ModelConfig, seq_len: int, global_batch: int, dtype: str, linears: str,
        routed: Routed | None, account: Traffic,
    ) -> None:  # fmt: skip
        self.mesh, self.rank, self.config, self.layout = mesh, rank, config, mesh.layout
        self.account, self.dtype, self.linears, self.routed = account, dtype, linears, routed
        self.share = Share(config, self.layout, global_batch, mesh.index("pp", rank))
        self.micro_batches = self.share.micro_batches
        self.tokens = self.layout.micro_batch * seq_len // self.layout.cp
        self.stream = self.layout.stream_tokens(seq_len) * config.hidden
        self.limit = self.layout.bucket_elements(DTYPE_BYTES[dtype])
        self.tensor()
        self.experts()
        self.context()
        self.pipeline()
        if self.layout.zero and mesh.size("loss") > 1:
            self.zero()
        else:
            self.data()
        self.replica()

    def add(
        self, axes: Axes, collective: str, elements: int, calls: int = 1, dtype: str | None = None, **where: Any
    ) -> None:
        """`elements` in all, in `calls` messages, where there are any."""
        if elements:
            dtype = dtype or self.dtype
            payload = elements * DTYPE_BYTES[dtype]
            self.account.add(self.mesh, self.rank, axes, collective, dtype, payload, calls, **where)

    def bucketed(self, axes: Axes, collective: str, sizes: Sequence[int], times: int = 1, **where: Any) -> None:
        """Tensors of `sizes` elements in messages of up to `layout.bucket_mib`."""
        self.add(axes, collective, times * sum(sizes), times * len(buckets(sizes, self.limit)), **where)

    def near(self, axes: Axes, count: int) -> tuple[int, ...]:
        """This rank's part of a group that is cut into parts of `count` neighbours."""
        ranks = self.mesh.group(axes, self.rank)
        first = ranks.index(self.rank) // count * count
        return ranks[first : first + count]

    def across(self, axes: Axes, count: int) -> tuple[int, ...]:
        """The ranks at this one's place in each of those parts."""
        ranks = self.mesh.group(axes, self.rank)
        return ranks[ranks.index(self.rank) % count :: count]

    def again(self, layer: int, *kinds: str) -> bool:
        """Whether a layer's forward, or its attention, runs again."""
        return self.layout.recompute_of(layer) in kinds

    def tensor(self) -> None:
        """Blocks are entered and left: a sum of T H where forwards leave (embedding, and attention, feed-forward or
        shared experts of a layer, once more where it runs again) and of T times the linear's width where backwards
        enter.

        With sequence parallelism a sum is a reduce-scatter, and its transpose an all-gather over P; the linears
        where blocks are entered gather once more for the weights' gradients. Linears take what was gathered rounded,
        and gradients are summed before. The head gathers a log-sum-exp and a target a token. Rows of keys and values
        that several ranks have are summed among them in each layer; the key that latent attention's heads share is
        gathered, and its gradient summed. A module of multi-token prediction looks tokens up and runs the head once
        more.
        """
        config, share, layout, m, moe = self.config, self.share, self.layout, self.micro_batches, self.config.moe
        latent, hidden, summed = config.latent, config.hidden, "all_reduce"
        if layout.sequence_parallel:
            summed = "reduce_scatter"
        latents = [width for width in (latent.q_rank, latent.kv_rank) if width]
        for layer in share.layers + share.later:
            block = [hidden] if not moe.in_layer(layer) or moe.shared else []
            streams = block if latent.q_rank else [hidden, *block]
            again, entries, leaves = self.again(layer, "full"), latents + streams, 1 + len(block)
            left = m * leaves * (1 + again)
            self.add("tp", summed, left * self.tokens * hidden, left, self.linears)
            self.add("tp", summed, m * self.tokens * sum(streams), m * len(streams))
            self.add("tp", summed, m * self.tokens * sum(latents), m * len(latents), self.linears)
            self.add("tp", summed, m * self.tokens * latent.rope * bool(latents), m, self.linears)
            if layout.sequence_parallel:
                own, passes = self.tokens // layout.tp, m * (2 + again)
                self.add("tp", "all_gather", passes * own * sum(entries), passes * len(entries), self.linears)
                self.add("tp", "all_gather", m * leaves * own * hidden, m * leaves, self.linears)
                keys = m * (1 + again)
                self.add("tp", "all_gather", keys * own * latent.rope * bool(latents), keys, self.linears)
        looked, heads = m * (share.embedding + len(share.later)), m * (share.head + len(share.later))
        ends = looked + heads + m * sum(self.again(layer, "full") for layer in share.later)
        self.add("tp", summed, ends * self.tokens * hidden, ends)
        if layout.sequence_parallel:
            self.add("tp", "all_gather", 2 * heads * self.stream, 2 * heads, self.linears)
            self.add("tp", "all_gather", looked * self.stream, looked)
        self.add("tp", "all_gather", heads * 2 * self.tokens, heads)
        if not latent.kv_rank:
            copies, layers = layout.tp // min(layout.tp, config.kv_heads), len(share.layers + share.later)
            rows = 2 * config.head_width * (hidden + config.qkv_bias)
            self.add("tp", "all_reduce", m * layers * rows, m * layers, ranks=self.near("tp", copies))

    def context(self) -> None:
        """Ulysses exchanges a share of qkv and of the output, and their gradients back: T columns each. A ring of R
        passes the block of keys and values on R-1 times, backward with its gradient, which goes on once more. What runs
        forward again sends again."""
        layout, config, inside, m = self.layout, self.config, self.layout.ulysses, self.micro_batches
        latent = config.latent
        width = latent.nope + latent.rope if latent.kv_rank else config.head_width
        queries = config.heads // layout.tp
        keys = queries if latent.kv_rank else max(1, config.kv_heads // layout.tp)
        share, layers = max(1, keys // inside), self.share.layers + self.share.later
        backwards = m * len(layers)
        forwards = backwards + m * sum(self.again(layer, "full", "selective") for layer in layers)
        passes, near = forwards + backwards, self.near("cp", inside)
        elements = passes * self.tokens * width
        self.add("cp", "all_to_all", elements * (queries + 2 * inside * share), passes, self.linears, ranks=near)
        self.add("cp", "all_to_all", elements * queries, passes, ranks=near)
        ring = self.across("cp", inside)
        following, others = ring[(ring.index(self.rank) + 1) % len(ring)], len(ring) - 1
        blocks, calls = others * (forwards + 2 * backwards) + backwards, others * passes + backwards
        block = self.tokens * inside * 2 * share * width
        self.add("cp", "send", blocks * block, calls, self.linears, ranks=ring, peer=following)

    def experts(self) -> None:
        """In each layer with experts, over the T / P tokens that this rank routes: outputs, and input gradients, are
        gathered over tp where its ranks have the same tokens; for a balance the E counts of copies and the number of
        labels are summed, of each sequence or of all, in the backward. Dispatch: `parallel.dispatch`."""
        layout, moe, m = self.layout, self.config.moe, self.micro_batches
        balanced = ("dp", "cp", "tp") if moe.aux_loss == "global" else ("cp", "tp")
        rows = layout.micro_batch if moe.aux_loss == "sequence" else 1
        own = self.tokens // layout.tp
        for layer in self.share.layers + self.share.later:
            if not moe.in_layer(layer):
                continue
            forwards = m * (1 + self.again(layer, "full"))
            if not layout.sequence_parallel:
                self.add("tp", "all_gather", forwards * own * self.config.hidden, forwards, self.linears)
                self.add("tp", "all_gather", m * own * self.config.hidden, m)
            if moe.aux_loss != "none" and moe.aux_coef > 0:
                self.add(balanced, "all_reduce", m * rows * (moe.experts + 1), m)
            if layout.ep * layout.etp > 1:
                self.dispatch(layer, forwards)

    def dispatch(self, layer: int, forwards: int) -> None:
        """Where rows are counted by rank: G rows given and R taken in a step. Forward, once more where the layer runs
        again: G H and what is about them there, R H back; the counts, a number a rank, before. Backward: G H there, R H
        and the weights' gradients back."""
        layout, moe, m, hidden = self.layout, self.config.moe, self.micro_batches, self.config.hidden
        group = self.mesh.group(("ep", "etp"), self.rank)
        place = group.index(self.rank)
        outer, _ = self.mesh.dispatch()
        levels = moves(self.routed[layer], moe.experts, layout.etp, outer, place) if self.routed else self.in_turn
        for level in levels:
            ranks, own = tuple(group[i] for i in level.places), level.places.index(place)
            gives, takes = level.rows[own], level.rows[:, own]
            times = forwards // m
            self.add(("ep", "etp"), "all_to_all", forwards * len(ranks), forwards, "int32", ranks=ranks)
            self.rows(gives, ranks, (times + 1) * hidden, forwards + m, self.linears)
            self.rows(gives, ranks, times * level.about, forwards)
            self.rows(takes, ranks, (times + 1) * hidden, forwards + m, self.linears)
            self.rows(takes, ranks, level.gradients, m)

    @cached_property
    def in_turn(self) -> list[Moves]:
        """What dispatch moves where tokens go to experts in turn: every layer and micro-batch the same."""
        layout, moe = self.layout, self.config.moe
        group = self.mesh.group(("ep", "etp"), self.rank)
        places = tuple(self.mesh.index("tp", rank) for rank in group)
        outer, _ = self.mesh.dispatch()
        place = group.index(self.rank) if outer > 1 else 0  # flat dispatch is the same for all
        levels = _moves_in_turn(self.tokens // layout.tp, moe.top_k, moe.experts, places, layout.etp, outer, place)
        return [level._replace(rows=level.rows * self.micro_batches) for level in levels]

    def rows(
        self, counts: np.ndarray, ranks: tuple[int, ...], width: int, calls: int, dtype: str | None = None
    ) -> None:
        """`counts` rows to each of `ranks`, of `width` elements each."""
        if len(ranks) > 1:
            item = width * DTYPE_BYTES[dtype or self.dtype]
            sent = {i: float(n * item) for i, n in enumerate(counts.tolist()) if ranks[i] != self.rank}
            where = {"ranks": ranks, "sent": sent}
            payload, name = int(counts.sum()) * item, dtype or self.dtype
            self.account.add(self.mesh, self.rank, ("ep", "etp"), "all_to_all_v", name, payload, calls, **where)

    def pipeline(self) -> None:
        """The stream of T H (T H / P with sequence parallelism) between stages on different ranks: forward to the next
        stage and backward to the one before, once a micro-batch under every schedule."""
        schedule, group = self.share.schedule, self.mesh.group("pp", self.rank)
        for stage in self.share.stages if schedule else ():
            for target in (stage - 1, stage + 1):
                if 0 <= target < schedule.stages and schedule.rank_of(target) != self.share.place:
                    m, peer = self.micro_batches, group[schedule.rank_of(target)]
                    self.add("pp", "send", m * self.stream, m, peer=peer)

    def data(self) -> None:
        """Gradients, and with those that all of dp x cp have the sums [loss, valid tokens, wishes to stop]."""
        self.bucketed("loss", "all_reduce", [*self.pieces("loss"), 3])
        self.bucketed("edp", "all_reduce", self.pieces("edp"))

    def pieces(self, axes: str, segments: Iterable[int] | None = None) -> list[int]:
        """Of the weights of experts (``edp``) or of the others (``loss``)."""
        return [n for name, n in self.share.pieces(segments).items() if is_expert(name) == (axes == "edp")]

    def zero(self) -> None:
        """Over the k ranks of a shard group, with p = a weight's n / k and padding: gradients are reduce-scattered,
        sum of k p, once a step (stage 1) or a micro-batch; weights gathered, sum of p, once a step, or in stage 3 by
        segment for each forward and each backward. Across groups pieces are summed. The loss sums and the gradients'
        square sum go alone. Experts have shard groups of their own.
        """
        share, m, stage = self.share, self.micro_batches, self.layout.zero
        for axes, k in (("loss", share.shards), ("edp", share.expert_shards)):
            near, pieces = self.near(axes, k), self.pieces(axes)
            if stage == 1:
                self.bucketed(axes, "reduce_scatter", [k * piece for piece in pieces], ranks=near)
            elif stage == 2:
                for span in share.stages.values():
                    own = [k * piece for piece in self.pieces(axes, span)]
                    self.bucketed(axes, "reduce_scatter", own, m, ranks=near)
            else:
                segments = [own for own in (self.pieces(axes, [i]) for i in share.segments) if own]
                own, passes = sum(map(sum, segments)), m * len(segments)
                self.add(axes, "all_gather", 2 * m * own, 2 * passes, ranks=near)
                self.add(axes, "reduce_scatter", m * k * own, passes, ranks=near)
            if stage < 3:
                self.bucketed(axes, "all_gather", pieces, ranks=near)
            self.bucketed(axes, "all_reduce", pieces, ranks=self.across(axes, k))
            self.add(axes, "all_reduce", int(bool(pieces)), ranks=near)
        self.add("loss", "all_reduce", 3)

    def replica(self) -> None:
        """Gradients of which ranks of one replica have parts: norms and latents' first matrices with sequence
        parallelism, q/k-norms and routers over tp, a tied embedding over the first and the last place of the pipeline.
        Then the loss sums and the square sum, before which that of experts is summed over their ranks."""
        kinds = ("q_norm", "k_norm", "router")
        if self.layout.sequence_parallel:
            kinds += ("norm", "q_a_proj", "kv_a_proj", "join_proj")
        weights = self.share.weights()
        parts = [self.share.piece(n, shape) for n, shape in weights.items() if n.rpartition(".")[0].endswith(kinds)]
        self.add("tp", "all_reduce", sum(parts))
        if self.share.tied:
            group = self.mesh.group("pp", self.rank)
            embedding = self.share.piece("embedding.weight", weights["embedding.weight"])
            self.add("pp", "all_reduce", embedding, ranks=(group[0], group[-1]))
        self.add(("ep", "etp"), "all_reduce", int(bool(self.pieces("edp"))))
        self.add(("pp", "tp"), "all_reduce", 4)
