"""The Ascend backend against recording stand-ins: compiled on CPU with numbers, and as plain Python with shapes."""

from __future__ import annotations

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import recording
from mindspore import Tensor, nn, ops

from models.kernels import choose
from models.layers import Linear
from models.segments import Chain, Segment
from models.weights import Weight
from parallel.collectives import Collectives, Primitive
from parallel.collectives.hccl import DTYPES, HcclBackend, HcclExchange
from parallel.collectives.interface import Room
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.tensor import GatheredLinear, Scatter
from parallel.traffic import Traffic

PRIMITIVES = ("AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Shift", "Broadcast")


class Operator(nn.Cell):
    """An HCCL operator in a world whose ranks all hold the same, as rank number `place` of `size` sees it."""

    def __init__(self, name: str, place: int, size: int) -> None:
        super().__init__()
        self.name, self.place, self.size, self.attributes = name, place, size, {}

    def add_prim_attr(self, name, value):
        self.attributes[name] = value

    def construct(self, x, gives=None, takes=None):
        if self.name == "AllReduce":
            return x * self.size
        if self.name == "AllGather":
            return ops.tile(x, (self.size,))
        if self.name == "ReduceScatter":
            return self.part(x) * self.size
        if self.name == "AlltoAllV":
            return ops.tile(self.part(x), (self.size,)) if min(gives) > 0 else x
        return x

    def part(self, x):
        length = x.size // self.size
        return x[self.place * length : (self.place + 1) * length]


class Moved(nn.Cell):
    """`AlltoAllV` of rows, after which a rank has those that it gave."""

    def construct(self, x, gives, takes):
        return x


class Recorder:
    """In the places of the modules that `HcclBackend` takes, as one rank of `size` sees them."""

    HCCL_WORLD_COMM_GROUP = "hccl_world_group"

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.groups = {self.HCCL_WORLD_COMM_GROUP: list(range(size))}
        self.calls: list[tuple] = []
        self.made: list[Operator] = []

    def init(self):
        self.calls.append(("init",))

    def get_rank(self):
        return self.rank

    def get_group_size(self):
        return len(self.groups[self.HCCL_WORLD_COMM_GROUP])

    def create_group(self, name, ranks):
        assert name not in self.groups and len(name) < 128
        self.calls.append(("create_group", name, ranks))
        self.groups[name] = ranks

    def AllReduce(self, op, group):
        return self._make("AllReduce", group, op)

    def AllGather(self, group):
        return self._make("AllGather", group)

    def ReduceScatter(self, op, group):
        return self._make("ReduceScatter", group, op)

    def AlltoAllV(self, group):
        return self._make("AlltoAllV", group)

    def Broadcast(self, root_rank, group):
        return self._make("Broadcast", group, root_rank)

    def isend(self, tensor, dst, group):
        self.calls.append(("isend", dst, group))

    def irecv(self, tensor, src, group):
        self.calls.append(("irecv", src, group))
        return SimpleNamespace(wait=lambda: tensor.assign_value(ops.full(tensor.shape, 7.0)))

    def _make(self, name, group, *arguments):
        self.calls.append((name, *arguments, group))
        ranks = self.groups[group]
        self.made.append(Operator(name, ranks.index(self.rank), len(ranks)))
        return self.made[-1]


def connect(rank: int, machine, **layout: int) -> tuple[Recorder, Collectives]:
    mesh = Mesh(Layout(**layout or {"dp": 2, "tp": 2}), machine("any"))
    recorder = Recorder(rank, mesh.world_size)
    return recorder, Collectives(mesh, HcclBackend(recorder, recorder, recorder))


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


@pytest.mark.parametrize("rank", range(4))
def test_groups_and_operators_are_those_of_the_mesh(machine, rank):
    recorder, made = connect(rank, machine)
    for name in PRIMITIVES:
        getattr(made, name)("dp")
    made.AllReduce("dense"), made.AllReduce("loss"), made.AllReduce("cp")
    dp, dense = f"busway-dp-{rank % 2}-{rank % 2 + 2}-2", "busway-dp-tp-0-3-4"
    assert recorder.calls == [
        ("init",),
        ("AllGather", "hccl_world_group"),
        ("create_group", dp, [rank % 2, rank % 2 + 2]),
        *[("AllReduce", "sum", dp)] * 3,
        *[("AllGather", dp)] * 3,
        *[("ReduceScatter", "sum", dp)] * 3,
        *[("AlltoAllV", dp)] * 3,
        *[("AlltoAllV", dp)] * 3,
        *[("Broadcast", 0, dp)] * 3,
        ("create_group", dense, [0, 1, 2, 3]),
        *[("AllReduce", "sum", dense)] * 3,
    ]
    assert all(operator.attributes == {"side_effect_io": True} for operator in recorder.made[1:])


