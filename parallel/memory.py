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
"""The other matrices are cut by rows, and norms not at all (`models.decoder.STYLES`)."""

Shapes = dict[str, tuple[int, ...]]


class Share:
    """What the ranks at `place` of the pipeline hold of a model: its segments, and slices of their weights.

    Segments are counted as in `models.decoder.decoder_segments`: 0 the embedding, then the layers, then the head.
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
        self.layers = tuple(segment - 1 for segment in self.segments if 0 < segment <= config.layers)
        self.embedding, self.head = 0 in self.segments, config.layers + 1 in self.segments
        self.place = place
        self.shards = (layout.zero_group or layout.dp * layout.cp) if layout.zero else 1
        """Ranks that cut each weight among them."""
        self._layer = _layer_shapes(config, layout.tp)

    @property
    def tied(self) -> bool:
        """Whether these ranks have the embedding and those at another place too."""
        last = self.schedule.rank_of(self.schedule.stages - 1) if self.schedule else 0
        return self.config.tied_embeddings and last != 0 and self.place in (0, last)

    def weights(self, segments: Iterable[int] | None = None) -> Shapes:
        """Shapes of the weights of `segments` (None: all), by name, in the order in which they are held."""
        shapes: Shapes = {}
        matrix = (self.config.vocab // self.layout.tp, self.config.hidden)
        for segment in self.segments if segments is None else segments:
            if segment == 0:
                shapes["embedding.weight"] = matrix
            elif segment <= self.config.layers:
                shapes |= {f"layers.{segment - 1}.{name}": shape for name, shape in self._layer.items()}
            else:
                shapes["norm.weight"] = (self.config.hidden,)
                shapes.setdefault("embedding.weight" if self.config.tied_embeddings else "head.weight", matrix)
        return shapes

    def elements(self, segment: int) -> int:
        """Of the weights of one segment."""
        return sum(map(math.prod, self.weights([segment]).values()))

    def kinds(self) -> list[int]:
        """One of each kind of segments that share their graphs (`parallel.sharded.fingerprint`)."""
        kind = {
            segment: self.layout.recompute_of(segment - 1) for segment in self.segments if segment - 1 in self.layers
        }
        return list({kind.get(segment, segment): segment for segment in self.segments}.values())

    def piece(self, shape: Sequence[int]) -> int:
        """Elements that one rank has of a tensor that ZeRO cuts, padding included; all of them without ZeRO."""
        return -(-math.prod(shape) // self.shards)

    def pieces(self, segments: Iterable[int] | None = None) -> list[int]:
        """Those of each of `weights`."""
        return [self.piece(shape) for shape in self.weights(segments).values()]


def _layer_shapes(config: ModelConfig, tp: int) -> Shapes:
    """Of the weights of any layer."""
    shapes: dict[str, list[int]] = {}
    for spec in config.layer_parameters(0):
        *block, role, kind = spec.name.split(".")[2:]
        shape = list(spec.shape)
        if not role.endswith("norm"):
            ranks = min(tp, config.kv_heads) if role in ("k_proj", "v_proj") else tp
            shape[role in CUT_BY_COLUMNS] //= ranks
        name = ".".join([*block, STACKED.get(role, role), kind])
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
    stage 1 has n, n and 3 p (it updates weights of its own), stage 2 n, p and 3 p, stage 3 p, p and 2 p."""
    layout, piece = share.layout, sum(share.pieces())
    whole = sum(map(math.prod, share.weights().values()))
    stage = layout.zero if layout.dp * layout.cp > 1 else 0
    weights = piece if stage == 3 else whole
    gradients = piece if stage >= 2 else whole
    optimizer = 3 * piece if stage in (1, 2) else 2 * weights
    if not share.schedule and share.micro_batches == 1:
        gradients = 0
    gathered = 0
    if stage == 3:
        gathered = max(map(share.elements, share.segments), default=0)
        if layout.prefetch:
            pairs = (sum(map(share.elements, pair)) for span in share.stages.values() for pair in pairwise(span))
            gathered = max([gathered, *pairs]) + 2 * sum(map(share.elements, share.kinds()))
    return State(*(item_bytes * elements for elements in (weights, gradients, optimizer, gathered)))


def saved_elements(config: ModelConfig, layout: Layout, seq_len: int, segment: int) -> int:
    """Elements that one micro-batch leaves of a segment on one rank, for the backward pass: what the segments save.

    A layer: the inputs of norms and linears; qkv before q/k-norm, and before attention (behind the rotary, with cp),
    attention's output and a log-sum-exp a head; gate and up. The head: the inputs of norm and linear, logits and a
    log-sum-exp. A tensor that two segments save counts once, as attention's output, the next linear's input, does
    unless Ulysses exchanges it between them.
    """
    tokens, tp = layout.micro_batch * seq_len // layout.cp, layout.tp
    stream = layout.stream_tokens(seq_len) * config.hidden
    if segment == 0:
        return 0
    if segment > config.layers:
        return 2 * stream + tokens * (config.vocab // tp + 1)
    which = layout.recompute_of(segment - 1)
    if which == "full":
        return stream
    heads, keys, inside = config.heads // tp, max(1, config.kv_heads // tp), layout.ulysses
    query, qkv = heads * config.head_width, (heads + 2 * keys) * config.head_width
    attention = qkv
    if which != "selective":
        attention = query + 2 * inside * max(1, keys // inside) * config.head_width + query + heads
        attention += query * (inside > 1)
    return 4 * stream + tokens * (attention + qkv * config.qk_norm + 3 * config.ffn // tp)


def recomputed_elements(share: Share, seq_len: int) -> int:
    """The most that one layer's backward brings back of what recompute did not save; 0 without recompute."""
    without = replace(share.layout, recompute="none")
    return max(
        (
            saved_elements(share.config, without, seq_len, layer + 1)
            - saved_elements(share.config, share.layout, seq_len, layer + 1)
            for layer in share.layers
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
