"""The run directory: its name, what lies in it, and whether a run may go on in it.

- recipe.yaml: the resolved recipe; plan.yaml: layout and placement; summary.json: how the run went
- trace.json: where the time of some steps went, with metrics.trace
- metrics.jsonl: a row a logged step; tb/: TensorBoard's event files; logs/: rank-0000.log, …
- checkpoints/: step-00000010, …
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from models.checks import ConfigError
from trainer.errors import MachineError
from trainer.machine import writing_to
from trainer.recipe import Recipe, resolved, typed

MAY_CHANGE = (
    "train.steps", "train.stop_at", "train.eval_every", "train.eval_batches", "train.log_every", "train.name",
    "train.out", "train.kernels", "layout", "topology", "launcher", "checkpoint", "metrics", "plan",
)  # fmt: skip
"""Keys in which a resumed run's recipe may differ from the one that began it."""

WAIT_SECONDS = 60.0
"""How much later than this node node 0 may make the run directory."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    def __str__(self) -> str:
        """The path as a user would type it: relative to the working directory where it lies below it."""
        try:
            return str(self.path.resolve().relative_to(Path.cwd()))
        except ValueError:
            return str(self.path)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """Layout and placement."""
        return self.path / "plan.yaml"

    @property
    def metrics(self) -> Path:
        """A JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def trace(self) -> Path:
        """A Chrome trace."""
        return self.path / "trace.json"

    @property
    def summary(self) -> Path:
        """How the run went."""
        return self.path / "summary.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of event files; curves over tokens and samples lie in a folder each below it."""
        return self.path / "tb"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    def routing(self, step: int, rank: int) -> Path:
        """What the tokens of a rank were routed to in a step, with metrics.routing."""
        return self.path / "routing" / f"step-{step:06}-rank-{rank:04}.npz"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    def wait_for(self, recipe: Recipe, seconds: float = WAIT_SECONDS) -> None:
        """Wait until node 0 has made this directory for `recipe`.

        Raises `MachineError` where that takes longer: node 0 has failed, writes elsewhere, or runs another recipe.
        """
        end = time.monotonic() + seconds
        while not (self.recipe.is_file() and not _differing(self, recipe, ("launcher",))):
            if time.monotonic() > end:
                raise MachineError(
                    f"node 0 has not made {self.path} for this recipe within {seconds:.0f} s; see what it says, set "
                    "train.out to a folder that all nodes share, and start all with the same recipe"
                )
            time.sleep(0.1)


def named(recipe: Recipe) -> RunDirectory:
    """The directory of a run that has a name."""
    return RunDirectory(_out(recipe) / recipe.train.name)


def create(recipe: Recipe, name: str) -> tuple[RunDirectory, bool]:
    """The directory of a run, with its folders and the resolved recipe in it, and whether it is new.

    It is `train.name`, or `name` and the first free number. An existing one is taken only to resume it, and only by
    a recipe that agrees with its own; with `checkpoint.resume=auto` and no `train.name`, the run of this recipe that
    was started last goes on, if there is one. Raises `ConfigError` otherwise, `MachineError` where nothing can be
    written.
    """
    run = _existing(recipe, name)
    new = run is None
    if run is not None:
        _check_may_resume(run, recipe)
    else:
        run = _new(recipe, name)
    with writing_to(run.path):
        for folder in (run.tensorboard, run.checkpoints, run.logs):
            folder.mkdir(parents=True, exist_ok=True)
        unfinished = run.recipe.with_suffix(".unfinished")
        unfinished.write_text(resolved(recipe))
        unfinished.replace(run.recipe)
    return run, new


def _existing(recipe: Recipe, name: str) -> RunDirectory | None:
    if recipe.train.name is not None:
        run = named(recipe)
        return run if run.path.exists() else None
    runs = _numbered(recipe, name).values() if recipe.checkpoint.resume == "auto" else ()
    begun = [run for run in runs if run.recipe.is_file()]
    return max(begun, key=lambda run: run.recipe.stat().st_mtime, default=None)


def _new(recipe: Recipe, name: str) -> RunDirectory:
    """Makes the folder, and takes the next number where another run was quicker."""
    while True:
        taken = _numbered(recipe, name)
        number = next(n for n in range(1, len(taken) + 2) if n not in taken)
        run = named(recipe) if recipe.train.name else RunDirectory(_out(recipe) / f"{name}-{number}")
        with writing_to(run.path):
            try:
                run.path.mkdir(parents=True)
            except FileExistsError:
                if not recipe.train.name:
                    continue
                _check_may_resume(run, recipe)
        return run


def _out(recipe: Recipe) -> Path:
    return Path(recipe.train.out).expanduser()


def _numbered(recipe: Recipe, name: str) -> dict[int, RunDirectory]:
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    entries = _out(recipe).iterdir() if _out(recipe).is_dir() else ()
    return {int(match[1]): RunDirectory(entry) for entry in entries if (match := pattern.fullmatch(entry.name))}


def _check_may_resume(run: RunDirectory, recipe: Recipe) -> None:
    if recipe.checkpoint.resume == "none":
        raise ConfigError(
            f"train.name {run.path.name!r}: {run.path} exists already; "
            "set checkpoint.resume=auto to go on with it, or choose another train.name"
        )
    if not run.recipe.is_file():
        raise ConfigError(f"{run.path} is not a run directory, as it holds no recipe.yaml; choose another train.name")
    if differing := _differing(run, recipe, MAY_CHANGE):
        key, (old, new) = next(iter(differing.items()))
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise ConfigError(
            f"{run.path} holds another recipe's run: {key} was {old}, but is {new}{more}; "
            "choose another train.name, or resume with the recipe that began it"
        )


def _differing(run: RunDirectory, recipe: Recipe, but: tuple[str, ...]) -> dict[str, tuple[object, object]]:
    """Key -> (value in the directory, value in `recipe`) where they differ, the keys and sections of `but` left out."""
    old, new = _flat(yaml.safe_load(run.recipe.read_text())), _flat(yaml.safe_load(resolved(recipe)))
    differing = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}
    return {key: pair for key, pair in differing.items() if not f"{key}.".startswith(tuple(f"{b}." for b in but))}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value; lists stay whole."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def load_recipe(run: RunDirectory) -> Recipe:
    """The recipe that a run directory holds."""
    return typed(OmegaConf.load(run.recipe))
