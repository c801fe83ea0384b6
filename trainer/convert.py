"""Weights in and out of Hugging Face's format: `busway convert`, and the reader behind `checkpoint.init_from`.

Busway's own weight directory is Hugging Face's with other names: `model.safetensors`, or shards listed by
`model.safetensors.index.json`, with the names of `ModelConfig.parameters()`; `model.yaml`, its fields;
`huggingface.json`, the config.json that the weights came with, if they did; the tokenizer's files.

Tensors are memory-mapped in the source and written from there, so that a conversion copies bytes, whatever their
dtype, and holds no model in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.filesize import decimal
from rich.progress import track
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from yaml import YAMLError

from models import huggingface
from models.checks import ConfigError
from models.config import ModelConfig
from trainer.errors import EXIT_DONE, InputError, MachineError

CONFIG = "model.yaml"
HUGGINGFACE_CONFIG = "huggingface.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that travel with the weights unread."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, not yet read."""

    file: Path
    dtype: str
    """As the format spells it: F64, F32, F16 or BF16."""
    shape: tuple[int, ...]
    data: np.ndarray
    """Its bytes, a view of the memory-mapped file."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first dim, copied to float32."""
        row = self.data.size // self.shape[0]
        raw = self.data[start * row : stop * row]
        if self.dtype == "BF16":
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view(np.dtype(_DTYPES[self.dtype]).newbyteorder("<")).astype(np.float32)
        return values.reshape(stop - start, *self.shape[1:])


class Weights:
    """The parameters of one model in a directory, ours or Hugging Face's, read when asked for, by our names."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors

    def names(self) -> list[str]:
        """The names of all parameters, in the order of `config.parameters()`."""
        return list(self.tensors)

    def read(self, name: str) -> np.ndarray:
        """The whole parameter, as a new float32 array of its global shape."""
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first dim, as a new float32 array; nothing else is read from the disk."""
        return self.tensors[name].read(start, stop)


def read_weights(directory: Path | str) -> Weights:
    """Open a weight directory, Busway's or Hugging Face's, and check it against its own config.

    Every parameter must be there with its shape, and nothing beyond; otherwise `InputError`.
    """
    directory = Path(directory)
    if (directory / CONFIG).is_file():
        return read_busway(directory)
    if (directory / "config.json").is_file():
        return read_huggingface(directory)
    raise InputError(
        f"{directory} is not a weight directory: it has neither {CONFIG} (Busway's) nor config.json (Hugging Face's); "
        "name the directory that holds one"
    )


def read_huggingface(directory: Path) -> Weights:
    """Open a directory as transformers' `save_pretrained` writes it."""
    path = directory / "config.json"
    config = _config_of_json(path)
    names = huggingface.names(config)
    found = _tensors(directory)
    found = {name: tensor for name, tensor in found.items() if not huggingface.is_harmless(config, name)}
    return _match(directory, path, config, names, found)


def read_busway(directory: Path) -> Weights:
    """Open a directory as `busway convert from-hf` writes it."""
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} has no {CONFIG}; name a directory that `busway convert from-hf` wrote")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path)))
    except (OmegaConfBaseException, ConfigError, YAMLError, ValueError, TypeError, OSError) as error:
        line = " ".join(str(error).split("\n    full_key")[0].split())
        raise InputError(f"{path}: {line}; restore the file, or convert again") from error
    return _match(directory, path, config, {spec.name: spec.name for spec in config.parameters()}, _tensors(directory))


def from_huggingface(source: Path, out: Path, max_shard_bytes: int) -> None:
    """Write the Hugging Face checkpoint `source` as a Busway weight directory `out`, which must not exist yet."""
    _check_free(out)
    weights = read_huggingface(source)
    with _committed(out) as folder:
        OmegaConf.save(OmegaConf.structured(weights.config), folder / CONFIG)
        shutil.copyfile(source / "config.json", folder / HUGGINGFACE_CONFIG)
        _finish(source, folder, weights.tensors, max_shard_bytes)


def to_huggingface(source: Path, out: Path, max_shard_bytes: int) -> None:
    """Write the Busway weight directory `source` as a Hugging Face checkpoint `out`, which must not exist yet."""
    _check_free(out)
    weights = read_busway(source)
    try:
        names = huggingface.names(weights.config)
        config_json = _config_json(source, weights.config)
    except ConfigError as error:
        raise InputError(f"{source / CONFIG}: {error}") from error
    with _committed(out) as folder:
        (folder / "config.json").write_text(config_json, encoding="utf-8")
        _finish(source, folder, {names[name]: t for name, t in weights.tensors.items()}, max_shard_bytes)


def register(parser: argparse.ArgumentParser) -> None:
    """Add `from-hf` and `to-hf` to the parser of `busway convert`; each sets `run(args) -> exit code`."""
    commands = parser.add_subparsers(metavar="from-hf | to-hf", required=True)
    texts = {
        "from-hf": (from_huggingface, "Hugging Face's format to Busway's (Llama, Qwen2, Qwen3)", "Hugging Face's"),
        "to-hf": (to_huggingface, "Busway's format to Hugging Face's", "Busway's"),
    }
    for name, (convert, text, kind) in texts.items():
        command = commands.add_parser(name, help=text, description=f"Convert weights from {text}, bit for bit.")
        command.add_argument("source", metavar="DIR", type=Path, help=f"{kind} weight directory")
        command.add_argument("out", metavar="OUT", type=Path, help="the directory to write; must be new or empty")
        command.add_argument(
            "--max-shard-size",
            metavar="SIZE",
            type=_parse_size,
            default="5GB",
            help="weights above it are written as several files (KB, MB, GB or TB; default 5GB)",
        )
        command.set_defaults(run=_command(convert))


