"""What segments of a model take and hold on one rank, whatever the pipeline, replicas and ZeRO stage around them.

Cuts that differ in these alone are priced once for the whole search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parallel.planner.memory import LAYERS, Holding
from parallel.planner.price import Pricing
from parallel.planner.problem import Problem
from parallel.planner.shape import KINDS, Candidates, distinct
from parallel.planner.space import Space

COLUMNS = ("tp", "cp", "ulysses", "ep", "etp", "micro_batch", "sequence_parallel")
"""What tells cuts apart."""
CHUNK = 16384
"""Cuts that are priced together: enough to outweigh a call, few enough for the cache."""


class Tables(NamedTuple):
    """One segment of each kind [kinds, N] of every cut; by recompute of the space [codes, ...]."""

    forward: np.ndarray
    """Seconds of a micro-batch."""
    backward: np.ndarray
    weight: np.ndarray
    """Of the backward, the half for the weights' gradients."""
    again: np.ndarray
    """[codes, kinds, N]: seconds that recompute adds to the backward."""
    elements: np.ndarray
    """Weights that are not of experts."""
    experts: np.ndarray
    counted: np.ndarray
    """Of `elements`, what has no moments."""
    left: np.ndarray
    """[codes, kinds, N]: bytes that a micro-batch leaves."""
    coming: np.ndarray
    """[codes, N]: bytes that come and go at least, somewhere."""
    message: np.ndarray
    """[N] seconds that the stream takes to another stage of a pipeline, at least."""

    def take(self, cuts: np.ndarray) -> Tables:
        """Those of some cuts."""
        return Tables(*(table.take(cuts, -1) for table in self))


def cuts(space: Space) -> tuple[list[tuple[int, dict[str, np.ndarray]]], Tables]:
    """The coarse rows of a space by pp, with a column ``cut``, and the tables that it is an index into."""
    coarse = list(space.coarse())
    columns = {name: np.concatenate([rows[name] for _, rows in coarse] or [np.empty(0, int)]) for name in COLUMNS}
    first, alike = _distinct(list(columns.values()))
    ends = np.cumsum([len(rows["tp"]) for _, rows in coarse])
    own = [{**rows, "cut": alike[end - len(rows["tp"]) : end]} for (_, rows), end in zip(coarse, ends, strict=True)]
    chunks = [first[start : start + CHUNK] for start in range(0, max(1, len(first)), CHUNK)]
    parts = [_tables(space.problem, space.codes, {name: columns[name][chunk] for name in COLUMNS}) for chunk in chunks]
    tables = Tables(*(_side_by_side(own) for own in zip(*parts, strict=True)))
    return [(pp, rows) for (pp, _), rows in zip(coarse, own, strict=True)], tables


def _distinct(columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(where each distinct row of some columns of small numbers occurs first, the index of that of every row)."""
    keys = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, alike = distinct(column)
        keys = keys * len(values) + alike
    return np.unique(keys, return_index=True, return_inverse=True)[1:]


def _tables(problem: Problem, codes: list[int], columns: dict[str, np.ndarray]) -> Tables:
    one, k = np.ones_like(columns["tp"]), problem.constants
    c = Candidates(
        "1f1b", 1, 1, order=None, **columns, dp=one, zero=0 * one, shards=one, micro_batches=one, recompute=0 * one
    )
    pricing = Pricing(problem.shape, problem.seq_len, c, problem.machine, k)
    holding = Holding(problem.shape, problem.seq_len, c, k)
    used = [i for i in LAYERS if problem.contents(1).counts(KINDS[i])[0]]
    again, left, coming = [], [], []
    for code in codes:
        under = holding.under(code)
        again.append(pricing.again_under(code).T)
        left.append(under.unit.T)
        back = under.back.T[used].min(0) * (k.item_bytes * k.saved)
        coming.append(np.maximum(under.logits[:, 0] * k.logits * k.item_bytes, back))
    backward = (pricing.input + pricing.weight).T
    found = (
        pricing.forward.T, backward, pricing.weight.T, np.stack(again), pricing.elements.T, pricing.experts.T,
        holding.counted.T, np.stack(left), np.stack(coming), pricing.compute.network.nearest(pricing.sent),
    )  # fmt: skip
    return Tables(*found)


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Joined along the last axis, in which numbers then follow one another in memory, however they did in `parts`."""
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    return np.concatenate(parts, -1, out=np.empty(shape))
