"""The CPU backend: MPI inside the compiled graph.

Operators are `ops.Custom` in one of two forms: the C++ ones of ``csrc/mpi_ops.cc`` where they were built and the
running MPI is of MPICH's ABI, else Python functions around mpi4py, which copy and hold the GIL. Both count what they
move where they run, at every run. Importing this module initialises MPI.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mpi4py import MPI

from parallel.collectives import Count, Group
from parallel.collectives.packing import Channel, PackedAllReduce, effect
from parallel.mesh import DENSE, EXPERT
from parallel.traffic import DTYPE_BYTES

LIBRARY = Path(__file__).with_name("_mpi_ops.so")
DTYPES = ("float64", "float32", "bfloat16", "int32")
"""In the order of NAMES in csrc/mpi_ops.cc."""
MPICH_ABI = ("MPICH", "Intel MPI", "MVAPICH")


class MpiWorld:
    """All ranks of the run. See `parallel.collectives.World`.

    The host may wait long here (rank 0 builds a data set meanwhile), and MPICH's own wait takes a core from a rank that
    works; so every call first waits for the others with a sleep that grows.
    """

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        self.barrier()
        return self._comm.bcast(value, root)

    def all_gather(self, value: Any) -> list[Any]:
        self.barrier()
        return self._comm.allgather(value)

    def barrier(self) -> None:
        request = self._comm.Ibarrier()
        pause = 20e-6
        while not request.Test():
            time.sleep(pause)
            pause = min(1.5 * pause, 1e-3)

    def reduce_max(self, values: Sequence[float]) -> np.ndarray:
        # Not MPI_MAX: what that makes of a NaN depends on the order of ranks.
        return np.max(self.all_gather(np.asarray(values, np.float64)), axis=0)

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(code)
        os._exit(code)


class MpiBackend:
    """Communicators and operators over MPI. `native` asks for the C++ operators or for the Python ones; None chooses.

    Each collective over a group has a communicator of its own, so that none waits for another that a second thread
    runs. It is made with the first primitive; the group's members must do that in one order.
    """

    dtypes = DTYPES

    def __init__(self, native: bool | None = None) -> None:
        self.world = MpiWorld()
        obstacle = _why_not_native() if native is None else None
        self._native = obstacle is None if native is None else native
        self._library = _load() if self._native else None
        self.note = "mpi (C++ operators)" if self._native else "mpi (Python operators, slower"
        if not self._native:
            self.note += f": {obstacle})" if obstacle else ")"
        self._operators: dict[tuple[str, Group], NativeAllReduce | PythonAllReduce] = {}

    def operator(self, collective: str, group: Group) -> nn.Cell:
        key = collective, group
        if key not in self._operators:
            native, python = FORMS[collective]
            communicator = _communicator(group)
            self._operators[key] = native(self._library, communicator) if self._native else python(communicator)
        return self._operators[key]

    def counts(self) -> Iterator[Count]:
        for (collective, group), operator in self._operators.items():
            for dtype, (payload, calls) in zip(DTYPES, operator.counts().tolist(), strict=True):
                if calls:
                    yield Count(group, collective, dtype, payload, calls)

    def reset(self) -> None:
        for operator in self._operators.values():
            operator.reset()


def _communicator(group: Group) -> MPI.Comm:
    """A communicator of the group, made by its members alone: ranks of other groups may make none."""
    everyone = MPI.COMM_WORLD.Get_group()
    names = tuple(dict.fromkeys(DENSE + EXPERT))
    tag = sum(1 << names.index(axis) for axis in group.axes)
    return MPI.COMM_WORLD.Create_group(everyone.Incl(group.ranks), tag)


def _why_not_native() -> str | None:
    if not LIBRARY.exists():
        return "the C++ ones are not built"
    name, version = MPI.get_vendor()
    if name not in MPICH_ABI or _mpi_library() is None:
        return f"{name} {'.'.join(map(str, version))} is not of MPICH's ABI"
    return None


def _mpi_library() -> str | None:
    """The path of the MPI library in this process, unless it is of the standard ABI (libmpi_abi)."""
    with open("/proc/self/maps") as maps:
        paths = (line.split(maxsplit=5)[5].strip() for line in maps if "libmpi" in line)
        return next((path for path in paths if re.match(r"libmpi(ch)?\.so", os.path.basename(path))), None)


def _load() -> ctypes.CDLL:
    # The operators' MPI symbols are undefined on purpose: they bind to the library that mpi4py uses.
    ctypes.CDLL(_mpi_library(), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(LIBRARY))


def _outputs(slot: Any, *tensors: Any) -> Any:
    """Shapes or dtypes of the outputs: those of the inputs, after the slot."""
    return tensors if len(tensors) > 1 else tensors[0]


class NativeAllReduce(nn.Cell):
    """The C++ operator over one communicator, in a slot of its own: tensors in, their sums out."""

    def __init__(self, library: ctypes.CDLL, communicator: MPI.Comm) -> None:
        super().__init__(auto_prefix=False)
        self._library = library
        self._slot = library.busway_open(communicator.py2f())
        self.slot = Tensor([self._slot], mindspore.int32)
        self.operator = effect(
            ops.Custom(f"{LIBRARY}:AllReduce", out_shape=_outputs, out_dtype=_outputs, func_type="aot")
        )

    def construct(self, tensors: tuple) -> tuple:
        if len(tensors) == 0:
            return tensors
        if len(tensors) == 1:
            return (self.operator(self.slot, tensors[0]),)
        return self.operator(self.slot, *tensors)

    def counts(self) -> np.ndarray:
        counts = np.zeros((len(DTYPES), 2), np.int64)
        self._library.busway_counts(self._slot, counts.ctypes.data_as(ctypes.c_void_p))
        return counts

    def reset(self) -> None:
        self._library.busway_reset(self._slot)


class PythonAllReduce(nn.Cell):
    """The same around mpi4py. A Python operator takes one tensor, so the graph packs each message.

    It takes no bfloat16 either, which travels and is added as float32, as in C++.
    """

    def __init__(self, communicator: MPI.Comm) -> None:
        super().__init__(auto_prefix=False)
        self._counts = np.zeros((len(DTYPES), 2), np.int64)
        self.packed = PackedAllReduce([self._channel(communicator, dtype) for dtype in DTYPES])

    def _channel(self, communicator: MPI.Comm, dtype: str) -> Channel:
        width, count = DTYPE_BYTES[dtype], self._counts[DTYPES.index(dtype)]

        def all_reduce(message: np.ndarray) -> np.ndarray:
            total = np.empty_like(message)
            wait(communicator.Iallreduce(np.ascontiguousarray(message), total))
            count[:] += (message.size * width, 1)
            return total

        operator = effect(ops.Custom(all_reduce, out_shape=_same, out_dtype=_same, func_type="pyfunc"))
        exact = getattr(mindspore, dtype)
        return Channel(exact, mindspore.float32 if dtype == "bfloat16" else exact, operator)

    def construct(self, tensors: tuple) -> tuple:
        return self.packed(tensors)

    def counts(self) -> np.ndarray:
        return self._counts.copy()

    def reset(self) -> None:
        self._counts[:] = 0


FORMS = {"all_reduce": (NativeAllReduce, PythonAllReduce)}
"""The two forms of each collective."""


def _same(value: Any) -> Any:
    return value


def wait(request: MPI.Request) -> None:
    """Yield for a millisecond, then sleep: see `wait` in csrc/mpi_ops.cc."""
    start = time.monotonic()
    while not request.Test():
        if time.monotonic() - start < 1e-3:
            os.sched_yield()
        else:
            time.sleep(50e-6)
