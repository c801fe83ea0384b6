"""Where the time of Busway's step goes, by operator: `python benchmarks/profile_step.py`.

The shape of `benchmarks/step.py`, on one process with 2 threads. MindSpore's own profiler counts each operator's
time; the step is timed without it, and what operators do not account for is the graph's dispatch and the loop.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "steps")]
STEPS = 20


def profile(step) -> None:
    """Time `step` plain, then profiled, and print the table."""
    import mindspore

    times = []
    for _ in range(2 * STEPS):
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    plain = statistics.median(times[STEPS:])
    with tempfile.TemporaryDirectory() as folder:
        profiler = mindspore.Profiler(output_path=folder)
        for _ in range(STEPS):
            step()
        profiler.analyse()
        (table,) = Path(folder).rglob("cpu_op_detail_info_0.csv")
        rows = list(csv.DictReader(table.open()))
    operators: dict[str, float] = defaultdict(float)
    for row in rows:
        operators[_name(row)] += float(row["op_total_time(ms)"]) / STEPS
    total = sum(operators.values())
    print(f"{'operator':40}{'ms/step':>9}{'share':>8}")
    for name, ms in sorted(operators.items(), key=lambda item: -item[1])[:16]:
        print(f"{name:40}{ms:>9.2f}{ms / total:>8.1%}")
    print(f"{'all operators':40}{total:>9.2f}\n{'the step, without the profiler':40}{plain:>9.2f}")
    result = {name: round(ms, 3) for name, ms in operators.items()}
    print(json.dumps({"step_ms": round(plain, 2), "operators_ms": round(total, 2), "by_operator_ms": result}))


def _name(row: dict[str, str]) -> str:
    """A native kernel is a Custom operator in a cell of its own class; the norm and AdamW stand in the step itself."""
    if row["op_type"] != "Custom":
        return row["op_type"]
    cells = re.findall(r"-(\w+)/", row["full_op_name"])
    return f"native {cells[-1] if cells else 'SquareSum, AdamW'}"


if __name__ == "__main__":
    import timing

    timing.serve = profile
    import busway_step  # noqa: F401
