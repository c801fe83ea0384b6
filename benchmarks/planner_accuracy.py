"""How far predictions are from published runs: `python benchmarks/planner_accuracy.py FILE…`.

FILE… are CSV files with the columns that docs/planner.md lists; absent ones read as blank. Prints a row per source and
what was refused, then one line of JSON with fractions, null where the files have no such thing:

- `rows` with a step time or an outcome, `refused` among them;
- `median_abs_err`, `p90_abs_err` of the step's time, `memory_median_abs_err` of the fullest rank's memory;
- `spearman_median` and `regret_p90` over groups of runs in which the layout alone differs: the rank correlation of
  predicted and measured times, and how much slower than the best the layout is that is predicted fastest (the 90th
  percentile over groups);
- `fits_recall`, `oom_recall`: of the runs that fitted, or ran out of memory, the share of which that was predicted.

The peer is Calculon 1.0 on the eight runs that it was published with (Korthikanti 2022, table 5), as its package is not
on PyPI: 3.65 % mean absolute error, by its authors' file for that machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from planner.predict import Runs
from planner.published import Refusal, Row, Setting, read
from scipy.stats import rankdata

from parallel.planner.constants import Constants, constants

CALCULON = ("Korthikanti 2022 T5", 0.0365)
LEAST = 3
"""Layouts in a group that is ranked."""


def main() -> None:
    """Predict, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns-only", action="store_true", help="take nothing from the column `citation`")
    parser.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    found = list(read(given.files, cited=not given.columns_only))
    refused = [row for row in found if isinstance(row, Refusal)]
    rows = [row for row in found if isinstance(row, Row) and (row.measured or row.outcome or row.memory)]
    for each in refused:
        print(f"refused {each.why}")
    runs = Runs(rows)
    table = Table(runs, runs.step_times(chosen)[0], runs.memories(chosen)[0], refused)
    table.print()
    print(json.dumps(table.figures()))


@cache
def chosen(setting: Setting) -> Constants:
    """The shipped constants."""
    return constants(setting.device, setting.framework, setting.kernel, setting.features).constants


class Table:
    """Predictions beside what was measured."""

    def __init__(self, runs: Runs, times: np.ndarray, memories: np.ndarray, refused: list[Refusal]) -> None:
        self.rows, self.times, self.memories, self.refused = runs.rows, times, memories, refused
        self.missed = np.abs(times / runs.measured - 1)
        self.memory_missed = np.abs(memories / runs.measured_memory - 1)
        self.measured = runs.measured
        capacity = np.array([row.capacity for row in self.rows])
        self.fits = memories <= capacity

    def print(self) -> None:
        """A row per source, and the peer."""
        sources = np.array([row.source for row in self.rows])
        print(f"{'source':52}{'rows':>6}{'median':>9}{'p90':>9}{'memory':>9}{'fits':>9}{'oom':>9}")
        for name in sorted(set(sources)):
            of = sources == name
            cells = (_middle(self.missed[of]), _high(self.missed[of]), _middle(self.memory_missed[of]))
            cells += tuple(self.recall(outcome, of) for outcome in ("ok", "oom"))
            print(f"{name[:50]:52}{of.sum():6}" + "".join(f"{_percent(cell):>9}" for cell in cells))
        name, error = CALCULON
        of = (sources == name) & np.isfinite(self.missed)
        if of.any():
            print(f"{name}: mean {_percent(float(self.missed[of].mean()))} here, Calculon {_percent(error)}")

    def recall(self, outcome: str, of: np.ndarray | None = None) -> float | None:
        """The share of runs with that outcome that was predicted; over all of them a refused one was not."""
        ours = np.array([row.outcome == outcome for row in self.rows], bool) & (True if of is None else of)
        right = self.fits if outcome == "ok" else ~self.fits
        runs = ours.sum() + (sum(each.outcome == outcome for each in self.refused) if of is None else 0)
        return float(right[ours].sum() / runs) if runs else None

    def groups(self) -> Iterator[np.ndarray]:
        """Rows of each group in which the layout alone differs."""
        keys: dict[tuple, list[int]] = {}
        for index, row in enumerate(self.rows):
            if np.isfinite(self.missed[index]):
                keys.setdefault(row.problem, []).append(index)
        for members in keys.values():
            if len({self.rows[i].layout for i in members}) >= LEAST:
                yield np.array(members)

    def figures(self) -> dict[str, float | int | None]:
        """The line of JSON."""
        correlations, regrets = [], []
        for of in self.groups():
            measured, predicted = self.measured[of], self.times[of]
            if np.ptp(measured) > 0 and np.ptp(predicted) > 0:
                correlations.append(np.corrcoef(rankdata(measured), rankdata(predicted))[0, 1])
            regrets.append(measured[np.argmin(predicted)] / measured.min() - 1)
        refused = sum(each.counts for each in self.refused)
        return {
            "rows": sum(bool(row.measured or row.outcome) for row in self.rows) + refused,
            "refused": refused,
            "median_abs_err": _middle(self.missed),
            "p90_abs_err": _high(self.missed),
            "memory_median_abs_err": _middle(self.memory_missed),
            "spearman_median": _middle(np.array(correlations)),
            "regret_p90": _high(np.array(regrets)),
            "fits_recall": self.recall("ok"),
            "oom_recall": self.recall("oom"),
        }


def _middle(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _high(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.quantile(values, 0.9)) if len(values) else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


if __name__ == "__main__":
    main()
