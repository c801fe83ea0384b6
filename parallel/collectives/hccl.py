"""The Ascend backend: MindSpore's HCCL operators, in processes that msrun started.

Never run by this project's tests, for want of the hardware: they compile it on CPU with recording stand-ins in the
places of `mindspore.ops` and `mindspore.communication`, and compare operators, groups and their order.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from parallel.collectives.interface import Collective, Group, Operator
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
    shapes are compiled.
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


class Spread(nn.Cell):
    """`Broadcast` of one tensor; the operator takes a tuple."""

    def __init__(self, operator: Any) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, message: Tensor) -> Tensor:
        return self.operator((message,))[0]


class HcclBackend:
    """Groups and operators of HCCL; `operators` and `communication` are replaced in tests."""

    note = "hccl"
    dtypes = DTYPES
    timed = False  # graphs are only launched by the host; MindSpore's profiler reads the device's times

    def __init__(self, operators: Any = ops, communication: Any = mindspore.communication) -> None:
        self._operators, self._communication = operators, communication
        self.world = HcclWorld(operators, communication)
        self._groups: set[str] = set()

    def operator(self, collective: Collective) -> Operator:
        group = self._whole(collective.group)
        types = [getattr(mindspore, dtype) for dtype in DTYPES]
        carriers = [Carrier(dtype, dtype, self._flat(collective, group)) for dtype in types]
        return HcclOperator(collective, carriers, f"counts.{collective.name}.{collective.place}.{group}")

    def transport(self, group: Group, name: str) -> HcclTransport:
        everyone = HostGather(self._operators.AllGather(group=self._whole(group)))
        n, directions = len(group.ranks), {}
        # A group comes about when both ranks have asked for it, so all ask in the order of the pairs.
        for a, b in sorted({(i, (i + step) % n) for i in range(n) for step in (1, -1)}):
            if group.place in (a, b):
                name_of_pair = f"busway-{'-'.join(group.axes)}-{name}-{group.ranks[a]}-{group.ranks[b]}"
                directions[a, b] = self._group(name_of_pair, sorted((group.ranks[a], group.ranks[b])))
        return HcclTransport(self._operators, group.place, directions, everyone)

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
    """`Send` and `Receive`, each a compiled cell of its own. `directions`: (from, to) -> the group of the two ranks.

    MindSpore runs each group's communication in order on a stream of its own, and HCCL's send waits for its receive.
    With a group for each direction no message waits for one that goes the other way; MindSpore's own pipeline does the
    same. It costs device memory: every group takes twice HCCL_BUFFSIZE.
    """

    def __init__(
        self, operators: Any, place: int, directions: dict[tuple[int, int], str], everyone: HostGather
    ) -> None:
        self._operators, self._place, self._directions = operators, place, directions
        self.all_gather = everyone.gather
        self._cells: dict[tuple, nn.Cell] = {}

    def send(self, tensor: Tensor, place: int) -> Callable[[], bool]:
        key = (place,)
        if key not in self._cells:
            group, last = self._directions[self._place, place], int(place > self._place)
            self._cells[key] = SendCell(effect(self._operators.Send(sr_tag=0, dest_rank=last, group=group)))
        self._cells[key](tensor)
        return _at_once

    def receive(
        self, shape: tuple[int, ...], dtype: str, place: int
    ) -> tuple[Callable[[], bool], Callable[[], Tensor]]:
        key = place, shape, dtype
        if key not in self._cells:
            group, last = self._directions[place, self._place], int(place > self._place)
            kind = getattr(mindspore, dtype)
            receive = self._operators.Receive(sr_tag=0, src_rank=last, shape=list(shape), dtype=kind, group=group)
            self._cells[key] = Simply(effect(receive))
        tensor = self._cells[key]()
        return _at_once, lambda: tensor


def _at_once() -> bool:
    """What uses a message waits for it on the device."""
    return True


class SendCell(nn.Cell):
    """Sends a tensor, and returns it."""

    def __init__(self, operator: Any) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, tensor: Tensor) -> Tensor:
        return ops.depend(tensor, self.operator(tensor))
