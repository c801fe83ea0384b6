"""Many runs with few worlds: all layouts of one number of ranks follow each other in one MPI world."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matrix import MODEL, Entry

from parallel.mesh import Mesh
from parallel.traffic import step_rows
from trainer.compose import compose_recipe

EQUAL = 1e-9
"""The design's bound in the fp64 reference."""


def run_all(busway: Any, entries: Iterable[Entry], tag: str, *overrides: str) -> dict[str, Any]:
    """The run of each entry by name, and of one rank for each model among them, by the model's overrides.

    `tag` ends the names of the run directories.
    """
    entries = list(entries)
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
    """The name of a run's directory."""
    return re.sub(r"\W+", "-", " ".join(parts))


def run_world(busway: Any, ranks: int, commands: list[list[str]]) -> None:
    """Run the command lines in one world of `ranks`."""
    file = busway.folder / f"commands-{ranks}.json"
    file.write_text(json.dumps(commands))
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
    driver = [sys.executable, "-P", str(Path(__file__).with_name("world.py")), str(file)]
    done = subprocess.run([*mpiexec, *driver], cwd=busway.folder, env=busway.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def difference(first: Any, other: Any) -> dict[str, float]:
    """The largest relative difference of two runs: of loss and gradient norm over all steps, of the held-out loss, and
    of the final weights, max|difference| / max|value| of each tensor."""
    found = {key: worst([r[key] for r in first.rows], [r[key] for r in other.rows]) for key in ("loss", "grad_norm")}
    found["eval_loss"] = worst(*([row["eval_loss"] for row in run.evaluations] for run in (first, other)))
    weights = other.weights()
    parts = [np.max(np.abs(v - weights[n])) / np.max(np.abs(v)) for n, v in first.weights().items()]
    found["weights"] = np.max(parts)  # unlike Python's max, NaN where one is
    return {key: float(value) for key, value in found.items()}


def beyond(found: dict[str, float], bound: float = EQUAL) -> dict[str, float]:
    """What is not within the bound: NaN is not either."""
    return {key: value for key, value in found.items() if not value <= bound}


def predicted(run: Any) -> list[dict[str, Any]]:
    """What `parallel.traffic` says that a step of the run moves, as `summary.json` lists it."""
    recipe = compose_recipe(str(run.path / "recipe.yaml"), []).recipe
    mesh, dtype = Mesh(recipe.parallel_layout, recipe.machine), {"fp64": "float64", "fp32": "float32"}
    batch, precision = recipe.train.global_batch, dtype[recipe.train.precision]
    return step_rows(mesh, recipe.model, recipe.data.seq_len, batch, precision)


def worst(first: list[float], other: list[float]) -> float:
    """The largest relative difference of two sequences of one length."""
    assert len(first) == len(other)
    return np.max([abs(a - b) / abs(a) for a, b in zip(first, other, strict=True)])
