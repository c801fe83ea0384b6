"""A rank's training step as plain Python on shapes: HCCL's operators are noted down, and nothing is computed.

The trainer, the techniques of `parallel/`, the segments, the kernels and the primitives are the real ones; so is the
HCCL backend. What they call of MindSpore has a stand-in here that knows the shape and dtype of its result, and an
operator without one is an error. Weights are never made. Ranks are recorded one at a time, in one process, so a value
that ranks would exchange on the host is this rank's own.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from models.kernels import ascend
from models.weights import Weight
from parallel.collectives import Collectives, hccl
from parallel.collectives.channel import Channel
from parallel.mesh import DENSE, Mesh
from parallel.traffic import Traffic, step_traffic
from parallel.zero import Zero
from trainer import precision, step
from trainer.build import assemble
from trainer.data.loader import Batch
from trainer.recipe import Recipe

WORLD = "hccl_world_group"
WIDTHS = (ms.bool_, ms.uint8, ms.int32, ms.int64, ms.bfloat16, ms.float32, ms.float64)
"""Of two dtypes that meet, the result has the later one."""


class Shape:
    """A tensor without numbers; small ones made on the host keep theirs, for what is counted."""

    def __init__(self, value: Any, dtype: Any = None) -> None:
        array = np.asarray(value)
        kind = "bool_" if array.dtype == bool else array.dtype.name
        self.shape, self.dtype = array.shape, dtype or getattr(ms, kind)
        self.value = array if array.size <= 64 else None

    @staticmethod
    def of(shape: tuple[int, ...], dtype: Any) -> Shape:
        made = object.__new__(Shape)
        made.shape, made.dtype, made.value = tuple(shape), dtype, None
        return made

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def data(self) -> Shape:
        return self

    def set_data(self, other: Shape) -> None:
        self.value = other.value

    def asnumpy(self) -> np.ndarray:
        return np.broadcast_to(np.float32(0), self.shape) if self.value is None else self.value

    def astype(self, dtype: Any) -> Shape:
        return Shape.of(self.shape, dtype)

    def reshape(self, *shape: Any) -> Shape:
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        known = math.prod(size for size in shape if size != -1)
        shape = tuple(self.size // known if size == -1 else size for size in shape)
        if math.prod(shape) != self.size:
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        return Shape.of(shape, self.dtype)

    def transpose(self, *axes: Any) -> Shape:
        axes = axes[0] if isinstance(axes[0], tuple) else axes
        return Shape.of([self.shape[axis] for axis in axes], self.dtype)

    def __getitem__(self, key: Any) -> Shape:
        return Shape.of(np.broadcast_to(0, self.shape)[key].shape, self.dtype)

    def __neg__(self) -> Shape:
        return self.astype(self.dtype)

    def _with(self, other: Any) -> Shape:
        if isinstance(other, Shape):
            return Shape.of(_broadcast(self.shape, other.shape), max(self.dtype, other.dtype, key=WIDTHS.index))
        kind = ms.float32 if isinstance(other, float) else self.dtype
        return Shape.of(self.shape, max(self.dtype, kind, key=WIDTHS.index))

    def _compare(self, other: Any) -> Shape:
        return self._with(other).astype(ms.bool_)

    def sum(self, axis: Any = ()) -> Shape:
        return reduce(self, axis)

    @property
    def T(self) -> Shape:
        return self.transpose(1, 0)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _with
    __mod__ = __floordiv__ = _with
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compare
    __hash__ = object.__hash__


_broadcast = cache(np.broadcast_shapes)


class Shapes(tuple):
    """In the place of ParameterTuple."""

    def clone(self, prefix: str, init: str) -> Shapes:
        return Shapes(parameter(p) for p in self)


def parameter(tensor: Shape, name: str = "", requires_grad: bool = True) -> Shape:
    made = tensor.astype(tensor.dtype)
    made.value = tensor.value
    return made


def like(x: Shape, *rest: Any) -> Shape:
    return x.astype(x.dtype)


def with_(x: Shape, y: Any) -> Shape:
    return x._with(y)


def concat(tensors: tuple, axis: int = 0) -> Shape:
    shapes = [list(tensor.shape) for tensor in tensors]
    axis %= len(shapes[0])
    total = sum(shape.pop(axis) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes) or len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"cannot concatenate {[(tensor.shape, tensor.dtype) for tensor in tensors]} along {axis}")
    return Shape.of((*shapes[0][:axis], total, *shapes[0][axis:]), tensors[0].dtype)


def unstack(x: Shape, axis: int) -> tuple:
    axis %= len(x.shape)
    return (Shape.of((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype),) * x.shape[axis]


def stack(tensors: tuple, axis: int) -> Shape:
    axis %= len(tensors[0].shape) + 1
    return concat(tuple(x.reshape((*x.shape[:axis], 1, *x.shape[axis:])) for x in tensors), axis)


def matmul(a: Shape, b: Shape, transpose_a: bool = False, transpose_b: bool = False) -> Shape:
    *batch, m, k = (*a.shape[:-2], a.shape[-1], a.shape[-2]) if transpose_a else a.shape
    *same, inner, n = (*b.shape[:-2], b.shape[-1], b.shape[-2]) if transpose_b else b.shape
    if (batch, k, a.dtype) != (same, inner, b.dtype):
        raise ValueError(f"cannot multiply {a.shape} {a.dtype} and {b.shape} {b.dtype}")
    return Shape.of((*batch, m, n), a.dtype)


def reduce(x: Shape, axis: Any = (), keep_dims: bool = False) -> Shape:
    axes = range(len(x.shape)) if axis == () else [axis % len(x.shape)]
    kept = [1 if i in axes else size for i, size in enumerate(x.shape) if keep_dims or i not in axes]
    return Shape.of(kept, x.dtype)


def assign(target: Shape, value: Shape) -> Shape:
    if (target.shape, target.dtype) != (value.shape, value.dtype):
        raise ValueError(f"cannot assign {value.shape} {value.dtype} to {target.shape} {target.dtype}")
    return target


def assign_add(target: Shape, value: Shape) -> Shape:
    """What the device alone knows, as how much is dispatched, is not added to the account."""
    if target.value is not None and value.value is not None:
        EFFECTS.append(partial(add, target, value.value))
        EFFECTS[-1]()
    return assign(target, value)


def add(target: Shape, value: np.ndarray) -> None:
    target.value = target.value + value


EFFECTS: list[Any] = []
"""What the calls so far did: notes of collectives, and additions to the account."""


def gather(x: Shape, indices: Shape, axis: int) -> Shape:
    return Shape.of((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype)


def segment_sum(x: Shape, ids: Shape, count: int) -> Shape:
    return Shape.of((count, *x.shape[len(ids.shape) :]), x.dtype)


def top_k(x: Shape, count: int) -> tuple[Shape, Shape]:
    shape = (*x.shape[:-1], count)
    return Shape.of(shape, x.dtype), Shape.of(shape, ms.int32)


def expand_dims(x: Shape, axis: int) -> Shape:
    return x.reshape((*x.shape[:axis], 1, *x.shape[axis:]))


OPS = SimpleNamespace(
    ReduceOp=ms.ops.ReduceOp,
    partial=partial,
    HyperMap=lambda: lambda function, *items: tuple(map(function, *items)),
    depend=lambda value, *after: value,
    cast=Shape.astype, Cast=lambda: Shape.astype,
    concat=concat, Concat=lambda axis=0: partial(concat, axis=axis), stack=stack, unstack=unstack,
    assign=assign, assign_add=assign_add, AssignAdd=lambda: assign_add,
    MatMul=lambda **transposes: partial(matmul, **transposes),
    BatchMatMul=lambda **transposes: partial(matmul, **transposes),
    ReduceSum=lambda **keep: partial(reduce, **keep),
    ReduceMax=lambda **keep: partial(reduce, **keep),
    ReduceMean=lambda **keep: partial(reduce, **keep),
    TopK=lambda **order: top_k, Softmax=lambda axis: like, expand_dims=expand_dims, cumsum=like, sign=like,
    matmul=matmul, repeat_elements=lambda x, times, axis: concat((x,) * times, axis),
    logsumexp=lambda x, axis, keep_dims: reduce(x, axis, keep_dims),
    exp=like, log=like, sqrt=like, sigmoid=like, expm1=like, zeros_like=like, ones_like=like,
    clip_by_value=like, clamp=like, relu=like, masked_fill=like,
    maximum=with_, minimum=with_, logical_and=with_, logical_or=with_,
    select=lambda condition, x, y: Shape.of(_broadcast(condition.shape, with_(x, y).shape), x.dtype),
    zeros=Shape.of, ones=Shape.of,
    arange=lambda start, stop: Shape.of((stop - start,), ms.int64),
    broadcast_to=lambda x, shape: Shape.of(_broadcast(x.shape, shape), x.dtype),
    gather=gather, gather_d=lambda x, axis, indices: Shape.of(indices.shape, x.dtype),
    unsorted_segment_sum=segment_sum, UnsortedSegmentSum=lambda: segment_sum,
)  # fmt: skip


def rows(x: Shape) -> Shape:
    """A number for each row of the last dim, float32."""
    return Shape.of((*x.shape[:-1], 1), ms.float32)


def attend(q: Shape, k: Shape, v: Shape, *rest: Any) -> tuple:
    batch, seq, heads, _ = q.shape
    statistics = Shape.of((batch, heads, seq, 8), ms.float32)
    return statistics, statistics, None, like(q)


FUSED = SimpleNamespace(
    RmsNorm=lambda eps: lambda x, w: (like(x), rows(x)),
    RmsNormGrad=lambda: lambda dy, x, rstd, w: (like(x), w.astype(ms.float32)),
    RotaryPositionEmbedding=lambda: like,
    FlashAttentionScore=lambda *settings: attend,
    FlashAttentionScoreGrad=lambda *settings: lambda q, k, v, *rest: (like(q), like(k), like(v), None),
    Swiglu=lambda: lambda x, dim: Shape.of((*x.shape[:-1], x.shape[-1] // 2), x.dtype),
    SwigluGrad=lambda: lambda dy, x, dim: like(x),
    AdamWeightDecay=lambda: lambda *tensors: like(tensors[0]),
)  # fmt: skip
"""Ascend's, with the shapes that `models.kernels.ascend` documents."""


