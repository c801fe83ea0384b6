"""The primitive: an `nn.Cell` with a `forward` and a `backward` for use inside a GRAPH_MODE graph.

Both take a tensor or a tuple of tensors and return the like. The tensors of a tuple travel in one message for each
dtype among them; shapes are free, empty ones included. With n ranks in the group, in ascending order:

=============  =======================  ==========================  ===================================
primitive      shapes                   forward                     backward
=============  =======================  ==========================  ===================================
AllReduce      [...] -> [...]           the sum                     the identity
AllGather      [k, ...] -> [n k, ...]   all parts, in order         this rank's part of the sum
ReduceScatter  [n k, ...] -> [k, ...]   this rank's part of a sum   all parts, in order
AllToAll       [n k, ...] -> same       part j goes to rank j       the same
Shift          [...] -> [...]           to the next on the ring     to the previous one
Broadcast      [...] -> [...]           the root's                  the sum on the root, elsewhere zeros
=============  =======================  ==========================  ===================================

A backward is the transpose of its forward: added up over ranks, <backward(dy), x> = <dy, forward(x)>. That of AllReduce
is the identity because what follows it is the same on every rank and counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore
from mindspore import nn, ops

from parallel.collectives.interface import Collective, Group, Operator
from parallel.collectives.packing import dtype_of, shape_of


class Primitive(nn.Cell):
    """A collective over `group` with its gradient. All ranks of the group must make and run it alike."""

    def __init__(self, group: Group, ahead: nn.Cell, back: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.group, self.ahead, self.back = group, ahead, back

    def construct(self, tensors: Any) -> Any:
        return self.forward(tensors)

    def forward(self, tensors: Any) -> Any:
        """The collective, on a tensor or a tuple of tensors."""
        return self.ahead(tensors)

    def backward(self, gradients: Any) -> Any:
        """The gradients of the inputs, from those of the outputs."""
        return self.back(gradients)


class Exchange(nn.Cell):
    """An all-to-all of rows in numbers that differ from rank to rank and from run to run, with its gradient.

    rows [R, W] lie by the rank that they go to; `gives` and `takes` [ranks] int32 say how many go to each rank and come
    from it. Results have as many rows as there may be; those behind the last that came are not there.
    """

    def __init__(self, group: Group, ahead: nn.Cell, back: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.group, self.ahead, self.back = group, ahead, back

    def forward(self, rows: Any, gives: Any, takes: Any) -> Any:
        """The rows that came, by rank."""
        return self.ahead(rows, gives, takes)

    def backward(self, rows: Any, gives: Any, takes: Any) -> Any:
        """The way back: rows [R', W] of those that came, to where they came from. `gives` and `takes` are those of the
        forward."""
        return self.back(rows, takes, gives)


class Identity(nn.Cell):
    """Every collective over one rank, and the backward of a sum."""

    def construct(self, tensors: Any) -> Any:
        return tensors


class Zeros(nn.Cell):
    """Runs `inner` and returns zeros: this rank has no part of the result."""

    def __init__(self, inner: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.inner = inner
        self.map = ops.HyperMap()

    def construct(self, tensors: Any) -> Any:
        return self.map(ops.zeros_like, self.inner(tensors))


class Checked(nn.Cell):
    """A backend's operator, on a tensor or a tuple of tensors that it can take."""

    def __init__(self, operator: Operator, collective: Collective, dtypes: Sequence[str]) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator
        self.collective, self.parts = collective.name, collective.parts
        self.dtypes = tuple(getattr(mindspore, dtype) for dtype in dtypes)
        self.map = ops.HyperMap()

    def construct(self, tensors: Any) -> Any:
        return self.several(tensors) if isinstance(tensors, tuple) else self.several((tensors,))[0]

    def several(self, tensors: tuple) -> tuple:
        _check(self.collective, self.parts, self.dtypes, self.map(dtype_of, tensors), self.map(shape_of, tensors))
        return self.operator(tensors)


@ops.constexpr
def _check(name: str, parts: tuple, known: tuple, dtypes: tuple, shapes: tuple) -> None:
    for dtype, shape in zip(dtypes, shapes, strict=True):
        if dtype not in known:
            raise TypeError(f"{name} takes tensors of {', '.join(map(str, known))}, but one is {dtype}")
        if parts != (1, 1) and (not shape or shape[0] % parts[0]):
            raise ValueError(f"{name} takes tensors whose dim 0 is a multiple of {parts[0]}, but one is {list(shape)}")
