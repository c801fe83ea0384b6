"""What a rank holds of a model under a layout: weights, gradients, the optimizer's state, saved activations.

Counted from shapes alone, as the planner has no model at hand; equal to what `parallelize` makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from models.config import ModelConfig
from parallel.layout import Layout
from parallel.schedules import cut, peaks

STACKED = {f"{name}_proj": "qkv_proj" for name in "qkv"} | {f"{name}_proj": "gate_up_proj" for name in ("gate", "up")}
"""Parameters that are one weight (`models.weights.Weight`)."""
CUT_BY_COLUMNS = ("o_proj", "down_proj")
WHOLE = ("q_a_proj", "kv_a_proj", "join_proj", "router")
"""The other matrices are cut by rows; these and norms not at all (`models.decoder.STYLES`)."""
COUNTED = ("router.bias", ".tally")
"""Endings of what AdamW does not update."""

Shapes = dict[str, tuple[int, ...]]


class Share:
    """What the ranks at `place` of the pipeline hold of a model: its segments, and slices of their weights.

    Segments are counted as in `models.decoder.decoder_segments`: 0 the embedding, then the layers, then the head with
    the layers of multi-token prediction.
    """

    def __init__(self, config: ModelConfig, layout: Layout, global_batch: int, place: int = 0) -> None:
        self.config, self.layout = config, layout
        self.micro_batches = layout.check_batch(global_batch)
        self.schedule = layout.pipeline(global_batch)
        self.stages = {0: range(config.layers + 2)}
        """Segments of each of the place's virtual stages."""
        if self.schedule:
            spans = cut(config.layers, self.schedule.stages, layout.stages if layout.pp > 1 else None)
            self.stages = {stage: spans[stage] for stage in self.schedule.stages_of(place)}
        self.segments = tuple(segment for span in self.stages.values() for segment in span)
        self.embedding, self.head = 0 in self.segments, config.layers + 1 in self.segments
        self.layers = tuple(segment - 1 for segment in self.segments if 0 < segment <= config.layers)
        self.later = tuple(config.later_layers) if self.head else ()
        """Layers of multi-token prediction."""
        self.place = place
        self.shards, self.expert_shards = shard_counts(layout)
        """Ranks that cut each weight among them, and those that cut an expert's."""
        self._layers = {kind: _layer_shapes(config, layout, layer) for kind, layer in self._first_of_kind().items()}

    def _first_of_kind(self) -> dict[bool, int]:
        """Whether a layer has experts -> the first layer of that kind."""
        last = self.config.layers + self.config.mtp.depth
        return {self.config.moe.in_layer(layer): layer for layer in reversed(range(last))}

    @property
    def tied(self) -> bool:
        """Whether these ranks have the embedding and those at another place too."""
        last = self.schedule.rank_of(self.schedule.stages - 1) if self.schedule else 0
        shared = self.config.tied_embeddings or self.config.mtp.depth > 0
        return shared and last != 0 and self.place in (0, last)

    def weights(self, segments: Iterable[int] | None = None) -> Shapes:
        """Shapes of the weights of `segments` (None: all), by name, in the order in which they are held."""
        shapes: Shapes = {}
        matrix = (self.config.vocab // self.layout.tp, self.config.hidden)
        for segment in self.segments if segments is None else segments:
            if segment == 0:
                shapes["embedding.weight"] = matrix
            elif segment <= self.config.layers:
                shapes |= self._layer(segment - 1)
            else:
                shapes["norm.weight"] = (self.config.hidden,)
                shapes.setdefault("embedding.weight" if self.config.tied_embeddings else "head.weight", matrix)
                if self.later:
                    shapes.setdefault("embedding.weight", matrix)
                tallies = {}
                for layer in self.later:
                    *joins, norm, tally = self.config.prediction_parameters(layer)
                    shapes |= {spec.name: spec.shape for spec in joins} | self._layer(layer) | {norm.name: norm.shape}
                    tallies = {tally.name: tally.shape} | tallies  # modules lie in one another
                shapes |= tallies
        return shapes

    def _layer(self, layer: int) -> Shapes:
        own = self._layers[self.config.moe.in_layer(layer)]
        return {f"layers.{layer}.{name}": shape for name, shape in own.items()}

    def elements(self, segment: int) -> int:
        """Of the weights of one segment."""
        return sum(map(math.prod, self.weights([segment]).values()))

    def kinds(self) -> list[int]:
        """One of each kind of segments that share their graphs (`parallel.sharded.fingerprint`)."""
        kind = {layer + 1: (self.layout.recompute_of(layer), self.config.moe.in_layer(layer)) for layer in self.layers}
        return list({kind.get(segment, segment): segment for segment in self.segments}.values())

    def piece(self, name: str, shape: Sequence[int]) -> int:
        """Elements that one rank has of a tensor that ZeRO cuts, padding included; all of them without ZeRO."""
        return -(-math.prod(shape) // (self.expert_shards if is_expert(name) else self.shards))

    def pieces(self, segments: Iterable[int] | None = None) -> dict[str, int]:
        """Those of each of `weights`."""
        return {name: self.piece(name, shape) for name, shape in self.weights(segments).items()}


def shard_counts(layout: Layout) -> tuple[int, int]:
    """Ranks that cut a weight among them under ZeRO, and ranks that cut an expert's: `layout.zero_group`, of experts as
    many as divide the ranks that have the same."""
    if not layout.zero or layout.dp * layout.cp == 1:
        return 1, 1
    group = layout.zero_group
    return group or layout.dp * layout.cp, math.gcd(layout.edp, group) if group else layout.edp


def is_expert(name: str) -> bool:
    """Whether a weight is that of routed experts."""
    return ".experts." in name


def _layer_shapes(config: ModelConfig, layout: Layout, layer: int) -> Shapes:
    """Of the weights of a layer, the routed experts' on one rank of ep and etp."""
    shapes: dict[str, list[int]] = {}
    experts = config.moe.experts // layout.ep if config.moe.in_layer(layer) else 0
    for spec in config.layer_parameters(layer):
        *block, role, kind = spec.name.split(".")[2:]
        shape, number = list(spec.shape), block[2] if "experts" in block else None
        if number is not None:
            if int(number) >= experts:
                continue
            block, ranks = block[:2], layout.etp
        else:
            ranks = min(layout.tp, config.kv_heads) if role in ("k_proj", "v_proj") else layout.tp
        if not role.endswith("norm") and role not in WHOLE:
            shape[role in CUT_BY_COLUMNS] //= ranks
        name = ".".join(
            [*block, STACKED.get(role, role) if not config.latent.kv_rank or role[0] != "q" else role, kind]
        )
        if name in shapes:
            shapes[name][0] += shape[0]
        else:
            shapes[name] = shape
    return {name: tuple(shape) for name, shape in shapes.items()}


class State(NamedTuple):
    """Bytes of the tensors that live from pass to pass."""

    weights: int
    gradients: int
    """Sums over micro-batches; 0 where the whole step is one graph, in which gradients come and go."""
    optimizer: int
    """Two moments of each weight, and the weights that it updates where it has some of its own."""
    gathered: int
    """Weights that ZeRO 3 has whole at once: a segment's. With prefetch those of two neighbours, and what the forward
    and the backward graph of each kind of segment were last given and hold on to."""


def state_bytes(share: Share, item_bytes: int) -> State:
    """Without ZeRO n elements of weights and gradients each, and 2 n of moments. Cut over k ranks, p = n/k and padding:
    stage 1 has n, n and 3 p (it updates weights of its own), stage 2 n, p and 3 p, stage 3 p, p and 2 p. Routers'
    biases and tallies have no moments."""
    layout, pieces = share.layout, share.pieces()
    whole = {name: math.prod(shape) for name, shape in share.weights().items()}
    stage = layout.zero if layout.dp * layout.cp > 1 else 0
    held, summed = pieces if stage == 3 else whole, pieces if stage >= 2 else whole
    updated = pieces if stage else whole
    optimizer = 2 * sum(size for name, size in updated.items() if not name.endswith(COUNTED))
    optimizer += sum(pieces.values()) if stage in (1, 2) else 0
    gradients = sum(summed.values()) if share.schedule or share.micro_batches > 1 else 0
    gathered = 0
    if stage == 3:
        gathered = max(map(share.elements, share.segments), default=0)
        if layout.prefetch:
            pairs = (sum(map(share.elements, pair)) for span in share.stages.values() for pair in pairwise(span))
            gathered = max([gathered, *pairs]) + 2 * sum(map(share.elements, share.kinds()))
    return State(*(item_bytes * elements for elements in (sum(held.values()), gradients, optimizer, gathered)))


def saved_elements(config: ModelConfig, layout: Layout, seq_len: int, segment: int) -> int:
    """Elements that one micro-batch leaves of a segment on one rank, for the backward pass: what the segments save.

    A layer: the inputs of norms and linears; qkv before q/k-norm, and before attention (behind the rotary, with cp),
    attention's output and a log-sum-exp a head; gate and up. The head: the inputs of norm and linear, logits and a
    log-sum-exp. A tensor that two segments save counts once, as attention's output, the next linear's input, does
    unless Ulysses exchanges it between them. Rows of experts are taken to be as many as even shares. A module of
    multi-token prediction: the embedding's norm's input, what is joined, a layer, and what the head saves.
    """
    stream = layout.stream_tokens(seq_len) * config.hidden
    if segment == 0:
        return 0
    if segment <= config.layers:
        return _saved_by_layer(config, layout, seq_len, segment - 1)
    own = 2 * stream + layout.micro_batch * seq_len // layout.cp * (config.vocab // layout.tp + 1)
    modules = len(config.later_layers) * (own + 1)
    for layer in config.later_layers:
        if layout.recompute_of(layer) != "full":  # which keeps the head's input alone, as the head does
            modules += 3 * stream + _saved_by_layer(config, layout, seq_len, layer)
    return own + modules


def _saved_by_layer(config: ModelConfig, layout: Layout, seq_len: int, layer: int) -> int:
    tokens, tp = layout.micro_batch * seq_len // layout.cp, layout.tp
    stream = layout.stream_tokens(seq_len) * config.hidden
    if layout.recompute_of(layer) == "full":
        return stream
    attention = _saved_by_latent_attention if config.latent.kv_rank else _saved_by_attention
    block = 2 * stream + tokens * 3 * config.ffn // tp
    if config.moe.in_layer(layer):
        block = 2 * stream + _saved_by_experts(config, layout, seq_len)
    norms = 2 * stream * config.sandwich_norm
    return 2 * stream + tokens * attention(config, layout, layout.recompute_of(layer)) + block + norms


def _saved_by_attention(config: ModelConfig, layout: Layout, which: str) -> int:
    """By token, behind the first linear's input."""
    heads, keys, inside = config.heads // layout.tp, max(1, config.kv_heads // layout.tp), layout.ulysses
    query, qkv = heads * config.head_width, (heads + 2 * keys) * config.head_width
    attention = qkv
    if which != "selective":
        attention = query + 2 * inside * max(1, keys // inside) * config.head_width + query + heads
        attention += query * (inside > 1)
    return attention + qkv * config.qk_norm


def _saved_by_latent_attention(config: ModelConfig, layout: Layout, which: str) -> int:
    """The latents before and behind their norms, packed heads, and the output with its log-sum-exp, of which the last
    linear takes the values."""
    latent, heads = config.latent, config.heads // layout.tp
    share = layout.tp if layout.sequence_parallel else 1
    width = latent.nope + latent.rope
    core = 3 * heads * width
    if which != "selective":
        core += heads * width + heads
    return 2 * ((latent.q_rank or 0) + latent.kv_rank) // share + core + heads * latent.value


def _saved_by_experts(config: ModelConfig, layout: Layout, seq_len: int) -> int:
    """Logits, choices and what was counted; rows and gates with a weight and a place for each copy; of the shared
    experts gate, up and the last linear's input."""
    moe = config.moe
    tokens = layout.micro_batch * seq_len // layout.cp
    own = tokens // layout.tp
    copies = own * moe.top_k * layout.etp
    routed = own * (moe.experts + moe.top_k) + layout.micro_batch * 2 * moe.experts + 1
    routed += copies * (config.hidden + 2 * moe.ffn // layout.etp + 2) + moe.experts // layout.ep
    taken = own * config.hidden if layout.tp > 1 and not layout.sequence_parallel else 0
    return routed + taken + tokens * 3 * moe.shared * moe.ffn // layout.tp


def room_rows(config: ModelConfig, layout: Layout, seq_len: int) -> int:
    """Rows for which a rank of `ep` has room: all tokens of its group, each to as many of its own experts as it can
    choose. Static, so memory on a device; address space on a CPU (docs/experts.md)."""
    moe, ranks = config.moe, layout.ep * layout.etp
    tokens = layout.micro_batch * seq_len // layout.cp // layout.tp
    return ranks * tokens * min(moe.top_k, moe.experts // layout.ep)


def recomputed_elements(share: Share, seq_len: int) -> int:
    """The most that one layer's backward brings back of what recompute did not save; 0 without recompute."""
    without = replace(share.layout, recompute="none")
    return max(
        (
            _saved_by_layer(share.config, without, seq_len, layer)
            - _saved_by_layer(share.config, share.layout, seq_len, layer)
            for layer in share.layers + share.later
        ),
        default=0,
    )


def peak_saved_elements(share: Share, seq_len: int) -> int:
    """The most that is saved at once, over the micro-batches in flight; from input to weight gradient as much stays."""
    saved = {
        stage: sum(saved_elements(share.config, share.layout, seq_len, segment) for segment in span)
        for stage, span in share.stages.items()
    }
    if not share.schedule:
        return saved[0]
    return int(peaks(share.schedule, *[[saved.get(s, 0) for s in range(share.schedule.stages)]] * 2)[share.place])
