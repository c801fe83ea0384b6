"""Checkpoints: a folder `step-00000010` of safetensors under parameter names, valid once its manifest is.

    model.safetensors, model.yaml             parameters and the model: a weight directory of Busway's
    tokenizer.json                            the text's tokenizer, where the recipe names one
    first.safetensors, second.safetensors     the optimizer's moments
    state.json                                step, samples, the callbacks' state
    manifest.json                             size and SHA-256 of each file

The folder is written under another name, flushed to disk and renamed, so that a folder of that name is whole; the
manifest shows later damage. Names are those of `ModelConfig.parameters()`, whatever the layout was. Where ranks hold
slices, each writes its own into a file (`model-00001-of-00004.safetensors`) under the name and its region
(``head.weight[0:512,0:128]``), with ZeRO the moments as runs of that laid out flat (``…@0:4096``), and any layout reads
them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from models.weights import Part, Piece, Reader, assemble, parse_key
from trainer.errors import InputError
from trainer.files import RUNS, flush, sha256_of, write_text
from trainer.launch.rank import World, everywhere, from_rank_0
from trainer.machine import writing_to
from trainer.weight_files import SINGLE, save_safetensors

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
    def reader(self, kind: str) -> Iterator[Reader]:
        """Reads `kind` (weights, first, second), one part of a parameter at a time, whatever pieces it lies in.

        Raises `InputError` where a parameter is missing or has another shape.
        """
        with ExitStack() as stack:
            pieces: dict[str, list[Piece]] = {}
            for path in sorted(self.path.glob(f"{_stem(kind)}*.safetensors")):
                file = stack.enter_context(safe_open(path, framework="numpy"))
                for key in file.keys():  # noqa: SIM118 (the library's object is no mapping)
                    name, region, run = parse_key(key)
                    pieces.setdefault(name, []).append((region, run, file.get_slice(key)))

            def read(part: Part) -> np.ndarray:
                name, shape = part.spec.name, part.spec.shape
                if name not in pieces:
                    raise InputError(f"{self.path} has no {name}; resume with the model that wrote it")
                whole = [stored.get_shape() for region, run, stored in pieces[name] if region is None and run is None]
                if whole and whole[0] != list(shape):
                    raise InputError(
                        f"{self.path}: {name} is {whole[0]}, but the model's is {list(shape)}; "
                        "resume with the model that wrote it"
                    )
                try:
                    return assemble(part, pieces[name])
                except ValueError as error:
                    raise InputError(f"{self.path}: {error}; resume with the model that wrote it") from error

            yield read


Values = Callable[[], dict[str, np.ndarray]]
"""Gives what one rank writes of a kind, by `Part.key`; called when it is written, so that one kind is held at once."""


def save(
    folder: Path, world: World, kinds: Mapping[str, Values], companions: Mapping[str, str], state: dict[str, Any],
    keep: int,
) -> Path:  # fmt: skip
    """Write `folder/step-…` for `state["step"]` and drop all but it and the `keep` - 1 before it; its path.

    All ranks call, each with the `kinds` that it writes a file of. Rank 0 adds the `companions` (file
    name -> content) and the state. Raises `MachineError` on every rank, on a full disk or a read-only folder, and then
    leaves earlier checkpoints as they are.
    """
    final = folder / _name(state["step"])
    unfinished = final.with_name(final.name + UNFINISHED)

    def begin() -> None:
        with writing_to(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def write() -> dict[str, Any]:
        """Fingerprints of the files that this rank writes."""
        with writing_to(folder):
            names = [_file(kind, writers[kind].index(world.rank), len(writers[kind])) for kind in kinds]
            for name, values in zip(names, kinds.values(), strict=True):
                save_safetensors(unfinished / name, values())
            return {name: _fingerprint(unfinished / name) for name in names}

    def commit() -> None:
        with writing_to(folder):
            manifest = {name: print for prints in written for name, print in prints.items()}
            for name, text in {**companions, STATE: json.dumps(state, indent=1)}.items():
                write_text(unfinished / name, text, RUNS)
                manifest[name] = _fingerprint(unfinished / name)
            write_text(unfinished / MANIFEST, json.dumps(dict(sorted(manifest.items())), indent=1), RUNS)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            flush(folder)
        for old in _folders(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    written_by = list(enumerate(world.all_gather(tuple(kinds))))
    writers = {kind: [rank for rank, theirs in written_by if kind in theirs] for kind in kinds}
    try:
        from_rank_0(world, begin)
        written = everywhere(world, write)
        from_rank_0(world, commit)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove checkpoints past `step`: the run goes on from there, and they are no longer part of it."""
    for path in _folders(folder):
        if path.name > _name(step):
            shutil.rmtree(path)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _stem(kind: str) -> str:
    """How the files of a kind begin: the weights' as readers of weight directories look for them."""
    return Path(SINGLE).stem if kind == "weights" else kind


def _file(kind: str, writer: int, writers: int) -> str:
    return f"{_stem(kind)}{'' if writers == 1 else f'-{writer + 1:05}-of-{writers:05}'}.safetensors"


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
