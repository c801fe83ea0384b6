"""Fits the planner's constants to published runs: `python benchmarks/planner_fit.py [--device D …] FILE…`.

FILE… are CSV files with the columns that docs/planner.md lists. Of every device that they have runs of it writes
`parallel/planner/constants/DEVICE.yaml`: constants by framework, what is pooled over all of them, each with the error
of the fit, and `left_out`: how far off runs of each source are with constants from the device's other sources.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from planner.fitting import LEAST, choice, errors, fit, fit_device, fit_memory
from planner.published import Row, read

from parallel.planner.constants import FOLDER

HEADER = """# Written by benchmarks/planner_fit.py; docs/planner.md says how. Every constant is described in
# parallel/planner/constants.py.
"""
MEMORY = {  # bytes of a weight, its gradient, its optimizer's state, and of the copy that ZeRO 1 and 2 update
    "default": {"weight_bytes": 2.0, "gradient_bytes": 4.0, "optimizer_bytes": 12.0, "own_bytes": 0.0},
    "torchtitan": {"weight_bytes": 4.0, "gradient_bytes": 4.0, "optimizer_bytes": 8.0, "own_bytes": 0.0},
    "llm_foundry": {"weight_bytes": 4.0, "gradient_bytes": 4.0, "optimizer_bytes": 8.0, "own_bytes": 0.0},
    "busway": {
        "weight_bytes": 4.0,
        "gradient_bytes": 4.0,
        "optimizer_bytes": 8.0,
        "own_bytes": 4.0,
        "message_bytes": 4.0,
        "stream_bytes": 4.0,
        "saved": 2.0,
        "gradient_copies": 3.0,
    },
}
"""Facts of the frameworks, not fitted."""


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", action="append", help="only this device; may be given several times")
    parser.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    rows = [row for row in read(given.files) if isinstance(row, Row)]
    for device in given.device or sorted({row.device for row in rows if row.measured}):
        own = [row for row in rows if row.device == device]
        print(f"{device}: {len(own)} rows", flush=True)
        path = FOLDER / f"{device}.yaml"
        path.write_text(HEADER + yaml.safe_dump(table(own), sort_keys=False, width=120))


def table(rows: list[Row]) -> dict[str, Any]:
    """The content of one device's file."""
    timed = once([row for row in rows if row.measured])
    device = fit_device(thinned(timed), MEMORY["default"])
    pooled = described(device, timed)
    frameworks = {"pooled": pooled}
    print(f"  pooled: {pooled['error']}", flush=True)
    for framework in sorted({row.framework for row in timed}):
        base = MEMORY.get(framework, MEMORY["default"])
        held = [row for row in rows if row.framework == framework and (row.memory or row.outcome)]
        base = fit_memory(held, base) if held else base
        own = [row for row in timed if row.framework == framework]
        frameworks[framework] = described(fit(own, device, base), own)
        print(f"  {framework}: {frameworks[framework]['error']}", flush=True)
    # HCCL's, 2 x 200 MB a communicator; and of a 910B's 64 GiB 60.3 are for use (FlagPerf).
    ascend = {"buffers": 0.39, "reserve": 3.7} if rows[0].device.startswith("ascend") else {}
    start = {name: value for name, value in device.items() if isinstance(value, float)}
    frameworks["busway"] = start | MEMORY["busway"] | ascend | {"error": pooled["error"]}
    return {"pooled": "pooled", "frameworks": frameworks, "left_out": left_out(timed)}


def thinned(rows: list[Row]) -> list[Row]:
    """Of each source no more than about three times as many rows as it counts for."""
    found = []
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        found += own[:: max(1, len(own) // (3 * LEAST))]
    return found


def once(rows: list[Row]) -> list[Row]:
    """Runs that several files have, once."""
    return list({(row.source, row.problem, row.layout, row.measured): row for row in rows}.values())


def described(found: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """An entry with its error on `rows`."""
    sources = dict(sorted(Counter(row.source for row in rows).items()))
    return found | {"error": errors(rows, choice(found)) | {"sources": sources}}


def left_out(rows: list[Row]) -> dict[str, Any]:
    """Errors on each source with constants from the others, those of its framework where it is among them.

    Sources of fewer than `LEAST` rows are left out together, by framework.
    """
    counts = Counter(row.source for row in rows)
    names = [row.source if counts[row.source] >= LEAST else f"{row.framework}, small sources" for row in rows]
    found = {}
    for name in sorted(set(names)):
        test = [row for row, own in zip(rows, names, strict=True) if own == name]
        others = [row for row, own in zip(rows, names, strict=True) if own != name]
        if not others:
            continue
        constants = fit_device(thinned(others), MEMORY["default"])
        alike = [row for row in others if row.framework == test[0].framework]
        if alike:
            constants = fit(thinned(alike), constants, MEMORY["default"])
        found[name] = errors(test, choice(constants)) | {"fitted_to": len(others), "of_its_framework": len(alike)}
        print(f"  without {name}: {found[name]}", flush=True)
    return found


if __name__ == "__main__":
    main()
