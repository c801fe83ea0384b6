"""A grouped matmul beside one dense matmul of the same FLOPs: `python benchmarks/grouped.py`.

1,024 tokens of width 256 go to 4 of 16 experts each: 4,096 rows, sorted by expert, through matrices of [256, 256] (gate
and up of ffn 128) and [256, 128] (down). The forward, the gradient of the input and that of the matrices, fp32, 2
threads; experts get even shares, or shares as uneven as 1 to 16. Dense: all rows with one matrix, by MindSpore's MatMul
(oneDNN) and by the kernel of linears. In turn in one run, medians. Prints a table, then one line of JSON with the rates
over either.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from models.kernels import choose, plain

ROWS, EXPERTS, ROUNDS, CALLS = 4096, 16, 31, 8
SHAPES = {"gate and up": (256, 256), "down": (256, 128)}
"""Outputs and inputs of a matrix."""


class Product(nn.Cell):
    """Some calls of one of a kernel's three products; `ends` is for one that has a matrix for each expert."""

    def __init__(self, kernel: nn.Cell, product: str, grouped: bool) -> None:
        super().__init__()
        self.kernel, self.product, self.grouped = kernel, product, grouped

    def construct(self, x, w, dy, ends):
        results, further = (), (ends,) if self.grouped else ()
        for _ in range(CALLS):
            dy, x = ops.depend(dy, results), ops.depend(x, results)
            if self.product == "forward":
                y = self.kernel.forward(x, w, *further)
            elif self.product == "input":
                y = self.kernel.backward_input(dy, w, *further)
            else:
                y = self.kernel.backward_weight(dy, x, *further)
            results = results + (y,)
        return results


def median_times(cells: dict[str, tuple], x: Tensor, dy: Tensor) -> dict[str, float]:
    """Milliseconds of a call of each (cell, matrices, rows of each expert), in turn."""
    times: dict[str, list[float]] = {key: [] for key in cells}
    for _ in range(ROUNDS):
        for key, (cell, w, shares) in cells.items():
            ends = Tensor(np.cumsum(shares).astype(np.int32))
            begin = time.perf_counter()
            cell(x, w, dy, ends)[-1].asnumpy()
            times[key].append(1e3 * (time.perf_counter() - begin) / CALLS)
    return {key: median(values[3:]) for key, values in times.items()}


def main() -> None:
    """Measure and print."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rng, kernels = np.random.default_rng(0), choose("auto", "fp32", "CPU")
    rates: dict[str, dict[str, float]] = {"mindspore": {}, "linear": {}}
    even = np.full(EXPERTS, ROWS // EXPERTS)
    uneven = np.diff(np.round(np.cumsum([0, *range(1, EXPERTS + 1)]) / sum(range(1, EXPERTS + 1)) * ROWS)).astype(int)
    print("GFLOP/s         product  mindspore     linear       even     uneven   even / faster dense   uneven / it")
    for name, (outer, inner) in SHAPES.items():
        x, dy = (Tensor(rng.standard_normal((ROWS, n)).astype(np.float32)) for n in (inner, outer))
        one, many = (Tensor(rng.standard_normal((n * outer, inner)).astype(np.float32)) for n in (1, EXPERTS))
        for product in ("forward", "input", "weight"):
            mindspore, linear = (Product(room.Matmul(), product, False) for room in (plain, kernels))
            grouped = Product(kernels.GroupedMatmul(), product, True)
            cells = {"mindspore": (mindspore, one, even), "linear": (linear, one, even)}
            cells |= {"even": (grouped, many, even), "uneven": (grouped, many, uneven)}
            found = {key: 2e-6 * ROWS * outer * inner / ms_of for key, ms_of in median_times(cells, x, dy).items()}
            for dense, held in rates.items():
                held |= {f"{name}, {product}, {key}": round(found[key] / found[dense], 3) for key in ("even", "uneven")}
            faster = max(found["mindspore"], found["linear"])
            shares = "".join(f"{found[key] / faster:>{width}.2f}" for key, width in (("even", 22), ("uneven", 14)))
            print(f"{name:14}{product:>9}" + "".join(f"{rate:>11.1f}" for rate in found.values()) + shares)
    print(json.dumps({"rate_of_dense": rates["mindspore"], "rate_of_linear": rates["linear"]}))


if __name__ == "__main__":
    main()
