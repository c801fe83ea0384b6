"""What each collective costs inside a graph over the bare mpi4py call that does the same.

Starts two ranks of one thread each (`--ranks` for more). For each primitive and payload, in turn in one run: mpi4py's
blocking call, its non-blocking one with the primitive's wait, and graphs of the primitive in the C++ and the Python
form, and for the all-reduce (C++) on sixteen tensors. Prints the median milliseconds of one call on the slowest rank,
then one line of JSON. What makes it fair:

- Everything is called many times over on the same input and into the same output: MindSpore reuses the memory of a
  result that nobody reads.
- A call is what one more of them adds: the difference of a long and a short series over that of their lengths, for
  mpi4py alike. What a graph costs beside its calls, fresh memory for its first output included, is the column `beside`.
- numpy would put arrays of 4 MiB and more on huge pages, which MindSpore's memory is not on, and MPI copies twice as
  fast between those. Here it does not (NUMPY_MADVISE_HUGEPAGE=0).

A channel, which works between graphs, stands beside `Sendrecv`.
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
FORMS = ("native", "python")
MEMBERS = 16

Series = Callable[[int], object]
"""Makes so many calls."""


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


def repeated(call: Callable[[], object]) -> Series:
    """A series of `call`."""

    def several(times: int) -> None:
        for _ in range(times):
            call()

    return several


def measure(comm, columns: dict[str, Series], size: int) -> dict[str, float]:
    """Milliseconds of a call of each column, and as ``<column>_beside`` of a series beside its calls."""
    short, turns = (32, 15) if size <= 1 << 20 else (8, 9)
    taken: dict[str, list[float]] = {}
    for turn in range(turns + 2):
        for name, series in columns.items():
            seconds = []
            for times in (short, 3 * short):
                comm.Barrier()
                start = time.perf_counter()
                series(times)
                seconds.append(time.perf_counter() - start)
            call = (seconds[1] - seconds[0]) / (2 * short)
            if turn >= 2:
                taken.setdefault(name, []).append(1e3 * call)
                taken.setdefault(f"{name}_beside", []).append(1e3 * (seconds[0] - short * call))
    return {name: comm.allreduce(sorted(figures)[turns // 2], max) for name, figures in taken.items()}


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
        """A graph of `times` calls of a primitive."""

        def __init__(self, primitive: nn.Cell, times: int) -> None:
            super().__init__()
            self.primitive, self.times = primitive, times

        def construct(self, *tensors):
            results = tensors
            for _ in range(self.times):
                results = self.primitive.forward(tensors)
            return results

    def graphs(primitive: nn.Cell, tensors: tuple) -> Series:
        made: dict[int, Graph] = {}
        return lambda times: made.setdefault(times, Graph(primitive, times))(*tensors)

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    ms.runtime.dispatch_threads_num(1)
    comm = MPI.COMM_WORLD
    level = Level("machine", 0, None, None, None, None, Plane("memory", None))
    mesh = Mesh(Layout(dp=comm.size), Topology("here", Rank("process", None, None, {}), (level.plane,), (level,)))
    native = mpi.LIBRARY.exists()
    forms = {form: Collectives(mesh, mpi.MpiBackend(native=form == "native")) for form in FORMS[not native :]}
    ring = [(place, (place + 1) % comm.size) for place in range(comm.size)]
    channel = forms["python"].Channel("dp", "benchmark", ring)

    def through_channel(tensor: Tensor) -> None:
        arrival = channel.receive(tensor.shape, tensor.dtype, (comm.rank - 1) % comm.size)
        channel.send(tensor, (comm.rank + 1) % comm.size)
        arrival.wait()

    rows = []
    for size in SIZES:
        x = np.ones(size // 4, np.float32)
        one, many = (Tensor(x),), tuple(Tensor(part) for part in np.split(x, MEMBERS))
        for name in PRIMITIVES:
            grown = {"AllGather": x.size * comm.size, "ReduceScatter": x.size // comm.size}.get(name, x.size)
            blocking, starting = bare(comm, name, x, np.empty(grown, np.float32))
            columns = {"mpi4py": repeated(blocking), "mpi4py_waiting": repeated(partial(waiting, mpi.wait, starting))}
            primitives = {form: getattr(made, name)("dp") for form, made in forms.items()}
            columns |= {form: graphs(primitive, one) for form, primitive in primitives.items()}
            if native and name == "AllReduce":
                columns["native_16"] = graphs(primitives["native"], many)
            rows.append({"bytes": size, "primitive": name, **measure(comm, columns, size)})
        blocking, _ = bare(comm, "Shift", x, np.empty_like(x))
        columns = {"mpi4py": repeated(blocking), tuple(forms)[0]: repeated(partial(through_channel, one[0]))}
        rows.append({"bytes": size, "primitive": "Channel", **measure(comm, columns, size)})
    channel.check_drained()
    if comm.rank == 0:
        report(comm.size, tuple(forms)[0], rows)


def waiting(wait: Callable[[list], None], starting: Callable[[], list]) -> None:
    """A non-blocking call, and the wait for it."""
    wait(starting())


def report(ranks: int, form: str, rows: list[dict]) -> None:
    """Print the table and the line of JSON."""
    columns = ("mpi4py", "mpi4py_waiting", *FORMS, "native_16", f"{form}_beside")
    print(f"milliseconds of a call over {ranks} ranks, float32, median")
    print("primitive           bytes" + "".join(f"{name:>16}" for name in (*columns, f"{form}/mpi4py")))
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        ratio = round(row[form] / row["mpi4py"], 3)
        ratios.setdefault(row["primitive"], {})[str(row["bytes"])] = ratio
        cells = "".join(f"{row[name]:>16.3f}" if name in row else f"{'':>16}" for name in columns)
        print(f"{row['primitive']:<14}{row['bytes']:>11,}{cells}{ratio:>16.2f}")
    print(json.dumps({"ranks": ranks, "form": form, "ratio_mpi4py": ratios, "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (2)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
    else:
        sys.exit(launch(arguments.ranks))
