"""ZeRO 3: a rank has pieces of every weight, and a stage is walked a segment at a time.

A segment's forward gathers its weights from the ranks of the shard group and drops them; its backward gathers them
again, and reduce-scatters the gradients at once (Rajbhandari et al., arXiv 1910.02054, section 5.3; Zhao et al., arXiv
2304.11277). Each is a graph of its own, so that the memory of what was gathered serves the next segment. With
`layout.prefetch` a gather is a graph too and runs one segment ahead; it costs memory, as a graph holds on to what it
was last given. Segments that are alike, as most layers are, share their graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, is_dataclass
from typing import Any

from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import Primitive

from models.segments import Segment, Shared
from models.weights import Weight
from parallel.zero import Pieces, Zero


class SegmentGraph(nn.Cell):
    """A graph of a segment. It is given the segment's weights whole, or as pieces that it gathers itself."""

    def __init__(self, segment: Segment, tables: tuple[Tensor, Tensor], pieces: Pieces, gathers: bool) -> None:
        super().__init__(auto_prefix=False)
        self.segment, self.tables, self.pieces, self.gathers = segment, tables, pieces, gathers
        self.places = tuple(range(len(segment.weights)))

    def weights(self, given):
        """Whole."""
        return self.pieces.gather(given) if self.gathers else given


class GatherGraph(SegmentGraph):
    """Whole weights from the rank's pieces."""

    def construct(self, *pieces):
        return self.pieces.gather(pieces)


class ForwardGraph(SegmentGraph):
    """`(y, *saved)` of one micro-batch."""

    def construct(self, x, tokens, labels, first_key, *given):
        y, saved = self.segment.forward(x, self.weights(given), (tokens, labels, first_key) + self.tables)
        return (y,) + saved


class BackwardGraph(SegmentGraph):
    """`(dx, *pieces)`: the rank's pieces of the gradients, summed over the shard group."""

    def construct(self, dy, tokens, labels, first_key, *tensors):
        weights, saved = self.weights(tensors[: len(self.places)]), tensors[len(self.places) :]
        dx, gradients = self.segment.backward(dy, saved, weights, (tokens, labels, first_key) + self.tables)
        return (dx,) + self.pieces.scatter(gradients, self.places)


class InputGraph(SegmentGraph):
    """`(dx, *kept)`: the first half of the backward."""

    def construct(self, dy, tokens, labels, first_key, *tensors):
        weights, saved = self.weights(tensors[: len(self.places)]), tensors[len(self.places) :]
        dx, kept = self.segment.backward_input(dy, saved, weights, (tokens, labels, first_key) + self.tables)
        return (dx,) + kept


class WeightGraph(SegmentGraph):
    """The second half: `pieces` as in `BackwardGraph`."""

    def construct(self, *kept):
        return self.pieces.scatter(self.segment.backward_weight(kept), self.places)


class Graphs:
    """A segment's graphs, for all segments that are alike."""

    def __init__(self, *parts: Any) -> None:
        self.gather, self.forward = GatherGraph(*parts), ForwardGraph(*parts)
        self.backward, self.input, self.weight = BackwardGraph(*parts), InputGraph(*parts), WeightGraph(*parts)


class Shards:
    """What all stages of a rank share: its pieces, the sums of their gradients, and graphs by what they compute.

    `sums` are Parameters, to which the host adds between graphs: a graph holds on to what it was last given, and new
    sums in every micro-batch would be held by the graph that finishes the step.
    """

    def __init__(
        self, weights: Sequence[Weight], values: Sequence[Parameter], sums: Sequence[Parameter],
        tables: tuple[Tensor, Tensor], zero: Zero, prefetch: bool,
    ) -> None:  # fmt: skip
        self.places = {weight.name: place for place, weight in enumerate(weights)}
        # As tensors: a graph that is given another Parameter is compiled again.
        self.pieces = [value.data for value in values]
        self.sums, self.tables, self.zero, self.prefetch = sums, tables, zero, prefetch
        self.graphs: dict[Any, Graphs] = {}

    def graphs_of(self, segment: Segment) -> Graphs:
        """Made once for all segments that are alike."""
        kind = fingerprint(segment)
        if kind not in self.graphs:
            pieces = self.zero.make_pieces(segment.weights)
            self.graphs[kind] = Graphs(segment, self.tables, pieces, not self.prefetch)
        return self.graphs[kind]

    def add(self, places: Sequence[int], pieces: Sequence[Tensor]) -> None:
        """Add to the sums of the weights at `places`."""
        for place, piece in zip(places, pieces, strict=True):
            ops.assign_add(self.sums[place], piece)


