"""Collectives: graph primitives over groups of the mesh, and a few helpers for the host.

`connect` chooses the backend once per process; above it nothing asks which one runs:

- ``local``: a world of one rank;
- ``mpi``: CPU, MPI operators inside the compiled graph (`parallel.collectives.mpi`);
- ``hccl``: Ascend, MindSpore's HCCL operators (`parallel.collectives.hccl`).

A primitive is an `nn.Cell` made by a method of `Collectives` for a set of axes. It knows its group, has `forward` and,
where it has a gradient, `backward`, both for use inside a GRAPH_MODE graph, and its executions are accounted for.
A primitive over a group of one rank is the identity, without communicator or operator.

Every execution is a side effect to the compiler: equal calls are not merged, unused ones are not removed, and the
calls of one graph run in the order in which the program writes them, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import mindspore
import numpy as np
from mindspore import nn, ops

from parallel.collectives.packing import dtype_of
from parallel.mesh import Axes, Mesh
from parallel.traffic import Traffic


@dataclass(frozen=True)
class Group:
    """The ranks that take part in a primitive."""

    axes: tuple[str, ...]
    """As `Mesh.axes` gives them."""
    ranks: tuple[int, ...]
    """In ascending order, this process among them."""


class Count(NamedTuple):
    """Executions of one collective over one group since the last reset."""

    group: Group
    collective: str
    dtype: str
    payload: int
    """Bytes handed to the primitive, over all calls."""
    calls: int
    """Messages: one for each execution and dtype."""


class World(Protocol):
    """All ranks, for values of the host. Every method but `abort` is called by all ranks in one order."""

    rank: int
    size: int

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """The `value` of rank `root` (anything that can be pickled), on every rank. Other ranks may pass None."""

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""

    def barrier(self) -> None:
        """Return when all ranks have called."""

    def reduce_max(self, values: Sequence[float]) -> np.ndarray:
        """The elementwise maximum over ranks of equally long rows of numbers, float64 [len(values)]."""

    def abort(self, code: int) -> NoReturn:
        """End every rank at once; the launcher exits with `code`. A world of one rank has no such method."""


class Backend(Protocol):
    """What a backend offers to `Collectives`."""

    world: World
    note: str
    """What runs, in a few words for the banner."""
    dtypes: tuple[str, ...]
    """What can be sent."""

    def operator(self, collective: str, group: Group) -> nn.Cell:
        """What runs `collective` over `group` in a graph, made once. ``all_reduce``: a tuple of tensors in, their sums
        over the group out, one message for each dtype.
        """

    def counts(self) -> Iterable[Count]:
        """Executions since the last reset."""

    def reset(self) -> None:
        """Start counting from zero."""


@ops.constexpr
def _check_dtypes(collective: str, dtypes: tuple, known: tuple) -> None:
    for dtype in dtypes:
        if dtype not in known:
            raise TypeError(f"{collective} takes tensors of {', '.join(map(str, known))}, but one is {dtype}")


class AllReduce(nn.Cell):
    """Sums over a group. Dtypes are those of the backend; shapes are free, empty ones included.

    `backward` is the identity: the sum is used alike on every rank of the group, so each rank holds its whole gradient.
    """

    def __init__(self, group: Group, backend: Backend) -> None:
        super().__init__(auto_prefix=False)
        self.group = group
        self.alone = len(group.ranks) == 1
        self.dtypes = () if self.alone else tuple(getattr(mindspore, dtype) for dtype in backend.dtypes)
        self.map = ops.HyperMap()
        self.operator = None if self.alone else backend.operator("all_reduce", group)

    def construct(self, tensors: tuple) -> tuple:
        return self.forward(tensors)

    def forward(self, tensors: tuple) -> tuple:
        """Each of `tensors` summed over the group. All go through one operator, in one message for each dtype."""
        if self.alone:
            return tensors
        _check_dtypes("all_reduce", self.map(dtype_of, tensors), self.dtypes)
        return self.operator(tensors)

    def backward(self, gradients: tuple) -> tuple:
        """The gradients of the inputs."""
        return gradients


class Collectives:
    """The collectives of this process over `mesh`. Made by `connect`."""

    def __init__(self, mesh: Mesh, backend: Backend) -> None:
        mesh.layout.check_world(backend.world.size)
        self.mesh = mesh
        self.world = backend.world
        self._backend = backend

    @property
    def rank(self) -> int:
        """This process in the mesh."""
        return self.world.rank

    def group(self, axes: Axes) -> Group:
        """The group of `axes` that this process belongs to."""
        return Group(self.mesh.axes(axes), self.mesh.group(axes, self.rank))

    def AllReduce(self, axes: Axes) -> AllReduce:
        """A primitive that sums over `axes`. All ranks of its group must make and run it."""
        return AllReduce(self.group(axes), self._backend)

    def traffic(self) -> Traffic:
        """What this rank's primitives moved since `reset_traffic`: counted where the operator runs, at every run."""
        account = Traffic()
        for group, collective, dtype, payload, calls in self._backend.counts():
            account.add(self.mesh, self.rank, group.axes, collective, dtype, payload, calls)
        return account

    def reset_traffic(self) -> None:
        """Start the account from zero. A whole number of steps later, `traffic` is that many steps' account."""
        self._backend.reset()

    def describe(self) -> str:
        """The backend in a few words, for the banner."""
        return self._backend.note


def connect(mesh: Mesh, backend: str | None = None) -> Collectives:
    """The collectives of this process: `backend` is ``local``, ``mpi`` or ``hccl``; None chooses.

    None means ``local`` for a mesh of one rank, else ``hccl`` if MindSpore's device target is Ascend, else ``mpi``.
    Raises `models.checks.ConfigError` if the world that was started is not of the size of the mesh.
    """
    if backend is None:
        if mesh.world_size == 1:
            backend = "local"
        else:
            backend = "hccl" if mindspore.get_context("device_target") == "Ascend" else "mpi"
    if backend == "local":
        from parallel.collectives.local import LocalBackend as chosen
    elif backend == "mpi":
        from parallel.collectives.mpi import MpiBackend as chosen
    elif backend == "hccl":
        from parallel.collectives.hccl import HcclBackend as chosen
    else:
        raise ValueError(f"no backend {backend!r}; known: local, mpi, hccl")
    return Collectives(mesh, chosen())
