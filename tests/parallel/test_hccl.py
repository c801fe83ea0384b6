"""The Ascend backend against recording stand-ins: each rank in turn, compiled on CPU."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.collectives import Collectives
from parallel.collectives.hccl import HcclBackend
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.traffic import data_parallel

SIZES = {"hccl_world_group": 4}


class StandIn(nn.Cell):
    """An operator in a world whose ranks all hold the same."""

    def __init__(self, kind: str, group: str) -> None:
        super().__init__()
        self.name, self.group, self.attributes = kind, group, {}
        self.size = SIZES[group]

    def add_prim_attr(self, name, value):
        self.attributes[name] = value

    def construct(self, x):
        return ops.tile(x, (self.size,)) if self.name == "AllGather" else x * self.size


class Recorder:
    """In the places of mindspore.ops and mindspore.communication, as one rank of four sees them."""

    HCCL_WORLD_COMM_GROUP = "hccl_world_group"

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.calls: list[tuple] = []
        self.made: list[StandIn] = []

    def init(self):
        self.calls.append(("init",))

    def get_rank(self):
        return self.rank

    def get_group_size(self):
        return 4

    def create_group(self, name, ranks):
        self.calls.append(("create_group", name, ranks))
        SIZES[name] = len(ranks)

    def AllReduce(self, op, group):
        self.calls.append(("AllReduce", op, group))
        self.made.append(StandIn("AllReduce", group))
        return self.made[-1]

    def AllGather(self, group):
        self.calls.append(("AllGather", group))
        return StandIn("AllGather", group)


class Step(nn.Cell):
    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.gradients, self.alone = made.AllReduce("loss"), made.AllReduce("cp")
        self.everyone, self.again = made.AllReduce("dense"), made.AllReduce("dp")

    def construct(self, tensors):
        pair = self.gradients.forward(tensors)
        return self.again.forward(pair), self.alone.forward(tensors), self.everyone.forward(tensors[:1])


def connect(rank: int, machine) -> tuple[Recorder, Collectives]:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    recorder = Recorder(rank)
    mesh = Mesh(Layout(dp=2, tp=2), machine("any"))
    return recorder, Collectives(mesh, HcclBackend(recorder, recorder))


@pytest.mark.parametrize("rank", range(4))
def test_groups_and_operators_are_those_of_the_mesh(machine, rank):
    recorder, made = connect(rank, machine)
    Step(made)
    first = rank % 2
    assert recorder.calls == [
        ("init",),
        ("AllGather", "hccl_world_group"),
        ("create_group", f"busway-dp-{first}", [first, first + 2]),
        *[("AllReduce", "sum", f"busway-dp-{first}")] * 3,
        ("create_group", "busway-dp-tp-0", [0, 1, 2, 3]),
        *[("AllReduce", "sum", "busway-dp-tp-0")] * 3,
    ]
    assert all(operator.attributes == {"side_effect_io": True} for operator in recorder.made)


def test_sums_and_the_account_come_out_of_the_graph_at_every_run(machine):
    _, made = connect(3, machine)
    tensors = (Tensor(np.arange(6, dtype=np.float32).reshape(2, 3)), Tensor(np.ones(5, np.float32)),
               Tensor(np.full(3, 2, np.int32)))  # fmt: skip
    step = Step(made)
    for _ in range(3):
        pair, alone, everyone = step(tensors)
    for result, tensor in zip(pair, tensors, strict=True):
        np.testing.assert_array_equal(result.asnumpy(), 4 * tensor.asnumpy())
    np.testing.assert_array_equal(alone[0].asnumpy(), tensors[0].asnumpy())
    np.testing.assert_array_equal(everyone[0].asnumpy(), 4 * tensors[0].asnumpy())
    rows = {(row["axis"], row["dtype"]): (row["payload_bytes"], row["calls"]) for row in made.traffic().rows()}
    assert rows == {("dp", "float32"): (6 * 44, 6), ("dp", "int32"): (6 * 12, 6), ("dp x tp", "float32"): (3 * 24, 3)}
    made.reset_traffic()
    assert made.traffic().rows() == []


def test_one_bucket_of_gradients_is_what_the_formula_predicts(machine):
    _, made = connect(0, machine)
    primitive = made.AllReduce("loss")
    primitive((Tensor(np.zeros((10, 10), np.float32)), Tensor(np.zeros(3, np.float32))))
    assert made.traffic().rows() == data_parallel(made.mesh, 0, 100, "float32", scalars=3).rows()


def test_float64_is_refused(machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a graph that fails to compile leaves a folder in the working directory
    _, made = connect(0, machine)
    with pytest.raises(TypeError, match="all_reduce takes tensors of Float32, BFloat16, Int32"):
        made.AllReduce("dp")((Tensor(np.zeros(3)),))


@pytest.mark.parametrize("value", [None, {"text": "x" * 1000}, [1.5, np.arange(3)]])
def test_values_of_the_host_travel_as_bytes(machine, value):
    _, made = connect(2, machine)
    for copy in made.world.all_gather(value):
        assert repr(copy) == repr(value)
    assert repr(made.world.broadcast(value, root=2)) == repr(value)
    assert made.world.reduce_max([1, 2.5]).tolist() == [1, 2.5]
