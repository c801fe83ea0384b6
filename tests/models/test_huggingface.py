"""Hugging Face's config.json and tensor names, and the numbers that transformers computes from the same weights.

The checkpoints and references come from tests/fixtures/make_huggingface.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import load_file

from models import huggingface
from models.attention import rotary_tables
from models.checks import ConfigError
from models.config import ModelConfig
from models.decoder import decoder_segments
from models.kernels import choose, native
from models.segments import Shared
from models.shapes import RopeScaling
from models.weights import initial_reader
from trainer.convert import read_weights

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "huggingface"
DENSE = ("llama", "qwen2", "qwen3")
FAMILIES = (*DENSE, "mixtral", "qwen3_moe", "qwen3_moe_normalised", "deepseek_v3")
PUBLISHED = "deepseek_v3_published"
"""In FP8, with a layer of multi-token prediction."""

# Published config.json files, as transformers 4 wrote them, less the keys that no reader of shapes needs.
LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN2_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 131072,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_llama_config_gives_its_shapes_and_parameter_count():
    config = huggingface.to_config(LLAMA31_8B)
    assert config == ModelConfig(
        layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256, rope_theta=500000.0, norm_eps=1e-5,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), max_length=131072,
    )  # fmt: skip
    assert config.parameter_count == 8_030_261_248


def test_published_qwen2_config_has_biases_and_a_tied_head():
    config = huggingface.to_config(QWEN2_05B)
    assert config.qkv_bias and config.tied_embeddings and not config.qk_norm
    assert config.parameter_count == 494_032_768  # as the model card's safetensors metadata counts them


def test_published_qwen3_config_has_head_norms():
    config = huggingface.to_config(QWEN3_8B)
    assert config.qk_norm and not config.qkv_bias and config.head_dim == 128
    assert config.parameter_count == 8_190_735_360


@pytest.mark.parametrize("published", [LLAMA31_8B, QWEN2_05B, QWEN3_8B], ids=DENSE)
def test_keys_of_transformers_5_say_the_same_as_those_of_4(published):
    newer = {key: value for key, value in published.items() if not key.startswith("rope_")}
    scaling = published.get("rope_scaling") or {"rope_type": "default"}
    newer["rope_parameters"] = {**scaling, "rope_theta": published["rope_theta"]}
    assert huggingface.to_config(newer) == huggingface.to_config(published)


@pytest.mark.parametrize("published", [LLAMA31_8B, QWEN2_05B, QWEN3_8B], ids=DENSE)
def test_a_config_survives_being_written_and_read(published):
    config = huggingface.to_config(published)
    written = json.loads(json.dumps(huggingface.from_config(config)))
    assert written["architectures"] == published["architectures"]
    assert written["model_type"] == published["model_type"]
    back = huggingface.to_config(written)
    assert back.head_width == config.head_width
    back.head_dim = config.head_dim
    assert back == config


def test_keys_left_out_take_the_defaults_of_transformers():
    hf = {key: LLAMA31_8B[key] for key in ("architectures", "hidden_size", "intermediate_size", "vocab_size")}
    config = huggingface.to_config({**hf, "num_hidden_layers": 1, "num_attention_heads": 32})
    assert (config.kv_heads, config.head_width, config.rope_theta) == (32, 128, 10000.0)
    assert (config.norm_eps, config.max_length, config.tied_embeddings) == (1e-6, 2048, False)


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA31_8B, {"architectures": ["MistralForCausalLM"]}, "architectures"),
        (LLAMA31_8B, {"architectures": None}, "architectures"),
        (LLAMA31_8B, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA31_8B, {"attention_bias": True}, "attention_bias"),
        (LLAMA31_8B, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA31_8B, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA31_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA31_8B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        (LLAMA31_8B, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.rope_type"),
        (LLAMA31_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        (LLAMA31_8B, {"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "rope_parameters"),
        (LLAMA31_8B, {"hidden_size": "4096"}, "hidden_size"),
        (LLAMA31_8B, {"num_hidden_layers": None}, "num_hidden_layers"),
        (LLAMA31_8B, {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        (QWEN2_05B, {"use_sliding_window": True, "max_window_layers": 12}, "use_sliding_window"),
        (QWEN3_8B, {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types"),
        (QWEN3_8B, {"attention_bias": True}, "attention_bias"),
    ],
)  # fmt: skip
def test_what_the_decoder_would_compute_differently_is_refused_by_key(base, change, named):
    with pytest.raises(ConfigError, match=f"config.json: {named} ") as error:
        huggingface.to_config({**base, **change})
    assert "\n" not in str(error.value) and "; " in str(error.value)


def test_a_window_that_no_layer_uses_is_accepted():
    unused = {**QWEN2_05B, "use_sliding_window": True, "max_window_layers": 24}
    assert huggingface.to_config(unused) == huggingface.to_config(QWEN2_05B)


def test_a_missing_key_is_named():
    hf = {key: value for key, value in QWEN3_8B.items() if key != "vocab_size"}
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        huggingface.to_config(hf)


def test_a_model_that_no_architecture_describes_cannot_be_written():
    config = ModelConfig(layers=1, hidden=16, ffn=16, heads=2, kv_heads=1, vocab=16, qk_norm=True, qkv_bias=True)
    with pytest.raises(ConfigError, match="model has qk_norm=True, which no architecture"):
        huggingface.from_config(config)


@pytest.mark.parametrize("family", (*FAMILIES, PUBLISHED))
def test_names_and_shapes_are_those_of_transformers(family):
    config = read_weights(FIXTURES / family).config
    names = huggingface.names(config)
    assert list(names) == [spec.name for spec in config.parameters()]
    gradients = {
        name.removeprefix("gradients."): value.shape
        for name, value in load_file(FIXTURES / f"{family}.reference.safetensors").items()
        if name.startswith("gradients.")
    }
    shapes = {names[spec.name]: spec.shape for spec in config.parameters() if spec.update == "adamw"}
    assert shapes == gradients


def shifted(rows, ahead):
    return np.pad(rows[:, ahead:], ((0, 0), (0, ahead)), constant_values=-100)


class Step(nn.Cell):
    """The decoder's loss sum, logits and gradients of one batch."""

    def __init__(self, model: Shared) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, tokens, labels, first_key, cos, sin, weights):
        context = (tokens, labels, first_key, cos, sin)
        loss, saved = self.model.forward(tokens, weights, context)
        _, gradients = self.model.backward(loss, saved, weights, context)
        return loss, saved, gradients


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        *((family, "auto") for family in FAMILIES),
        *(
            pytest.param(*own, marks=pytest.mark.slow)
            for own in (("qwen2", "plain"), ("mixtral", "plain"), (PUBLISHED, "auto"))
        ),
    ],
)
def test_logits_loss_and_gradients_are_those_of_transformers(family, kernels):
    if kernels == "auto" and native.missing():
        pytest.skip(native.missing())
    ms.set_context(mode=ms.GRAPH_MODE)
    reference = load_file(FIXTURES / f"{family}.reference.safetensors")
    stored = read_weights(FIXTURES / family)
    stored.config.moe.aux_coef, further = 0.0, stored.config.mtp.depth
    model = Shared(decoder_segments(stored.config, choose(kernels, "fp32", "CPU")))
    length = reference["input_ids"].shape[1]
    tokens, targets = (reference[name].astype(np.int32).reshape(-1) for name in ("input_ids", "targets"))
    cos, sin = rotary_tables(stored.config, length)
    start = initial_reader(0, 0.0)
    weights = tuple(Tensor(w.stack(start if w.update == "tally" else stored.read)) for w in model.weights)
    rows = [reference["targets"]]
    for k in range(1, 1 + further):
        rows += [shifted(reference["input_ids"], k), shifted(reference["targets"], k)]
    labels = np.stack(rows).astype(np.int32).reshape(-1)
    inputs = (Tensor(x) for x in (tokens, labels, np.zeros_like(tokens), cos, sin))
    loss, saved, gradients = Step(model)(*inputs, ms.mutable(weights))

    count = (targets >= 0).sum()
    logits = next(tensor for tensor in saved if tensor.shape == (len(tokens), stored.config.vocab))
    for weight, gradient in zip(model.weights, gradients, strict=True):
        if "prediction.tally" in weight.name:
            total, tokens_of_it = gradient.asnumpy()
            assert total / tokens_of_it == pytest.approx(float(reference["mtp_loss"]), rel=1e-3)
    assert np.abs(logits.asnumpy().reshape(reference["logits"].shape) - reference["logits"]).max() < 1e-4
    assert loss.asnumpy()[0] / count == pytest.approx(float(reference["loss"]), rel=1e-3)
    names = huggingface.names(stored.config)
    ours = {
        names[part.spec.name]: rows / count
        for weight, gradient in zip(model.weights, gradients, strict=True)
        if weight.update == "adamw"
        for part, rows in weight.split(gradient.asnumpy())
    }
    assert sorted(ours) == sorted(name.removeprefix("gradients.") for name in reference if "gradients." in name)
    for name, gradient in ours.items():
        wanted = reference[f"gradients.{name}"]
        assert np.abs(gradient - wanted).max() < 1e-3 * np.abs(wanted).max(), name
