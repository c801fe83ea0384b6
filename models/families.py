"""What transformers' architectures call the parts of models that we have: one table a family. No MindSpore here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.config import ModelConfig

_COMMON = {
    "embedding": "model.embed_tokens",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.attention.o_proj": "model.layers.*.self_attn.o_proj",
    "layers.*.feed_forward_norm": "model.layers.*.post_attention_layernorm",
    "norm": "model.norm",
    "head": "lm_head",
}
_HEADS = {
    f"layers.*.attention.{part}": f"model.layers.*.self_attn.{part}"
    for part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
}
_LATENT = {
    f"layers.*.attention.{ours}": f"model.layers.*.self_attn.{theirs}"
    for ours, theirs in {
        "q_proj": "q_proj",
        "q_a_proj": "q_a_proj",
        "q_a_norm": "q_a_layernorm",
        "q_b_proj": "q_b_proj",
        "kv_a_proj": "kv_a_proj_with_mqa",
        "kv_a_norm": "kv_a_layernorm",
        "kv_b_proj": "kv_b_proj",
    }.items()
}
_DENSE = {f"layers.*.feed_forward.{part}_proj": f"model.layers.*.mlp.{part}_proj" for part in ("gate", "up", "down")}
_EXPERTS = {
    "layers.*.feed_forward.router": "model.layers.*.mlp.gate",
    "layers.*.feed_forward.router.bias": "model.layers.*.mlp.gate.e_score_correction_bias",
    **{
        f"layers.*.feed_forward.{ours}.{part}_proj": f"model.layers.*.mlp.{theirs}.{part}_proj"
        for part in ("gate", "up", "down")
        for ours, theirs in {"experts.*": "experts.*", "shared": "shared_experts"}.items()
    },
}
_LATER = {
    f"layers.*.{ours}": f"model.layers.*.{theirs}"
    for ours, theirs in {
        "embedding_norm": "enorm",
        "stream_norm": "hnorm",
        "join_proj": "eh_proj",
        "norm": "shared_head.norm",
    }.items()
}
_MIXTRAL = {
    "layers.*.feed_forward.router": "model.layers.*.block_sparse_moe.gate",
    **{
        f"layers.*.feed_forward.experts.*.{part}_proj": f"model.layers.*.block_sparse_moe.experts.*.{theirs}"
        for part, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items()
    },
}

KEYS = {
    "layers": ("num_hidden_layers", int),
    "hidden": ("hidden_size", int),
    "ffn": ("intermediate_size", int),
    "heads": ("num_attention_heads", int),
    "kv_heads": ("num_key_value_heads", int),
    "vocab": ("vocab_size", int),
    "norm_eps": ("rms_norm_eps", float),
    "tied_embeddings": ("tie_word_embeddings", bool),
    "max_length": ("max_position_embeddings", int),
    "init_std": ("initializer_range", float),
}
"""Our field (with a dot inside one) -> their key and its type, in every family."""
_HEAD_DIM = {"head_dim": ("head_dim", int)}
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10000.0}
NULLABLE = ("num_key_value_heads", "head_dim", "q_lora_rank")

_PLAIN = {"latent": False, "experts": False, "sandwich_norm": False, "mtp.depth": 0}
_SOFTMAX = {
    "mtp.depth": 0, "latent": False, "experts": True, "sandwich_norm": False, "qkv_bias": False, "moe.score": "softmax",
    "moe.biased": False, "moe.shared": 0, "moe.scale": 1.0, "moe.groups": 1, "moe.top_groups": 1, "moe.first_dense": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture of transformers: how we recognise it, and how it names what we have."""

    architecture: str
    """The class named under `architectures`."""
    model_type: str
    """The key of the same name."""
    features: Mapping[str, object]
    """What the architecture itself decides of a `ModelConfig`: its fields, and whether it has `latent`, `experts`."""
    defaults: Mapping[str, object]
    """What transformers takes for keys that config.json may leave out, where families differ."""
    fixed: Mapping[str, object]
    """Keys of which we represent this one value, which is also transformers' default."""
    keys: Mapping[str, tuple[str, type]] = field(default_factory=lambda: KEYS | _HEAD_DIM)
    """As `KEYS`, of this family."""
    modules: Mapping[str, str] = field(default_factory=lambda: _COMMON | _HEADS | _DENSE)
    """Our module, or parameter, to theirs; `*` stands for a number, in the same order on both sides."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of keys."""
    scalings: tuple[str, ...] = ("none", "llama3")
    """Kinds of `rope_scaling`."""

    def describes(self, config: ModelConfig) -> bool:
        """Whether `config` has these features."""
        return all(feature(config, name) == value for name, value in self.features.items())


