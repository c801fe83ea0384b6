"""The CPU backend: MPI inside the compiled graph, and between graphs.

Operators are `ops.Custom` in one of two forms: the C++ one of ``csrc/mpi_ops.cc`` where it was built and the running
MPI is of MPICH's ABI, else Python functions around mpi4py, which copy and hold the GIL. Both count what they move where
they run, at every run. Importing this module initialises MPI.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mpi4py import MPI

from parallel.collectives import channel
from parallel.collectives.interface import Collective, Event, ExchangeOperator, Group, Operator, Pairs, Room
from parallel.collectives.packing import Carrier, Packed, effect, result_shape
from parallel.mesh import DENSE, EXPERT
from parallel.traffic import DTYPE_BYTES

LIBRARY = Path(__file__).with_name("_mpi_ops.so")
DTYPES = ("float64", "float32", "bfloat16", "int32")
"""In the order of NAMES in csrc/mpi_ops.cc."""
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast", "all_to_all_v")
"""In the order of Kind in csrc/mpi_ops.cc."""
EVENT = np.dtype([("start", "f8"), ("end", "f8"), ("payload", "i8"), ("dtype", "i8")])
"""Event in csrc/mpi_ops.cc."""
MPICH_ABI = ("MPICH", "Intel MPI", "MVAPICH")


class MpiWorld:
    """All ranks of the run. See `parallel.collectives.interface.World`."""

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        _share_cores(self._comm)

    def broadcast(self, value: Any, root: int = 0) -> Any:
        _meet(self._comm)
        return self._comm.bcast(value, root)

    def all_gather(self, value: Any) -> list[Any]:
        _meet(self._comm)
        return self._comm.allgather(value)

    def barrier(self) -> None:
        _meet(self._comm)

    def reduce_max(self, values: Sequence[float]) -> np.ndarray:
        # Not MPI_MAX: what that makes of a NaN depends on the order of ranks.
        return np.max(self.all_gather(np.asarray(values, np.float64)), axis=0)

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(code)
        os._exit(code)


def _share_cores(world: MPI.Comm) -> None:
    """Bind this rank to its share of the cores that ranks of its machine have in common; where a launcher has bound
    each to its own, nothing changes. More ranks than cores take them in turn, so that neighbours work at once.

    MindSpore takes a thread for every core that it may run on, whatever it is told: without this, ranks took 1.0 to 1.7
    times as long on two cores (docs/performance.md).
    """
    mine = (platform.node(), sorted(os.sched_getaffinity(0)))
    sharing = [rank for rank, other in enumerate(world.allgather(mine)) if other == mine]
    place, cores, ranks = sharing.index(world.rank), mine[1], len(sharing)
    share = cores[place * len(cores) // ranks : (place + 1) * len(cores) // ranks]
    os.sched_setaffinity(0, share if ranks <= len(cores) else [cores[place % len(cores)]])


def _meet(communicator: MPI.Comm) -> None:
    """Wait for all ranks before a call of the host: it may take long (rank 0 builds a data set meanwhile), and MPICH's
    own wait takes a core from a rank that works.
    """
    channel.wait(communicator.Ibarrier().Test)


class MpiBackend:
    """Communicators and operators over MPI. `native` asks for the C++ operators or for the Python ones; None chooses.

    Each operator and each transport has a communicator of its own, so that none waits for another that a second thread
    runs.
    """

    dtypes = DTYPES
    timed = True

    def __init__(self, native: bool | None = None) -> None:
        self.world = MpiWorld()
        obstacle = _why_not_native() if native is None else None
        self._native = obstacle is None if native is None else native
        self._library = _load() if self._native else None
        self.note = "mpi (C++ operators)" if self._native else "mpi (Python operators, slower"
        if not self._native:
            self.note += f": {obstacle})" if obstacle else ")"

    def operator(self, collective: Collective) -> Operator:
        communicator = _communicator(collective.group)
        if self._native:
            return NativeOperator(self._library, communicator, collective)
        return PythonOperator(communicator, collective)

    def exchange(self, group: Group, room: Room) -> ExchangeOperator:
        communicator = _communicator(group)
        if self._native:
            return NativeExchange(self._library, communicator, group, room)
        return PythonExchange(communicator, group, room)

    def transport(self, group: Group, name: str, pairs: Pairs) -> MpiTransport:
        return MpiTransport(_communicator(group))


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


class NativeOperator(nn.Cell):
    """The C++ operator over one communicator, in a slot of its own. See `parallel.collectives.interface.Operator`."""

    def __init__(self, library: ctypes.CDLL, communicator: MPI.Comm, collective: Collective) -> None:
        super().__init__(auto_prefix=False)
        self._library = library
        self._slot = library.busway_open(communicator.py2f(), KINDS.index(collective.name), collective.place)
        self.slot = Tensor([self._slot], mindspore.int32)
        # The root of a broadcast keeps its tensors: its operator returns nothing but the slot.
        self.keeps = collective.name == "broadcast" and collective.place == collective.group.place
        keeps, parts = self.keeps, collective.parts

        def shapes(slot: Any, *tensors: Any) -> Any:
            results = tuple(result_shape(parts, shape) for shape in tensors)
            return slot if keeps else results[0] if len(results) == 1 else results

        def dtypes(slot: Any, *tensors: Any) -> Any:
            return slot if keeps else tensors[0] if len(tensors) == 1 else tensors

        self.operator = effect(ops.Custom(f"{LIBRARY}:Run", out_shape=shapes, out_dtype=dtypes, func_type="aot"))

    def construct(self, tensors: tuple) -> tuple:
        if len(tensors) == 0:
            return tensors
        if self.keeps:
            self.operator(self.slot, *tensors)
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

    def record(self, on: bool) -> None:
        self._library.busway_record(self._slot, on)

    def events(self) -> list[Event]:
        events = np.empty(self._library.busway_events(self._slot, None), EVENT)
        self._library.busway_events(self._slot, events.ctypes.data_as(ctypes.c_void_p))
        return [Event(start, end, payload, DTYPES[dtype]) for start, end, payload, dtype in events.tolist()]


class NativeExchange(NativeOperator):
    """The C++ operator of rows in any number. See `parallel.collectives.interface.ExchangeOperator`."""

    def __init__(self, library: ctypes.CDLL, communicator: MPI.Comm, group: Group, room: Room) -> None:
        super().__init__(library, communicator, Collective("all_to_all_v", group))
        self._ranks = len(group.ranks)

        def shape(slot: Any, rows: Any, gives: Any, takes: Any) -> Any:
            return [rows[0] * room.times // room.over, *rows[1:]]

        def dtype(slot: Any, rows: Any, gives: Any, takes: Any) -> Any:
            return rows

        self.operator = effect(ops.Custom(f"{LIBRARY}:Exchange", out_shape=shape, out_dtype=dtype, func_type="aot"))

    def construct(self, rows: Tensor, gives: Tensor, takes: Tensor) -> Tensor:
        return self.operator(self.slot, rows, gives, takes)

    def sent(self) -> np.ndarray:
        sent = np.zeros((len(DTYPES), self._ranks), np.int64)
        self._library.busway_sent(self._slot, sent.ctypes.data_as(ctypes.c_void_p))
        return sent


class PythonOperator(nn.Cell):
    """The same around mpi4py. A Python operator takes one tensor, so the graph packs each message.

    It takes no bfloat16 either, which travels and is added as float32.
    """

    def __init__(self, communicator: MPI.Comm, collective: Collective) -> None:
        super().__init__(auto_prefix=False)
        self._counts = np.zeros((len(DTYPES), 2), np.int64)
        self._recording, self._events = False, []
        self.packed = Packed(collective, [self._carrier(communicator, collective, dtype) for dtype in DTYPES])

    def _carrier(self, communicator: MPI.Comm, collective: Collective, dtype: str) -> Carrier:
        start, parts = _starter(communicator, collective), collective.parts
        width, count = DTYPE_BYTES[dtype], self._counts[DTYPES.index(dtype)]

        def run(message: np.ndarray) -> np.ndarray:
            message = np.ascontiguousarray(message)
            result = np.empty(result_shape(parts, message.shape), message.dtype)
            begin, payload = time.monotonic(), message.size * width
            wait(start(message, result))
            count[:] += (payload, 1)
            if self._recording:
                self._events.append(Event(begin, time.monotonic(), payload, dtype))
            return result

        def shape(message: Any) -> Any:
            return result_shape(parts, message)

        operator = effect(ops.Custom(run, out_shape=shape, out_dtype=_same, func_type="pyfunc"))
        exact = getattr(mindspore, dtype)
        return Carrier(exact, mindspore.float32 if dtype == "bfloat16" else exact, operator)

    def construct(self, tensors: tuple) -> tuple:
        return self.packed(tensors)

    def counts(self) -> np.ndarray:
        return self._counts.copy()

    def reset(self) -> None:
        self._counts[:] = 0

    def record(self, on: bool) -> None:
        self._recording = on

    def events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class PythonExchange(nn.Cell):
    """The same around mpi4py."""

    def __init__(self, communicator: MPI.Comm, group: Group, room: Room) -> None:
        super().__init__(auto_prefix=False)
        self._counts = np.zeros((len(DTYPES), 2), np.int64)
        self._sent = np.zeros((len(DTYPES), len(group.ranks)), np.int64)
        self._recording, self._events = False, []

        def run(rows: np.ndarray, gives: np.ndarray, takes: np.ndarray) -> np.ndarray:
            rows = np.ascontiguousarray(rows)
            result = np.zeros((len(rows) * room.times // room.over, *rows.shape[1:]), rows.dtype)
            if takes.sum() > len(result) or gives.sum() > len(rows):
                rooms = f"{gives.sum()} rows to send of {len(rows)}, {takes.sum()} to take into a room of {len(result)}"
                raise RuntimeError(f"dispatch: {rooms}")
            begin, width, dtype = time.monotonic(), rows[:1].nbytes, rows.dtype.name
            given, taken = np.split(rows[: gives.sum()], np.cumsum(gives)[:-1]), np.cumsum(takes) - takes
            requests = [
                communicator.Irecv(_bytes(result[start : start + n]), rank)
                for rank, (start, n) in enumerate(zip(taken, takes, strict=True))
            ]
            wait(requests + [communicator.Isend(_bytes(part), rank) for rank, part in enumerate(given)])
            self._counts[DTYPES.index(dtype)] += (gives.sum() * width, 1)
            self._sent[DTYPES.index(dtype)] += gives.astype(np.int64) * width
            if self._recording:
                self._events.append(Event(begin, time.monotonic(), int(gives.sum()) * width, dtype))
            return result

        def shape(rows: Any, gives: Any, takes: Any) -> Any:
            return [rows[0] * room.times // room.over, *rows[1:]]

        def dtype(rows: Any, gives: Any, takes: Any) -> Any:
            return rows

        self.operator = effect(ops.Custom(run, out_shape=shape, out_dtype=dtype, func_type="pyfunc"))

    def construct(self, rows: Tensor, gives: Tensor, takes: Tensor) -> Tensor:
        return self.operator(rows, gives, takes)

    counts, reset_counts = PythonOperator.counts, PythonOperator.reset
    record, events = PythonOperator.record, PythonOperator.events

    def sent(self) -> np.ndarray:
        return self._sent.copy()

    def reset(self) -> None:
        self.reset_counts()
        self._sent[:] = 0


def _same(value: Any) -> Any:
    return value


def _starter(communicator: MPI.Comm, collective: Collective) -> Callable[[np.ndarray, np.ndarray], list[MPI.Request]]:
    """What starts `collective` on a message and an array for the result."""
    place, sender = collective.place, collective.sender

    def send(message: np.ndarray, result: np.ndarray) -> list[MPI.Request]:
        return [communicator.Irecv(result, sender), communicator.Isend(message, place)]

    def broadcast(message: np.ndarray, result: np.ndarray) -> list[MPI.Request]:
        result[:] = message
        return [communicator.Ibcast(result, place)]

    whole = {
        "all_reduce": communicator.Iallreduce,
        "all_gather": communicator.Iallgather,
        "reduce_scatter": communicator.Ireduce_scatter_block,
        "all_to_all": communicator.Ialltoall,
    }
    if collective.name in whole:
        return lambda message, result: [whole[collective.name](message, result)]
    return {"send": send, "broadcast": broadcast}[collective.name]


def wait(requests: list[MPI.Request]) -> None:
    """Yield for a millisecond, then sleep: see `wait` in csrc/mpi_ops.cc."""
    start = time.monotonic()
    while not MPI.Request.Testall(requests):
        if time.monotonic() - start < 1e-3:
            os.sched_yield()
        else:
            time.sleep(50e-6)


class MpiTransport:
    """Non-blocking messages over a communicator of their own, from and into the memory of tensors."""

    ahead = True

    def __init__(self, communicator: MPI.Comm) -> None:
        self._comm = communicator

    def send(self, tensor: Tensor, place: int) -> Callable[[], bool]:
        return self._comm.Isend(_bytes(np.ascontiguousarray(tensor.asnumpy())), place).Test

    def receive(
        self, shape: tuple[int, ...], dtype: str, place: int
    ) -> tuple[Callable[[], bool], Callable[[], Tensor]]:
        # numpy has no bfloat16 of its own.
        array, kind = np.empty(shape, np.int16 if dtype == "bfloat16" else dtype), getattr(mindspore, dtype)
        status = MPI.Status()
        request = self._comm.Irecv(_bytes(array), place)

        def tensor() -> Tensor:
            came = status.Get_count(MPI.BYTE)
            if came != array.nbytes:
                raise RuntimeError(f"asked for {dtype} {list(shape)}, but {came} bytes came")
            whole = Tensor.from_numpy(array)
            return whole.view(kind) if dtype == "bfloat16" else whole

        return lambda: request.Test(status), tensor

    def all_gather(self, value: Any) -> list[Any]:
        _meet(self._comm)
        return self._comm.allgather(value)


def _bytes(array: np.ndarray) -> list:
    return [array.reshape(-1).view(np.uint8), MPI.BYTE]
