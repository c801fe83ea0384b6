"""How many rows dispatch moves between the ranks of a group of experts: from what was routed where, or by even shares.

Copies are counted from the routed indices of all ranks of a group (`Routed`), for the traffic account, which has them
by level of the machine. No MindSpore here; `parallel.expert` does what is counted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Routed = Mapping[int, Sequence[np.ndarray]]
"""layer -> for each rank of a group of experts, in its order, the experts [T, K] that its tokens of a step went to; -1
where a copy was dropped."""


class Moves(NamedTuple):
    """Rows that go between ranks of one group at one level of dispatch."""

    places: tuple[int, ...]
    """Of the group's members among the ranks of the experts' group."""
    rows: np.ndarray
    """int64 [from, to]: rows of dispatch; combine moves as many back."""
    about: int
    """Numbers that travel with a row on its way there."""
    gradients: int
    """Numbers that come back with a row's gradient."""


def moves(routed: Sequence[np.ndarray], experts: int, slices: int, outer: int, place: int) -> list[Moves]:
    """What the rank at `place` takes part in: one level of flat dispatch, or two where there are `outer` groups."""
    top_k = routed[0].shape[1]
    if outer == 1:
        everyone = tuple(range(len(routed)))
        return [Moves(everyone, _copies(routed, experts, slices, 0, len(routed)), 2, 1)]
    inside = len(routed) // outer
    number, within = divmod(place, inside)
    across = tuple(range(within, len(routed), inside))
    tokens = np.array([_groups(routed[source], experts, outer).sum(0) for source in across])
    levels = [Moves(across, tokens, 2 * top_k, top_k)]
    if inside > 1:
        mine = tuple(range(number * inside, (number + 1) * inside))
        each = experts // outer
        came = [  # all tokens of the ranks at a place that go to this group, at that place inside it
            np.concatenate([routed[source] for source in range(inner, len(routed), inside)]) for inner in range(inside)
        ]
        levels.append(Moves(mine, _copies(came, each, slices, number * each, inside), 2, 1))
    return levels


def _copies(routed: Sequence[np.ndarray], experts: int, slices: int, first: int, ranks: int) -> np.ndarray:
    """int64 [from, to] copies to `experts` from number `first` on, which `ranks` hold, each expert in `slices`."""
    local = experts * slices // ranks
    counts = np.zeros((len(routed), ranks), np.int64)
    for source, indices in enumerate(routed):
        own = indices[(indices >= first) & (indices < first + experts)] - first
        by_holder = np.bincount(own // local, minlength=ranks // slices)
        counts[source] = np.repeat(by_holder, slices)
    return counts


def _groups(indices: np.ndarray, experts: int, outer: int) -> np.ndarray:
    """bool [T, outer]: the outer groups that have an expert of a token."""
    group = np.where(indices < 0, -1, indices // (experts // outer))
    return (group[:, :, None] == np.arange(outer)).any(1)


def even(tokens: int, top_k: int, experts: int, place: int = 0) -> np.ndarray:
    """What a rank routes of a micro-batch whose tokens go to experts in turn (`model.moe.force_uniform`).

    `tokens` are those on this rank, at `place` of the ranks that share the micro-batch.
    """
    copies = np.arange(place * tokens * top_k, (place + 1) * tokens * top_k)
    return (copies % experts).reshape(tokens, top_k)
