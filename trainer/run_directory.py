"""The run directory: its name, what lies in it, and whether a run may go on in it.

    recipe.yaml       the resolved recipe            metrics.jsonl   a row a logged step
    plan.yaml         layout and placement           tb/             TensorBoard's event files
    summary.json      how the run went               checkpoints/    step-00000010, …
    logs/             rank-0000.log, …
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from models.checks import ConfigError
from trainer.machine import writing_to
from trainer.recipe import Recipe, resolved

MAY_CHANGE = (
    "train.steps", "train.stop_at", "train.eval_every", "train.eval_batches", "train.log_every", "train.name",
    "train.out", "train.kernels", "layout", "topology", "launcher", "checkpoint", "metrics",
)  # fmt: skip
"""Keys in which a resumed run's recipe may differ from the one that began it."""


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
    def summary(self) -> Path:
        """How the run went."""
        return self.path / "summary.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of event files."""
        return self.path / "tb"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    def create(self, recipe: Recipe) -> None:
        """Make the folders and write the resolved recipe. Raises `MachineError` where that is not possible."""
        with writing_to(self.path):
            for folder in (self.tensorboard, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            self.recipe.write_text(resolved(recipe))


def choose(recipe: Recipe, name: str) -> RunDirectory:
    """The directory of a run: `train.name`, or `name` and a number.

    An existing one is taken only to resume it, and only by a recipe that agrees with its own. With
    `checkpoint.resume=auto` and no `train.name`, the newest run of this recipe goes on if there is one.
    Raises `ConfigError` otherwise.
    """
    out = Path(recipe.train.out).expanduser()
    numbers = _numbers(out, name)
    if recipe.train.name is not None:
        run = RunDirectory(out / recipe.train.name)
    elif recipe.checkpoint.resume == "auto" and numbers:
        run = RunDirectory(out / f"{name}-{max(numbers)}")
    else:
        return RunDirectory(out / f"{name}-{next(n for n in range(1, len(numbers) + 2) if n not in numbers)}")
    if run.path.exists():
        _check_may_resume(run, recipe)
    return run


def _numbers(out: Path, name: str) -> set[int]:
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    entries = out.iterdir() if out.is_dir() else ()
    return {int(match.group(1)) for entry in entries if (match := pattern.fullmatch(entry.name))}


def _check_may_resume(run: RunDirectory, recipe: Recipe) -> None:
    if recipe.checkpoint.resume == "none":
        raise ConfigError(
            f"train.name {run.path.name!r}: {run.path} exists already; "
            "set checkpoint.resume=auto to go on with it, or choose another train.name"
        )
    if not run.recipe.is_file():
        raise ConfigError(f"{run.path} is not a run directory, as it holds no recipe.yaml; choose another train.name")
    old = _flat(yaml.safe_load(run.recipe.read_text()))
    new = _flat(yaml.safe_load(resolved(recipe)))
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and not _may_change(key)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise ConfigError(
            f"{run.path} holds another recipe's run: {key} was {old.get(key)}, but is {new.get(key)}{more}; "
            "choose another train.name, or resume with the recipe that began it"
        )


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)


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
    from trainer.recipe import typed

    return typed(OmegaConf.load(run.recipe))
