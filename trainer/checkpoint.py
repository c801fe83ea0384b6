"""Checkpoints: a folder `step-00000010` of safetensors under parameter names, valid once its manifest is.

    model.safetensors, model.yaml             parameters in global shapes, and the model: a weight directory of Busway's
    tokenizer.json                            the text's tokenizer, where the recipe names one
    first.safetensors, second.safetensors     the optimizer's moments
    state.json                                step, samples, the callbacks' state
    manifest.json                             size and SHA-256 of each file

The folder is written under another name, flushed to disk and renamed, so that a folder of that name is whole; the
manifest shows later damage. Names and shapes are those of `ModelConfig.parameters()`, whatever the layout was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from models.config import ModelConfig
from models.weights import Part, Reader
from trainer.errors import InputError
from trainer.files import RUNS, flush, sha256_of, write_text
from trainer.machine import writing_to
from trainer.weight_files import CONFIG, SINGLE, save_safetensors, yaml_of_config

STATE = "state.json"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that was found whole."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """The last step whose update it holds."""
        return self.state["step"]

    @contextmanager
    def reader(self, kind: str) -> Iterator[Reader]:
        """Reads `kind` (weights, first, second), one part of a parameter at a time.

        Raises `InputError` where a parameter is missing or has another shape.
        """
        with safe_open(self.path / _file(kind), framework="numpy") as file:
            names = set(file.keys())

            def read(part: Part) -> np.ndarray:
                name, shape = part.spec.name, list(part.spec.shape)
                if name not in names:
                    raise InputError(f"{self.path} has no {name}; resume with the model that wrote it")
                stored = file.get_slice(name)
                if stored.get_shape() != shape:
                    raise InputError(
                        f"{self.path}: {name} is {stored.get_shape()}, but the model's is {shape}; "
                        "resume with the model that wrote it"
                    )
                return stored[part.slices]

            yield read


def save(
    folder: Path, model: ModelConfig, kinds: Mapping[str, Callable[[], dict[str, np.ndarray]]], state: dict[str, Any],
    keep: int, tokenizer: str | None = None,
) -> Path:  # fmt: skip
    """Write `folder/step-…` for `state["step"]` and drop all but it and the `keep` - 1 before it; its path.

    `kinds` is kind -> a function that gives parameter name -> value, so that one kind is held at a time; `tokenizer`
    is the content of a tokenizer.json.
    Raises `MachineError` on a full disk or a read-only folder, and then leaves earlier checkpoints as they are.
    """
    final = folder / _name(state["step"])
    unfinished = final.with_name(final.name + UNFINISHED)
    try:
        with writing_to(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for kind, values in kinds.items():
                save_safetensors(unfinished / _file(kind), values())
            write_text(unfinished / CONFIG, yaml_of_config(model), RUNS)
            if tokenizer is not None:
                write_text(unfinished / TOKENIZER, tokenizer, RUNS)
            write_text(unfinished / STATE, json.dumps(state, indent=1), RUNS)
            manifest = {file.name: _fingerprint(file) for file in sorted(unfinished.iterdir())}
            write_text(unfinished / MANIFEST, json.dumps(manifest, indent=1), RUNS)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            flush(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove checkpoints past `step`: the run goes on from there, and they are no longer part of it."""
    for path in _folders(folder):
        if path.name > _name(step):
            shutil.rmtree(path)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _file(kind: str) -> str:
    """Where a kind lies: the weights under the name that readers of weight directories look for."""
    return SINGLE if kind == "weights" else f"{kind}.safetensors"


def check(path: Path) -> None:
    """Raise `InputError` unless `path` is a checkpoint's folder, whole or not."""
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is no checkpoint, as it has no {MANIFEST}; name a folder step-… in checkpoints/")


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`. Raises `InputError` unless it is whole."""
    check(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        damaged = [name for name, expected in manifest.items() if _fingerprint(path / name) != expected]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; resume from another checkpoint") from error
    if damaged:
        raise InputError(f"{path / damaged[0]} does not match its checksum; resume from another checkpoint")
    return Checkpoint(path, json.loads((path / STATE).read_text()))


def last_saved(folder: Path) -> Path | None:
    """The folder of the newest checkpoint, None if there is none; it is not read."""
    return max(_folders(folder), default=None)


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, None if there is none yet; damaged ones are reported and passed over.

    Raises `InputError` where all are damaged.
    """
    folders = _folders(folder)
    for path in reversed(folders):
        try:
            return load(path)
        except InputError as error:
            report(f"passing over a damaged checkpoint: {error}")
    if folders:
        raise InputError(f"{folder} holds no whole checkpoint; name one with checkpoint.resume=PATH, or start anew")
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != UNFINISHED)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
