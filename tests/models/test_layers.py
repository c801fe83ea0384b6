"""How linears round: emulated on CPU, and the dtypes that reach Ascend's matmul."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from models import layers
from models.config import ParameterSpec
from models.kernels import choose
from models.layers import Linear
from models.weights import Weight

SEED = 11


class RecordingMatMul:
    """Stands in for the bf16 matmul that the CPU backend lacks: computes in fp32, returns its operands' dtype."""

    calls: list = []

    def __init__(self, transpose_a=False, transpose_b=False):
        self.transposes = transpose_a, transpose_b

    def __call__(self, a, b):
        self.calls.append((a.dtype, b.dtype))
        a, b = (m.astype(ms.float32).asnumpy() for m in (a, b))
        product = (a.T if self.transposes[0] else a) @ (b.T if self.transposes[1] else b)
        return Tensor(product).astype(self.calls[-1][0])


def linear(rounding):
    parts = [Weight(n, (ParameterSpec(n, s, "normal"),)) for n, s in (("w", (6, 5)), ("b", (6,)))]
    return Linear(parts, rounding, choose("plain", "fp32", "CPU"))


def bf16(array):
    """Rounded to nearest even, by the bits."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


@pytest.fixture
def operands():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (6, 5), (6,), (7, 6))]


def run(segment, operands):
    x, w, b, dy = map(Tensor, operands)
    y, saved = segment.forward(x, (w, b), ())
    dx, (dw, db) = segment.backward(dy, saved, (w, b), ())
    return y, dx, dw, db


def test_emulated_bf16_rounds_operands_and_multiplies_in_fp32(operands):
    x, w, b, dy = operands
    y, dx, dw, db = run(linear("emulated"), operands)
    np.testing.assert_allclose(y.asnumpy(), bf16(x) @ bf16(w).T + bf16(b), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx.asnumpy(), bf16(dy) @ bf16(w), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw.asnumpy(), bf16(dy).T @ bf16(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(db.asnumpy(), dy.sum(0), rtol=1e-5, atol=1e-6)


def test_native_bf16_multiplies_in_bf16_and_keeps_gradients_in_the_weights_dtype(operands, monkeypatch):
    monkeypatch.setattr(layers.ops, "MatMul", RecordingMatMul)
    RecordingMatMul.calls = []
    ms.set_context(mode=ms.PYNATIVE_MODE)
    y, dx, dw, db = run(linear("native"), operands)
    assert RecordingMatMul.calls == [(ms.bfloat16, ms.bfloat16)] * 3
    assert y.dtype == ms.bfloat16
    assert [g.dtype for g in (dx, dw, db)] == [ms.float32] * 3
    np.testing.assert_allclose(dw.asnumpy(), operands[3].T @ operands[0], rtol=0.05, atol=0.05)
