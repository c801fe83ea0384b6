"""The kernels in C++ for CPU: `csrc/`, one `ops.Custom(func_type="aot")` operator each, for fp32 and fp64.

Same classes and signatures as `plain`, which defines them. Shapes and dtypes are inferred from the inputs, so one
object serves any shape. Numbers that shapes do not give reach an operator as small constant tensors.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from models.kernels import plain

LIBRARY = Path(__file__).resolve().parent / "_native.so"
AGAIN = "`make clean setup` or `pip install .`"


@cache
def missing() -> str:
    """Why the compiled kernels cannot be used here; empty when they can."""
    if not LIBRARY.exists():
        return "no compiled kernels: install g++, then Busway again (`make setup` or `pip install .`)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the compiled kernels do not load ({error}): install Busway again ({AGAIN})"
    library.busway_missing_cpu_feature.restype = ctypes.c_char_p
    feature = library.busway_missing_cpu_feature().decode()
    reason = f"the kernels were compiled for another CPU (no {feature} here): install Busway again ({AGAIN})"
    return reason if feature else ""


@cache
def missing_matmul() -> str:
    """Why matrices cannot be multiplied natively; empty when they can."""
    library = ctypes.CDLL(str(LIBRARY))
    library.busway_missing_sgemm.restype = ctypes.c_char_p
    return library.busway_missing_sgemm().decode()


def operator(name: str, shape, dtype) -> ops.Custom:
    return ops.Custom(f"{LIBRARY}:busway_{name}", out_shape=shape, out_dtype=dtype, func_type="aot")


def _first(first, *_):
    return first


def _second(_, second, *__):
    return second


def _third(_, __, third, *___):
    return third


def _first_two(first, second, *_):
    return first, second


def _first_three(first, second, third, *_):
    return first, second, third


def _first_twice(first, *_):
    return first, first


def _number(value: float) -> Tensor:
    return Tensor([value], mstype.float64)


class Matmul(plain.Matmul):
    """See `plain.Matmul`. Multiplied by oneDNN, in blocks of rows that threads share."""

    def __init__(self) -> None:
        super().__init__()
        self.run_forward = operator("matmul", lambda x, w: [x[0], w[0]], _first)
        self.run_input = operator("matmul_input", lambda dy, w: [dy[0], w[1]], _first)
        self.run_weight = operator("matmul_weight", lambda dy, x: [dy[1], x[1]], _first)


class RMSNorm(nn.Cell):
    """See `plain.RMSNorm`."""

    def __init__(self, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.eps = _number(eps)
        self.run_forward = operator("rms_norm", _first, _first)
        self.run_backward = operator("rms_norm_backward", _first_two, _first_two)

    def forward(self, x, w):
        return self.run_forward(x, w, self.eps)

    def backward(self, x, w, dy):
        return self.run_backward(x, w, dy, self.eps)


class HeadNorm(nn.Cell):
    """See `plain.HeadNorm`."""

    def __init__(self, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.heads, self.eps = Tensor([heads, kv_heads], mstype.int32), _number(eps)
        self.run_forward = operator("head_norm", _first, _first)
        self.run_backward = operator("head_norm_backward", _first_three, _first_three)

    def forward(self, qkv, wq, wk):
        return self.run_forward(qkv, wq, wk, self.heads, self.eps)

    def backward(self, qkv, wq, wk, dy):
        return self.run_backward(qkv, wq, wk, dy, self.heads, self.eps)


class Rotary(nn.Cell):
    """See `plain.Rotary`."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__(auto_prefix=False)
        self.heads = Tensor([heads, kv_heads], mstype.int32)
        self.onward, self.back = _number(1), _number(-1)
        self.run = operator("rotary", _first, _first)

    def forward(self, qkv, cos, sin):
        return self.run(qkv, cos, sin, self.heads, self.onward)

    def backward(self, dqkv, cos, sin):
        return self.run(dqkv, cos, sin, self.heads, self.back)


