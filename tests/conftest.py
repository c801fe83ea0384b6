"""What tests of whole runs share: a small text, a small recipe on it, and `busway` as a user types it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.weights import weights_of
from trainer import checkpoint
from trainer.compose import compose_recipe

TEXT = "the bus runs every ten minutes and a tram every five while rain falls on an old stone bridge"
SECONDS = 300
"""After which a run that hangs fails its test."""

RECIPE = """
defaults:
  - topology: laptop
  - optimizer: adamw
  - lr: constant
  - _self_
model: {{layers: 1, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, vocab: 300, max_length: 64}}
data: {{sources: [{{path: {text}}}], tokenizer: "bpe:300", seq_len: 32, holdout: 0.1}}
train: {{steps: 6, global_batch: 4, out: {out}}}
layout: {{micro_batch: 2}}
"""


LONG = ("layouts", "trainer")
"""Folders that begin first, so that both halves of `make test` end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    order = {tests / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.parent, len(LONG)))


class Run:
    """A run directory, read as a dashboard would."""

    def __init__(self, path: Path, stdout: str = "", stderr: str = "") -> None:
        self.path, self.stdout, self.stderr = path, stdout, stderr

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every object of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of steps."""
        return [line for line in self.lines if "loss" in line and "event" not in line]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "eval_loss" in line]

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    @property
    def checkpoints(self) -> list[str]:
        """Names in checkpoints/, in order."""
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())

    @property
    def newest(self) -> Path:
        return self.path / "checkpoints" / self.checkpoints[-1]

    def weights(self) -> dict[str, np.ndarray]:
        """The newest checkpoint's, put together from what the ranks wrote."""
        saved = checkpoint.load(self.newest)
        model = compose_recipe(str(self.path / "recipe.yaml"), []).recipe.model
        with saved.reader("weights") as read:
            return {weight.name: weight.stack(read) for weight in weights_of(model.parameters())}

    def curves(self, folder: str = "") -> dict[str, list[tuple[int, float]]]:
        """Tag -> (x, value) in order, as TensorBoard reads them."""
        reader = EventAccumulator(str(self.path / "tb" / folder))
        reader.Reload()
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


class Busway:
    """Runs `busway` in a folder of its own, with a cache of its own."""

    def __init__(self, folder: Path, cache: Path, recipe: Path) -> None:
        self.folder, self.recipe = folder, recipe
        self.out = folder / "runs"
        program = Path(sys.executable).with_name("busway")
        self.program = [str(program)]
        self.env = {**os.environ, "XDG_CACHE_HOME": str(cache)}

    def start(self, *words: object, above: tuple[str, ...] = ()) -> subprocess.Popen:
        """`busway` and its words; `above` stands before it."""
        command = [*above, *self.program, *map(str, words)]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __call__(self, *words: object, code: int = 0, above: tuple[str, ...] = ()) -> tuple[str, str]:
        """Run it to its end, which must be `code`; what it printed on stdout and stderr."""
        process = self.start(*words, above=above)
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return out, err

    def train(self, name: str, *overrides: object, code: int = 0, above: tuple[str, ...] = ()) -> Run:
        """`busway train` with the small recipe and `train.name=name`."""
        printed = self("train", *self.words(name, *overrides), code=code, above=above)
        return Run(self.out / name, *printed)

    def run(self, name: str) -> Run:
        """The run directory of that name."""
        return Run(self.out / name)

    def sweep(self, out: str, *overrides: object) -> list[Run]:
        """`busway train --multirun` with the small recipe: the runs in their order, in a folder of their own."""
        printed, _ = self("train", "--multirun", self.recipe, f"train.out={self.folder / out}", *overrides)
        numbered = {int(path.name.rpartition("-")[2]): path for path in (self.folder / out).iterdir()}
        jobs = printed.split("multirun: ")[1:]
        return [Run(numbered[number], job) for number, job in zip(sorted(numbered), jobs, strict=True)]

    def words(self, name: str, *overrides: object) -> list[str]:
        """What stands after `busway train`."""
        return [str(self.recipe), f"train.out={self.out}", f"train.name={name}", *map(str, overrides)]


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 texts."""
    folder = tmp_path_factory.mktemp("text")
    rng, words = random.Random(0), TEXT.split()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(words) for _ in range(200)) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_recipe(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose model is compiled in seconds: one layer, 26,976 parameters."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "small.yaml").write_text(RECIPE.format(text=small_text, out=folder / "runs"))
    return folder / "small.yaml"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$XDG_CACHE_HOME of the runs, so that the text is tokenised once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def busway(tmp_path_factory: pytest.TempPathFactory, cache: Path, small_recipe: Path) -> Busway:
    return Busway(tmp_path_factory.mktemp("busway"), cache, small_recipe)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """`with mounted("size=1m") as folder`: a small disk; skips where mounting is not permitted."""

    @contextmanager
    def mount(options: str) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine does not permit mounting a tmpfs: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)

    return mount