def _command(convert: Callable[[Path, Path, int], None]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        convert(args.source, args.out, args.max_shard_size)
        weights = read_weights(args.out)
        size = sum(tensor.data.size for tensor in weights.tensors.values())
        files = len({tensor.file for tensor in weights.tensors.values()})
        print(f"{args.out}: {len(weights.tensors)} tensors, {decimal(size)}, {files} file{'s'[: files > 1]}")
        return EXIT_DONE

    return run


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write a number and KB, MB, GB or TB, as in 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _config_json(source: Path, config: ModelConfig) -> str:
    """The text of config.json: the one that came with the weights where it still says the same, else a new one.

    A new one keeps what `config` cannot say (token ids, dropout), less the keys that would contradict it.
    """
    path = source / HUGGINGFACE_CONFIG
    kept = {}
    if path.is_file():
        if _config_of_json(path) == config:
            return path.read_text(encoding="utf-8")
        kept = json.loads(path.read_text(encoding="utf-8"))
        for key in ("rope_parameters", "layer_types"):
            kept.pop(key, None)
    ours = huggingface.from_config(config)
    kept_ids = {key: kept[key] for key, value in ours.items() if value is None and key in kept}
    return json.dumps({**kept, **ours, **kept_ids}, indent=2) + "\n"


def _config_of_json(path: Path) -> ModelConfig:
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; name a checkpoint's directory")
    try:
        return huggingface.to_config(_load_object(path))
    except ConfigError as error:
        raise InputError(f"{path.parent}: {error}") from error


def _load_object(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object; download it again")
    return value


def _match(
    directory: Path, config_path: Path, config: ModelConfig, names: Mapping[str, str], found: Mapping[str, Tensor]
) -> Weights:
    """Give each parameter its tensor; `names` maps ours to those of the files."""
    remedy = f"{config_path.name} and the weights must be of one model"
    tensors = {}
    for spec in config.parameters():
        name = names[spec.name]
        if name not in found:
            raise InputError(f"{directory}: tensor {name} is missing; {remedy}")
        tensor = tensors[spec.name] = found[name]
        if tensor.shape != spec.shape:
            shape, wanted = list(tensor.shape), list(spec.shape)
            raise InputError(f"{tensor.file}: tensor {name} must have shape {wanted}, but has {shape}; {remedy}")
        if tensor.dtype not in _DTYPES:
            raise InputError(
                f"{tensor.file}: tensor {name} must be of dtype {', '.join(_DTYPES)}, but is {tensor.dtype}; "
                "save it unquantised first"
            )
    extra = sorted(found.keys() - set(names.values()))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise InputError(f"{found[extra[0]].file}: tensor {extra[0]}{more} belongs to no parameter; {remedy}")
    return Weights(config, tensors)


def _tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, from its single file or, as in transformers only without one, from the index."""
    if (directory / SINGLE).is_file():
        return _tensors_of_file(directory / SINGLE)
    index = directory / INDEX
    if not index.is_file():
        raise InputError(
            f"{directory} has neither {SINGLE} nor {INDEX}; if its weights are in another format, save them as "
            "safetensors with transformers first"
        )
    weight_map = _load_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} must have a weight_map from tensors to files; download it again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        tensors |= _tensors_of_file(directory / file)
    for name, file in weight_map.items():
        if name not in tensors:
            raise InputError(f"{directory / file}: tensor {name} is missing, but {INDEX} lists it; download both again")
    return tensors


def _tensors_of_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. The library checks the header; their places in the file are in it."""
    if not file.is_file():
        raise InputError(f"{file} is missing, but {INDEX} lists it; download it again")
    try:
        with safe_open(file, framework="numpy"):
            mapped = np.memmap(file, np.uint8, mode="r").view(np.ndarray)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is no whole safetensors file ({error}); download it again") from error
    start = 8 + int(mapped[:8].view("<u8")[0])
    header = json.loads(mapped[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), mapped[start + first : start + last])
    return tensors


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory; name another, or remove it")


@contextlib.contextmanager
def _committed(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and otherwise goes."""
    folder = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"cannot write {out} ({error}); give it room and write permission") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(source: Path, folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    shards = _shards(tensors, max_shard_bytes)
    weight_map = {}
    umask = os.umask(0)
    os.umask(umask)
    for number, shard in enumerate(track(shards, "writing", disable=not sys.stdout.isatty()), start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        specs = {name: _spec(tensors[name]) for name in shard}
        # transformers 4 refuses a file that does not say which framework's layout of a matrix it holds.
        serialize_file(specs, folder / file, {"format": "pt"})
        (folder / file).chmod(0o666 & ~umask)  # the library's own is 0600, whatever the umask
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.data.size for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _spec(tensor: Tensor) -> TensorSpec:
    """What the library's writer takes; it reads the bytes straight from the mapped file."""
    data = tensor.data
    return TensorSpec(dtype=_DTYPES[tensor.dtype], shape=tensor.shape, data_ptr=data.ctypes.data, data_len=data.size)


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in files of at most `max_bytes`, in order; a tensor above it has a file alone."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.data.size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.data.size
    return shards
