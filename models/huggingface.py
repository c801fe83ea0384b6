"""How Hugging Face's transformers writes the models that we have: keys of config.json, names of tensors.

The tables are those of `models.families`. The layout of every matrix is the same on both sides (`[out, in]`), so that a
conversion renames tensors and does not touch their bytes, but for FP8 (`trainer.quantised`). No MindSpore here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from models.checks import ConfigError, check, check_choice
from models.config import ModelConfig
from models.families import DEFAULTS, FAMILIES, NULLABLE, Family, feature
from models.shapes import ExpertsConfig, LatentConfig, PredictionConfig, RopeScaling

_SCALING_KEYS = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}


def to_config(hf: Mapping[str, object]) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json, as transformers 4 or 5 writes it.

    Raises `ConfigError`, naming the key, for whatever our decoder would compute differently.
    """
    family = _family_of_json(hf)
    quantised_block(hf)
    for key, value in family.fixed.items():
        check(
            hf.get(key) in (value, None),
            f"config.json: {key}",
            f"must be {_json(value)} for {family.architecture}, but is {_json(hf.get(key))}",
            "convert a checkpoint without it",
        )
    _check_full_attention(hf)
    read = {name: _read(family, hf, key, kind) for name, (key, kind) in family.keys.items()}
    decided = {
        name: value for name, value in family.features.items() if name not in ("latent", "experts", "moe.biased")
    }
    values, sections = {}, {"latent": {}, "moe": {}, "mtp": {}}
    for name, value in (decided | read).items():
        section, _, field = name.rpartition(".")
        (sections[section] if section else values)[field] = value
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    theta, scaling = _read_rope(family, hf, values["max_length"])
    kinds = {"latent": LatentConfig, "moe": ExpertsConfig, "mtp": PredictionConfig}
    made = {name: kind(**sections[name]) for name, kind in kinds.items()}
    return ModelConfig(**values, **made, rope_theta=theta, rope_scaling=scaling)


def from_config(config: ModelConfig) -> dict[str, object]:
    """A config.json for `config`, in the keys that transformers 4 and 5 both read.

    Raises `ConfigError` where no family has this combination of features. Token ids are null: the shapes of a
    model do not tell them.
    """
    family = family_of(config)
    check(
        config.hidden % config.heads == 0 or family.model_type != "llama",
        "model.heads",
        f"must divide model.hidden {config.hidden} in a {family.architecture}, but is {config.heads}",
        "transformers refuses such a Llama, so keep the weights in Busway's format",
    )
    scaling, rope = config.rope_scaling, None
    check(
        scaling.kind in family.scalings,
        "model.rope_scaling.kind",
        f"must be one of {', '.join(family.scalings)} in a {family.architecture}, but is {scaling.kind}",
        "keep the weights in Busway's format",
    )
    if scaling.kind != "none":
        factors = {key: getattr(scaling, key) for key in _SCALING_KEYS[scaling.kind]}
        rope = {"rope_type": scaling.kind, **factors, "original_max_position_embeddings": scaling.original_length}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: feature(config, name) for name, (key, _) in family.keys.items()},
        **({"head_dim": config.head_width} if "head_dim" in family.keys else {}),
        **({"num_key_value_heads": config.heads} if config.latent.kv_rank else {}),
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        **family.fixed,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def family_of(config: ModelConfig) -> Family:
    """The family that has the features of `config`."""
    for family in FAMILIES:
        if family.describes(config):
            return family
    nearest = min(FAMILIES, key=lambda family: sum(feature(config, n) != v for n, v in family.features.items()))
    other = [f"{name}={feature(config, name)}" for name, v in nearest.features.items() if feature(config, name) != v]
    raise ConfigError(
        f"model has {', '.join(other)}, which no architecture of transformers has beside the rest (the nearest is "
        f"{nearest.architecture}); keep it in Busway's format"
    )


def names(config: ModelConfig) -> dict[str, str]:
    """Our name of every parameter of `config`, in order, and Hugging Face's name of the same tensor."""
    modules = family_of(config).modules
    return {spec.name: _translate(modules, spec.name) for spec in config.parameters()}