class Call(NamedTuple):
    """What a rank asked of HCCL, or waited for."""

    operator: str
    """Its class, with what else must be the same on all ranks; ``create_group``; ``isend`` and ``irecv``; ``wait``, for
    what the latter asked for; ``end`` of a graph, where messages are under way: see `test_hccl_layouts.run`.
    """
    group: int
    """In `Record.groups`."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    gives: tuple[int, ...] = ()
    """Of AlltoAllV: how many elements go to each rank of the group, and below how many come from it."""
    takes: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def offered(self) -> tuple:
        """What the others of the group must ask for too."""
        return self.operator, self.dtype, self.shape

    @property
    def wanted(self) -> tuple:
        """What the rank at the other end must ask for, if it is a message; else the same."""
        other = {"isend": "irecv", "irecv": "isend"}.get(self.operator, self.operator)
        return other, self.dtype, self.shape

    def __str__(self) -> str:
        return f"{self.operator} {self.dtype} {list(self.shape)}" if self.dtype else self.operator


class Record(NamedTuple):
    """What one rank asked for in a step, and then in an evaluation."""

    rank: int
    groups: list[tuple[str, tuple[int, ...]]]
    """Name and ranks, in the order in which it made them; the world is the first."""
    calls: list[Call]
    end: int
    """Of the step in `calls`."""
    account: Traffic
    """What the rank's own account says of the step."""


