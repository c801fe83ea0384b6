"""Constants from measured runs: least squares on the logarithm of predicted over measured, robust against outliers,
with priors that keep every constant in its physical range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from planner.predict import Choice, Runs
from planner.published import Row, Setting
from scipy.optimize import least_squares

from parallel.planner.constants import Constants

NOISE = 0.05
"""Of a step's logarithm: what a prediction may miss before it counts as an outlier's would."""
SAMPLE, EVALUATIONS = 100, (25, 7)
"""A fit begins on every n-th row, so that about as many are left; evaluations of either part."""
STEP = 4e-3
"""Of differences, in spreads of the priors."""
MARGIN = 0.01
"""Of memory's logarithm, by which a device's is to be missed."""
LEAST = 20
"""Rows that a source counts for at most, where there are others."""
SCATTER, ROUNDS = 0.5, 4
"""Of a framework's constants about its device's, in spreads of the priors; how often either is found from the other."""


class Prior(NamedTuple):
    """What is known of a constant without runs."""

    mean: float
    spread: float
    low: float
    high: float


PRIORS = {
    "matmul": Prior(0.75, 0.1, 0.3, 1.0),
    "attention": Prior(0.45, 0.15, 0.05, 1.0),
    "memory": Prior(0.8, 0.1, 0.4, 1.0),
    "passes": Prior(1.2, 0.7, 0.2, 6.0),
    "logit_passes": Prior(1.5, 1.0, 0.5, 10.0),
    "kernel": Prior(2e-5, 3e-5, 0.0, 1e-3),
    "host": Prior(1e-4, 3e-4, 0.0, 5e-3),
    "inner": Prior(0.75, 0.1, 0.2, 1.0),
    "outer": Prior(0.6, 0.2, 0.05, 1.0),
    "call": Prior(1e-5, 1e-5, 0.0, 3e-4),
    "call_far": Prior(2e-5, 3e-5, 0.0, 1e-3),
    "hide_tp": Prior(0.1, 0.2, 0.0, 1.0),
    "hide_dp": Prior(0.6, 0.3, 0.0, 1.0),
    "hide_gather": Prior(0.2, 0.3, 0.0, 1.0),
    "hide_pp": Prior(0.5, 0.3, 0.0, 1.0),
    "spread": Prior(0.0, 0.005, 0.0, 0.05),
    "step": Prior(0.0, 0.02, 0.0, 0.5),
}
EXPERT_PRIORS = {
    "experts": Prior(0.8, 0.15, 0.2, 1.0),
    "hide_ep": Prior(0.1, 0.3, 0.0, 1.0),
}
"""Fitted where there are models with experts."""
KERNELS = {  # what is known without runs: passes over scores, and over the stream where norms are fused or not
    "torch": {"scores": 10.0, "passes": 2.5},  # written, scaled, masked, softmax, each read and written
    "fused": {"scores": 4.0, "passes": 2.5},
    "flash_attentionv1.0.8": {"scores": 0.5, "passes": 2.5},
    "flash_attention2": {"scores": 0.1, "passes": 2.5},
    "flash_attention2 + RMS kernel": {"scores": 0.1, "passes": 1.0},
}
KERNEL_PRIORS = {
    "attention": Prior(0.45, 0.15, 0.05, 1.0),
    "scores": Prior(1.0, 2.0, 0.0, 40.0),
    "passes": Prior(1.2, 0.7, 0.2, 6.0),
}
DEVICE_PRIORS = {
    "ascend910c": {  # a3_microbench.csv: matmuls as flops + bytes; HCCL in production; causal attention
        "matmul": Prior(0.97, 0.02, 0.3, 1.0),
        "memory": Prior(0.87, 0.02, 0.4, 1.0),
        "attention": Prior(0.36, 0.03, 0.05, 1.0),
        "inner": Prior(0.98, 0.02, 0.2, 1.0),
        "call": Prior(1.1e-5, 3e-6, 0.0, 3e-4),
    },
}
"""Known from microbenchmarks."""
FEATURE_PRIORS = {
    "slow_network": {
        "host_tp": Prior(8e-4, 2e-4, 0.0, 5e-3),
        "call_far": Prior(4e-4, 2e-4, 0.0, 5e-3),
        "outer": Prior(0.4, 0.2, 0.02, 1.0),
        "hide_dp": Prior(0.3, 0.3, 0.0, 1.0),
    },
    "stalled": {"message": Prior(0.5, 0.2, 0.0, 2.0)},
    "tp_overlap": {"hide_tp": Prior(0.4, 0.2, 0.0, 1.0)},
    "ep_overlap": {"hide_ep": Prior(0.7, 0.2, 0.0, 1.0)},
}

MEMORY_PRIORS = {
    "saved": Prior(1.0, 0.3, 0.5, 4.0),
    "logit_bytes": Prior(4.0, 3.0, 0.0, 30.0),
    "logits": Prior(2.0, 2.0, 0.0, 10.0),
    "gradient_copies": Prior(0.0, 1.0, 0.0, 6.0),
    "reserve": Prior(1.0, 1.0, 0.0, 8.0),
    "fragments": Prior(0.03, 0.03, 0.0, 0.3),
}
KERNEL_MEMORY_PRIORS = {"saved": Prior(1.0, 0.3, 0.5, 4.0), "score_bytes": Prior(0.0, 3.0, 0.0, 12.0)}

Name = tuple[str, str, str]
"""("", "", field), ("attention_kernels", kernel, field) or ("features", feature, field)."""


def memory_unknowns(rows: list[Row]) -> dict[Name, Prior]:
    """What memory and outcomes of rows can tell."""
    found = {("", "", name): prior for name, prior in MEMORY_PRIORS.items()}
    for kernel in sorted({row.kernel for row in rows if row.kernel}):
        found |= {("attention_kernels", kernel, name): prior for name, prior in KERNEL_MEMORY_PRIORS.items()}
    return found


def unknowns(rows: list[Row], device: Mapping[str, Any] | None = None) -> dict[Name, Prior]:
    """What step times of rows can tell, with priors about the entry of their device where there is one."""
    known = PRIORS | (EXPERT_PRIORS if any(row.shape["experts"] for row in rows) else {})
    known |= DEVICE_PRIORS.get(rows[0].device, {})
    if device:
        known = {
            name: p._replace(mean=device.get(name, p.mean), spread=SCATTER * p.spread) for name, p in known.items()
        }
    found = {("", "", name): prior for name, prior in known.items()}
    for kernel in sorted({row.kernel for row in rows if row.kernel}):
        own = KERNELS.get(kernel, {})
        found |= {
            ("attention_kernels", kernel, name): prior._replace(mean=own.get(name, prior.mean))
            for name, prior in KERNEL_PRIORS.items()
        }
    for feature in sorted({feature for row in rows for feature in row.features}):
        found |= {("features", feature, name): prior for name, prior in FEATURE_PRIORS[feature].items()}
    return found


def entry(names: list[Name], values: Iterable[float], base: Mapping[str, float]) -> dict[str, Any]:
    """As `constants/*.yaml` hold it."""
    found: dict[str, Any] = deepcopy(dict(base))
    for (group, member, name), value in zip(names, values, strict=True):
        place = found.setdefault(group, {}).setdefault(member, {}) if group else found
        place[name] = float(value)
    return found


def choice(table: Mapping[str, Any]) -> Choice:
    """The constants of an entry by setting, whatever the device and framework."""
    fields = {name: value for name, value in table.items() if isinstance(value, int | float)}
    base = replace(Constants(), **fields)

    def choose(setting: Setting) -> Constants:
        kernels = KERNELS | table.get("attention_kernels", {})
        found = replace(base, **kernels.get(setting.kernel, {}))
        for feature in sorted(setting.features):
            found = replace(found, **table.get("features", {}).get(feature, {}))
        return found

    return choose


def fit(rows: list[Row], device: Mapping[str, Any], base: Mapping[str, float]) -> dict:
    """The entry of a framework that fits `rows` best; those of one source count no more than `LEAST` would, where there
    are others. `device` is the entry of its device."""
    return _solved(_Times, rows, unknowns(rows, device), base)


def fit_device(rows: list[Row], base: Mapping[str, float]) -> dict:
    """The entry of a device, for frameworks of which nothing is known there.

    Constants of frameworks scatter about their device's, and these about the priors: the likeliest of all together (a
    hierarchical fit), found in turn. What is peculiar to one framework, of however many runs, is so no trait of the
    device.
    """
    known, found = unknowns(rows), dict(base)
    for _ in range(ROUNDS):
        names = sorted({row.framework for row in rows})
        fits = [fit([row for row in rows if row.framework == name], found, base) for name in names]
        found = entry(list(known), [_middle(prior, _of(fits, name)) for name, prior in known.items()], base)
    return found


def _of(fits: list[dict], name: Name) -> list[float]:
    group, member, field = name
    places = [table.get(group, {}).get(member, {}) if group else table for table in fits]
    return [place[field] for place in places if field in place]


def _middle(prior: Prior, values: list[float]) -> float:
    """The likeliest mean, of values that scatter about it, and it about the prior."""
    return float(f"{(prior.mean + sum(values) / SCATTER**2) / (1 + len(values) / SCATTER**2):.4g}")


def fit_memory(rows: list[Row], base: Mapping[str, float]) -> dict:
    """The constants of memory that fit what rows held, and which of them ran out of it."""
    return _solved(_Memories, rows, memory_unknowns(rows), base)


def _solved(kind: type[_Problem], rows: list[Row], known: Mapping[Name, Prior], base: Mapping[str, float]) -> dict:
    mean, spread, low, high = (np.array(column) for column in zip(*known.values(), strict=True))
    low, high = (low - mean) / spread, (high - mean) / spread
    off = np.clip(0.0, low + STEP, high - STEP)
    for part, evaluations in zip((rows[:: max(1, len(rows) // SAMPLE)], rows), EVALUATIONS, strict=True):
        problem = kind(part, known, base)
        found = least_squares(
            lambda off, problem=problem: problem.residuals(off[None])[0],
            off,
            lambda off, problem=problem: problem.slopes(off, high),
            (low, high),
            max_nfev=evaluations,
        )
        off = np.clip(found.x, low + STEP, high - STEP)
    return entry(list(known), [f"{value:.4g}" for value in mean + found.x * spread], base)


class _Problem:
    """What a least-squares solver asks about, in spreads of the priors from their means."""

    def __init__(self, rows: list[Row], known: Mapping[Name, Prior], base: Mapping[str, float]) -> None:
        self.runs, self.names, self.base = Runs(rows), list(known), base
        self.mean, self.spread = (
            np.array([getattr(prior, key) for prior in known.values()]) for key in ("mean", "spread")
        )
        sources = Counter(row.source for row in rows)
        least = LEAST if len(sources) > 1 else np.inf
        self.weights = np.array([min(1.0, np.sqrt(least / sources[row.source])) for row in rows])

    def residuals(self, points: np.ndarray) -> np.ndarray:
        """[points, rows and priors]"""
        tables = [entry(self.names, self.mean + off * self.spread, self.base) for off in points]
        missed = self.missed(list(map(choice, tables))) / NOISE
        robust = np.sign(missed) * np.sqrt(2 * (np.sqrt(1 + missed**2) - 1))
        return np.concatenate([robust * self.weights, points], 1)

    def missed(self, choices: list[Choice]) -> np.ndarray:
        """[choices, rows]: logarithms that should be 0."""
        raise NotImplementedError

    def slopes(self, off: np.ndarray, high: np.ndarray) -> np.ndarray:
        """[rows and priors, unknowns]"""
        step = np.where(off + STEP > high, -STEP, STEP)
        return ((self.residuals(off + np.diag(step)) - self.residuals(off[None])) / step[:, None]).T


class _Times(_Problem):
    """How far step times are off."""

    def missed(self, choices: list[Choice]) -> np.ndarray:
        return np.log(self.runs.step_times(*choices) / self.runs.measured)


class _Memories(_Problem):
    """How far memory is off: where it was not measured, beyond what a device has or below it."""

    def missed(self, choices: list[Choice]) -> np.ndarray:
        predicted, rows = self.runs.memories(*choices), self.runs.rows
        beyond = np.log(predicted / np.array([row.capacity for row in rows]))
        oom = np.array([row.outcome == "oom" for row in rows])
        wrong = np.where(oom, np.minimum(beyond - MARGIN, 0.0), np.maximum(beyond + MARGIN, 0.0))
        measured = self.runs.measured_memory
        return np.where(np.isfinite(measured), np.log(predicted / measured), 0.0) + wrong


def errors(rows: list[Row], choose: Choice) -> dict[str, Any]:
    """How far predictions are off."""
    runs = Runs(rows)
    missed = np.abs(runs.step_times(choose)[0] / runs.measured - 1)
    return {
        "rows": len(rows),
        "median_abs_err": round(float(np.median(missed)), 4),
        "p90_abs_err": round(float(np.quantile(missed, 0.9)), 4),
    }
