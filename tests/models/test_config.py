"""Shapes, and the parameters and FLOPs that follow from them."""

import pytest

from models.checks import ConfigError
from models.config import ModelConfig
from trainer.compose import compose_recipe

SMALL = {"layers": 2, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": 128}


def test_flops_follow_the_convention():
    config = ModelConfig(**SMALL)
    matmul = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96) + 64 * 128
    attention = 2 * 3 * (2 * 2 * 4 * 16 * 100 / 2)  # layers x (forward + 2 backward) x (q k^T and p v) on half the keys
    assert config.flops_per_token(100) == 6 * matmul + attention


def test_llama3_8b_flops_are_near_six_times_its_parameters():
    model = compose_recipe("llama3_8b", []).recipe.model
    assert model.flops_per_token(8192) == pytest.approx(6 * 8.03e9, rel=0.08)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "model.layers must be at least 1, but is 0"),
        ({"kv_heads": 3}, "model.kv_heads must divide model.heads 4, but is 3; the nearest that does is 2"),
        ({"heads": 5, "kv_heads": 1}, "model.heads must divide model.hidden 64"),
        ({"head_dim": 7}, "model.head_dim must be even"),
        ({"norm_eps": 0.0}, "model.norm_eps must be above 0"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig(**(SMALL | change))
    assert "\n" not in str(error.value)
