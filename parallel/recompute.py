"""Recompute: which segments save their input alone and run forward again in the backward pass.

`selective` merges attention with the projection behind it, so that neither its output nor its log-sum-exp is kept
(Korthikanti et al., arXiv 2205.05198, recompute the core of attention); `full` merges a whole layer; a list of layers
merges those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from models.attention import SelfAttention
from models.latent import LatentAttention
from models.layers import Linear
from models.prediction import Prediction
from models.segments import Chain, Recompute, Segment
from parallel.context import ContextAttention
from parallel.layout import Layout


def recompute(segments: Sequence[Segment], layout: Layout) -> list[Segment]:
    """`segments` (embedding, layers, head) with the layers merged that `layout.recompute` names."""
    merge = {"none": lambda segment: segment, "selective": _selective, "full": lambda layer: Recompute(layer.segments)}
    embedding, *layers, head = segments
    merged = [merge[layout.recompute_of(i)](layer) for i, layer in enumerate(layers)]
    return [embedding, *merged, _later(head, len(layers), layout, merge)]


def _later(segment: Segment, layers: int, layout: Layout, merge: Mapping[str, Callable]) -> Segment:
    """The same of what multi-token prediction has behind the `layers`; `full` merges what joins streams too."""
    if not isinstance(segment, Chain):
        return segment
    pieces = [_later(child, layers, layout, merge) for child in segment.segments]
    if isinstance(segment, Prediction):
        pieces[0] = merge[layout.recompute_of(layers + segment.ahead - 1)](pieces[0])
    return segment.rebuilt(pieces)


def _selective(segment: Segment) -> Segment:
    if not isinstance(segment, Chain):
        return segment
    if isinstance(segment, LatentAttention):
        return segment.rebuilt([*segment.segments[:-1], Recompute(segment.segments[-1:])])
    pieces = [_selective(child) for child in segment.segments]
    for place, piece in enumerate(pieces[:-1]):
        if isinstance(piece, SelfAttention | ContextAttention) and isinstance(pieces[place + 1], Linear):
            pieces[place : place + 2] = [Recompute(pieces[place : place + 2])]
            break
    return segment.rebuilt(pieces)
