"""What a backend offers to `Collectives`, and the words for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from mindspore import Tensor

Pairs = Collection[tuple[int, int]]
"""(from, to): places in a group between which messages go."""


@dataclass(frozen=True)
class Group:
    """The ranks that take part in a primitive."""

    axes: tuple[str, ...]
    """As `Mesh.axes` gives them."""
    ranks: tuple[int, ...]
    """In ascending order, this process among them."""
    place: int
    """Of this process in `ranks`."""


@dataclass(frozen=True)
class Collective:
    """One collective over one group."""

    name: str
    """As in `parallel.traffic`: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast``; or
    ``send``, in which all ranks send at once, each as many places further along the ring.
    """
    group: Group
    place: int = 0
    """In the group: of the root of ``broadcast``, and of the rank to which this one sends in ``send``."""

    @property
    def parts(self) -> tuple[int, int]:
        """Parts of equal size, one a rank of the group, along dim 0 of what goes in and of what comes out."""
        n = len(self.group.ranks)
        return {"all_gather": (1, n), "reduce_scatter": (n, 1), "all_to_all": (n, n)}.get(self.name, (1, 1))

    @property
    def sender(self) -> int:
        """The place of the rank from which this one receives in ``send``."""
        return (2 * self.group.place - self.place) % len(self.group.ranks)


class Room(NamedTuple):
    """Rows that an exchange may take: `times` / `over` of those that it may give."""

    times: int
    over: int


class Event(NamedTuple):
    """One message of an operator."""

    start: float
    """Seconds of CLOCK_MONOTONIC."""
    end: float
    payload: int
    """Bytes."""
    dtype: str


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


class Operator(Protocol):
    """What runs one collective inside a graph: an `nn.Cell`."""

    def __call__(self, tensors: tuple) -> tuple:
        """A tuple of tensors in, as many out, in one message for each dtype among them. Empty ones send nothing."""

    def counts(self) -> np.ndarray:
        """Payload bytes and messages since the last reset, int64 [dtypes of the backend, 2]."""

    def reset(self) -> None:
        """Start counting from zero."""

    def record(self, on: bool) -> None:
        """Take the time of every message from now on, or no more. Only for a backend that is `timed`."""

    def events(self) -> list[Event]:
        """The messages that were recorded since the last call, in their order."""


class ExchangeOperator(Operator, Protocol):
    """What moves rows between the ranks of a group, as many between any two as these say: an `nn.Cell`."""

    def __call__(self, rows: Tensor, gives: Tensor, takes: Tensor) -> Tensor:
        """rows [R, W], gives and takes [ranks] int32 -> [R x room, W]: the rows that came, by rank. What is behind them
        is not there. Raises RuntimeError where more come than there is room for."""

    def sent(self) -> np.ndarray:
        """Bytes for each rank of the group since the last reset, int64 [dtypes of the backend, ranks]."""


class Transport(Protocol):
    """Messages between ranks of a group; those from one to another arrive in the order sent."""

    ahead: bool
    """Whether a graph may run between asking for a message and its sending: not where the graph's end waits for it."""

    def send(self, tensor: Tensor, place: int) -> Callable[[], bool]:
        """Start to send to the rank at `place`; what says whether it has left, until it has."""

    def receive(
        self, shape: tuple[int, ...], dtype: str, place: int
    ) -> tuple[Callable[[], bool], Callable[[], Tensor]]:
        """Start to receive from the rank at `place`; what says whether it has come, until it has, and what gives it."""

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks of the group, for values of the host."""


class Backend(Protocol):
    """What a backend offers, for groups of two ranks or more. The members of a group ask in one order."""

    world: World
    note: str
    """What runs, in a few words for the banner."""
    dtypes: tuple[str, ...]
    """What can be sent."""
    timed: bool
    """Whether the host sees when a graph and its messages run, and operators take their times."""

    def operator(self, collective: Collective) -> Operator:
        """A new operator."""

    def exchange(self, group: Group, room: Room) -> ExchangeOperator:
        """A new one."""

    def transport(self, group: Group, name: str, pairs: Pairs) -> Transport:
        """A new transport, which waits for no other. `name` is unlike those of others over the group."""
