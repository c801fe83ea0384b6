"""What each collective costs inside a graph over the bare mpi4py call that does the same.

Starts two ranks of one thread each (`--ranks` for more). For each primitive and payload, in turn in one run: mpi4py's
blocking call, its non-blocking one with the primitive's wait, and graphs of the primitive in the C++ and the Python
form, and for the all-reduce (C++) on sixteen tensors. Prints the median milliseconds of one call on the slowest rank,
then one line of JSON. What makes it fair:

- All are called many times over on the same input and into the same output: MindSpore reuses the memory of a result
  that nobody reads.
- As in a training step, many calls share what calling a graph costs; that is printed too.
- numpy would put arrays of 4 MiB and more on huge pages, which MindSpore's memory is not on, and MPI copies twice as
  fast between those. Here it does not (NUMPY_MADVISE_HUGEPAGE=0).

A channel, which works between graphs, stands beside `Sendrecv`; it sleeps while it waits, as a pipeline stage should.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

SIZES = (64 << 10, 1 << 20, 4 << 20, 16 << 20)
PRIMITIVES = ("AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Shift", "Broadcast")
COLUMNS = ("mpi4py", "mpi4py_waiting", "native", "native_16", "python")
MEMBERS = 16


def launch(ranks: int) -> int:
    """Start the ranks and return the exit code of mpiexec."""
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if mpiexec is None:
        sys.exit("collectives.py needs mpiexec, which the mpich package brings")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "NUMPY_MADVISE_HUGEPAGE": "0"}
    return subprocess.call([mpiexec, "-n", str(ranks), sys.executable, __file__, "--worker"], env=environment)


def bare(comm, primitive: str, x, y) -> tuple[Callable[[], object], Callable[[], list]]:
    """mpi4py's call from array `x` into `y`, and what starts its non-blocking one and returns the requests."""
    following, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if primitive == "Shift":
        return (
            lambda: comm.Sendrecv(x, following, recvbuf=y, source=before),
            lambda: [comm.Irecv(y, before), comm.Isend(x, following)],
        )
    if primitive == "Broadcast":
        y = y if comm.rank else x
        return lambda: comm.Bcast(y), lambda: [comm.Ibcast(y)]
    name = {"ReduceScatter": "Reduce_scatter_block"}.get(primitive, primitive.capitalize())
    blocking, starting = getattr(comm, name), getattr(comm, "I" + name.lower())
    return lambda: blocking(x, y), lambda: [starting(x, y)]


def measure(comm, columns: dict[str, Callable[[], object]], calls: int, turns: int) -> dict[str, float]:
    """The median milliseconds of one of the `calls` that each of `columns` makes."""
    taken = {name: [] for name in columns}
    for turn in range(turns + 2):
        for name, call in columns.items():
            comm.Barrier()
            start = time.perf_counter()
            call()
            if turn >= 2:
                taken[name].append(1e3 / calls * (time.perf_counter() - start))
    return {name: comm.allreduce(sorted(times)[len(times) // 2], max) for name, times in taken.items()}


def worker() -> None:
    """One rank; rank 0 prints."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn
    from mpi4py import MPI

    from parallel.collectives import Collectives, mpi
    from parallel.layout import Layout
    from parallel.mesh import Mesh
    from parallel.topology import Level, Plane, Rank, Topology

    class Graph(nn.Cell):
        """`calls` runs of a primitive."""

        def __init__(self, primitive: nn.Cell, calls: int) -> None:
            super().__init__()
            self.primitive, self.calls = primitive, calls

        def construct(self, *tensors):
            results = tensors
            for _ in range(self.calls):
                results = self.primitive.forward(tensors)
            return results

    def over(times: int, call: Callable[[], object]) -> Callable[[], None]:
        def several() -> None:
            for _ in range(times):
                call()

        return several

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    ms.runtime.dispatch_threads_num(1)
    comm = MPI.COMM_WORLD
    level = Level("machine", 0, None, None, None, None, Plane("memory", None))
    mesh = Mesh(Layout(dp=comm.size), Topology("here", Rank("process", None, None, {}), (level.plane,), (level,)))
    native = mpi.LIBRARY.exists()
    forms = {"python": Collectives(mesh, mpi.MpiBackend(native=False))}
    if native:
        forms["native"] = Collectives(mesh, mpi.MpiBackend(native=True))
    channel = forms["python"].Channel("dp", "benchmark")

    def waiting(starting: Callable[[], list]) -> None:
        mpi.wait(starting())

    def through_channel(tensor: Tensor) -> None:
        arrival = channel.receive(tensor.shape, tensor.dtype, (comm.rank - 1) % comm.size)
        channel.send(tensor, (comm.rank + 1) % comm.size)
        arrival.wait()

    rows = []
    for size in SIZES:
        calls, turns = (128, 12) if size <= 1 << 20 else (32, 8)
        x = np.ones(size // 4, np.float32)
        one, many = (Tensor(x),), tuple(Tensor(part) for part in np.split(x, MEMBERS))
        for primitive in PRIMITIVES:
            grown = {"AllGather": x.size * comm.size, "ReduceScatter": x.size // comm.size}.get(primitive, x.size)
            blocking, starting = bare(comm, primitive, x, np.empty(grown, np.float32))
            columns = {"mpi4py": over(calls, blocking), "mpi4py_waiting": over(calls, partial(waiting, starting))}
            for form, made in forms.items():
                graph = Graph(getattr(made, primitive)("dp"), calls)
                columns[form] = partial(graph, *one)
                if (form, primitive) == ("native", "AllReduce"):
                    columns["native_16"] = partial(graph, *many)
            rows.append({"bytes": size, "primitive": primitive, **measure(comm, columns, calls, turns)})
        blocking, _ = bare(comm, "Shift", x, np.empty_like(x))
        ours = over(calls, partial(through_channel, one[0]))
        columns = {"mpi4py": over(calls, blocking), "native" if native else "python": ours}
        rows.append({"bytes": size, "primitive": "Channel", **measure(comm, columns, calls, turns)})
    channel.check_drained()
    empty = Graph(forms["python"].AllReduce("pp"), 1)
    scalar = Tensor(np.zeros(1, np.float32))
    graph_call = measure(comm, {"graph": lambda: empty(scalar)}, 1, 50)["graph"]
    if comm.rank == 0:
        report(comm.size, "native" if native else "python", graph_call, rows)


def report(ranks: int, form: str, graph_call: float, rows: list[dict]) -> None:
    """Print the table and the line of JSON."""
    print(f"milliseconds of a call over {ranks} ranks, float32, median; calling a graph costs {graph_call:.3f}")
    print("primitive           bytes" + "".join(f"{name:>16}" for name in COLUMNS) + f"{form + '/mpi4py':>16}")
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        ratio = round(row[form] / row["mpi4py"], 3)
        ratios.setdefault(row["primitive"], {})[str(row["bytes"])] = ratio
        cells = "".join(f"{row[name]:>16.3f}" if name in row else f"{'':>16}" for name in COLUMNS)
        print(f"{row['primitive']:<14}{row['bytes']:>11,}{cells}{ratio:>16.2f}")
    print(json.dumps({"ranks": ranks, "form": form, "ratio_mpi4py": ratios, "graph_call": graph_call, "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (2)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
    else:
        sys.exit(launch(arguments.ranks))
