"""Four ranks, dp 2 x tp 2, that try the collectives and leave what they saw in a file for test_collectives.py.

Arguments: the file. The world ends by an abort of rank 3 with code 7 while the others wait in an all-reduce.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel import collectives
from parallel.collectives import Collectives, Room
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.topology import load

AXES = ("dp", "cp", "dense")
PRIMITIVES = ("AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Shift", "Broadcast")
RUNS = 3
DTYPES = ("float32", "float64", "int32", "float32", "float32", "float32", "bfloat16", "float32")
SHAPES = ((4, 5), (8,), (4, 2, 3), (0, 4), (4, 0), (132,), (4, 3), (4, 5001))
"""Mixed, odd and empty, and one that is large enough to travel without being packed."""
LAPTOP = {
    "name": "laptop",
    "rank": {"name": "process", "memory_gib": None, "memory_bandwidth": None, "peak_tflops": None},
    "planes": {"memory": {"injection": None}},
    "levels": [{"name": "machine", "members": "any", "bandwidth": None, "latency": None, "plane": "memory"}],
}


def numbers(rank: int) -> list[np.ndarray]:
    """What `rank` puts in: float64, of whole numbers whose sums every dtype holds."""
    draw = np.random.default_rng(rank)
    return [draw.integers(-9, 9, shape).astype(np.float64) for shape in SHAPES]


def fractions(rank: int) -> np.ndarray:
    """Float32 whose sums are rounded, of more bytes than are summed at a time."""
    return np.random.default_rng(rank).standard_normal((4, 300_001)).astype(np.float32)


def halves(rank: int) -> np.ndarray:
    """Every bfloat16 on rank 0, as float32, and zeros elsewhere. Subnormals are left out: MindSpore flushes them."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    every = np.where(bits & 0x7F800000, bits, 0).astype(np.uint32).view(np.float32)
    return every if rank == 0 else np.zeros_like(every)


def primitive(made: Collectives, name: str, axes: str) -> nn.Cell:
    """That of `name`; a broadcast is from the last rank of the group."""
    if name == "Broadcast":
        return made.Broadcast(axes, root=len(made.group(axes).ranks) - 1)
    return getattr(made, name)(axes)


class Everything(nn.Cell):
    """Of each primitive over some axes the result, and what its backward makes of that."""

    def __init__(self, made: Collectives, axes: str) -> None:
        super().__init__()
        self.primitives = nn.CellList([primitive(made, name, axes) for name in PRIMITIVES])

    def construct(self, *tensors):
        results = ()
        for one in self.primitives:
            forward = one.forward(tensors)
            results = results + ((forward, one.backward(forward)),)
        return results


class Both(nn.Cell):
    """Forward of `x` and backward of `dy`, which come in no tuple."""

    def __init__(self, made: Collectives, name: str) -> None:
        super().__init__()
        self.one = primitive(made, name, "dense")

    def construct(self, x, dy):
        return self.one.forward(x), self.one.backward(dy)


class Repeated(nn.Cell):
    """Equal calls, one of them without a reader."""

    def __init__(self, made: Collectives, name: str) -> None:
        super().__init__()
        self.one, self.other = primitive(made, name, "dp"), primitive(made, name, "dp")

    def construct(self, x):
        self.one.forward((x,))
        return self.one.forward((x,))[0], self.one.forward((x,))[0], self.other.forward((x,))[0]


class Independent(nn.Cell):
    """Calls that do not depend on each other, over groups that overlap, each after work of another length."""

    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.dp, self.tp, self.dense = made.AllReduce("dp"), made.Shift("tp"), made.AllReduce("dense")
        self.multiply = ops.MatMul()

    def construct(self, work, values):
        results = ()
        for i in range(4):
            busy = work
            for _ in range(4 - i):
                busy = self.multiply(busy, work)
            late = values[i : i + 1] + 0 * busy[0, 0]
            results = results + self.dp.forward((late,))
            results = results + self.tp.forward((values[i : i + 1] * 10,))
            results = results + self.dense.forward((values[i : i + 1] * 100,))
        return results


