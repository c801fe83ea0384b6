"""How Hugging Face's transformers writes the models that we have: keys of config.json, names of tensors.

One table a family. The layout of every matrix is the same on both sides (`[out, in]`, rotary pairs half a head
apart), so that a conversion renames tensors and never touches their bytes. No MindSpore here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from models.checks import ConfigError, check, check_choice
from models.config import ModelConfig, RopeScaling

_DENSE_MODULES = {
    "embedding": "model.embed_tokens",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.attention.q_proj": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.k_proj": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.v_proj": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
    "layers.*.attention.o_proj": "model.layers.*.self_attn.o_proj",
    "layers.*.feed_forward_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.feed_forward.gate_proj": "model.layers.*.mlp.gate_proj",
    "layers.*.feed_forward.up_proj": "model.layers.*.mlp.up_proj",
    "layers.*.feed_forward.down_proj": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


@dataclass(frozen=True)
class Family:
    """One architecture of transformers: how we recognise it, and how it names what we have."""

    architecture: str
    """The class named under `architectures`."""
    model_type: str
    """The key of the same name."""
    features: Mapping[str, bool]
    """Fields of `ModelConfig` that the architecture itself decides."""
    defaults: Mapping[str, object]
    """What transformers takes for keys that config.json may leave out, where families differ."""
    fixed: Mapping[str, object]
    """Keys of which we represent this one value, which is also transformers' default."""
    modules: Mapping[str, str] = field(default_factory=lambda: _DENSE_MODULES)
    """Our module to theirs; `*` stands for a number, in the same order on both sides."""


FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        features={"qk_norm": False, "qkv_bias": False},
        defaults={"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        features={"qk_norm": False, "qkv_bias": True},
        defaults={"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
        fixed={"hidden_act": "silu"},
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        features={"qk_norm": True, "qkv_bias": False},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        fixed={"hidden_act": "silu", "attention_bias": False},
    ),
)

_KEYS = {
    "layers": ("num_hidden_layers", int),
    "hidden": ("hidden_size", int),
    "ffn": ("intermediate_size", int),
    "heads": ("num_attention_heads", int),
    "kv_heads": ("num_key_value_heads", int),
    "vocab": ("vocab_size", int),
    "head_dim": ("head_dim", int),
    "norm_eps": ("rms_norm_eps", float),
    "tied_embeddings": ("tie_word_embeddings", bool),
    "max_length": ("max_position_embeddings", int),
    "init_std": ("initializer_range", float),
}
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_NULLABLE = ("num_key_value_heads", "head_dim")
_LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
_ROPE_THETA = 10000.0


def to_config(hf: Mapping[str, object]) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json, as transformers 4 or 5 writes it.

    Raises `ConfigError`, naming the key, for whatever our decoder would compute differently.
    """
    family = _family_of_json(hf)
    for key, value in {**family.fixed, "quantization_config": None}.items():
        check(
            hf.get(key) in (value, None),
            f"config.json: {key}",
            f"must be {_json(value)} for {family.architecture}, but is {_json(hf.get(key))}",
            "convert a checkpoint without it",
        )
    _check_full_attention(hf)
    values = {name: _read(family, hf, key, kind) for name, (key, kind) in _KEYS.items()}
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    theta, scaling = _read_rope(hf, values["max_length"])
    return ModelConfig(**values, **family.features, rope_theta=theta, rope_scaling=scaling)


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
    scaling = config.rope_scaling
    llama3 = {
        "rope_type": "llama3",
        **{key: getattr(scaling, key) for key in _LLAMA3_FACTORS},
        "original_max_position_embeddings": scaling.original_length,
    }
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(config, name) for name, (key, _) in _KEYS.items()},
        "head_dim": config.head_width,
        "rope_theta": config.rope_theta,
        "rope_scaling": llama3 if scaling.kind == "llama3" else None,
        **family.fixed,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def family_of(config: ModelConfig) -> Family:
    """The family that has the features of `config`."""
    for family in FAMILIES:
        if all(getattr(config, name) == value for name, value in family.features.items()):
            return family
    features = ", ".join(f"{name}={getattr(config, name)}" for name in FAMILIES[0].features)
    raise ConfigError(f"model has {features}, which no architecture of transformers has; keep it in Busway's format")


def names(config: ModelConfig) -> dict[str, str]:
    """Our name of every parameter of `config`, in order, and Hugging Face's name of the same tensor."""
    modules = family_of(config).modules
    return {spec.name: _translate(modules, spec.name) for spec in config.parameters()}


def is_harmless(config: ModelConfig, tensor: str) -> bool:
    """Whether a checkpoint's `tensor`, a Hugging Face name, repeats what the config or another tensor says."""
    return tensor.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and tensor == "lm_head.weight")


def _translate(modules: Mapping[str, str], name: str) -> str:
    module, _, leaf = name.rpartition(".")
    numbers = iter(re.findall(r"(?<=\.)\d+", module))
    theirs = modules[re.sub(r"(?<=\.)\d+", "*", module)]
    return re.sub(r"\*", lambda _: next(numbers), theirs) + "." + leaf


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
    defaults = _DEFAULTS | dict(family.defaults)
    check(key in hf or key in defaults, f"config.json: {key}", "is missing", "take it from the published config.json")
    value = hf.get(key, defaults.get(key))
    if value is None and key in _NULLABLE:
        return None
    return _typed(key, value, kind)


def _typed(key: str, value: object, kind: type) -> int | float | bool:
    accepted = (int, float) if kind is float else kind
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    noun = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
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


def _read_rope(hf: Mapping[str, object], max_length: int) -> tuple[float, RopeScaling]:
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
    check_choice(f"config.json: {where}.rope_type", str(kind), ("default", "llama3"))
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    check(
        partial in (None, 1),
        "config.json: partial_rotary_factor",
        f"must be 1, but is {_json(partial)}",
        "convert a checkpoint without it",
    )
    theta = _typed("rope_theta", rope.get("rope_theta") or hf.get("rope_theta") or _ROPE_THETA, float)
    if kind == "default":
        return theta, RopeScaling()
    factors = {key: _typed(f"{where}.{key}", rope.get(key), float) for key in _LLAMA3_FACTORS}
    length = rope.get("original_max_position_embeddings") or max_length
    length = _typed(f"{where}.original_max_position_embeddings", length, int)
    return theta, RopeScaling(kind="llama3", **factors, original_length=length)


def _json(value: object) -> str:
    """`value` as config.json would spell it, short enough for one line."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
