"""Two ranks that record collectives, for test_trace.py. Argument: the file for what rank 0 sees."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel.collectives import Collectives
from parallel.collectives.mpi import LIBRARY, MpiBackend
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.topology import load

LAPTOP = {
    "name": "laptop",
    "rank": {"name": "process", "memory_gib": None, "memory_bandwidth": None, "peak_tflops": None},
    "planes": {"memory": {"injection": None}},
    "levels": [{"name": "machine", "members": "any", "bandwidth": None, "latency": None, "plane": "memory"}],
}


class Both(nn.Cell):
    """An all-reduce, and a shift of the same tensors."""

    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.total, self.shift = made.AllReduce("dp"), made.Shift("dp")

    def construct(self, *tensors):
        return self.total(tensors), self.shift(tensors)


ms.set_context(mode=ms.GRAPH_MODE)
mesh, seen = Mesh(Layout(dp=2), load(LAPTOP)), {}
for form in ("native", "python") if LIBRARY.exists() else ("python",):
    made = Collectives(mesh, MpiBackend(native=form == "native"))
    both, tensors = Both(made), (Tensor(np.ones(100, np.float32)), Tensor(np.ones(3, np.int32)))
    both(*tensors)
    before = made.spans()
    made.reset_traffic()
    made.record(True)
    start = time.monotonic()
    for _ in range(3):
        both(*tensors)
    window = (start, time.monotonic())
    made.record(False)
    counted = sum(payload for payload, _ in made.traffic().payload.values())
    both(*tensors)
    seen[form] = before, window, made.spans(), counted, made.spans()
if made.rank == 0:
    Path(sys.argv[1]).write_bytes(pickle.dumps(seen))
