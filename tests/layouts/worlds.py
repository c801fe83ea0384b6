"""Many runs with few worlds: all layouts of one number of ranks follow each other in one MPI world."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matrix import MODEL, Entry

from trainer import report

LEVELS = {"package": (2, 100.0, "bus"), "node": (2, 90.0, "bus"), "cluster": ("any", 80.0, "roce")}
"""Members, bandwidth and plane of each level of the machine that layouts are placed on."""

EQUAL = 1e-9
"""The design's bound in the fp64 reference."""


def machine(folder: Path, levels: dict[str, tuple[Any, float, str]]) -> str:
    """What has runs placed on a machine of these levels, whose speed is known, as the planner asks."""
    source = {
        "name": "-".join(levels),
        "rank": {
            "name": "core",
            "memory_gib": 64.0,
            "memory_bandwidth": 100.0,
            "peak_tflops": dict.fromkeys(("bfloat16", "float32", "float64"), 1.0),
        }
        | {"device": "ascend910c"},
        "planes": {plane: {"injection": None} for _, _, plane in levels.values()},
        "levels": [
            {"name": name, "members": members, "bandwidth": bandwidth, "latency": 1.0, "plane": plane}
            for name, (members, bandwidth, plane) in levels.items()
        ],
    }
    path = folder / f"{source['name']}.yaml"
    path.write_text(yaml.safe_dump(source))
    return f"topology={path}"


def run_all(busway: Any, entries: Iterable[Entry], tag: str, *overrides: str) -> dict[str, Any]:
    """The run of each entry by name, and of one rank for each model among them, by the model's overrides.

    `tag` ends the names of the run directories.
    """
    entries, overrides = list(entries), (machine(busway.folder, LEVELS), *overrides)
    bases = [Entry(" ".join(model), 1, ("layout.micro_batch=1",), model) for model in {e.model: None for e in entries}]
    worlds: dict[int, list[Entry]] = {1: bases}
    for entry in entries:
        worlds.setdefault(entry.ranks, []).append(entry)
    for ranks, members in worlds.items():
        run_world(busway, ranks, [words(busway, member, tag, *overrides) for member in members])
    return {entry.name: busway.run(slug(entry.name, tag)) for entry in [*bases, *entries]}


def words(busway: Any, entry: Entry, tag: str, *overrides: str) -> list[str]:
    """The command line of an entry's run."""
    keys = (*MODEL, *entry.model, *entry.layout, *overrides)
    return ["train", *busway.words(slug(entry.name, tag), "launcher.kind=none", *keys)]


def slug(*parts: str) -> str:
    """The name of a run's directory, of a length that any file system takes."""
    name = re.sub(r"\W+", "-", " ".join(parts))
    return name if len(name) < 100 else f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def run_world(busway: Any, ranks: int, commands: list[list[str]]) -> None:
    """Run the command lines in one world of `ranks`."""
    file = busway.folder / f"commands-{ranks}.json"
    file.write_text(json.dumps(commands))
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
    driver = [sys.executable, "-P", str(Path(__file__).with_name("world.py")), str(file)]
    done = subprocess.run([*mpiexec, *driver], cwd=busway.folder, env=busway.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def difference(first: Any, other: Any) -> dict[str, float]:
    """The largest relative difference of two runs: of loss and gradient norm over all steps, of the held-out loss
    where there is one, and of the final weights, max|difference| / max|value| of each tensor."""
    found = {key: worst([r[key] for r in first.rows], [r[key] for r in other.rows]) for key in ("loss", "grad_norm")}
    if first.evaluations or other.evaluations:
        found["eval_loss"] = worst(*([row["eval_loss"] for row in run.evaluations] for run in (first, other)))
    weights = other.weights()
    parts = [np.max(np.abs(v - weights[n])) / (np.max(np.abs(v)) or 1) for n, v in first.weights().items()]
    found["weights"] = np.max(parts)  # unlike Python's max, NaN where one is
    return {key: float(value) for key, value in found.items()}


def beyond(found: dict[str, float], bound: float = EQUAL) -> dict[str, float]:
    """What is not within the bound: NaN is not either."""
    return {key: value for key, value in found.items() if not value <= bound}


def predicted(run: Any) -> list[dict[str, Any]]:
    """What the planner says that a step of the run moves, on what was routed, as `summary.json` lists it."""
    measured = report.read(run.path)
    routed = measured.routing()
    assert (routed is None) == (not measured.recipe.metrics.routing)
    return measured.plan(routed).traffic


def routing(run: Any, step: int, rank: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(numbers of the tokens [N] that a rank routed in a step, layer -> the experts [N, K] that they went to)."""
    saved = np.load(run.path / "routing" / f"step-{step:06}-rank-{rank:04}.npz")
    layers = {int(key.removeprefix("layer.")): saved[key] for key in saved.files if key.startswith("layer.")}
    return saved["tokens"].reshape(-1), {
        layer: chosen.reshape(-1, chosen.shape[-1]) for layer, chosen in layers.items()
    }


def flipped(first: Any, other: Any) -> str:
    """Of the choices of experts, by token, layer and step, how many differ between two runs; "" where none were kept.

    A choice is the set of a token's experts.
    """
    count = total = 0
    for step in range(1, len(first.rows) + 1):
        choices = [_choices(run, step) for run in (first, other)]
        for layer, chosen in choices[0].items():
            total += len(chosen)
            count += int((np.sort(chosen) != np.sort(choices[1][layer])).any(1).sum())
    return f"{count} of {total}" if total else ""


def _choices(run: Any, step: int) -> dict[int, np.ndarray]:
    """layer -> the experts [N, K] of every token of a step, in the order of the global batch."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for file in sorted((run.path / "routing").glob(f"step-{step:06}-rank-*.npz")):
        tokens, layers = routing(run, step, int(file.stem[-4:]))
        for layer, chosen in layers.items():
            found.setdefault(layer, {}).update(zip(tokens.tolist(), chosen, strict=True))
    return {layer: np.stack([by_token[n] for n in sorted(by_token)]) for layer, by_token in found.items()}


def worst(first: list[float], other: list[float]) -> float:
    """The largest relative difference of two sequences of one length."""
    assert len(first) == len(other)
    return np.max([abs(a - b) / abs(a) for a, b in zip(first, other, strict=True)])