class Exchanged(nn.Cell):
    """Rows there, and what of them came back again."""

    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.exchange = made.Exchange("dense", Room(3, 2))

    def construct(self, rows, gives, takes):
        came = self.exchange.forward(rows, gives, takes)
        return came, self.exchange.backward(came * 2, gives, takes)


def rows_between() -> np.ndarray:
    """[from, to] rows, none between some."""
    return np.array([[1, 0, 3, 2], [0, 2, 0, 0], [4, 1, 0, 3], [0, 0, 0, 0]], np.int32)


def try_exchange(made: Collectives) -> dict:
    """What this rank sees of rows in any number: those that came and went back, by dtype, and a lack of room."""
    rank, counts = made.rank, rows_between()
    gives, takes = Tensor(counts[rank]), Tensor(np.ascontiguousarray(counts[:, rank]))
    rows = np.arange(8 * 3, dtype=np.float32).reshape(8, 3) + 100 * rank
    exchanged, seen = Exchanged(made), {}
    made.reset_traffic()
    for dtype in ("float32", "float64"):
        came, back = exchanged(Tensor(rows).astype(getattr(ms, dtype)), gives, takes)
        seen[dtype] = came.shape, came.asnumpy()[: counts[:, rank].sum()], back.asnumpy()[: counts[rank].sum()]
    seen["traffic"] = made.traffic().rows()
    narrow = made.Exchange("tp", Room(1, 1))
    many = Tensor(np.array([2, 2], np.int32))
    try:
        narrow.ahead(Tensor(np.zeros((3, 1), np.float32)), many, many).asnumpy()
        seen["no room"] = None
    except RuntimeError as error:
        seen["no room"] = str(error)
    return seen


def try_form(made: Collectives) -> dict:
    """What this rank sees of one form of the operators."""
    rank = made.rank
    seen: dict = {"results": {}, "traffic": {}, "products": {}, "repeated": {}, "errors": []}
    seen["exchange"] = try_exchange(made)
    for axes in AXES:
        everything = Everything(made, axes)
        made.reset_traffic()
        for _ in range(RUNS):
            inputs = zip(numbers(rank), DTYPES, strict=True)
            results = everything(*[Tensor(array).astype(getattr(ms, dtype)) for array, dtype in inputs])
        pairs = [(contents(forward), contents(backward)) for forward, backward in results]
        seen["results"][axes] = dict(zip(PRIMITIVES, pairs, strict=True))
        seen["traffic"][axes] = made.traffic().rows()
    made.reset_traffic()
    seen["after reset"] = made.traffic().rows()

    for name in PRIMITIVES:
        x = np.random.default_rng(rank).standard_normal((4, 1001))
        rows = {"AllGather": 16, "ReduceScatter": 1}.get(name, 4)
        # What follows a sum over ranks is the same on all of them and counts once.
        alike = name == "AllReduce"
        dy = np.random.default_rng(9 if alike else 9 + rank).standard_normal((rows, 1001))
        y, dx = (result.asnumpy() for result in Both(made, name)(Tensor(x), Tensor(dy)))
        seen["products"][name] = float(np.vdot(dx, x)), float(np.vdot(dy, y)) if rank == 0 or not alike else 0.0

    x = Tensor(fractions(rank))
    total, part = made.AllReduce("dense")(x).asnumpy(), made.ReduceScatter("dense")(x).asnumpy()
    seen["total"] = total if rank == 0 else None
    seen["digest"] = hashlib.sha256(total).hexdigest()
    seen["part of total"] = np.array_equal(part, total[rank : rank + 1])
    every = Tensor(halves(rank)).astype(ms.bfloat16)
    seen["halves"] = made.AllReduce("dense")(every).astype(ms.float32).asnumpy()
    diagonal = made.subgroup("dense", (0, 3) if rank in (0, 3) else (1, 2))
    seen["subgroup"] = made.AllGather(diagonal)(Tensor(np.array([rank], np.int32))).asnumpy().tolist()
    made.reset_traffic()
    experts = made.AllGather("ep")(Tensor(np.array([rank], np.int32))).asnumpy().tolist()
    seen["experts"] = experts, made.traffic().rows()[0]["axis"]

    for name in PRIMITIVES:
        made.reset_traffic()
        results = Repeated(made, name)(Tensor(np.arange(2, dtype=np.float32) + 10 * rank))
        seen["repeated"][name] = [t.asnumpy().tolist() for t in results], made.traffic().rows()
    seen["independent"] = []
    independent = Independent(made)
    work = Tensor(np.zeros([(8, 8), (200, 200), (40, 40), (120, 120)][rank], np.float32))
    for run in range(10):
        results = independent(work, Tensor(np.arange(4, dtype=np.float32) + 4 * rank + run))
        seen["independent"].append([float(t.asnumpy()[0]) for t in results])

    for name, x in (("AllReduce", np.zeros(1, np.int64)), ("AllToAll", np.zeros((6, 2), np.float32))):
        try:
            primitive(made, name, "dense")(Tensor(x))
        except (TypeError, ValueError) as error:
            seen["errors"].append(str(error))
    one, together = Tensor(np.zeros(1, np.float32)), made.AllReduce("dense")
    together(one)
    seen["share of a core while waiting"] = waiting(made.world, lambda: together(one).asnumpy())
    return seen


