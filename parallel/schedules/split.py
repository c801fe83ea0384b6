"""Which segments of a model each stage of a pipeline has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def cut(layers: int, stages: int, sizes: Sequence[int] | None = None) -> list[range]:
    """The segments of each stage, of a model of embedding, `layers` layers and head (`decoder_segments`).

    `sizes` gives the layers of each stage; without it, embedding and head count as a layer each and the stages'
    loads differ by at most one, the larger ones in the middle, where no embedding or head is.
    """
    if sizes is None:
        load, larger = divmod(layers + 2, stages)
        first = (stages - larger) // 2
        loads = [load + (first <= stage < first + larger) for stage in range(stages)]
    else:
        loads = list(sizes)
        loads[0] += 1
        loads[-1] += 1
    return [range(start, stop) for start, stop in pairwise(accumulate([0, *loads]))]
