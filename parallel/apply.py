"""`parallelize`: the techniques of `parallel/`, applied to a model from outside in one stated order.

1. tensor and sequence parallelism (`parallel.tensor`): segments become the forms that a rank of tp runs
2. expert parallelism (`parallel.expert`): routed experts are spread over ranks, and routers count over them
3. context parallelism (`parallel.context`): attention is computed over the ranks that share a sequence
4. recompute (`parallel.recompute`): segments are merged that save their input alone
5. pipeline (`parallel.pipeline`): the segments are cut into stages, and a rank keeps its own
6. data parallelism (`parallel.data`, `parallel.zero`): gradients and loss sums are added up over the ranks of the loss
   view, with ZeRO each rank's optimizer having a piece of every weight
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from models.config import ModelConfig
from models.kernels import Kernels
from models.segments import Segment, Shared
from models.weights import Weight
from parallel.collectives import Collectives
from parallel.context import ContextAttention, contextual, positions
from parallel.data import DataParallel, Held
from parallel.expert import ExpertParallel
from parallel.recompute import recompute
from parallel.schedules import Schedule, cut
from parallel.tensor import TensorParallel
from parallel.zero import Zero

EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Parallelized:
    """A model as this rank holds it, and what the step must do around it."""

    stages: dict[int, Shared]
    """This rank's, by virtual stage; the whole model is stage 0 where there is no pipeline."""
    schedule: Schedule | None
    """The pipeline's, or that of one stage with ZeRO 3; None where a step is one graph."""
    weights: tuple[Weight, ...]
    """What this rank holds, each once."""
    data: DataParallel
    positions: np.ndarray
    """Positions in a sequence of this rank's tokens, int64."""
    collectives: Collectives
    kernels: Kernels


def parallelize(
    segments: Sequence[Segment], config: ModelConfig, kernels: Kernels, collectives: Collectives,
    schedule: Schedule | None, seq_len: int, dtype: type,
) -> Parallelized:  # fmt: skip
    """Lay the model of `segments` (`models.decoder.decoder_segments`) over the ranks of `collectives.mesh`.

    `dtype` is the numpy dtype of gradients.
    """
    mesh, rank = collectives.mesh, collectives.rank
    layout = mesh.layout
    if layout.tp > 1:
        tensor = TensorParallel(config, collectives, kernels, layout.sequence_parallel)
        segments = [tensor.apply(segment) for segment in segments]
    if config.moe.experts and mesh.world_size > 1:
        experts = ExpertParallel(config, collectives, kernels)
        segments = [experts.apply(segment) for segment in segments]
    if layout.cp > 1:
        attention = cache(partial(ContextAttention, kernels, collectives, layout.micro_batch, seq_len, dtype))
        segments = [contextual(segment, attention) for segment in segments]
    if layout.recompute != "none":
        segments = recompute(segments, layout)
    stages = {0: Shared(segments)}
    if schedule:
        spans = cut(config.layers, schedule.stages, layout.stages if layout.pp > 1 else None)
        own = schedule.stages_of(mesh.index("pp", rank))
        stages = {stage: Shared([segments[i] for i in spans[stage]]) for stage in own}
    weights = tuple({weight.name: weight for stage in stages.values() for weight in stage.weights}.values())
    shared = config.tied_embeddings or config.mtp.depth
    if schedule and shared and schedule.rank_of(0) != schedule.rank_of(schedule.stages - 1):
        weights = tuple(_tied(weight, 0 in stages) if weight.name == EMBEDDING else weight for weight in weights)
    data = (Zero if layout.zero and mesh.size("loss") > 1 else DataParallel)(weights, collectives, kernels, dtype)
    own = positions(layout, mesh.index("cp", rank), seq_len)
    return Parallelized(stages, schedule, weights, data, own, collectives, kernels)


def _tied(weight: Weight, first: bool) -> Held:
    """The embedding, of which the first and the last stage have a copy each."""
    held = weight if isinstance(weight, Held) else Held(weight.name, weight.parts, (1,), (True,))
    replicas = tuple(2 * count for count in held.replicas)
    return replace(held, replicas=replicas, firsts=tuple(first and f for f in held.firsts), tied=True)
