"""`parallelize`: the techniques of `parallel/`, applied to a model from outside in one stated order.

1. data parallelism (`parallel.data`): gradients and loss sums are added up over the ranks of the loss view.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.decoder import Decoder
from parallel.collectives import Collectives
from parallel.data import DataParallel


@dataclass(frozen=True)
class Parallelized:
    """A model as this rank holds it, and what the step must do around it."""

    model: Decoder
    data: DataParallel


def parallelize(model: Decoder, collectives: Collectives) -> Parallelized:
    """Lay `model` over the ranks of `collectives.mesh`."""
    return Parallelized(model, DataParallel(collectives))
