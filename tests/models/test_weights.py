"""The start of a model does not depend on who draws it."""

import numpy as np
import pytest

from models.config import ModelConfig, ParameterSpec
from models.weights import BLOCK_ROWS, draw, initial_reader, weights_of

MATRIX = ParameterSpec("a", (1024, 8), "normal")


@pytest.mark.parametrize("rows", [(0, 10), (5, 300), (250, 262), (255, 256), (256, 512), (700, 700), (0, 777)])
def test_a_slice_is_drawn_as_the_whole_would_be(rows):
    spec = ParameterSpec("layers.3.attention.q_proj.weight", (777, 5), "normal")
    assert spec.shape[0] > 3 * BLOCK_ROWS
    whole = draw(spec, seed=7, std=0.02)
    np.testing.assert_array_equal(draw(spec, 7, 0.02, slice(*rows)), whole[slice(*rows)])


def test_draws_are_normal_and_differ_by_name_seed_and_block():
    spec = ParameterSpec("a.weight", (1024, 64), "normal")
    value = draw(spec, 0, 0.02)
    assert abs(value.mean()) < 3 * 0.02 / np.sqrt(value.size) and value.std() == pytest.approx(0.02, rel=0.01)
    assert not np.array_equal(value[:BLOCK_ROWS], value[BLOCK_ROWS : 2 * BLOCK_ROWS])
    assert not np.array_equal(value, draw(spec, 1, 0.02))
    assert not np.array_equal(value, draw(ParameterSpec("b.weight", (1024, 64), "normal"), 0, 0.02))


def test_norms_start_at_one_and_biases_at_zero():
    config = ModelConfig(layers=1, hidden=8, ffn=8, heads=2, kv_heads=1, vocab=16, qkv_bias=True, qk_norm=True)
    for spec in config.parameters():
        if not spec.decays:
            assert set(draw(spec, 0, 0.02)) == {0.0 if spec.name.endswith("bias") else 1.0}


def test_a_weight_stacks_and_splits_its_parameters():
    specs = [ParameterSpec(f"{n}.weight", (rows, 4), "normal") for n, rows in (("q", 6), ("k", 2), ("v", 2))]
    (weight,) = weights_of(specs, ("qkv.weight", ("q.weight", "k.weight", "v.weight")))
    value = weight.stack(initial_reader(3, 0.02))
    assert weight.name == "qkv.weight" and value.shape == weight.shape == (10, 4)
    for spec, (part, rows) in zip(specs, weight.split(value), strict=True):
        assert part.spec == spec
        np.testing.assert_array_equal(rows, draw(spec, 3, 0.02))


@pytest.mark.parametrize("dim", [0, 1])
def test_the_pieces_of_a_parameter_are_read_apart(dim):
    (weight,), read = weights_of([MATRIX]), initial_reader(3, 0.02)
    pieces = [weight.parts[0].cut(dim, index, 4) for index in range(4)]
    np.testing.assert_array_equal(np.concatenate([read(piece) for piece in pieces], dim), draw(MATRIX, 3, 0.02))
    half = pieces[1].cut(1 - dim, 1, 2)
    np.testing.assert_array_equal(read(half), draw(MATRIX, 3, 0.02)[half.slices])
    with pytest.raises(ValueError, match=f"a: .* along dim {dim} is no multiple of 7"):
        weight.parts[0].cut(dim, 0, 7)
