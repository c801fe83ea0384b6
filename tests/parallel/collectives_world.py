"""Four ranks, dp 2 x tp 2, that try the collectives and leave what they saw in a file for test_collectives.py.

Arguments: the file. The world ends by an abort of rank 3 with code 7 while the others wait in an all-reduce.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel import collectives
from parallel.collectives import Collectives
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.topology import load

AXES = ("dp", "tp", "cp", "loss", "dense", "ep")
RUNS = 3
LAPTOP = {
    "name": "laptop",
    "rank": {"name": "process", "memory_gib": None, "memory_bandwidth": None, "peak_tflops": None},
    "planes": {"memory": {"injection": None}},
    "levels": [{"name": "machine", "members": "any", "bandwidth": None, "latency": None, "plane": "memory"}],
}


def numbers(rank: int) -> list[np.ndarray]:
    """What `rank` puts in; bfloat16 is made of the last one."""
    draw = np.random.default_rng(rank)
    return [
        draw.standard_normal((3, 5)).astype(np.float32),
        draw.standard_normal(7),
        draw.integers(-9, 9, (2, 2)).astype(np.int32),
        np.zeros((0, 4), np.float32),
        draw.standard_normal((129,)).astype(np.float32),
        draw.standard_normal((4, 3)).astype(np.float32),
    ]


def halves(rank: int) -> np.ndarray:
    """Every bfloat16 on rank 0, as float32, and zeros elsewhere. Subnormals are left out: MindSpore flushes them."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    every = np.where(bits & 0x7F800000, bits, 0).astype(np.uint32).view(np.float32)
    return every if rank == 0 else np.zeros_like(every)


class Sums(nn.Cell):
    """The same tensors summed over every set of axes."""

    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.primitives = nn.CellList([made.AllReduce(axes) for axes in AXES])

    def construct(self, *tensors):
        sums = ()
        for primitive in self.primitives:
            sums = sums + (primitive.forward(tensors),)
        return sums


class Repeated(nn.Cell):
    """Equal calls, one of them without a reader."""

    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.primitive = made.AllReduce("dp")
        self.other = made.AllReduce("dp")

    def construct(self, x):
        self.primitive.forward((x,))
        return self.primitive.forward((x,))[0], self.primitive.forward((x,))[0], self.other.forward((x,))[0]


class Independent(nn.Cell):
    """Twelve sums that do not depend on each other, over groups that overlap, each after work of another length."""

    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.dp, self.tp, self.dense = made.AllReduce("dp"), made.AllReduce("tp"), made.AllReduce("dense")
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


class One(nn.Cell):
    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.primitive = made.AllReduce("dense")

    def construct(self, x):
        return self.primitive.backward(self.primitive.forward((x,)))[0]


def try_form(made: Collectives) -> dict:
    """What this rank sees of one form of the operators."""
    seen: dict = {"note": made.describe()}
    rank = made.rank

    inputs = [Tensor(array) for array in numbers(rank)]
    inputs[-1] = inputs[-1].astype(ms.bfloat16)
    sums = Sums(made)
    made.reset_traffic()
    for _ in range(RUNS):
        results = sums(*inputs)
        out = [[(str(t.dtype), t.astype(ms.float64).asnumpy() if t.size else t.shape) for t in row] for row in results]
    seen["sums"] = dict(zip(AXES, out, strict=True))
    seen["traffic"] = made.traffic().rows()

    made.reset_traffic()
    seen["after reset"] = made.traffic().rows()
    repeated = Repeated(made)
    seen["repeated"] = [float(t.asnumpy()[0]) for t in repeated(Tensor(np.array([rank + 1], np.float32)))]
    seen["repeated traffic"] = made.traffic().rows()

    independent = Independent(made)
    work = Tensor(np.zeros([(8, 8), (200, 200), (40, 40), (120, 120)][rank], np.float32))
    seen["independent"] = []
    for run in range(10):
        values = Tensor(np.arange(4, dtype=np.float32) + 4 * rank + run)
        seen["independent"].append([float(t.asnumpy()[0]) for t in independent(work, values)])

    seen["halves"] = One(made)(Tensor(halves(rank)).astype(ms.bfloat16)).astype(ms.float32).asnumpy()
    try:
        One(made)(Tensor(np.zeros(1, np.int64)))
    except TypeError as error:
        seen["int64"] = str(error)
    return seen


def try_two_threads(mpi: ModuleType, made: Collectives) -> bool:
    """Whether a collective ends while rank 0 waits in another one, which the other ranks join only afterwards."""
    library = ctypes.CDLL(str(mpi.LIBRARY))
    slots = [library.busway_open(mpi.MPI.COMM_WORLD.Dup().py2f()) for _ in range(2)]
    results = [np.zeros(2, np.float32) for _ in slots]

    def run(i: int) -> None:
        tensors = [np.array([slots[i]], np.int32), np.ones(2, np.float32), results[i]]
        shapes = [np.array([tensor.size], np.int64) for tensor in tensors]
        library.AllReduce(
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
    seen = {
        "broadcast": world.broadcast({"from": world.rank} if world.rank == 2 else None, root=2),
        "all_gather": world.all_gather("abcd"[: world.rank]),
        "reduce_max": world.reduce_max([world.rank, -world.rank]).tolist(),
        "reduce_max of nan": world.reduce_max([float("nan") if world.rank == 1 else 1.0]).tolist(),
    }
    # A rank that waits must leave its core to one that works: rank 0 is late by a second.
    world.barrier()
    if world.rank == 0:
        time.sleep(1)
    start = time.process_time()
    world.barrier()
    seen["cpu seconds while waiting"] = time.process_time() - start
    return seen


def main(path: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    ms.runtime.dispatch_threads_num(1)
    from parallel.collectives import mpi  # initialises MPI, which the test that imports this file must not

    mesh = Mesh(Layout(dp=2, tp=2, ep=4), load(LAPTOP))
    made = collectives.connect(mesh)
    world = made.world
    seen = {"chosen": made.describe(), "host": try_host(world)}
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

    everything = world.all_gather(seen)
    if world.rank == 0:
        with open(path, "wb") as file:
            pickle.dump(everything, file)
    world.barrier()
    if world.rank == 3:
        time.sleep(0.5)
        world.abort(7)
    One(made)(Tensor(np.zeros(1, np.float32))).asnumpy()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
