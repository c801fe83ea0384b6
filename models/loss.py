"""Token cross-entropy as the last segment: logits in, the sum of the losses out."""

from __future__ import annotations

import mindspore as ms
from mindspore import ops

from models.kernels import Kernels
from models.segments import Segment, labels_of


class CrossEntropySum(Segment):
    """Sum over tokens whose label is not negative of -log softmax(logits)[label]: a tensor of one element.

    A sum and not a mean, so that micro-batches and ranks add up; the trainer divides by the global count. Labels are
    those of `ahead` tokens after the next; `coef` is a factor of the gradient alone.
    """

    saves = 2

    def __init__(self, kernels: Kernels, ahead: int = 0, coef: float = 1.0) -> None:
        super().__init__()
        self.ahead, self.coef = ahead, coef
        self.kernel = kernels.CrossEntropy()
        self.sum = ops.ReduceSum()

    def forward(self, x, weights, context):
        """Saves the logits and their log-sum-exp. Logits of a bf16 matmul are widened first."""
        labels = labels_of(context, self.ahead)
        if x.dtype == ms.bfloat16:
            x = ops.cast(x, ms.float32)
        lse, target = self.statistics(x, labels)
        return self.sum((lse - target) * self.valid(labels, x)).reshape((1,)), (x, lse)

    def backward_input(self, dy, saved, weights, context):
        """The gradient of the sum, by `coef`: dy is not read, as it is one."""
        labels = labels_of(context, self.ahead)
        logits, lse = saved
        factor = self.valid(labels, logits)
        if self.coef != 1.0:
            factor = factor * self.coef
        return self.kernel.backward(logits, self.columns(labels), lse, factor), ()

    def statistics(self, logits, labels):
        """Log-sum-exp [T] of the logits, and the label's logit [T]."""
        return self.kernel.forward(logits, self.columns(labels))

    def columns(self, labels):
        """Columns of the logits in which the labels stand."""
        return labels

    def valid(self, labels, like):
        """1 where a token's loss counts, 0 elsewhere, in the dtype of `like`."""
        return ops.cast(labels >= 0, like.dtype)
