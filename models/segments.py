"""Segments: the steps that a model is made of, each with its forward, what it saves, and its backward.

There is no autodiff. A segment gives `y, saved = forward(x, weights, context)` and later, in the same graph or in
another, `dx, gradients = backward(dy, saved, weights, context)`. The backward comes in two halves so that a
pipeline may run the weight gradients later: `dx, kept = backward_input(...)`, `gradients = backward_weight(kept)`.
Segments nest: a `Chain` of segments is a segment, a `Residual` is a chain with a skip connection. `saved` and `kept`
are flat tuples of tensors whatever the nesting, so that they may leave a graph and come back into another.

`weights` is a tuple in the order of `segment.weights`; `context` is what all segments of a step share:
(tokens_T, labels_T, first_key_T, cos_SR, sin_SR), at the places that the constants below name. With multi-token
prediction, behind the labels stand for each module the later tokens and their labels (`labels_of`, `later_tokens`). The
methods run inside a compiled graph.

Shape suffixes: T tokens (batch x sequence), S sequence, H hidden, R half of a head's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mindspore import nn, ops

from models.weights import Weight

TOKENS, LABELS, FIRST_KEY, COS, SIN = range(5)
"""Places in `context`."""


def labels_of(context, ahead=0):
    """The labels [T] of the tokens that come `ahead` tokens after the next ones."""
    tokens = context[TOKENS].shape[0]
    return context[LABELS][2 * ahead * tokens : (2 * ahead + 1) * tokens]


def later_tokens(context, ahead):
    """The tokens [T] that come `ahead` tokens from here, -1 behind the sequence."""
    tokens = context[TOKENS].shape[0]
    return context[LABELS][(2 * ahead - 1) * tokens : 2 * ahead * tokens]


class Segment(nn.Cell):
    """One step of the model. Subclasses define `forward`, `backward_input` and `backward_weight`."""

    saves = 0
    """Tensors that `forward` saves."""
    keeps = 0
    """Tensors that `backward_input` keeps."""

    def __init__(self, weights: Sequence[Weight] = ()) -> None:
        super().__init__(auto_prefix=False)
        self.weights = tuple(weights)

    def forward(self, x, weights, context):
        """`(y, saved)`: the output and a tuple of what the backward needs."""
        raise NotImplementedError

    def backward_input(self, dy, saved, weights, context):
        """`(dx, kept)`: the gradient of the input and what `backward_weight` needs."""
        raise NotImplementedError

    def backward_weight(self, kept):
        """The gradients of `weights`, in their order; `kept` itself where they came with the input's."""
        return kept

    def backward(self, dy, saved, weights, context):
        """`(dx, gradients)`: both halves."""
        dx, kept = self.backward_input(dy, saved, weights, context)
        return dx, self.backward_weight(kept)


class Chain(Segment):
    """Segments one after another."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__([weight for segment in segments for weight in segment.weights])
        self.segments = nn.CellList(list(segments), auto_prefix=False)
        self.saves = sum(segment.saves for segment in segments)
        self.keeps = sum(segment.keeps for segment in segments)
        self.weight_spans = _spans([len(segment.weights) for segment in segments])
        self.saved_spans = _spans([segment.saves for segment in segments])
        self.kept_spans = _spans([segment.keeps for segment in segments])

    def rebuilt(self, segments: Sequence[Segment]) -> Chain:
        """The same around other segments."""
        return type(self)(segments)

    def forward(self, x, weights, context):
        """Every segment's forward in turn."""
        saved = ()
        for i, segment in enumerate(self.segments):
            start, stop = self.weight_spans[i]
            x, segment_saved = segment.forward(x, weights[start:stop], context)
            saved = saved + segment_saved
        return x, saved

    def backward_input(self, dy, saved, weights, context):
        """Every segment's input gradient, last first."""
        kept = ()
        for j in range(len(self.segments)):
            i = len(self.segments) - 1 - j
            start, stop = self.weight_spans[i]
            first, last = self.saved_spans[i]
            dy, segment_kept = self.segments[i].backward_input(dy, saved[first:last], weights[start:stop], context)
            kept = segment_kept + kept
        return dy, kept

    def backward_weight(self, kept):
        """Every segment's weight gradients."""
        gradients = ()
        for i, segment in enumerate(self.segments):
            start, stop = self.kept_spans[i]
            gradients = gradients + segment.backward_weight(kept[start:stop])
        return gradients


class Residual(Chain):
    """x + chain(x)."""

    def forward(self, x, weights, context):
        """The chain's output added to its input."""
        y, saved = super().forward(x, weights, context)
        return x + y, saved

    def backward_input(self, dy, saved, weights, context):
        """The chain's input gradient added to dy."""
        dx, kept = super().backward_input(dy, saved, weights, context)
        return dy + dx, kept


class Branches(Chain):
    """The sum of what several segments make of one input."""

    def forward(self, x, weights, context):
        """Every segment's output, added up."""
        total, saved = None, ()
        for i, segment in enumerate(self.segments):
            start, stop = self.weight_spans[i]
            y, segment_saved = segment.forward(x, weights[start:stop], context)
            total, saved = y if i == 0 else total + y, saved + segment_saved
        return total, saved

    def backward_input(self, dy, saved, weights, context):
        """Every segment's input gradient, added up."""
        total, kept = None, ()
        for i, segment in enumerate(self.segments):
            start, stop = self.weight_spans[i]
            first, last = self.saved_spans[i]
            dx, segment_kept = segment.backward_input(dy, saved[first:last], weights[start:stop], context)
            total, kept = dx if i == 0 else total + dx, kept + segment_kept
        return total, kept


class Shared(Chain):
    """A chain in which weights may have several places, as a model with a tied head or a pipeline's stage of it is.

    `weights` lists each once, and the gradients of its places are added up.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        names = [weight.name for weight in self.weights]
        once = list(dict.fromkeys(names))
        self.weights = tuple(self.weights[names.index(name)] for name in once)
        self.number = tuple(once.index(name) for name in names)
        self.repeats = len(once) < len(names)

    def forward(self, x, weights, context):
        """The chain's."""
        return super().forward(x, self.placed(weights), context)

    def backward_input(self, dy, saved, weights, context):
        """The chain's."""
        return super().backward_input(dy, saved, self.placed(weights), context)

    def backward_weight(self, kept):
        """Gradients in the order of `weights`."""
        gradients = super().backward_weight(kept)
        if not self.repeats:
            return gradients
        total = ()
        for place in range(len(self.number)):
            number = self.number[place]
            if number < len(total):
                joined = total[number] + gradients[place]
                total = total[:number] + (joined,) + total[number + 1 :]
            else:
                total = total + (gradients[place],)
        return total

    def placed(self, weights):
        """The weights in all of their places."""
        if not self.repeats:
            return weights
        placed = ()
        for number in self.number:
            placed = placed + (weights[number],)
        return placed


class Recompute(Chain):
    """A chain that saves its input alone, and runs forward again in the backward pass."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        self.saves = 1

    def forward(self, x, weights, context):
        """The chain's output."""
        y, _ = super().forward(x, weights, context)
        return y, (x,)

    def backward_input(self, dy, saved, weights, context):
        """The chain's input gradient, from what a second forward saves.

        The second forward waits for dy: the compiler would otherwise merge it with the first, and save everything.
        """
        x = ops.depend(saved[0], dy)
        _, again = super().forward(x, weights, context)
        return super().backward_input(dy, again, weights, context)


def _spans(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each of several runs of a flat tuple."""
    ends = [0, *accumulate(lengths)]
    return tuple(zip(ends[:-1], ends[1:], strict=True))
