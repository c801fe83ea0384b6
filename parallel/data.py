"""Data parallelism: ranks compute different samples, and their gradients are summed."""

from __future__ import annotations

from mindspore import nn

from parallel.collectives import Collectives

AXES = ("dp", "cp")
"""Ranks that hold the same dense weights and see different tokens."""


class DataParallel(nn.Cell):
    """Sums what the ranks of the loss view computed from their own tokens."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__(auto_prefix=False)
        self.all_reduce = collectives.AllReduce(AXES)

    def reduce(self, sums, gradients):
        """`(sums, gradients)` added up over the ranks, in one message.

        The trainer's loss is a sum over tokens, so plain sums suffice; it divides by the global count afterwards.
        """
        reduced = self.all_reduce.forward((sums,) + gradients)
        return reduced[0], reduced[1:]
