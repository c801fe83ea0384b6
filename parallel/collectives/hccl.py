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
from parallel.collectives.packing import Channel, PackedAllReduce, effect
from parallel.traffic import DTYPE_BYTES

DTYPES = ("float32", "float16", "bfloat16", "int32")
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


class CountedSum(nn.Cell):
    """Sums one message and counts it on the device, where a graph runs without the host seeing its operators."""

    def __init__(self, operator: Any, name: str, width: int) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator
        self.width = width
        self.counts = Parameter(Tensor(np.zeros(2, np.int64)), name=name, requires_grad=False)
        self.add = ops.AssignAdd()

    def construct(self, message: Tensor) -> Tensor:
        self.add(self.counts, Tensor([message.size * self.width, 1], mindspore.int64))
        return self.operator(message)


class HcclBackend:
    """Groups and operators of HCCL; `operators` and `communication` are replaced in tests."""

    note = "hccl"
    dtypes = DTYPES

    def __init__(self, operators: Any = ops, communication: Any = mindspore.communication) -> None:
        self._operators, self._communication = operators, communication
        self.world = HcclWorld(operators, communication)
        self._sums: dict[Group, dict[str, CountedSum]] = {}
        self._cells: dict[Group, PackedAllReduce] = {}

    def all_reduce(self, group: Group) -> nn.Cell:
        if group not in self._cells:
            name = f"busway-{'-'.join(group.axes)}-{group.ranks[0]}"
            self._communication.create_group(name, list(group.ranks))
            sums = {dtype: self._sum(name, dtype) for dtype in DTYPES}
            types = {dtype: getattr(mindspore, dtype) for dtype in DTYPES}
            self._sums[group] = sums
            self._cells[group] = PackedAllReduce([Channel(types[d], types[d], sums[d]) for d in DTYPES])
        return self._cells[group]

    def _sum(self, name: str, dtype: str) -> CountedSum:
        operator = effect(self._operators.AllReduce(ops.ReduceOp.SUM, name))
        return CountedSum(operator, f"counts.{name}.{dtype}", DTYPE_BYTES[dtype])

    def counts(self) -> Iterator[Count]:
        for group, sums in self._sums.items():
            for dtype, one in sums.items():
                payload, calls = one.counts.asnumpy().tolist()
                if calls:
                    yield Count(group, "all_reduce", dtype, payload, calls)

    def reset(self) -> None:
        for sums in self._sums.values():
            for one in sums.values():
                one.counts.set_data(Tensor(np.zeros(2, np.int64)))
