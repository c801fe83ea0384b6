"""Weight directories, Busway's and Hugging Face's: the reader behind `checkpoint.init_from`, and safetensors files.

Busway's own weight directory is Hugging Face's with other names: `model.safetensors`, or shards listed by
`model.safetensors.index.json`, with the names of `ModelConfig.parameters()`; `model.yaml`, its fields;
`huggingface.json`, the config.json that the weights came with, if they did; the tokenizer's files. A checkpoint's
folder is one too.

Tensors are memory-mapped and written from there, so that a conversion copies bytes, whatever their dtype, and holds
no model in memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from yaml import YAMLError

from models import huggingface
from models.checks import ConfigError
from models.config import ModelConfig, ParameterSpec
from models.weights import Part, Region, Run, assemble, parse_key, whole
from trainer.errors import InputError
from trainer.files import flush
from trainer.quantised import Quantised, with_factors
from trainer.weight_tensor import DTYPES, Tensor

CONFIG = "model.yaml"
THEIR_CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Weights:
    """The parameters of one model in a directory, ours or Hugging Face's, read when asked for, by our names."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor | Quantised]) -> None:
        self.config = config
        self.tensors = tensors

    def read(self, part: Part) -> np.ndarray:
        """A part of a parameter, as `Tensor.read` gives it."""
        return self.tensors[part.spec.name].read(part.slices)


def read_weights(directory: Path | str) -> Weights:
    """Open a weight directory, Busway's or Hugging Face's, and check it against its own config.

    Every parameter must be there with its shape, and nothing beyond; otherwise `InputError`.
    """
    directory = Path(directory)
    if (directory / CONFIG).is_file():
        return read_busway(directory)
    if (directory / THEIR_CONFIG).is_file():
        return read_huggingface(directory)
    raise InputError(
        f"{directory} is not a weight directory: it has neither {CONFIG} (Busway's) nor {THEIR_CONFIG} "
        "(Hugging Face's); name the directory that holds one, as a checkpoint's folder step-… does"
    )


def read_huggingface(directory: Path) -> Weights:
    """Open a directory as transformers' `save_pretrained` writes it."""
    path = directory / THEIR_CONFIG
    config, found = config_of_json(path), _tensors(directory)
    if not any(huggingface.is_later(config, name) for name in found):
        config.mtp.depth = 0  # transformers writes the key, and leaves the weights out
    found = with_factors(found, huggingface.quantised_block(_load_object(path)))
    names = huggingface.names(config)
    _check_copies(directory, config, names, found)
    found = {name: tensor for name, tensor in found.items() if not huggingface.is_harmless(config, name)}
    return _match(directory, path, config, names, found)


def _check_copies(
    directory: Path, config: ModelConfig, names: Mapping[str, str], found: Mapping[str, Tensor | Quantised]
) -> None:
    """What a further layer stores of embedding and head must be the model's own, as we keep them once."""
    for copy, ours in huggingface.copies(config).items():
        own, other = found.get(names[ours]), found.get(copy)
        if own and other and not (own.dtype == other.dtype and np.array_equal(own.data, other.data)):
            raise InputError(
                f"{directory}: tensor {copy} must be a copy of {names[ours]}, but has another dtype or other values, "
                "which would be lost; leave that layer out of the weights to convert the others"
            )


def read_busway(directory: Path) -> Weights:
    """Open a directory as `busway convert from-hf` writes it, or a checkpoint's."""
    path = directory / CONFIG
    config = _config_of_yaml(path)
    specs = config.parameters()
    found = _tensors(directory, {spec.name: spec.shape for spec in specs})
    return _match(directory, path, config, {spec.name: spec.name for spec in specs}, found)


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Quantised | np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file through to the disk, with the mode that the umask gives.

    Raises:
        OSError: as any writing does; the library's own error hides the system's, and its file's mode is 0600.
    """
    data = {
        name: x.data if isinstance(x, Tensor | Quantised) else np.ascontiguousarray(x) for name, x in tensors.items()
    }
    specs = {}
    for name, x in tensors.items():
        dtype = DTYPES[x.dtype] if isinstance(x, Tensor | Quantised) else x.dtype.name
        place, size = data[name].ctypes.data, data[name].nbytes
        specs[name] = TensorSpec(dtype=dtype, shape=x.shape, data_ptr=place, data_len=size)
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        serialize_file(specs, path, dict(metadata or {}))
    except SafetensorError as error:
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        if hidden is None:
            raise
        raise OSError(int(hidden[1]), os.strerror(int(hidden[1])), str(path)) from error
    path.chmod(mode)
    flush(path)


def yaml_of_config(config: ModelConfig) -> str:
    """The content of a model.yaml."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _config_of_yaml(path: Path) -> ModelConfig:
    if not path.is_file():
        raise InputError(
            f"{path.parent} has no {path.name}; name a directory that `busway convert from-hf` wrote, or a checkpoint's"
        )
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path)))
    except (OmegaConfBaseException, ConfigError, YAMLError, ValueError, TypeError, OSError) as error:
        line = " ".join(str(error).split("\n    full_key")[0].split())
        raise InputError(f"{path}: {line}; restore the file, or convert again") from error


def config_of_json(path: Path) -> ModelConfig:
    """The model that a Hugging Face config.json describes. Raises `InputError`."""
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; name a directory that save_pretrained wrote")
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
    directory: Path,
    config_path: Path,
    config: ModelConfig,
    names: Mapping[str, str],
    found: Mapping[str, Tensor | Quantised],
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
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{tensor.file}: tensor {name} must be of dtype {', '.join(DTYPES)}, but is {tensor.dtype}; "
                "save it unquantised first"
            )
    extra = sorted(found.keys() - set(names.values()))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise InputError(f"{found[extra[0]].file}: tensor {extra[0]}{more} belongs to no parameter; {remedy}")
    return Weights(config, tensors)


def _tensors(directory: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Every tensor of a directory, from its single file or, as in transformers only without one, from the index.

    A checkpoint whose ranks wrote slices has neither: its tensors, of which `shapes` says how large they are, are put
    together, in memory.
    """
    if (directory / SINGLE).is_file():
        return _tensors_of_file(directory / SINGLE)
    index = directory / INDEX
    if not index.is_file() and (slices := sorted(directory.glob(f"{Path(SINGLE).stem}-*-of-*.safetensors"))):
        return _put_together(slices, shapes or {})
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


def _put_together(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of which each of several files has slices, or runs of them. One without a shape keeps its own."""
    pieces: dict[str, list[tuple[Region | None, Run | None, Tensor]]] = {}
    for file in files:
        for key, tensor in _tensors_of_file(file).items():
            name, region, run = parse_key(key)
            pieces.setdefault(name, []).append((region, run, tensor))
    tensors = {}
    for name, held in pieces.items():
        first = held[0][2]
        kind = np.dtype("uint16" if first.dtype == "BF16" else DTYPES[first.dtype])
        shape = shapes.get(name, first.shape)
        part = whole(ParameterSpec(name, shape, "normal"))
        stored = [(region, run, tensor.data.view(kind).reshape(tensor.shape)) for region, run, tensor in held]
        try:
            value = np.ascontiguousarray(assemble(part, stored))
        except ValueError as error:
            raise InputError(
                f"{first.file.parent}: {error}; model.yaml and the weights must be of one model"
            ) from error
        tensors[name] = Tensor(first.file, first.dtype, shape, value.reshape(-1).view(np.uint8))
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
