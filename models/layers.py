"""Linear layers, norms and the embedding as segments."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import nn, ops

from models.kernels import Kernels
from models.segments import TOKENS, Segment
from models.weights import Weight


class Rounding(nn.Cell):
    """How a linear's operands enter its matmul: as they are, or as bfloat16.

    `none` leaves them alone; `emulated` rounds to bfloat16 and multiplies in fp32 (the CPU backend has no bf16
    matmul); `native` casts, and the matmul runs in bfloat16 (Ascend).
    """

    def __init__(self, kind: str) -> None:
        super().__init__(auto_prefix=False)
        self.kind = kind
        self.cast = ops.Cast()

    def operand(self, x):
        """`x` as the matmul takes it."""
        if self.kind == "none":
            return x
        rounded = self.cast(x, ms.bfloat16)
        if self.kind == "native":
            return rounded
        return self.cast(rounded, ms.float32)

    def like(self, gradient, tensor):
        """An input's gradient in the input's dtype: a matmul's result may be narrower."""
        return self.cast(gradient, tensor.dtype) if self.kind == "native" else gradient

    def master(self, gradient):
        """A weight's gradient in the dtype of the master weights."""
        return self.cast(gradient, ms.float32) if self.kind == "native" else gradient


class Linear(Segment):
    """y_TO = x_TI w_OI^T (+ b_O). The backward's halves are one matmul each."""

    saves, keeps = 1, 2

    def __init__(self, weights: Sequence[Weight], rounding: str, kernels: Kernels) -> None:
        super().__init__(weights)
        self.rounding = Rounding(rounding)
        self.has_bias = len(weights) == 2
        self.matmul = kernels.Matmul()
        self.column_sum = ops.ReduceSum()

    def forward(self, x, weights, context):
        """Saves its input."""
        y = self.matmul.forward(self.rounding.operand(x), self.rounding.operand(weights[0]))
        if self.has_bias:
            y = y + self.rounding.operand(weights[1])
        return y, (x,)

    def backward_input(self, dy, saved, weights, context):
        """dx = dy w."""
        dx = self.matmul.backward_input(self.rounding.operand(dy), self.rounding.operand(weights[0]))
        return self.rounding.like(dx, saved[0]), (dy, saved[0])

    def backward_weight(self, kept):
        """dw = dy^T x, db = the column sums of dy."""
        dy, x = kept
        dw = self.rounding.master(self.matmul.backward_weight(self.rounding.operand(dy), self.rounding.operand(x)))
        if self.has_bias:
            return dw, self.rounding.master(self.column_sum(dy, 0))
        return (dw,)


class Norm(Segment):
    """RMSNorm over the hidden dim."""

    saves, keeps = 1, 1

    def __init__(self, weights: Sequence[Weight], eps: float, kernels: Kernels) -> None:
        super().__init__(weights)
        self.eps = eps
        self.kernel = kernels.RMSNorm(eps)

    def forward(self, x, weights, context):
        """Saves its input."""
        return self.kernel.forward(x, weights[0]), (x,)

    def backward_input(self, dy, saved, weights, context):
        """Both gradients come from one pass over memory."""
        dx, dw = self.kernel.backward(saved[0], weights[0], dy)
        return dx, (dw,)


class Embedding(Segment):
    """Token ids to rows of the table. Its input gradient is dy itself, as ids have none.

    A table that holds some of the rows gives zeros for ids of others, and takes no gradient from them.
    """

    keeps = 1

    def __init__(self, weights: Sequence[Weight], kernels: Kernels) -> None:
        super().__init__(weights)
        self.first_row = weights[0].parts[0].region[0][0]
        self.kernel = kernels.Embedding()

    def rebuilt(self, weights: Sequence[Weight], kernels: Kernels) -> Embedding:
        """The same with other weights."""
        return Embedding(weights, kernels)

    def forward(self, x, weights, context):
        """Looks up the context's tokens; `x` is not read."""
        return self.kernel.forward(self.rows(context), weights[0]), ()

    def backward_input(self, dy, saved, weights, context):
        """Adds the rows of dy up by token."""
        return dy, (self.kernel.backward(self.rows(context), dy, weights[0]),)

    def rows(self, context):
        """Rows of the table to look up."""
        return context[TOKENS] - self.first_row if self.first_row else context[TOKENS]
