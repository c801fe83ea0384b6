"""Collectives: graph primitives over groups of the mesh, channels between ranks, and helpers for the host.

`connect` chooses the backend once per process; above it nothing asks which one runs:

- ``local``: a world of one rank;
- ``mpi``: CPU, MPI operators inside the compiled graph (`parallel.collectives.mpi`);
- ``hccl``: Ascend, MindSpore's HCCL operators (`parallel.collectives.hccl`).

A primitive (`parallel.collectives.primitives`) is made by a method of `Collectives` for a set of axes. It knows its
group, has `forward` and `backward`, both for use inside a GRAPH_MODE graph, and its executions are accounted for. Over
a group of one rank it is the identity, without communicator or operator. A channel (`parallel.collectives.channel`)
is for use between graphs.

Every execution is a side effect to the compiler: equal calls are not merged, unused ones are not removed, and the
calls of one graph run in the order in which the program writes them, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import mindspore
from mindspore import nn

from parallel.collectives.channel import Channel
from parallel.collectives.interface import Backend, Collective, ExchangeOperator, Group, Operator, Pairs, Room, World
from parallel.collectives.primitives import Checked, Exchange, Identity, Primitive, Zeros
from parallel.mesh import Axes, Mesh
from parallel.trace import COLLECTIVES, Recorder, Span
from parallel.traffic import Traffic

__all__ = ["Channel", "Collectives", "Exchange", "Group", "Primitive", "Room", "World", "connect"]


class Collectives:
    """The collectives of this process over `mesh`, made by `connect`. Where it takes axes, it takes a `subgroup`."""

    def __init__(self, mesh: Mesh, backend: Backend) -> None:
        mesh.layout.check_world(backend.world.size)
        self.mesh = mesh
        self.world = backend.world
        self._backend = backend
        self._operators: dict[Collective, Operator] = {}
        self._exchanges: dict[tuple[Group, Room], ExchangeOperator] = {}
        self._channels: list[Channel] = []
        self.recorder = Recorder()

    @property
    def rank(self) -> int:
        """This process in the mesh."""
        return self.world.rank

    def group(self, axes: Axes | Group) -> Group:
        """The group of `axes` that this process belongs to."""
        if isinstance(axes, Group):
            return axes
        ranks = self.mesh.group(axes, self.rank)
        return Group(self.mesh.axes(axes), ranks, ranks.index(self.rank))

    def subgroup(self, axes: Axes, places: Iterable[int]) -> Group:
        """The ranks at `places` of the group of `axes`, this process among them."""
        whole, places = self.group(axes), sorted(places)
        return Group(whole.axes, tuple(whole.ranks[place] for place in places), places.index(whole.place))

    def AllReduce(self, axes: Axes | Group) -> Primitive:
        """Sums over `axes`."""
        group = self.group(axes)
        return Primitive(group, self._over(group, "all_reduce"), Identity(auto_prefix=False))

    def AllGather(self, axes: Axes | Group) -> Primitive:
        """Puts the parts of the ranks of `axes` together."""
        group = self.group(axes)
        return Primitive(group, self._over(group, "all_gather"), self._over(group, "reduce_scatter"))

    def ReduceScatter(self, axes: Axes | Group) -> Primitive:
        """Sums over `axes` and leaves each rank its part."""
        group = self.group(axes)
        return Primitive(group, self._over(group, "reduce_scatter"), self._over(group, "all_gather"))

    def AllToAll(self, axes: Axes | Group) -> Primitive:
        """Gives part j to rank j of `axes`."""
        group = self.group(axes)
        return Primitive(group, self._over(group, "all_to_all"), self._over(group, "all_to_all"))

    def Shift(self, axes: Axes | Group) -> Primitive:
        """Moves tensors to the next rank on the ring of `axes`. The account calls it ``send``, with the peer."""
        group = self.group(axes)
        following, before = ((group.place + step) % len(group.ranks) for step in (1, -1))
        return Primitive(group, self._over(group, "send", following), self._over(group, "send", before))

    def Broadcast(self, axes: Axes | Group, root: int = 0) -> Primitive:
        """Gives every rank of `axes` what the one at place `root` has. The others pass tensors of the same shapes."""
        group = self.group(axes)
        if not 0 <= root < len(group.ranks):
            raise ValueError(f"root {root} is outside a group of {len(group.ranks)} ranks")
        total = self._over(group, "all_reduce")
        return Primitive(group, self._over(group, "broadcast", root), total if group.place == root else Zeros(total))

    def Exchange(self, axes: Axes | Group, room: Room) -> Exchange:
        """Rows to each rank of `axes`, of at least two, in numbers that are known when the graph runs."""
        group = self.group(axes)
        for way in (room, Room(room.over, room.times)):
            if (group, way) not in self._exchanges:
                self._exchanges[group, way] = self._backend.exchange(group, way)
        return Exchange(group, self._exchanges[group, room], self._exchanges[group, Room(room.over, room.times)])

    def Channel(self, axes: Axes | Group, name: str, pairs: Pairs) -> Channel:
        """A channel over `axes`, of at least two ranks. `name` is unlike those of others over these axes."""
        group = self.group(axes)
        if len(group.ranks) == 1:
            raise ValueError(f"channel {name}: a group of one rank has nobody to send to")
        transport = self._backend.transport(group, name, pairs)
        self._channels.append(Channel(group, transport, name, pairs, self.recorder))
        return self._channels[-1]

    def _over(self, group: Group, name: str, place: int = 0) -> nn.Cell:
        if len(group.ranks) == 1:
            return Identity(auto_prefix=False)
        collective = Collective(name, group, place)
        if collective not in self._operators:
            self._operators[collective] = self._backend.operator(collective)
        return Checked(self._operators[collective], collective, self._backend.dtypes)

    def traffic(self) -> Traffic:
        """What this rank moved since `reset_traffic`: counted where the operator runs, at every run."""
        account = Traffic()
        for collective, operator in self._operators.items():
            group, name = collective.group, collective.name
            peer = group.ranks[collective.place] if name == "send" else None
            for dtype, (payload, calls) in zip(self._backend.dtypes, operator.counts().tolist(), strict=True):
                if calls:
                    account.add(self.mesh, self.rank, group.axes, name, dtype, payload, calls, peer, group.ranks)
        for (group, _), operator in self._exchanges.items():
            for dtype, (_, calls), sent in zip(self._backend.dtypes, operator.counts(), operator.sent(), strict=True):
                if calls:
                    to = {place: size for place, size in enumerate(sent.tolist()) if place != group.place}
                    payload = int(sent.sum())
                    where = {"ranks": group.ranks, "sent": to}
                    account.add(self.mesh, self.rank, group.axes, "all_to_all_v", dtype, payload, int(calls), **where)
        for channel in self._channels:
            group, counts = channel.group, channel.counts
            for peer, dtype in sorted({key[:2] for key in counts}):
                payload, calls = counts[peer, dtype, "payload"], counts[peer, dtype, "calls"]
                to = group.ranks[peer]
                account.add(self.mesh, self.rank, group.axes, "send", dtype, payload, calls, to, group.ranks)
        return account

    def reset_traffic(self) -> None:
        """Start the account from zero. A whole number of steps later, `traffic` is that many steps' account."""
        for operator in self._all():
            operator.reset()
        for channel in self._channels:
            channel.counts.clear()

    @property
    def timed(self) -> bool:
        """Whether times of the host are those of the graphs and messages; else it only launches them."""
        return self._backend.timed

    def record(self, on: bool) -> None:
        """Take times from now on, or no more: of what the host does and, where `timed`, of collectives in graphs."""
        self.recorder.on = on
        for operator in self._all() if self.timed else ():
            operator.record(on)

    def _all(self) -> list[Operator]:
        return [*self._operators.values(), *self._exchanges.values()]

    def spans(self) -> list[Span]:
        """What was recorded since the last call."""
        spans, self.recorder.spans = self.recorder.spans, []
        named = [(collective.group, collective.name, operator) for collective, operator in self._operators.items()]
        named += [(group, "all_to_all_v", operator) for (group, _), operator in self._exchanges.items()]
        for group, name, operator in named if self.timed else ():
            axis = self.mesh.label(group.axes)
            for start, end, payload, dtype in operator.events():
                details = {"axis": axis, "collective": name, "bytes": payload, "dtype": dtype}
                spans.append(Span(COLLECTIVES, f"{name} {axis}", start, end, details))
        return spans

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