class Attention(nn.Cell):
    """See `plain.Attention`. Skipping the keys before a document costs nothing here, so `documents` changes nothing."""

    def __init__(self, heads: int, kv_heads: int, scale: float, documents: bool = True) -> None:
        super().__init__(auto_prefix=False)
        self.scale = _number(scale)

        def forward_shape(qkv, *_):
            tokens, width = qkv
            return (tokens, width // (heads + 2 * kv_heads) * heads), (tokens * heads,)

        self.run_forward = operator("attention", forward_shape, _first_twice)
        self.run_backward = operator("attention_backward", _first, _first)

    def forward(self, qkv, cos, sin, first_key):
        return self.run_forward(qkv, cos, sin, first_key, self.scale)

    def backward(self, qkv, cos, sin, first_key, o, lse, do):
        return self.run_backward(qkv, cos, sin, first_key, o, lse, do, self.scale)


class BlockAttention(nn.Cell):
    """See `plain.BlockAttention`."""

    def __init__(self, heads: int, kv_heads: int, scale: float) -> None:
        super().__init__(auto_prefix=False)
        self.heads, self.scale = Tensor([heads, kv_heads], mstype.int32), _number(scale)

        def outputs(q, kv, first, last, o, lse, *_):
            return o, lse

        self.run_forward = operator("block_attention", outputs, _first_twice)
        self.run_backward = operator("block_attention_backward", _first_two, _first_two)

    def forward(self, q, kv, first, last, o, lse):
        return self.run_forward(q, kv, first, last, o, lse, self.heads, self.scale)

    def backward(self, q, kv, first, last, o, lse, do):
        return self.run_backward(q, kv, first, last, o, lse, do, self.heads, self.scale)


class SwiGLU(nn.Cell):
    """See `plain.SwiGLU`."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)

        def half(gate_up):
            return gate_up[0], gate_up[1] // 2

        self.run_forward = operator("swiglu", half, _first)
        self.run_backward = operator("swiglu_backward", _first, _first)

    def forward(self, gate_up):
        return self.run_forward(gate_up)

    def backward(self, gate_up, dy):
        return self.run_backward(gate_up, dy)


class CrossEntropy(nn.Cell):
    """See `plain.CrossEntropy`."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)

        def two_rows(_, labels):
            return labels, labels

        self.run_forward = operator("cross_entropy", two_rows, _first_twice)
        self.run_backward = operator("cross_entropy_backward", _first, _first)

    def forward(self, logits, labels):
        return self.run_forward(logits, labels)

    def backward(self, logits, labels, lse, weight):
        return self.run_backward(logits, labels, lse, weight)


class Embedding(nn.Cell):
    """See `plain.Embedding`."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)

        def rows(ids, table):
            return ids[0], table[1]

        self.run_forward = operator("embedding", rows, _second)
        self.run_backward = operator("embedding_backward", _third, _third)

    def forward(self, ids, table):
        return self.run_forward(ids, table)

    def backward(self, ids, dx, table):
        return self.run_backward(ids, dx, table)


class SquareSum(nn.Cell):
    """See `plain.SquareSum`; accumulated in double."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.run = operator("square_sum", (1,), _first)

    def forward(self, gradients):
        return self.run(*gradients)


class AdamW(nn.Cell):
    """See `plain.AdamW`. MindSpore does not know that the operator writes weights and moments: it is ordered after
    every use of them by taking every gradient, and before what follows by `ops.depend` on what it returns.
    """

    def __init__(self, beta1: float, beta2: float, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self.hyper = Tensor([beta1, beta2, eps], mstype.float64)
        self.run = operator("adamw", (1,), _second)

    def forward(self, weights, first, second, gradients, decays, factor, lr, step):
        return self.run(self.hyper, decays, factor, lr, step, *weights, *first, *second, *gradients)