def feature(config: ModelConfig, name: str) -> object:
    """A field of `config`, or of a section of it; `latent` and `experts` are whether it has any."""
    known = {"latent": config.latent.kv_rank > 0, "experts": config.moe.experts > 0}
    section, _, key = name.rpartition(".")
    return known[name] if name in known else getattr(getattr(config, section) if section else config, key)


FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        features={"qk_norm": False, "qkv_bias": False, **_PLAIN},
        defaults={"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        features={"qk_norm": False, "qkv_bias": True, **_PLAIN},
        defaults={"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
        fixed={"hidden_act": "silu"},
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        features={"qk_norm": True, "qkv_bias": False, **_PLAIN},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        fixed={"hidden_act": "silu", "attention_bias": False},
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        features={"qk_norm": False, "moe.normalise": True, "moe.every": 1, "moe.dense_layers": [], **_SOFTMAX},
        defaults={
            "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1000000.0,
        },
        fixed={"hidden_act": "silu", "sliding_window": None, "router_jitter_noise": 0.0},
        keys=KEYS
        | _HEAD_DIM
        | {
            "moe.experts": ("num_local_experts", int),
            "moe.top_k": ("num_experts_per_tok", int),
            "moe.ffn": ("intermediate_size", int),
        },
        modules=_COMMON | _HEADS | _MIXTRAL,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        features={"qk_norm": True, **_SOFTMAX},
        defaults={
            "num_key_value_heads": 4, "head_dim": None, "max_position_embeddings": 32768, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        fixed={"hidden_act": "silu", "attention_bias": False},
        keys=KEYS
        | _HEAD_DIM
        | {
            "moe.experts": ("num_experts", int),
            "moe.top_k": ("num_experts_per_tok", int),
            "moe.ffn": ("moe_intermediate_size", int),
            "moe.normalise": ("norm_topk_prob", bool),
            "moe.every": ("decoder_sparse_step", int),
            "moe.dense_layers": ("mlp_only_layers", list),
        },
        modules=_COMMON | _HEADS | _DENSE | _EXPERTS,
        aliases={"num_experts": "num_local_experts"},
    ),
    Family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        features={
            "latent": True, "experts": True, "sandwich_norm": False, "qk_norm": False, "qkv_bias": False,
            "moe.score": "sigmoid", "moe.every": 1, "moe.dense_layers": [],
        },
        defaults={
            "num_key_value_heads": 128, "max_position_embeddings": 4096, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
            "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "num_nextn_predict_layers": 0,
        },
        fixed={
            "hidden_act": "silu", "attention_bias": False, "rope_interleave": True, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc", "moe_layer_freq": 1,
        },
        keys=KEYS
        | {
            "moe.experts": ("n_routed_experts", int),
            "moe.top_k": ("num_experts_per_tok", int),
            "moe.ffn": ("moe_intermediate_size", int),
            "moe.shared": ("n_shared_experts", int),
            "moe.first_dense": ("first_k_dense_replace", int),
            "moe.groups": ("n_group", int),
            "moe.top_groups": ("topk_group", int),
            "moe.normalise": ("norm_topk_prob", bool),
            "moe.scale": ("routed_scaling_factor", float),
            "latent.kv_rank": ("kv_lora_rank", int),
            "latent.q_rank": ("q_lora_rank", int),
            "latent.nope": ("qk_nope_head_dim", int),
            "latent.rope": ("qk_rope_head_dim", int),
            "latent.value": ("v_head_dim", int),
            "mtp.depth": ("num_nextn_predict_layers", int),
        },
        modules=_COMMON | _LATENT | _DENSE | _EXPERTS | _LATER,
        scalings=("none", "yarn"),
    ),
)  # fmt: skip