class Operator:
    """In the place of an operator of HCCL. `result` makes the result's shape of the message's."""

    def __init__(self, recorder: Recorder, name: str, group: str, result: Callable[[Shape], Any]) -> None:
        self.recorder, self.name, self.group, self.result = recorder, name, group, result

    def add_prim_attr(self, name: str, value: Any) -> None:
        assert (name, value) == ("side_effect_io", True)

    def __call__(self, message: Any, *counts: tuple[int, ...]) -> Any:
        message = message[0] if isinstance(message, tuple) else message
        known = [count for count in counts if isinstance(count, tuple)]  # how much is dispatched, the device knows
        self.recorder.note(self.name, self.group, str(message.dtype), message.shape, *known)
        return self.result(message)


class Recorder:
    """In the places of the modules that `hccl.HcclBackend` takes, as one rank sees them."""

    HCCL_WORLD_COMM_GROUP = WORLD

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.groups = rank, {WORLD: tuple(range(size))}
        self.calls: list[Call] = []
        self.numbers = {WORLD: 0}
        self.under_way = False

    def init(self) -> None:
        pass

    def get_rank(self) -> int:
        return self.rank

    def get_group_size(self) -> int:
        return len(self.groups[WORLD])

    def create_group(self, name: str, ranks: list[int]) -> None:
        assert name not in self.groups and len(name) < 128 and self.rank in ranks and len(ranks) > 1
        self.groups[name], self.numbers[name] = tuple(ranks), len(self.numbers)
        self.note("create_group", name)

    def note(self, operator: str, group: str, *what: Any) -> None:
        EFFECTS.append(partial(self.calls.append, Call(operator, self.numbers[group], *what)))
        EFFECTS[-1]()

    def AllReduce(self, op: str, group: str) -> Operator:
        return Operator(self, f"AllReduce {op}", group, like)

    def AllGather(self, group: str) -> Operator:
        n = len(self.groups[group])
        return Operator(self, "AllGather", group, lambda x: Shape.of((x.size * n,), x.dtype))

    def ReduceScatter(self, op: str, group: str) -> Operator:
        n = len(self.groups[group])
        return Operator(self, f"ReduceScatter {op}", group, lambda x: Shape.of((x.size // n,), x.dtype))

    def AlltoAllV(self, group: str) -> Operator:
        return Operator(self, "AlltoAllV", group, like)

    def Broadcast(self, root_rank: int, group: str) -> Operator:
        return Operator(self, f"Broadcast from {root_rank}", group, lambda x: (like(x),))

    def isend(self, tensor: Shape, dst: int, group: str) -> None:
        self._message("isend", tensor, dst, group)

    def irecv(self, tensor: Shape, src: int, group: str) -> SimpleNamespace:
        self._message("irecv", tensor, src, group)
        return SimpleNamespace(wait=partial(self.note, "wait", group))

    def _message(self, name: str, tensor: Shape, peer: int, group: str) -> None:
        assert sorted((peer, self.rank)) == list(self.groups[group])
        self.note(name, group, str(tensor.dtype), tensor.shape)
        self.under_way = True

    def end_graph(self) -> None:
        if self.under_way:
            self.note("end", WORLD)
        self.under_way = False


class HostGather:
    """In the place of `hccl.HostGather`, whose two gathers depend on what the other ranks hold."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator

    def gather(self, value: Any) -> list[Any]:
        recorder, group = self.operator.recorder, self.operator.group
        recorder.note("HostGather", group)
        recorder.end_graph()
        return [value] * len(recorder.groups[group])


class Graphs:
    """In the place of `nn.Cell.__call__`: runs `construct`, and as a compiled graph does, has the same effect whenever
    it is called with inputs of the same shapes. So many micro-batches take no longer than one.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.inside = recorder, False
        self.known: dict[tuple, tuple] = {}
        EFFECTS.clear()

    def __get__(self, cell: nn.Cell, kind: type) -> Any:
        return partial(self, cell)

    def __call__(self, cell: nn.Cell, *inputs: Any) -> Any:
        if self.inside:
            return cell.construct(*inputs)
        key = cell, *((x.shape, x.dtype) for x in inputs)
        if key in self.known:
            result, effects = self.known[key]
            for effect in effects:
                effect()
        else:
            start, self.inside = len(EFFECTS), True
            result = cell.construct(*inputs)
            self.inside = False
            self.known[key] = result, EFFECTS[start:]
        self.recorder.end_graph()
        return result


@contextmanager
def shapes_alone(recorder: Recorder) -> Iterator[None]:
    """Inside, Busway runs on `Shape`s."""
    stand_ins = [
        (ms.ops, OPS), (ms.ops.auto_generate, FUSED), (ms.Tensor, Shape), (ms.Parameter, parameter),
        (ms.ParameterTuple, Shapes),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("models", "parallel", "trainer"):
                for word, value in list(vars(module).items()):
                    for real, stand_in in stand_ins:
                        if value is real:
                            patch.setattr(module, word, stand_in)
        patch.setattr(nn.Cell, "__call__", Graphs(recorder))
        patch.setattr(hccl, "HostGather", HostGather)
        # Only all ranks together know whether what one sent was asked for: tests compare their records.
        patch.setattr(Channel, "check_drained", lambda channel: channel._transport.all_gather(None))
        patch.setattr(ascend, "_causal_corner", lambda: Shape.of((2048, 2048), ms.uint8))
        # Weights take gigabytes: of the arrays on the host only the shapes are there.
        patch.setattr(Weight, "stack", lambda weight, read: np.broadcast_to(np.float32(0), weight.shape))
        patch.setattr(Zero, "cut", lambda zero, weight, value: np.broadcast_to(np.float32(0), zero.shape(weight)))
        patch.setattr(step, "_parameter", lambda value, dtype, name: Shape.of(value.shape, getattr(ms, dtype.__name__)))
        yield


class Ranks:
    """The ranks of a recipe on Ascend devices."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.layout = recipe, recipe.parallel_layout
        self.mesh = Mesh(self.layout, recipe.machine)
        self.precision = precision.choose(recipe.train.precision, "Ascend")

    def record(self, rank: int) -> Record:
        """One step of `rank`, and one evaluation."""
        recorder = Recorder(rank, self.mesh.world_size)
        micro_batches = self.layout.check_batch(self.recipe.train.global_batch)
        zeros = np.zeros((micro_batches, self.layout.micro_batch * self.recipe.data.seq_len), np.int32)
        batch = Batch(zeros, zeros, zeros)
        with shapes_alone(recorder):
            collectives = Collectives(self.mesh, hccl.HcclBackend(recorder, recorder, recorder))
            train_step, *_ = assemble(self.recipe, collectives, "Ascend", None)
            train_step(batch, 1e-3, 1, False)
            end, account = len(recorder.calls), collectives.traffic()
            train_step.evaluate([batch])
        return Record(rank, list(recorder.groups.items()), recorder.calls, end, account)

    def predicted(self, rank: int) -> Traffic:
        """What the formulas say of a step."""
        train, linears = self.recipe.train, "bfloat16" if self.precision.rounding == "native" else None
        sizes = (self.recipe.model, self.recipe.data.seq_len, train.global_batch, self.precision.dtype.__name__)
        return step_traffic(self.mesh, rank, *sizes, linears)

    def role(self, rank: int) -> tuple[int, int]:
        """Ranks alike in it ask for the same in the same order, each of its own groups: stage, and place on a ring."""
        return self.mesh.index("pp", rank), self.mesh.index("cp", rank)

    def expand(self, record: Record) -> list[Record]:
        """`record` as all ranks of its role would have it."""
        mesh, first = self.mesh, record.rank
        spans = []
        for name, ranks in record.groups:
            axes = [axis for axis in DENSE if len({mesh.index(axis, rank) for rank in ranks}) > 1]
            whole = mesh.group(axes, first)
            spans.append((name, ranks, axes, whole.index(first), [whole.index(rank) for rank in ranks]))
        expanded = []
        for rank in range(mesh.world_size):
            if self.role(rank) == self.role(first):
                groups = []
                for name, ranks, axes, place, places in spans:
                    whole = mesh.group(axes, rank)
                    own = tuple(whole[i] for i in _alike(places, place, whole.index(rank)))
                    groups.append((_renamed(name, dict(zip(ranks, own, strict=True))), own))
                expanded.append(record._replace(rank=rank, groups=groups))
        return expanded


def _alike(places: list[int], place: int, other: int) -> list[int]:
    """The places of the group of `other`, where `places`, evenly spaced, are those of the group of `place`."""
    if place == other:
        return places
    stride = places[1] - places[0]
    start = other // (stride * len(places)) * stride * len(places) + other % stride
    return [start + i * stride for i in range(len(places))]


def _renamed(name: str, ranks: dict[int, int]) -> str:
    """Names end in two ranks, and perhaps in how many there are."""
    if name == WORLD:
        return name
    prefix, first, last, count = re.fullmatch(r"(\D+)(\d+)-(\d+)(-\d+)?", name).groups("")
    return f"{prefix}{ranks[int(first)]}-{ranks[int(last)]}{count}"