class ShardedStage:
    """A stage of pieces, in the place of `parallel.pipeline.Stage`."""

    def __init__(self, decoder: Shared, shards: Shards) -> None:
        self.shards = shards
        self.graphs = [shards.graphs_of(segment) for segment in decoder.segments]
        self.places = [[shards.places[weight.name] for weight in segment.weights] for segment in decoder.segments]
        self.saved: dict[int, list[list[Tensor]]] = {}
        self.kept: dict[int, list[list[Tensor]]] = {}
        self.ahead: dict[int, tuple[Tensor, ...]] = {}

    def forward(self, micro_batch: int, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The stage's output."""
        saved = self.saved[micro_batch] = []
        for i, graphs in enumerate(self.graphs):
            x, *own = graphs.forward(x, *inputs, *self._weights(i, i + 1))
            saved.append(own)
        return x

    def backward(self, micro_batch: int, dy: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The gradient of the stage's input."""
        saved = self.saved.pop(micro_batch)
        for i in reversed(range(len(self.graphs))):
            dy, *pieces = self.graphs[i].backward(dy, *inputs, *self._weights(i, i - 1), *saved.pop())
            self.shards.add(self.places[i], pieces)
        return dy

    def backward_input(self, micro_batch: int, dy: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The same; the weights' gradients are left to `backward_weight`."""
        saved, kept = self.saved.pop(micro_batch), []
        for i in reversed(range(len(self.graphs))):
            dy, *own = self.graphs[i].input(dy, *inputs, *self._weights(i, i - 1), *saved.pop())
            kept.append(own)
        self.kept[micro_batch] = kept
        return dy

    def backward_weight(self, micro_batch: int) -> None:
        """The gradients of the weights."""
        kept = self.kept.pop(micro_batch)
        for i, graphs in enumerate(self.graphs):
            self.shards.add(self.places[i], graphs.weight(*kept.pop()))

    def _weights(self, i: int, following: int) -> Sequence[Tensor]:
        """What segment `i` is given: its pieces, or with prefetch its weights, after the gather of the `following`."""
        if not self.shards.prefetch:
            return self._pieces(i)
        weights = self.ahead.pop(i) if i in self.ahead else self.graphs[i].gather(*self._pieces(i))
        if 0 <= following < len(self.graphs):
            self.ahead[following] = self.graphs[following].gather(*self._pieces(following))
        return weights

    def _pieces(self, i: int) -> list[Tensor]:
        return [self.shards.pieces[place] for place in self.places[i]]


def fingerprint(part: Any) -> Any:
    """What a part of a segment computes: equal for cells of one class with equal constants, weights' shapes and parts.

    What cannot be compared counts as unlike anything else.
    """
    if isinstance(part, nn.Cell):
        own = {name: value for name, value in vars(part).items() if name not in _CELL} | part.name_cells()
        return type(part), tuple((name, fingerprint(value)) for name, value in sorted(own.items()))
    if isinstance(part, Weight):
        return part.shape
    if is_dataclass(part):
        return fingerprint(astuple(part))
    if isinstance(part, Tensor):
        return part.shape, str(part.dtype), part.asnumpy().tobytes()
    if isinstance(part, Primitive):
        return type(part), part.name, str(part.attrs), getattr(part, "func", None)
    if isinstance(part, list | tuple):
        return tuple(fingerprint(item) for item in part)
    return part if isinstance(part, int | float | str | None) else id(part)


_CELL = frozenset(vars(nn.Cell(auto_prefix=False)))