class Step(nn.Cell):
    def __init__(self, made: Collectives) -> None:
        super().__init__()
        self.primitives = nn.CellList([getattr(made, name)("dense") for name in PRIMITIVES])
        self.pair, self.alone = made.AllReduce("dp"), made.AllReduce("cp")

    def construct(self, tensors):
        results = (self.pair.forward(tensors), self.alone.forward(tensors))
        for primitive in self.primitives:
            results = results + (primitive.forward(tensors),)
        return results


@pytest.mark.parametrize("rank", [0, 2])
def test_a_tuple_travels_packed_and_comes_back_in_its_shapes(machine, rank):
    _, made = connect(rank, machine)
    arrays = [np.arange(24, dtype=np.float32).reshape(4, 2, 3), np.ones((4, 0), np.float32),
              np.arange(8, dtype=np.float32), np.arange(4, dtype=np.int32)]  # fmt: skip
    step, tensors = Step(made), tuple(map(Tensor, arrays))
    for _ in range(3):
        results = step(tensors)
    for array, *seen in zip(arrays, *results, strict=True):
        part = np.split(array, 4)[rank]
        gathered = np.concatenate([array] * 4)
        wanted = [2 * array, array, 4 * array, gathered, 4 * part, np.concatenate([part] * 4), array, array]
        for one, other in zip(seen, wanted, strict=True):
            assert one.shape == other.shape
            if one.size:
                np.testing.assert_array_equal(one.asnumpy(), other)
    rows = {(row["axis"], row["collective"], row["dtype"]): (row["payload_bytes"], row["calls"])
            for row in made.traffic().rows()}  # fmt: skip
    sizes = {"float32": (3 * 128, 3), "int32": (3 * 16, 3)}
    collectives = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast")
    wanted = {("dp x tp", name, dtype): size for name in collectives for dtype, size in sizes.items()}
    assert rows == wanted | {("dp", "all_reduce", dtype): size for dtype, size in sizes.items()}
    made.reset_traffic()
    assert made.traffic().rows() == []


class ThereAndBack(nn.Cell):
    def __init__(self, primitive: Primitive) -> None:
        super().__init__()
        self.primitive = primitive

    def construct(self, *tensors):
        return self.primitive.backward(self.primitive.forward(tensors))


def calls_of(machine, rank: int) -> dict[str, list[tuple]]:
    """What each primitive over four ranks calls with shapes alone, forward and backward."""
    recorder = recording.Recorder(rank, 4)
    kinds = [((4, 3), ms.float32), ((8,), ms.int32), ((12,), ms.float32)]
    tensors, calls = tuple(recording.Shape.of(*kind) for kind in kinds), {}
    with recording.shapes_alone(recorder):
        made = Collectives(Mesh(Layout(dp=2, tp=2), machine("any")), HcclBackend(recorder, recorder, recorder))
        for name in PRIMITIVES[:-1]:
            graph = ThereAndBack(getattr(made, name)("dense"))
            recorder.calls.clear()
            back = graph(*tensors)
            assert [(tensor.shape, tensor.dtype) for tensor in back] == kinds
            calls[name] = [(c.operator, c.dtype, c.size, c.gives, c.takes) for c in recorder.calls]
    return calls


