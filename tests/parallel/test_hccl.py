"""The Ascend backend against recording stand-ins: compiled on CPU with numbers, and as plain Python with shapes."""

from __future__ import annotations

import math
from collections import deque
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.collectives import Collectives
from parallel.collectives.hccl import HcclBackend
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.traffic import Traffic

PRIMITIVES = ("AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Shift", "Broadcast")


class Operator(nn.Cell):
    """An HCCL operator in a world whose ranks all hold the same, as rank number `place` of `size` sees it."""

    def __init__(self, name: str, place: int, size: int) -> None:
        super().__init__()
        self.name, self.place, self.size, self.attributes = name, place, size, {}

    def add_prim_attr(self, name, value):
        self.attributes[name] = value

    def construct(self, x=None, gives=None, takes=None):
        if self.name == "AllReduce":
            return x * self.size
        if self.name == "AllGather":
            return ops.tile(x, (self.size,))
        if self.name == "ReduceScatter":
            return self.part(x) * self.size
        if self.name == "AlltoAllV":
            return ops.tile(self.part(x), (self.size,)) if min(gives) > 0 else x
        if self.name == "Receive":
            return ops.full((2, 3), 7.0)
        return x

    def part(self, x):
        length = x.size // self.size
        return x[self.place * length : (self.place + 1) * length]


