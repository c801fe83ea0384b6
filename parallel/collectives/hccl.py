"""The Ascend backend: MindSpore's HCCL operators, in processes that msrun started.

Never run by this project's tests, for want of the hardware: they compile it on CPU with recording stand-ins in the
places of `mindspore.ops`, `mindspore.communication` and `mindspore.mint.distributed`, and compare operators, groups
and their order.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from parallel.collectives.interface import Collective, Group, Operator, Pairs, Room
from parallel.collectives.packing import Carrier, Packed, dtype_of, effect, size_of
from parallel.traffic import DTYPE_BYTES

DTYPES = ("float32", "bfloat16", "int32")
"""What HCCL sums and Busway uses; float64 is the CPU reference's alone."""


class Simply(nn.Cell):
    """A graph of one operator."""

    def __init__(self, operator: Any) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, *inputs: Tensor) -> Tensor:
        return self.operator(*inputs)


class HostGather:
    """Gathers values of the host, meant to be small, on the device: pickled, and padded to a power of two so that few
    shapes are compiled. They come from ranks of this run alone; mpi4py pickles too.
    """

    def __init__(self, operator: Any) -> None:
        self._gather = Simply(operator)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        data = np.frombuffer(pickle.dumps(value), np.int8)
        lengths = self._gather(Tensor(np.array([data.size], np.int32))).asnumpy()
        block = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.int8)
        block[: data.size] = data
        blocks = self._gather(Tensor(block)).asnumpy().reshape(len(lengths), -1)
        return [pickle.loads(row[:length].tobytes()) for row, length in zip(blocks, lengths, strict=True)]


class HcclWorld:
    """All ranks of the run. See `parallel.collectives.interface.World`."""

    def __init__(self, operators: Any, communication: Any) -> None:
        communication.init()
        self.rank = communication.get_rank()
        self.size = communication.get_group_size()
        self.all_gather = HostGather(operators.AllGather(group=communication.HCCL_WORLD_COMM_GROUP)).gather

    def broadcast(self, value: Any, root: int = 0) -> Any:
        return self.all_gather(value if self.rank == root else None)[root]

    def barrier(self) -> None:
        self.all_gather(None)

    def reduce_max(self, values: Sequence[float]) -> np.ndarray:
        return np.max(self.all_gather(np.asarray(values, np.float64)), axis=0)

    def abort(self, code: int) -> NoReturn:
        # msrun ends the other ranks when one of them exits with an error.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class HcclOperator(nn.Cell):
    """Packs, runs and counts. It counts on the device: what a run adds is known when the graph is compiled, but how
    often a graph runs only the device sees.
    """

    def __init__(self, collective: Collective, carriers: Sequence[Carrier], name: str) -> None:
        super().__init__(auto_prefix=False)
        self.packed = Packed(collective, carriers)
        self.counted = Parameter(Tensor(np.zeros((len(DTYPES), 2), np.int64)), name=name, requires_grad=False)
        self.add = ops.AssignAdd()
        self.map = ops.HyperMap()

    def construct(self, tensors: tuple) -> tuple:
        self.add(self.counted, _counts(self.map(dtype_of, tensors), self.map(size_of, tensors)))
        return self.packed(tensors)

    def counts(self) -> np.ndarray:
        return self.counted.asnumpy()

    def reset(self) -> None:
        self.counted.set_data(Tensor(np.zeros((len(DTYPES), 2), np.int64)))


@ops.constexpr
def _counts(dtypes: tuple, sizes: tuple) -> Tensor:
    """What one run adds to the account."""
    counts = np.zeros((len(DTYPES), 2), np.int64)
    for row, dtype in enumerate(DTYPES):
        count = sum(size for kind, size in zip(dtypes, sizes, strict=True) if kind == getattr(mindspore, dtype))
        counts[row] = count * DTYPE_BYTES[dtype], count > 0
    return Tensor(counts)


class Exchange(nn.Cell):
    """`AlltoAllV` on a message of equal parts: `gives[i]` of them go to rank i, and `takes[i]` come from it."""

    def __init__(self, operator: Any, gives: tuple[int, ...], takes: tuple[int, ...]) -> None:
        super().__init__(auto_prefix=False)
        self.operator, self.gives, self.takes = operator, gives, takes

    def construct(self, message: Tensor) -> Tensor:
        return self.operator(message, _sizes(message.size, self.gives), _sizes(message.size, self.takes))