def test_messages_hold_all_tensors_of_a_dtype_and_go_to_the_ranks_of_the_table(machine):
    for rank in range(4):
        calls = calls_of(machine, rank)

        def flat(name: str, *sizes: int, parts: int = 0) -> list[tuple]:
            split = [((size // parts,) * parts if parts else (),) * 2 for size in sizes]
            return [(name, dtype, size, *s) for dtype, size, s in zip(("Float32", "Int32"), sizes, split, strict=True)]

        assert calls["AllReduce"] == flat("AllReduce sum", 24, 8)
        assert calls["AllGather"] == flat("AllGather", 24, 8) + flat("ReduceScatter sum", 96, 32)
        assert calls["ReduceScatter"] == flat("ReduceScatter sum", 24, 8) + flat("AllGather", 6, 2)
        assert calls["AllToAll"] == 2 * flat("AlltoAllV", 24, 8, parts=4)
        for call, step in zip(calls["Shift"], (1, 1, -1, -1), strict=True):
            name, _, size, gives, takes = call
            assert (name, sum(gives), sum(takes)) == ("AlltoAllV", size, size)
            assert gives[(rank + step) % 4] == takes[(rank - step) % 4] == size


def test_a_channel_has_a_group_for_each_pair_of_this_rank_and_names_ranks_of_the_world(machine):
    recorder, made = connect(4, machine, dp=1, pp=4, tp=2)
    forward = made.Channel("pp", "forward", [(0, 1), (1, 2), (2, 3), (2, 1)])
    groups = [call[1:] for call in recorder.calls if call[0] == "create_group"]
    of_pairs = [(f"busway-pp-forward-{a}-{b}", sorted((a, b))) for a, b in [(2, 4), (4, 2), (4, 6)]]
    assert groups == [("busway-pp-0-6-4", [0, 2, 4, 6]), *of_pairs]
    recorder.calls.clear()
    x = Tensor(np.ones((2, 3), np.float32))
    for _ in range(2):
        forward.send(x, 3)
        arrival = forward.receive((2, 3), ms.float32, 1)
        assert arrival.ready() and arrival.wait().asnumpy().tolist() == [[7, 7, 7]] * 2
    forward.send(x.astype(ms.int32), 1)
    assert recorder.calls == [
        *[("isend", 6, "busway-pp-forward-4-6"), ("irecv", 2, "busway-pp-forward-2-4")] * 2,
        ("isend", 2, "busway-pp-forward-4-2"),
    ]
    keys = ("axis", "collective", "dtype", "payload_bytes", "calls")
    rows = [tuple(row[key] for key in keys) for row in made.traffic().rows()]
    assert rows == [("pp", "send", "float32", 48, 2), ("pp", "send", "int32", 24, 1)]
    # All ranks hold the same here, so what this one received nobody sent.
    with pytest.raises(RuntimeError, match="channel forward over pp: rank 0 sent 1 to rank 2, which asked for 0"):
        forward.check_drained()


def test_one_bucket_of_gradients_is_one_row_of_the_account(machine):
    _, made = connect(0, machine)
    primitive = made.AllReduce("loss")
    primitive((Tensor(np.zeros((10, 10), np.float32)), Tensor(np.zeros(3, np.float32))))
    expected = Traffic()
    expected.add(made.mesh, 0, "loss", "all_reduce", "float32", 4 * (100 + 3))
    assert made.traffic().rows() == expected.rows()


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


class ForwardAndBackward(nn.Cell):
    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment

    def construct(self, x, dy, w):
        y, saved = self.segment.forward(x, (w,), ())
        dx, gradients = self.segment.backward(dy, saved, (w,), ())
        return y, dx, gradients[0]


@pytest.mark.parametrize("kind", ["none", "emulated"])
def test_rounding_before_tokens_are_gathered_has_the_bits_of_rounding_after(machine, kind):
    """All ranks hold the same here: what is gathered is there twice, and a sum is twice what the first rank has."""
    _, made = connect(0, machine, dp=1, tp=2)
    rng, weight, kernels = np.random.default_rng(0), [Weight("w", ())], choose("auto", "fp32", "CPU")
    x, dy, w = (Tensor(rng.standard_normal(shape, np.float32)) for shape in ((8, 6), (8, 10), (10, 6)))
    whole = Linear(weight, kind, kernels)
    segments = (GatheredLinear(weight, kind, kernels, made), Chain([whole, Scatter(made, kind)]))
    gathered = ForwardAndBackward(segments[0])(x[:4], dy, w)
    scattered = ForwardAndBackward(segments[1])(x, dy[:4], w)
    linear = ForwardAndBackward(Linear(weight, kind, kernels))
    y, dx, dw = linear(ops.concat((x[:4], x[:4])), dy, w)
    wanted = [y, 2 * dx[:4], dw]
    y, dx, dw = linear(x, ops.concat((dy[:4], dy[:4])), w)
    for one, other in zip((*gathered, *scattered), (*wanted, 2 * y[:4], dx, dw), strict=True):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


def test_rows_are_padded_to_their_room_and_counted_on_the_device():
    exchange = HcclExchange(Moved(), 2, Room(2, 1), "exchange")
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    came = exchange(Tensor(rows), Tensor([1, 3], ms.int32), Tensor([2, 2], ms.int32))
    assert came.asnumpy().tolist() == [*rows.tolist(), *np.zeros((4, 3)).tolist()]
    row = DTYPES.index("float32")
    assert exchange.counts()[row].tolist() == [48, 1]
    assert exchange.sent()[row].tolist() == [12, 36]


def test_rows_beyond_their_room_end_the_run():
    exchange = HcclExchange(Moved(), 2, Room(1, 1), "exchange")
    rows = Tensor(np.ones((4, 3), np.float32))
    exchange(rows, Tensor([2, 2], ms.int32), Tensor([2, 2], ms.int32))
    exchange.sent()
    exchange(rows, Tensor([2, 2], ms.int32), Tensor([2, 5], ms.int32))
    with pytest.raises(RuntimeError, match="3 rows of experts found no room"):
        exchange.sent()