def copies(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's names of tensors that repeat one of ours -> our name: embedding and head of each module of
    multi-token prediction."""
    head = "embedding.weight" if config.tied_embeddings else "head.weight"
    found = {}
    for layer in config.later_layers:
        found[f"model.layers.{layer}.embed_tokens.weight"] = "embedding.weight"
        found[f"model.layers.{layer}.shared_head.head.weight"] = head
    return found


def is_later(config: ModelConfig, tensor: str) -> bool:
    """Whether a checkpoint's `tensor` is of a layer of multi-token prediction."""
    return any(tensor.startswith(f"model.layers.{layer}.") for layer in config.later_layers)


def is_harmless(config: ModelConfig, tensor: str) -> bool:
    """Whether a checkpoint's `tensor`, a Hugging Face name, repeats what the config or another tensor says."""
    repeats = tensor in copies(config) or (config.tied_embeddings and tensor == "lm_head.weight")
    return repeats or tensor.endswith("rotary_emb.inv_freq")


def quantised_block(hf: Mapping[str, object]) -> tuple[int, int] | None:
    """Rows and columns of a block of FP8 weights that share a factor, by a parsed config.json; None without FP8.

    Raises `ConfigError` for other quantisations.
    """
    given = hf.get("quantization_config")
    if given is None:
        return None
    block = given.get("weight_block_size") if isinstance(given, Mapping) else None
    fits = isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)
    check(
        fits and (given.get("quant_method"), given.get("fmt", "e4m3")) == ("fp8", "e4m3"),
        "config.json: quantization_config",
        f"must be null or DeepSeek-V3's (fp8, e4m3, with a weight_block_size), but is {_json(given)}",
        "convert a checkpoint without it",
    )
    return block[0], block[1]


def _translate(modules: Mapping[str, str], name: str) -> str:
    numbers = iter(re.findall(r"(?<=\.)\d+", name))
    ours = re.sub(r"(?<=\.)\d+", "*", name)
    module, _, leaf = ours.rpartition(".")
    theirs = modules[ours] if ours in modules else f"{modules[module]}.{leaf}"
    return re.sub(r"\*", lambda _: next(numbers), theirs)


def _family_of_json(hf: Mapping[str, object]) -> Family:
    listed = hf.get("architectures")
    check(
        isinstance(listed, list) and len(listed) == 1,
        "config.json: architectures",
        f"must name one class, but is {_json(listed)}",
        "convert a language model's checkpoint, as save_pretrained writes it",
    )
    check_choice("config.json: architectures", str(listed[0]), [family.architecture for family in FAMILIES])
    return next(family for family in FAMILIES if family.architecture == listed[0])


def _read(family: Family, hf: Mapping[str, object], key: str, kind: type) -> int | float | bool | None:
    key = family.aliases[key] if key not in hf and family.aliases.get(key) in hf else key
    defaults = DEFAULTS | dict(family.defaults)
    check(key in hf or key in defaults, f"config.json: {key}", "is missing", "take it from the published config.json")
    value = hf.get(key, defaults.get(key))
    if value is None and key in NULLABLE:
        return None
    if value is None and kind is list:
        return []
    return _typed(key, value, kind)


def _typed(key: str, value: object, kind: type) -> int | float | bool:
    accepted = (int, float) if kind is float else kind
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    noun = {int: "a whole number", float: "a number", bool: "true or false", list: "a list"}[kind]
    check(fits, f"config.json: {key}", f"must be {noun}, but is {_json(value)}", "correct the file")
    return kind(value)


def _check_full_attention(hf: Mapping[str, object]) -> None:
    """Qwen's keys for sliding windows, by transformers' rule: layers from `max_window_layers` on, unless listed."""
    kinds = set(hf.get("layer_types") or ())
    windowed = hf.get("use_sliding_window") and hf.get("sliding_window") is not None
    if not kinds and windowed:
        first, layers = hf.get("max_window_layers", 28), hf.get("num_hidden_layers")
        if _typed("max_window_layers", first, int) < _typed("num_hidden_layers", layers, int):
            kinds = {"sliding_attention"}
    check(
        kinds <= {"full_attention"},
        "config.json: " + ("layer_types" if hf.get("layer_types") else "use_sliding_window"),
        f"must leave every layer to full attention, but asks for {', '.join(sorted(kinds))}",
        "convert a checkpoint without it",
    )


def _read_rope(family: Family, hf: Mapping[str, object], max_length: int) -> tuple[float, RopeScaling]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    A key left out takes the default of transformers' `standardize_rope_params`.
    """
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(where) or {}
    check(
        isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()),
        f"config.json: {where}",
        "must be one table for all layers",
        "convert a checkpoint whose layers share their rotary positions",
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_choice(f"config.json: {where}.rope_type", str(kind), ("default", *family.scalings[1:]))
    for key in ("partial_rotary_factor", "attention_factor"):
        value = rope.get(key, hf.get(key))
        check(value in (None, 1), f"config.json: {key}", f"must be 1, but is {_json(value)}", "convert one without it")
    default = family.defaults.get("rope_theta", DEFAULTS["rope_theta"])
    theta = _typed("rope_theta", rope.get("rope_theta") or hf.get("rope_theta") or default, float)
    if kind == "default":
        return theta, RopeScaling()
    given = (_YARN_DEFAULTS if kind == "yarn" else {}) | dict(rope)
    factors = {key: _typed(f"{where}.{key}", given.get(key), float) for key in _SCALING_KEYS[kind]}
    length = rope.get("original_max_position_embeddings") or max_length
    length = _typed(f"{where}.original_max_position_embeddings", length, int)
    return theta, RopeScaling(kind=kind, **factors, original_length=length)


def _json(value: object) -> str:
    """`value` as config.json would spell it, short enough for one line."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
