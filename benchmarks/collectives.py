"""What an all-reduce of the graph costs over the bare mpi4py call it is made of.

Starts two ranks of one thread each (`--ranks` for more). At each size, in turn in one run: eight calls of mpi4py's
blocking `Allreduce`, each on the other's result; of `Iallreduce` with the primitives' wait; and graphs of eight
primitives in a row, in the C++ and the Python form, on one tensor and on sixteen that make one message. Prints the
median milliseconds of one call, then one line of JSON. The graphs' times hold their share of calling a graph at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time

SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
MEMBERS = 16
CALLS = 8


def launch(ranks: int) -> int:
    """Start the ranks and return the exit code of mpiexec."""
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if mpiexec is None:
        sys.exit("collectives.py needs mpiexec, which the mpich package brings")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.call([mpiexec, "-n", str(ranks), sys.executable, __file__, "--worker"], env=environment)


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

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    ms.runtime.dispatch_threads_num(1)
    comm = MPI.COMM_WORLD
    level = Level("machine", 0, None, None, None, None, Plane("memory", None))
    mesh = Mesh(Layout(dp=comm.size), Topology("here", Rank("process", None, None, {}), (level.plane,), (level,)))

    class Step(nn.Cell):
        def __init__(self, primitive) -> None:
            super().__init__()
            self.primitive = primitive

        def construct(self, *tensors):
            for _ in range(CALLS):
                tensors = self.primitive.forward(tensors)
            return tensors

    def measure(calls: dict, repeats: int) -> dict:
        taken = {name: [] for name in calls}
        for turn in range(repeats + 2):
            for name, call in calls.items():
                comm.Barrier()
                start = time.perf_counter()
                call()
                if turn >= 2:
                    taken[name].append(1e3 / CALLS * (time.perf_counter() - start))
        return {name: comm.allreduce(float(np.median(times)), MPI.MAX) for name, times in taken.items()}

    def bare(call, source, target) -> None:
        for _ in range(CALLS):
            call(source, target)
            source, target = target, source

    def waiting(source, target) -> None:
        mpi.wait(comm.Iallreduce(source, target))

    native = mpi.LIBRARY.exists()
    python_step = Step(Collectives(mesh, mpi.MpiBackend(native=False)).AllReduce("dp"))
    native_step = Step(Collectives(mesh, mpi.MpiBackend(native=True)).AllReduce("dp")) if native else None
    rows = []
    for size in SIZES:
        source = np.zeros(size // 4, np.float32)
        target = np.empty_like(source)
        one = (Tensor(source),)
        many = tuple(Tensor(part) for part in np.split(source, MEMBERS))
        calls = {
            "mpi4py": lambda a=source, b=target: bare(comm.Allreduce, a, b),
            "mpi4py_waiting": lambda a=source, b=target: bare(waiting, a, b),
            "python": lambda t=one: python_step(*t),
            "python_16": lambda t=many: python_step(*t),
        }
        if native:
            calls["native"] = lambda t=one: native_step(*t)
            calls["native_16"] = lambda t=many: native_step(*t)
        rows.append({"bytes": size, **measure(calls, 20 if size <= 1 << 20 else 8)})
    if comm.rank:
        return
    names = [name for name in rows[0] if name != "bytes"]
    print(f"milliseconds of an all-reduce over {comm.size} ranks, float32, median")
    print("      bytes" + "".join(f"{name:>16}" for name in names))
    for row in rows:
        print(f"{row['bytes']:>11,}" + "".join(f"{row[name]:>16.3f}" for name in names))
    form = "native" if native else "python"
    ratios = {str(row["bytes"]): round(row[form] / row["mpi4py"], 3) for row in rows}
    print(json.dumps({"ranks": comm.size, "form": form, "ratio_mpi4py": ratios, "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start (2)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
    else:
        sys.exit(launch(arguments.ranks))
