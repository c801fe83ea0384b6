"""Packing inside the graph, for operators that take one tensor: the tensors of a dtype become one message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mindspore import nn, ops


class Channel(NamedTuple):
    """What carries the messages of one dtype."""

    dtype: Any
    """MindSpore dtype of the tensors."""
    wire: Any
    """MindSpore dtype of the message."""
    operator: Any
    """Sums a message [n] over the group."""


class PackedAllReduce(nn.Cell):
    """A tuple of tensors in, their sums out, one message for each dtype among them; empty tensors send nothing.

    Written with HyperMap over whole tuples: the compiler takes seconds over the same thing as a loop of 60 tensors.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        super().__init__(auto_prefix=False)
        self.dtypes = tuple(channel.dtype for channel in channels)
        self.wires = tuple(channel.wire for channel in channels)
        self.operators = [channel.operator for channel in channels]
        self.map = ops.HyperMap()

    def construct(self, tensors: tuple) -> tuple:
        sizes = self.map(size_of, tensors)
        dtypes = self.map(dtype_of, tensors)
        members = _members(self.dtypes, dtypes, sizes)
        for i in range(len(self.dtypes)):
            if len(members[i]) > 0:
                chosen = self.map(ops.partial(_item, tensors), members[i])
                parts = self.map(ops.partial(_flat, self.wires[i]), chosen)
                message = self.operators[i](parts[0] if len(parts) == 1 else ops.concat(parts))
                starts = _starts(members[i], sizes)
                sums = self.map(ops.partial(_part, message), starts, chosen)
                tensors = self.map(ops.partial(_item, tensors + sums), _order(members[i], len(tensors)))
        return tensors


@ops.constexpr
def _members(channels: tuple, dtypes: tuple, sizes: tuple) -> tuple:
    """For each channel the places of the tensors that it carries."""
    pairs = list(enumerate(zip(dtypes, sizes, strict=True)))
    return tuple(tuple(i for i, (dtype, size) in pairs if size > 0 and dtype == channel) for channel in channels)


@ops.constexpr
def _starts(members: tuple, sizes: tuple) -> tuple:
    """Where each member starts in the message."""
    return tuple(sum(sizes[before] for before in members[:k]) for k in range(len(members)))


@ops.constexpr
def _order(members: tuple, count: int) -> tuple:
    """Places in ``tensors + sums`` that put each sum where its tensor was."""
    return tuple(count + members.index(i) if i in members else i for i in range(count))


def size_of(tensor):
    return tensor.size


def dtype_of(tensor):
    return tensor.dtype


def _item(items, place):
    return items[place]


def _flat(wire, tensor):
    return tensor.astype(wire).reshape((-1,))


def _part(message, start, tensor):
    if message.size == tensor.size:
        return message.reshape(tensor.shape).astype(tensor.dtype)
    return message[start : start + tensor.size].reshape(tensor.shape).astype(tensor.dtype)


def effect(operator: Any) -> Any:
    """Tell the compiler that every execution of `operator` counts, so that it merges, drops and reorders none."""
    operator.add_prim_attr("side_effect_io", True)
    return operator