def contents(tensors: tuple) -> list[tuple]:
    """(dtype, shape, float64 values) of each."""
    return [(str(t.dtype), t.shape, t.astype(ms.float64).asnumpy() if t.size else None) for t in tensors]


def waiting(
    world: collectives.World, call: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> float:
    """CPU seconds over seconds of this rank while it waits in `call` for rank 0, which is late by a second."""
    call()  # what is done once, compiling say, is no waiting
    world.barrier()
    start, started = clock(), time.perf_counter()
    if world.rank == 0:
        time.sleep(1)
    call()
    return (clock() - start) / (time.perf_counter() - started)


def try_channels(made: Collectives) -> dict:
    """What this rank sees of channels around the ring of all ranks and along tp."""
    world, rank = made.world, made.rank
    following, before = (rank + 1) % 4, (rank - 1) % 4
    seen: dict = {}
    made.reset_traffic()
    ring = [(place, (place + 1) % 4) for place in range(4)]
    ahead, back = made.Channel("dense", "ahead", ring), made.Channel("dense", "back", [pair[::-1] for pair in ring])
    asked = [
        ahead.receive(shape, getattr(ms, dtype), before) for shape, dtype in zip(SHAPES, DTYPES, strict=True)
    ] + [back.receive((), ms.float32, following)]  # fmt: skip
    world.barrier()
    seen["ready before it was sent"] = [arrival.ready() for arrival in asked]
    world.barrier()
    for array, dtype in zip(numbers(rank), DTYPES, strict=True):
        ahead.send(Tensor(array).astype(getattr(ms, dtype)), following)
    back.send(Tensor(np.float32(rank)), before)
    # In another order than that of sending, but each channel in its own.
    seen["back"] = float(asked[-1].wait().asnumpy())
    seen["ahead"] = contents([arrival.wait() for arrival in asked[:-1]])
    ahead.check_drained()
    back.check_drained()
    seen["traffic"] = made.traffic().rows()

    waits = made.Channel("dense", "waits", ring)

    def around() -> None:
        late = waits.receive((1,), ms.int32, before)
        if rank == 0:
            waits.send(Tensor(np.array([4], np.int32)), following)
            late.wait()
        else:
            waits.send(late.wait(), following)

    seen["share of a core while waiting"] = waiting(
        made.world, around, time.thread_time
    )  # threads of MindSpore spin on
    waits.check_drained()

    both = [(0, 1), (1, 0)]
    unmatched = made.Channel("tp", "unmatched", both)
    peer = 1 - unmatched.group.place
    if rank in (0, 1):
        unmatched.send(Tensor(np.zeros(1 << 20, np.float32)), peer)
    if rank == 1:
        unmatched.receive((1 << 20,), ms.float32, peer)
    try:
        unmatched.check_drained()
        seen["unmatched"] = None
    except RuntimeError as error:
        seen["unmatched"] = str(error)
    short = made.Channel("tp", "short", both)
    short.send(Tensor(np.zeros(3, np.float32)), peer)
    try:
        short.receive((2, 2), ms.float32, peer).wait()
    except RuntimeError as error:
        seen["short"] = str(error)
    try:
        ahead.send(Tensor(np.zeros(1, np.float32)), (rank + 2) % 4)
    except ValueError as error:
        seen["far"] = str(error)
    return seen


def try_two_threads(mpi: ModuleType, made: Collectives) -> bool:
    """Whether a collective ends while rank 0 waits in another one, which the other ranks join only afterwards."""
    library = ctypes.CDLL(str(mpi.LIBRARY))
    slots = [library.busway_open(mpi.MPI.COMM_WORLD.Dup().py2f(), 0, 0) for _ in range(2)]
    results = [np.zeros(2, np.float32) for _ in slots]

    def run(i: int) -> None:
        tensors = [np.array([slots[i]], np.int32), np.ones(2, np.float32), results[i]]
        shapes = [np.array([tensor.size], np.int64) for tensor in tensors]
        library.Run(
            3,
            (ctypes.c_void_p * 3)(*(tensor.ctypes.data for tensor in tensors)),
            (ctypes.c_int * 3)(1, 1, 1),
            (ctypes.c_void_p * 3)(*(shape.ctypes.data for shape in shapes)),
            (ctypes.c_char_p * 3)(b"int32", b"float32", b"float32"),
            None,
            None,
        )

    threads = [threading.Thread(target=run, args=[i], daemon=True) for i in range(2)]
    if made.rank == 0:
        threads[0].start()
        time.sleep(0.2)
    threads[1].start()
    threads[1].join(30)
    if threads[1].is_alive():
        raise TimeoutError("a collective waits for one in another slot")
    if made.rank != 0:
        threads[0].start()
    threads[0].join(30)
    return all((result == 4).all() for result in results)


def try_host(world: collectives.World) -> dict:
    """What this rank sees of the helpers for the host."""
    return {
        "broadcast": world.broadcast({"from": world.rank} if world.rank == 2 else None, root=2),
        "all_gather": world.all_gather("abcd"[: world.rank]),
        "reduce_max": world.reduce_max([world.rank, -world.rank]).tolist(),
        "reduce_max of nan": world.reduce_max([float("nan") if world.rank == 1 else 1.0]).tolist(),
        "share of a core while waiting": waiting(world, world.barrier),
    }


def main(path: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    ms.runtime.dispatch_threads_num(1)
    cores = sorted(os.sched_getaffinity(0))
    from parallel.collectives import mpi  # initialises MPI, which the test that imports this file must not

    mesh = Mesh(Layout(dp=2, tp=2, ep=4), load(LAPTOP))
    made = collectives.connect(mesh)
    world = made.world
    seen = {"chosen": made.describe(), "cores": (cores, sorted(os.sched_getaffinity(0)))}
    seen |= {"host": try_host(world), "channels": try_channels(made)}
    seen["python"] = try_form(Collectives(mesh, mpi.MpiBackend(native=False)))
    if mpi.LIBRARY.exists():
        seen["native"] = try_form(Collectives(mesh, mpi.MpiBackend(native=True)))
        seen["two threads"] = try_two_threads(mpi, made)
    with mock.patch.object(mpi.MPI, "get_vendor", return_value=("Open MPI", (5, 0, 8))):
        seen["foreign"] = mpi.MpiBackend().note
    with mock.patch.object(mpi, "LIBRARY", Path("missing.so")):
        seen["not built"] = mpi.MpiBackend().note
    try:
        collectives.connect(Mesh(Layout(dp=8), load(LAPTOP)))
    except ValueError as error:
        seen["other size"] = str(error)

    seen["cores"] += (sorted(os.sched_getaffinity(0)),)
    everything = world.all_gather(seen)
    if world.rank == 0:
        with open(path, "wb") as file:
            pickle.dump(everything, file)
    world.barrier()
    if world.rank == 3:
        time.sleep(0.5)
        world.abort(7)
    made.AllReduce("dense")(Tensor(np.zeros(1, np.float32))).asnumpy()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