@ops.constexpr
def _sizes(size: int, parts: tuple) -> tuple:
    return tuple(size // sum(parts) * count for count in parts)


class HcclExchange(nn.Cell):
    """`AlltoAllV` of rows in numbers that tensors hold, filled up to as many rows as there is room for. What comes has
    a shape that the device alone knows. It counts on the device too, and so rows that found no room: the host ends the
    run when it looks at the counts, for a row of metrics or an evaluation.
    """

    def __init__(self, operator: Any, ranks: int, room: Room, name: str) -> None:
        super().__init__(auto_prefix=False)
        self.operator, self.room = operator, room
        self.counted = Parameter(Tensor(np.zeros((len(DTYPES), ranks + 1), np.int64)), name=name, requires_grad=False)
        self.lost = Parameter(Tensor(np.zeros(1, np.int64)), name=f"{name}.lost", requires_grad=False)
        self.add = ops.AssignAdd()

    def construct(self, rows: Tensor, gives: Tensor, takes: Tensor) -> Tensor:
        width = rows.size // rows.shape[0]
        counts = ops.concat((gives, ops.ones_like(gives[:1]))).reshape((1, -1))
        self.add(self.counted, ops.cast(counts, mindspore.int64) * _row_bytes(rows.dtype, width, gives.shape[0]))
        came = self.operator(rows.reshape((-1,)), gives * width, takes * width)
        size = rows.size * self.room.times // self.room.over
        self.add(self.lost, ops.relu(ops.cast(takes, mindspore.int64).sum() - size // width).reshape((1,)))
        return ops.concat((came, ops.zeros((size,), rows.dtype)))[:size].reshape((-1, width))

    def counts(self) -> np.ndarray:
        counted = self.counted.asnumpy()
        return np.stack((counted[:, :-1].sum(1), counted[:, -1]), 1)

    def sent(self) -> np.ndarray:
        if lost := int(self.lost.asnumpy()[0]):
            raise RuntimeError(f"dispatch: {lost} rows of experts found no room")
        return self.counted.asnumpy()[:, :-1]

    def reset(self) -> None:
        self.counted.set_data(Tensor(np.zeros(self.counted.shape, np.int64)))


@ops.constexpr
def _row_bytes(dtype: Any, width: int, ranks: int) -> Tensor:
    """[dtypes, ranks + 1]: bytes of a row in the row of its dtype, and last 1, for the call."""
    factors = np.zeros((len(DTYPES), ranks + 1), np.int64)
    row = next(i for i, name in enumerate(DTYPES) if getattr(mindspore, name) == dtype)
    factors[row] = [*[width * DTYPE_BYTES[DTYPES[row]]] * ranks, 1]
    return Tensor(factors)


class Spread(nn.Cell):
    """`Broadcast` of one tensor; the operator takes a tuple."""

    def __init__(self, operator: Any) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, message: Tensor) -> Tensor:
        return self.operator((message,))[0]


class HcclBackend:
    """Groups, operators and messages of HCCL; the modules that they come from are replaced in tests."""

    note = "hccl"
    dtypes = DTYPES
    timed = False  # collectives run within graphs on the device; MindSpore's profiler has their times

    def __init__(
        self, operators: Any = ops, communication: Any = mindspore.communication, messages: Any = mint.distributed
    ) -> None:
        self._operators, self._communication, self._messages = operators, communication, messages
        self.world = HcclWorld(operators, communication)
        self._groups: set[str] = set()

    def operator(self, collective: Collective) -> Operator:
        group = self._whole(collective.group)
        types = [getattr(mindspore, dtype) for dtype in DTYPES]
        carriers = [Carrier(dtype, dtype, self._flat(collective, group)) for dtype in types]
        return HcclOperator(collective, carriers, f"counts.{collective.name}.{collective.place}.{group}")

    def exchange(self, group: Group, room: Room) -> HcclExchange:
        whole = self._whole(group)
        operator = effect(self._operators.AlltoAllV(whole))
        return HcclExchange(operator, len(group.ranks), room, f"counts.all_to_all_v.{room.times}.{room.over}.{whole}")

    def transport(self, group: Group, name: str, pairs: Pairs) -> HcclTransport:
        everyone = HostGather(self._operators.AllGather(group=self._whole(group)))
        directions = {}
        # A group comes about when both ranks have asked for it, so all ask in the order of the pairs.
        for a, b in sorted(pairs):
            if group.place in (a, b):
                name_of_pair = f"busway-{'-'.join(group.axes)}-{name}-{group.ranks[a]}-{group.ranks[b]}"
                directions[a, b] = self._group(name_of_pair, sorted((group.ranks[a], group.ranks[b])))
        return HcclTransport(self._messages, group, directions, everyone)

    def _flat(self, collective: Collective, group: str) -> Any:
        """What runs `collective` on a flat message."""
        hccl, n = self._operators, len(collective.group.ranks)
        match collective.name:
            case "all_reduce":
                return effect(hccl.AllReduce(ops.ReduceOp.SUM, group))
            case "all_gather":
                return effect(hccl.AllGather(group))
            case "reduce_scatter":
                return effect(hccl.ReduceScatter(ops.ReduceOp.SUM, group))
            case "broadcast":
                # The operator's documentation asks for the root's rank in the world, but what it hands to HCCL as it
                # is, and mindspore.communication.comm_func.broadcast gives it, is the place in the group.
                return Spread(effect(hccl.Broadcast(collective.place, group)))
            case "all_to_all":
                return Exchange(effect(hccl.AlltoAllV(group)), (1,) * n, (1,) * n)
            case "send":
                gives, takes = (tuple(int(i == j) for i in range(n)) for j in (collective.place, collective.sender))
                return Exchange(effect(hccl.AlltoAllV(group)), gives, takes)

    def _whole(self, group: Group) -> str:
        ranks = group.ranks
        return self._group(f"busway-{'-'.join(group.axes)}-{ranks[0]}-{ranks[-1]}-{len(ranks)}", ranks)

    def _group(self, name: str, ranks: Sequence[int]) -> str:
        """Each HCCL group holds buffers on the device, so there is one for all collectives over the same ranks."""
        if name not in self._groups:
            self._groups.add(name)
            self._communication.create_group(name, list(ranks))
        return name


class HcclTransport:
    """MindSpore's eager `isend` and `irecv`. `directions`: (from, to) -> the group of the two ranks.

    This rests on MindSpore 2.10's sources and was never run on the hardware. Its CPU backend was seen to do
    what the second and third say.

    - HCCL's send waits for its receive. Eager communication runs on a stream of its group, after all that the default
      stream was given; `wait` holds the default stream up, not the host. So with a group for each direction no message
      waits for one that goes another way. It costs device memory: every group takes twice HCCL_BUFFSIZE.
    - Peers are ranks of the world. `communication.init` and `create_group` are all that it needs, and outside of cells
      GRAPH_MODE does not forbid it.
    - A graph of GRAPH_MODE ends with the host waiting for the whole device ("Sync stream in the step end"), messages
      too: they overlap with the one graph that follows them. So none may be asked for ahead of a graph that its sender
      waits for; `parallel.schedules.requests` gives an order in which nobody waits for ever. With `Send` and `Receive`
      in graphs of their own a rank could not even ask for a message while its own is on the way.
    """

    ahead = False

    def __init__(
        self, messages: Any, group: Group, directions: dict[tuple[int, int], str], everyone: HostGather
    ) -> None:
        self._messages, self._group, self._directions = messages, group, directions
        self.all_gather = everyone.gather

    def send(self, tensor: Tensor, place: int) -> Callable[[], bool]:
        self._messages.isend(tensor, self._group.ranks[place], self._directions[self._group.place, place])
        return _at_once

    def receive(
        self, shape: tuple[int, ...], dtype: str, place: int
    ) -> tuple[Callable[[], bool], Callable[[], Tensor]]:
        tensor = ops.zeros(shape, getattr(mindspore, dtype))
        group = self._directions[place, self._group.place]
        handle = self._messages.irecv(tensor, self._group.ranks[place], group)

        def arrived() -> Tensor:
            handle.wait()
            return tensor

        return _at_once, arrived


def _at_once() -> bool:
    """What uses a message waits for it on the device, and so does what takes the memory of one that was sent."""
    return True
