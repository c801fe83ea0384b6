"""A grouped matmul beside one dense matmul of the same FLOPs: `python benchmarks/grouped.py`.

1,024 tokens of width 256 go to 4 of 16 experts each: 4,096 rows, sorted by expert, through matrices of [256, 256] (gate
and up of ffn 128) and [256, 128] (down). The forward, the gradient of the input and that of the matrices, fp32, 2
threads; experts get even shares, or shares as uneven as 1 to 16. Dense: MindSpore's MatMul (oneDNN) of all rows with
one matrix. In turn in one run, medians. Prints a table, then one line of JSON with the rates over the dense one's.
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

from models.kernels import choose

ROWS, EXPERTS, ROUNDS, CALLS = 4096, 16, 31, 8
SHAPES = {"gate and up": (256, 256), "down": (256, 128)}
"""Outputs and inputs of a matrix."""


class Dense(nn.Cell):
    """Some calls of one of the three products with one matrix."""

    def __init__(self, product: str) -> None:
        super().__init__()
        transposed = {"forward": {"transpose_b": True}, "input": {}, "weight": {"transpose_a": True}}
        self.product, self.matmul = product, ops.MatMul(**transposed[product])

    def construct(self, x, w, dy, ends):
        a, b = (x, w) if self.product == "forward" else (dy, w) if self.product == "input" else (dy, x)
        results = ()
        for _ in range(CALLS):
            a = ops.depend(a, results)
            results = results + (self.matmul(a, b),)
        return results


class Grouped(nn.Cell):
    """The same with a matrix for each expert."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.product, self.kernel = product, choose("auto", "fp32", "CPU").GroupedMatmul()

    def construct(self, x, w, dy, ends):
        results = ()
        for _ in range(CALLS):
            dy, x = ops.depend(dy, results), ops.depend(x, results)
            if self.product == "forward":
                y = self.kernel.forward(x, w, ends)
            elif self.product == "input":
                y = self.kernel.backward_input(dy, w, ends)
            else:
                y = self.kernel.backward_weight(dy, x, ends)
            results = results + (y,)
        return results


def main() -> None:
    """Measure and print."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rng, rates = np.random.default_rng(0), {}
    even = np.full(EXPERTS, ROWS // EXPERTS)
    uneven = np.diff(np.round(np.cumsum([0, *range(1, EXPERTS + 1)]) / sum(range(1, EXPERTS + 1)) * ROWS)).astype(int)
    print(f"{'matrix':14}{'product':>10}{'dense, ms':>12}{'even, ms':>12}{'uneven, ms':>12}{'even':>8}{'uneven':>8}")
    for name, (outer, inner) in SHAPES.items():
        x, dy = (Tensor(rng.standard_normal((ROWS, n)).astype(np.float32)) for n in (inner, outer))
        one, many = (Tensor(rng.standard_normal((n * outer, inner)).astype(np.float32)) for n in (1, EXPERTS))
        for product in ("forward", "input", "weight"):
            dense, grouped = Dense(product), Grouped(product)
            runs = {"dense": (dense, one, even), "even": (grouped, many, even), "uneven": (grouped, many, uneven)}
            times = {key: [] for key in runs}
            for _ in range(ROUNDS):
                for key, (cell, w, shares) in runs.items():
                    ends = Tensor(np.cumsum(shares).astype(np.int32))
                    begin = time.perf_counter()
                    cell(x, w, dy, ends)[-1].asnumpy()
                    times[key].append(1e3 * (time.perf_counter() - begin) / CALLS)
            ms_of = {key: median(values[3:]) for key, values in times.items()}
            shares = {key: ms_of["dense"] / ms_of[key] for key in ("even", "uneven")}
            rates |= {f"{name}, {product}, {key}": round(share, 3) for key, share in shares.items()}
            cells = "".join(f"{ms_of[key]:>12.3f}" for key in runs) + "".join(f"{s:>8.2f}" for s in shares.values())
            print(f"{name:14}{product:>10}{cells}")
    print(json.dumps({"rate_of_dense": rates}))


if __name__ == "__main__":
    main()
