"""`busway convert`: weights in and out of Hugging Face's format, bit for bit but for FP8 (`trainer.weight_files`)."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal
from rich.progress import track

from models import huggingface
from models.checks import ConfigError
from models.config import ModelConfig
from models.families import FAMILIES
from trainer.checkpoint import MANIFEST, STATE
from trainer.errors import EXIT_DONE, InputError
from trainer.machine import writing_to
from trainer.quantised import Quantised
from trainer.weight_files import (
    CONFIG,
    INDEX,
    SINGLE,
    THEIR_CONFIG,
    Weights,
    config_of_json,
    read_busway,
    read_huggingface,
    read_weights,
    save_safetensors,
    yaml_of_config,
)
from trainer.weight_tensor import Tensor

HUGGINGFACE_CONFIG = "huggingface.json"
STAYING = (CONFIG, THEIR_CONFIG, HUGGINGFACE_CONFIG, STATE, MANIFEST)
"""Files that are no companions of the weights: configs are written anew, and OUT is no checkpoint."""
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
"""Endings of files that hold weights, in whatever format, or list those that do."""
LARGEST_COMPANION = 64 * 10**6
"""Bytes of a file that travels along, as the tokenizer's do."""


@dataclass(frozen=True)
class Direction:
    """What tells the two conversions apart."""

    help: str
    source: str
    """What DIR is."""
    read: Callable[[Path], Weights]
    configs: Callable[[Path, ModelConfig], dict[str, bytes]]
    """File name -> content of the configs to write, from the source directory and its model."""
    names: Callable[[ModelConfig], Mapping[str, str]]
    """Names to write -> our parameters'."""


def convert(direction: Direction, source: Path, out: Path, max_shard_bytes: float) -> list[str]:
    """Write the weight directory `source` as `out`, which must not exist yet or be empty; the names of left out files.

    Raises:
        InputError: `source` is no whole weight directory, or `out` holds something.
        MachineError: `out` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory; name another, or remove it")
    weights = direction.read(source)
    try:
        names = direction.names(weights.config)
        files = direction.configs(source, weights.config)
    except ConfigError as error:
        raise InputError(f"{source / CONFIG}: {error}") from error
    companions, left_out = _companions(source)
    with _committed(out) as folder:
        for name, content in (files | companions).items():
            (folder / name).write_bytes(content)
        _write_shards(folder, {name: weights.tensors[ours] for name, ours in names.items()}, max_shard_bytes)
    return left_out


def register(parser: argparse.ArgumentParser) -> None:
    """Add `from-hf` and `to-hf` to the parser of `busway convert`; each sets `run(args) -> exit code`."""
    commands = parser.add_subparsers(metavar="from-hf | to-hf", required=True)
    for name, direction in DIRECTIONS.items():
        text = direction.help
        command = commands.add_parser(name, help=text, description=f"Convert weights from {text}, bit for bit.")
        command.add_argument("source", metavar="DIR", type=Path, help=direction.source)
        command.add_argument("out", metavar="OUT", type=Path, help="the directory to write; must be new or empty")
        command.add_argument(
            "--max-shard-gb",
            metavar="FLOAT",
            type=_above_zero,
            default=5.0,
            help="weights above this many GB are written as several files (default: %(default)g)",
        )
        command.set_defaults(run=_run, direction=direction)


def _run(args: argparse.Namespace) -> int:
    left_out = convert(args.direction, args.source, args.out, args.max_shard_gb * 1e9)
    tensors = read_weights(args.out).tensors.values()
    files = len({tensor.file for tensor in tensors})
    size = decimal(sum(tensor.nbytes for tensor in tensors))
    print(f"{args.out}: {len(tensors)} tensors, {size}, {files} file{'s'[: files > 1]}")
    if left_out:
        print(f"left out, as large or links to elsewhere: {', '.join(left_out)}")
    return EXIT_DONE


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if (value := float(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"must be a number above 0, but is {text!r}")


def _our_configs(source: Path, config: ModelConfig) -> dict[str, bytes]:
    return {
        CONFIG: yaml_of_config(config).encode(),
        HUGGINGFACE_CONFIG: _unquantised((source / THEIR_CONFIG).read_bytes()),
    }


def _unquantised(config: bytes) -> bytes:
    """Without a word about FP8, as what is written has none."""
    content = json.loads(config)
    if content.pop("quantization_config", None) is None:
        return config
    return (json.dumps(content, indent=2) + "\n").encode()


def _their_configs(source: Path, config: ModelConfig) -> dict[str, bytes]:
    """The config.json that came with the weights where it still says the same, else a new one.

    A new one keeps what `config` cannot say (token ids, dropout), less the keys that would contradict it.
    """
    path = source / HUGGINGFACE_CONFIG
    kept = {}
    if path.is_file():
        if config_of_json(path) == config:
            return {THEIR_CONFIG: path.read_bytes()}
        kept = json.loads(path.read_bytes())
        for key in ("rope_parameters", "layer_types"):
            kept.pop(key, None)
    ours = huggingface.from_config(config)
    kept_ids = {key: kept[key] for key, value in ours.items() if value is None and key in kept}
    return {THEIR_CONFIG: (json.dumps({**kept, **ours, **kept_ids}, indent=2) + "\n").encode()}


def _their_names(config: ModelConfig) -> dict[str, str]:
    names = {theirs: ours for ours, theirs in huggingface.names(config).items()}
    return names | huggingface.copies(config)


DIRECTIONS = {
    "from-hf": Direction(
        help=f"Hugging Face's format to Busway's ({', '.join(family.model_type for family in FAMILIES)})",
        source="Hugging Face's weight directory",
        read=read_huggingface,
        configs=_our_configs,
        names=lambda config: {spec.name: spec.name for spec in config.parameters()},
    ),
    "to-hf": Direction(
        help="Busway's format to Hugging Face's",
        source="Busway's weight directory, or a checkpoint (runs/NAME/checkpoints/step-…)",
        read=read_busway,
        configs=_their_configs,
        names=_their_names,
    ),
}


def _companions(source: Path) -> tuple[dict[str, bytes], list[str]]:
    """Name -> content of the files that travel with the weights unread, and the names of those that could not.

    Links are followed within the directory and, from a snapshot of Hugging Face's cache, within its repository.
    """
    home = source.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    found, left_out = {}, []
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name in STAYING or file.name.endswith(WEIGHTS):
            continue
        try:
            if file.stat().st_size < LARGEST_COMPANION and file.resolve().is_relative_to(home):
                found[file.name] = file.read_bytes()
            else:
                left_out.append(file.name)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}; make it readable or remove it") from error
    return found, left_out


@contextlib.contextmanager
def _committed(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and otherwise goes."""
    folder = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        with writing_to(out, "set OUT to"):
            folder.mkdir(parents=True)
            yield folder
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_shards(folder: Path, tensors: Mapping[str, Tensor | Quantised], max_bytes: float) -> None:
    shards = _shards(tensors, max_bytes)
    weight_map = {}
    for number, shard in enumerate(track(shards, "writing", disable=not sys.stdout.isatty()), start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # transformers 4 refuses a file that does not say which framework's layout of a matrix it holds.
        save_safetensors(folder / file, {name: tensors[name] for name in shard}, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor | Quantised], max_bytes: float) -> list[list[str]]:
    """Names in files of at most `max_bytes`, in order; a tensor above it has a file alone."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards
