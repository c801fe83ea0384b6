"""What a rank holds, by formula, against what `parallelize` makes on stand-ins of the other ranks."""

from __future__ import annotations

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from models.attention import rotary_tables
from models.config import ModelConfig
from models.decoder import decoder_segments
from models.kernels import choose
from models.shapes import ExpertsConfig, LatentConfig, PredictionConfig
from models.weights import initial_reader
from parallel.apply import parallelize
from parallel.collectives import Collectives
from parallel.layout import Layout
from parallel.memory import Share, peak_saved_elements, recomputed_elements, saved_elements, state_bytes
from parallel.mesh import Mesh
from trainer.step import Weights

SEQ_LEN, GLOBAL_BATCH = 16, 12
SHAPES = {"layers": 3, "hidden": 30, "ffn": 44, "heads": 8, "kv_heads": 2, "head_dim": 6, "vocab": 40}
EXPERTS = {"moe": ExpertsConfig(experts=4, top_k=2, ffn=12, shared=1, first_dense=1)}
LATENT = {"latent": LatentConfig(kv_rank=6, q_rank=8, nope=4, rope=4, value=6), "sandwich_norm": True}
FURTHER = {"mtp": PredictionConfig(depth=2)}
VARIANTS = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"qk_norm": True},
    "experts, further tokens": EXPERTS | FURTHER,
    "latent experts": EXPERTS | LATENT,
}
LAYOUTS = {
    "one rank": Layout(dp=1, micro_batch=3),
    "tp": Layout(dp=1, tp=2),
    "tp beyond the heads of keys": Layout(dp=1, tp=4, recompute="selective"),
    "sequence parallel": Layout(dp=1, tp=2, sequence_parallel=True, micro_batch=2),
    "recompute": Layout(dp=1, tp=2, recompute=(1,)),
    "recompute full": Layout(dp=1, tp=2, sequence_parallel=True, recompute="full"),
    "ring": Layout(dp=1, cp=4),
    "ulysses": Layout(dp=1, cp=2, cp_method="ulysses"),
    "hybrid": Layout(dp=1, cp=4, tp=2, cp_method="hybrid", cp_ulysses=2),
    "ring, selective": Layout(dp=1, cp=2, recompute="selective"),
    "uneven stages": Layout(dp=1, pp=3, stages=(0, 2, 1)),
    "v": Layout(dp=2, pp=2, schedule="zb_v", zero=2),
    "interleaved": Layout(dp=1, pp=2, tp=2, vpp=2, schedule="interleaved"),
    "zero 1": Layout(dp=4, zero=1, micro_batch=3),
    "zero 3": Layout(dp=2, cp=2, zero=3),
    "zero 2 with experts over ranks": Layout(dp=4, ep=2, zero=2),
    "slices of experts over tp": Layout(dp=2, tp=2, ep=2, etp=2, sequence_parallel=True),
    "zero 3 over a pipeline": Layout(dp=4, pp=2, zero=3, zero_group=2),
}


class Alike(nn.Cell):
    """A collective of which only the shapes of the results are right."""

    def __init__(self, parts: tuple[int, int]) -> None:
        super().__init__(auto_prefix=False)
        self.parts = parts

    def construct(self, tensors: tuple) -> tuple:
        into, out = self.parts
        if out > into:
            return tuple(ops.concat([tensor] * out, 0) for tensor in tensors)
        return tuple(tensor[: len(tensor) * out // into] for tensor in tensors)


def made(config: ModelConfig, layout: Layout, place: int, machine):
    """The model as the first rank at `place` of the pipeline holds it."""
    mesh = Mesh(layout, machine("any"))
    rank = mesh.groups("pp")[0][place]
    backend = SimpleNamespace(
        world=SimpleNamespace(rank=rank, size=mesh.world_size),
        dtypes=("float32", "int32"),
        operator=lambda collective: Alike(collective.parts),
        exchange=lambda group, room: None,
    )
    kernels = choose("plain", "fp32", "CPU")
    segments = decoder_segments(config, kernels)
    schedule = layout.pipeline(GLOBAL_BATCH)
    return parallelize(segments, config, kernels, Collectives(mesh, backend), schedule, SEQ_LEN, np.float32)


@pytest.fixture(autouse=True)
def pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_and_their_bytes_are_those_of_the_model(machine, name, variant):
    config, layout = ModelConfig(**SHAPES, **VARIANTS[variant]), LAYOUTS[name]
    for place in range(layout.pp):
        model, share = made(config, layout, place, machine), Share(config, layout, GLOBAL_BATCH, place)
        assert list(share.weights().items()) == [(weight.name, weight.shape) for weight in model.weights]
        assert share.tied == any(getattr(weight, "tied", False) for weight in model.weights)
        for stage, decoder in model.stages.items():
            assert list(share.weights(share.stages[stage])) == [weight.name for weight in decoder.weights]

        held = Weights(model.weights, model.data, initial_reader(0, 0.02), np.float32)
        masters = () if held.masters is held.values else held.masters
        state = state_bytes(share, 4)
        assert state.weights == sum(value.nbytes for value in held.values)
        assert state.optimizer == sum(value.nbytes for value in (*masters, *held.first, *held.second))
        collected = sum(int(np.prod(model.data.collected(weight))) for weight in model.weights)
        assert state.gradients == (4 * collected if layout.check_batch(GLOBAL_BATCH) > 1 or layout.pp > 1 else 0)


@pytest.mark.parametrize("name", [name for name, x in LAYOUTS.items() if x.pp * x.ep == 1 and not x.zero])
@pytest.mark.parametrize("kind", ["dense", "experts", "latent", "further"])
def test_segments_save_what_the_formula_says(machine, name, kind):
    kinds = {"dense": {"qk_norm": name != "tp"}, "experts": EXPERTS, "latent": LATENT, "further": EXPERTS | FURTHER}
    layout, config = LAYOUTS[name], ModelConfig(**SHAPES, **kinds[kind])
    model = made(config, layout, 0, machine)
    length = layout.micro_batch * SEQ_LEN
    own, labels = (Tensor(np.zeros(n * length // layout.cp, np.int32)) for n in (1, 1 + 2 * config.mtp.depth))
    tables = [Tensor(table[model.positions]) for table in rotary_tables(config, SEQ_LEN)]
    context, x = (own, labels, Tensor(np.zeros(length, np.int32)), *tables), own
    for number, segment in enumerate(model.stages[0].segments):
        values = tuple(Tensor(weight.stack(initial_reader(0, 0.02))) for weight in segment.weights)
        x, saved = segment.forward(x, values, context)
        once = {id(tensor): tensor.size for tensor in saved}  # attention's output is the next linear's input
        assert sum(once.values()) == saved_elements(config, layout, SEQ_LEN, number)


def test_micro_batches_in_flight_add_up():
    config = ModelConfig(**SHAPES)
    shares = [Share(config, Layout(dp=1, pp=2, stages=(2, 1)), GLOBAL_BATCH, place) for place in (0, 1)]
    layer, head = (saved_elements(config, shares[0].layout, SEQ_LEN, segment) for segment in (1, 4))
    assert [peak_saved_elements(share, SEQ_LEN) for share in shares] == [2 * 2 * layer, layer + head]


@pytest.mark.parametrize("recompute", ["none", "selective", "full", (1,)])
def test_a_backward_brings_back_what_recompute_did_not_save(recompute):
    config, plain = ModelConfig(**SHAPES), Layout(dp=1)
    share = Share(config, Layout(dp=1, recompute=recompute), GLOBAL_BATCH)
    for layer in range(config.layers):
        missing = saved_elements(config, plain, SEQ_LEN, layer + 1)
        missing -= saved_elements(config, share.layout, SEQ_LEN, layer + 1)
        assert missing == (recomputed_elements(share, SEQ_LEN) if recompute != (1,) or layer == 1 else 0)
    assert (recomputed_elements(share, SEQ_LEN) == 0) == (recompute == "none")
    ends = Share(config, Layout(dp=1, pp=2, stages=(0, 3), recompute=recompute), GLOBAL_BATCH)
    assert recomputed_elements(ends, SEQ_LEN) == 0


def test_zero_3_has_one_segment_whole_and_with_prefetch_two_and_what_graphs_hold():
    config = ModelConfig(layers=2, hidden=8, ffn=12, heads=4, kv_heads=2, vocab=80, tied_embeddings=True)
    layer = 2 * 8 + (4 + 2 * 2) * 2 * 8 + 8 * 8 + 3 * 8 * 12
    embedding, head = 80 * 8, 8 + 80 * 8
    ahead = layer + head + 2 * (embedding + layer + head)
    unlike = ahead + 2 * layer  # a recomputed layer has graphs of its own
    for prefetch, which, elements in ((True, "none", ahead), (True, (1,), unlike), (False, "none", head)):
        share = Share(config, Layout(dp=4, zero=3, prefetch=prefetch, recompute=which), 4)
        assert state_bytes(share, 8).gathered == 8 * elements
