"""The planner's prices of single operators beside measured ones: `python benchmarks/planner_microbench.py FILE.csv`.

FILE.csv has microbenchmarks of one node of Ascend A3 dies, in columns `kind`, `op`, `shape_or_msg`, `dtype`, `n_dies`
and `profiler_us` (or `bench_us`). What is priced is what a plan on `cloudmatrix384` counts on with Busway's constants:
matmuls `MxKxN` in bf16, and collectives over dies of one node, whose message is a rank's part (of an all-reduce, all of
it). Others are left out and counted. Their constants are priors of the fit, made from these figures by hand, so that
this says how well the formulas fit, and where they do not. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from statistics import median

from parallel.planner.communication import Network
from parallel.planner.compute import matmul_seconds
from parallel.planner.constants import constants
from parallel.planner.machine import Machine, machine
from trainer.compose import compose_topology

PARTS = {"allGather": 1, "reduceScatter": 1, "allReduce": 2}
"""Halves of an all-reduce that a collective is."""


def main() -> None:
    """Price, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    known = constants("ascend910c", "busway").constants
    node = machine(compose_topology("cloudmatrix384", []), known)
    network = Network(node, known)
    missed: dict[str, list[float]] = {"matmul": [], "collective": []}
    left_out = 0
    print(f"{'operator':32}{'measured, us':>14}{'priced, us':>12}{'off':>9}")
    with given.file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            seconds = priced(row, node, network)
            if seconds is None:
                left_out += 1
                continue
            measured = float(row["profiler_us"] or row["bench_us"])
            off = 1e6 * seconds / measured - 1
            missed[row["kind"]].append(abs(off))
            dies = f" of {row['n_dies']}" if row["kind"] == "collective" else ""
            print(f"{row['op'] + ' ' + row['shape_or_msg'] + dies:32}{measured:14.1f}{1e6 * seconds:12.1f}{off:9.1%}")
    print(f"{left_out} left out")
    print(json.dumps({f"{kind}_median_abs_err": median(errors) for kind, errors in missed.items() if errors}))


def priced(row: dict[str, str], node: Machine, network: Network) -> float | None:
    """Seconds of a measured operator; None: one that is not priced alone."""
    if row["dtype"] != "BF16":
        return None
    if row["kind"] == "matmul":
        rows, into, out = map(int, row["shape_or_msg"].split("x"))
        return float(matmul_seconds(node, network.constants, rows, into, out))
    if row["kind"] == "collective" and row["op"] in PARTS:
        dies, size = int(row["n_dies"]), int(row["shape_or_msg"])
        whole = size if row["op"] == "allReduce" else size * dies
        return float(PARTS[row["op"]] * network.half(whole, network.group([(dies, 1)])))
    return None


if __name__ == "__main__":
    main()