class Shape(SimpleNamespace):
    """A tensor without numbers."""

    @property
    def size(self):
        return math.prod(self.shape)

    def reshape(self, shape):
        known = -math.prod(shape)
        return Shape(shape=tuple(self.size // known if size == -1 else size for size in shape), dtype=self.dtype)

    def astype(self, dtype):
        return Shape(shape=self.shape, dtype=dtype)

    def __getitem__(self, key):
        rows, columns = key
        return Shape(shape=(*self.shape[:1], columns.stop - columns.start), dtype=self.dtype)


class Plain:
    """An HCCL operator that notes what it is called with and returns a shape."""

    def __init__(self, name: str, group: str, size: int, calls: list) -> None:
        self.name, self.group, self.size, self.calls = name, group, size, calls

    def add_prim_attr(self, name, value):
        pass

    def __call__(self, x, *more):
        message = x[0] if isinstance(x, tuple) else x
        self.calls.append((self.name, self.group, str(message.dtype), message.size, *more))
        factor = {"AllGather": self.size, "ReduceScatter": 1 / self.size}.get(self.name, 1)
        result = Shape(shape=(int(message.size * factor),), dtype=message.dtype)
        return (result,) if isinstance(x, tuple) else result


class Recorder:
    """In the places of mindspore.ops and mindspore.communication, as one rank of `size` sees them."""

    HCCL_WORLD_COMM_GROUP = "hccl_world_group"

    def __init__(self, rank: int, size: int, plain: bool = False) -> None:
        self.rank, self.plain = rank, plain
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

    def Send(self, sr_tag, dest_rank, group):
        return self._make("Send", group, sr_tag, dest_rank)

    def Receive(self, sr_tag, src_rank, shape, dtype, group):
        return self._make("Receive", group, sr_tag, src_rank, shape, dtype)

    def _make(self, name, group, *arguments):
        self.calls.append((name, *arguments, group))
        ranks = self.groups[group]
        if self.plain:
            return Plain(name, group, len(ranks), self.calls)
        self.made.append(Operator(name, ranks.index(self.rank), len(ranks)))
        return self.made[-1]


def connect(rank: int, machine, plain: bool = False, **layout: int) -> tuple[Recorder, Collectives]:
    mesh = Mesh(Layout(**layout or {"dp": 2, "tp": 2}), machine("any"))
    recorder = Recorder(rank, mesh.world_size, plain)
    return recorder, Collectives(mesh, HcclBackend(recorder, recorder))


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


@pytest.fixture
def plain_python(monkeypatch):
    """Cells run as plain Python, and tensors may be `Shape`s."""

    def concat(blocks, axis):
        assert axis == 1
        return Shape(shape=(blocks[0].shape[0], sum(block.shape[1] for block in blocks)), dtype=blocks[0].dtype)

    monkeypatch.setattr("parallel.collectives.packing.ops.concat", concat)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


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


def calls_of(machine, rank: int) -> dict[str, list[tuple]]:
    """What each primitive over four ranks calls with shapes alone, forward and backward."""
    recorder, made = connect(rank, machine, plain=True)
    tensors = tuple(Shape(shape=shape, dtype=dtype)
                    for shape, dtype in [((4, 3), ms.float32), ((8,), ms.int32), ((12,), ms.float32)])  # fmt: skip
    calls = {}
    for name in PRIMITIVES[:-1]:
        primitive = getattr(made, name)("dense")
        recorder.calls.clear()
        back = primitive.backward(primitive.forward(tensors))
        assert back == tensors
        calls[name] = list(recorder.calls)
    return calls


def test_messages_hold_all_tensors_of_a_dtype_and_go_to_the_ranks_of_the_table(machine, plain_python):
    group = "busway-dp-tp-0-3-4"
    ranks = [calls_of(machine, rank) for rank in range(4)]
    for rank, calls in enumerate(ranks):

        def flat(name: str, floats: int, integers: int) -> list[tuple]:
            return [(name, group, "Float32", floats), (name, group, "Int32", integers)]

        assert calls["AllReduce"] == flat("AllReduce", 24, 8)
        assert calls["AllGather"] == flat("AllGather", 24, 8) + flat("ReduceScatter", 96, 32)
        assert calls["ReduceScatter"] == flat("ReduceScatter", 24, 8) + flat("AllGather", 6, 2)
        equal = [call + ((size,) * 4,) * 2 for call, size in zip(flat("AlltoAllV", 24, 8), (6, 2), strict=True)]
        assert calls["AllToAll"] == 2 * equal
        for call, step in zip(calls["Shift"], (1, 1, -1, -1), strict=True):
            name, _, _, size, gives, takes = call
            assert (name, sum(gives), sum(takes)) == ("AlltoAllV", size, size)
            assert gives[(rank + step) % 4] == takes[(rank - step) % 4] == size


def test_ranks_never_wait_for_each_other_in_a_circle_to_make_groups(machine):
    """`create_group` returns when all ranks of the group have called it."""
    waiting = []
    for rank in range(16):
        recorder, made = connect(rank, machine, pp=4, dp=2, tp=2)
        made.AllGather("tp")
        made.Channel("pp", "forward"), made.Channel("pp", "backward")
        made.ReduceScatter("loss"), made.AllReduce("dense")
        waiting.append(deque(call[1:] for call in recorder.calls if call[0] == "create_group"))
    while any(waiting):
        ready = {group[0] for group in (queue[0] for queue in waiting if queue)
                 if all(waiting[rank] and waiting[rank][0] == group for rank in group[1])}  # fmt: skip
        assert ready, [queue[0] for queue in waiting if queue]
        for queue in waiting:
            if queue and queue[0][0] in ready:
                queue.popleft()


def test_a_channel_sends_and_receives_over_a_group_of_its_own_in_each_direction(machine):
    recorder, made = connect(4, machine, dp=1, pp=4, tp=2)
    forward = made.Channel("pp", "forward")
    groups = [call[1:] for call in recorder.calls if call[0] == "create_group"]
    pairs = [(2, 4), (4, 2), (4, 6), (6, 4)]
    of_pairs = [(f"busway-pp-forward-{a}-{b}", sorted((a, b))) for a, b in pairs]
    assert groups == [("busway-pp-0-6-4", [0, 2, 4, 6]), *of_pairs]
    recorder.calls.clear()
    x = Tensor(np.ones((2, 3), np.float32))
    for _ in range(2):
        forward.send(x, 3)
        arrival = forward.receive((2, 3), ms.float32, 1)
        assert arrival.ready() and arrival.wait().asnumpy().tolist() == [[7, 7, 7]] * 2
    forward.send(x.astype(ms.int32), 1)
    assert recorder.calls == [
        ("Send", 0, 1, "busway-pp-forward-4-6"),
        ("Receive", 0, 0, [2, 3], ms.float32, "busway-pp-forward-2-4"),
        ("Send", 0, 0, "busway-pp-forward-4-2"),
    ]
    assert all(operator.attributes == {"side_effect_io": True} for operator in recorder.made[2:])
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
