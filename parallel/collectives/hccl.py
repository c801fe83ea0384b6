"""The Ascend backend: MindSpore's HCCL operators, in processes that msrun started.

Never run by this project's tests, for want of the hardware: they compile it on CPU with recording stand-ins in the
places of `mindspore.ops` and `mindspore.communication`, and compare operators, groups and their order.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from parallel.collectives import Count, Group
from parallel.collectives.packing import Channel, PackedAllReduce, dtype_of, effect, size_of
from parallel.traffic import DTYPE_BYTES

DTYPES = ("float32", "bfloat16", "int32")
"""What HCCL sums and Busway uses; float64 is the CPU reference's alone."""


class Gather(nn.Cell):
    """Equal blocks of all ranks, one after the other: [n] -> [ranks * n]."""

    def __init__(self, operator: Any) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, block: Tensor) -> Tensor:
        return self.operator(block)


class HcclWorld:
    """All ranks of the run. See `parallel.collectives.World`.

    One operator serves every method: pickled values, padded to a power of two so that few shapes are compiled, are
    gathered on the device. Meant for small values.
    """

    def __init__(self, operators: Any, communication: Any) -> None:
        communication.init()
        self.rank = communication.get_rank()
        self.size = communication.get_group_size()
        self._gather = Gather(operators.AllGather(group=communication.HCCL_WORLD_COMM_GROUP))

    def all_gather(self, value: Any) -> list[Any]:
        data = np.frombuffer(pickle.dumps(value), np.int8)
        lengths = self._gather(Tensor(np.array([data.size], np.int32))).asnumpy()
        block = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.int8)
        block[: data.size] = data
        blocks = self._gather(Tensor(block)).asnumpy().reshape(self.size, -1)
        return [pickle.loads(row[:length].tobytes()) for row, length in zip(blocks, lengths, strict=True)]

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


@ops.constexpr
def _counted(dtypes: tuple, sizes: tuple) -> Tensor:
    """What one execution adds to the account, int64 [DTYPES, 2]: payload bytes and messages."""
    counts = np.zeros((len(DTYPES), 2), np.int64)
    for row, dtype in enumerate(DTYPES):
        count = sum(size for kind, size in zip(dtypes, sizes, strict=True) if kind == getattr(mindspore, dtype))
        counts[row] = count * DTYPE_BYTES[dtype], count > 0
    return Tensor(counts)


class Counted(nn.Cell):
    """An operator over tuples of tensors that counts itself on the device: what it adds is known when the graph is
    compiled, but how often a graph runs only the device sees.
    """

    def __init__(self, operator: nn.Cell, name: str) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator
        self.counts = Parameter(Tensor(np.zeros((len(DTYPES), 2), np.int64)), name=name, requires_grad=False)
        self.add = ops.AssignAdd()
        self.map = ops.HyperMap()

    def construct(self, tensors: tuple) -> tuple:
        self.add(self.counts, _counted(self.map(dtype_of, tensors), self.map(size_of, tensors)))
        return self.operator(tensors)


class HcclBackend:
    """Groups and operators of HCCL; `operators` and `communication` are replaced in tests."""

    note = "hccl"
    dtypes = DTYPES

    def __init__(self, operators: Any = ops, communication: Any = mindspore.communication) -> None:
        self._operators, self._communication = operators, communication
        self.world = HcclWorld(operators, communication)
        self._cells: dict[tuple[str, Group], Counted] = {}

    def operator(self, collective: str, group: Group) -> nn.Cell:
        key = collective, group
        if key not in self._cells:
            make = {"all_reduce": self._all_reduce}[collective]
            name = f"busway-{'-'.join(group.axes)}-{group.ranks[0]}"
            if group not in (made for _, made in self._cells):
                # Each HCCL group holds buffers on the device, so collectives share it.
                self._communication.create_group(name, list(group.ranks))
            self._cells[key] = Counted(make(name), f"counts.{collective}.{name}")
        return self._cells[key]

    def _all_reduce(self, name: str) -> nn.Cell:
        types = [getattr(mindspore, dtype) for dtype in DTYPES]
        sums = [effect(self._operators.AllReduce(ops.ReduceOp.SUM, name)) for _ in DTYPES]
        return PackedAllReduce([Channel(dtype, dtype, operator) for dtype, operator in zip(types, sums, strict=True)])

    def counts(self) -> Iterator[Count]:
        for (collective, group), cell in self._cells.items():
            for dtype, (payload, calls) in zip(DTYPES, cell.counts.asnumpy().tolist(), strict=True):
                if calls:
                    yield Count(group, collective, dtype, payload, calls)

    def reset(self) -> None:
        for cell in self._cells.values():
            cell.counts.set_data(Tensor(np.zeros((len(DTYPES), 2), np.int64)))
