"""Checkpoints: a folder `step-00000010` of safetensors under parameter names, valid once its manifest is.

    weights.safetensors, first.safetensors, second.safetensors   parameters and their moments, global shapes
    state.json                                                   step, samples, the callbacks' state
    manifest.json                                                size and SHA-256 of each file

The folder is written under another name, flushed to disk and renamed, so that a folder of that name is whole; the
manifest shows later damage. Names and shapes are those of `ModelConfig.parameters()`, whatever the layout was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import ParameterSpec
from trainer.errors import InputError
from trainer.machine import writing_to

STATE = "state.json"
MANIFEST = "manifest.json"
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
    def reader(self, kind: str) -> Iterator[Callable[[ParameterSpec], np.ndarray]]:
        """A function for `Weight.stack` that reads `kind` (weights, first, second), one parameter at a time.

        Raises `InputError` where a parameter is missing or has another shape.
        """
        with safe_open(self.path / f"{kind}.safetensors", framework="numpy") as file:
            names = set(file.keys())

            def read(spec: ParameterSpec) -> np.ndarray:
                if spec.name not in names:
                    raise InputError(f"{self.path} has no {spec.name}; resume with the model that wrote it")
                value = file.get_tensor(spec.name)
                if value.shape != spec.shape:
                    raise InputError(
                        f"{self.path}: {spec.name} is {list(value.shape)}, but the model's is {list(spec.shape)}; "
                        "resume with the model that wrote it"
                    )
                return value

            yield read


def save(folder: Path, tensors: dict[str, dict[str, np.ndarray]], state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-…` for `state["step"]` and drop all but it and the `keep` - 1 before it; its path.

    Those past it go too: the run was resumed from an earlier one, and this one supersedes them.
    `tensors` is kind -> parameter name -> value. Raises `MachineError` on a full disk or a read-only folder, and
    then leaves earlier checkpoints as they are.
    """
    final = folder / f"step-{state['step']:08d}"
    unfinished = final.with_name(final.name + UNFINISHED)
    try:
        with writing_to(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for kind, values in tensors.items():
                _write(unfinished / f"{kind}.safetensors", lambda path, v=values: _save_tensors(v, path))
            _write(unfinished / STATE, lambda path: path.write_text(json.dumps(state, indent=1)))
            manifest = {file.name: _fingerprint(file) for file in sorted(unfinished.iterdir())}
            _write(unfinished / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1)))
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            _flush(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    folders = _folders(folder)
    kept = folders[: folders.index(final) + 1][-keep:]
    for old in folders:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return final


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


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`; damaged ones are reported and passed over."""
    for path in reversed(_folders(folder)):
        try:
            return load(path)
        except InputError as error:
            report(f"passing over a damaged checkpoint: {error}")
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != UNFINISHED)


def _save_tensors(values: dict[str, np.ndarray], path: Path) -> None:
    """`save_file`, with the operating system's error where its own hides one, as on a full disk."""
    try:
        save_file(values, path)
    except SafetensorError as error:
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        if hidden is None:
            raise
        raise OSError(int(hidden[1]), os.strerror(int(hidden[1]))) from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
