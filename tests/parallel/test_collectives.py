"""Collectives over MPI, in one world of four ranks (collectives_world.py), and of one rank in this process."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import collectives_world as script
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from models.checks import ConfigError
from parallel import collectives
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.traffic import DTYPE_BYTES, Traffic

SCRIPT = Path(__file__).with_name("collectives_world.py")
LIBRARY = Path(collectives.__file__).with_name("_mpi_ops.so")
GROUPS = {
    "dp": [(0, 2), (1, 3)],
    "cp": [(0,), (1,), (2,), (3,)],
    "dense": [(0, 1, 2, 3)],
}
PRIMITIVES = ("AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Shift", "Broadcast")
FORMS = [
    "python",
    pytest.param("native", marks=pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ operators are not built")),
]
each_form = pytest.mark.parametrize("form", FORMS)
each_primitive = pytest.mark.parametrize("primitive", PRIMITIVES)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`(exit code, what each rank saw)` of the world."""
    folder = tmp_path_factory.mktemp("world")
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [mpiexec, "-n", "4", sys.executable, "-P", str(SCRIPT), str(folder / "seen")]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (folder / "seen").exists(), ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.returncode, pickle.loads((folder / "seen").read_bytes())


def group_of(axes: str, rank: int) -> tuple[int, ...]:
    return next(group for group in GROUPS[axes] if rank in group)


def result(primitive: str, inputs: list[np.ndarray], place: int) -> np.ndarray:
    """What the rank at `place` gets when rank i of the group puts in `inputs[i]`; the last is the root."""
    n = len(inputs)
    if primitive in ("AllReduce", "ReduceScatter"):
        total = np.sum(inputs, axis=0)
        return total if primitive == "AllReduce" else np.split(total, n)[place]
    if primitive == "AllGather":
        return np.concatenate(inputs)
    if primitive == "AllToAll":
        return np.concatenate([np.split(one, n)[place] for one in inputs])
    return inputs[place - 1 if primitive == "Shift" else -1]


def gradient(primitive: str, gradients: list[np.ndarray], place: int) -> np.ndarray:
    """The same for the backward."""
    n = len(gradients)
    if primitive == "AllReduce":
        return gradients[place]
    if primitive == "Shift":
        return gradients[(place + 1) % n]
    if primitive == "Broadcast":
        total = np.sum(gradients, axis=0)
        return total if place == n - 1 else np.zeros_like(total)
    other = {"AllGather": "ReduceScatter", "ReduceScatter": "AllGather", "AllToAll": "AllToAll"}
    return result(other[primitive], gradients, place)


def check(seen: list[tuple], expected: list[np.ndarray], dtypes: tuple[str, ...]) -> None:
    """`seen` as `contents` in collectives_world.py gives it."""
    for (dtype, shape, values), wanted, wanted_dtype in zip(seen, expected, dtypes, strict=True):
        assert dtype.lower() == wanted_dtype and shape == wanted.shape
        if wanted.size:
            np.testing.assert_array_equal(values, wanted)


@each_form
@each_primitive
@pytest.mark.parametrize("axes", GROUPS)
def test_tensors_of_every_dtype_and_shape_travel_within_the_group_of_their_axes(world, form, primitive, axes):
    for rank, seen in enumerate(world[1]):
        forward, backward = seen[form]["results"][axes][primitive]
        group = group_of(axes, rank)
        results, gradients = [], []
        for inputs in zip(*(script.numbers(peer) for peer in group), strict=True):
            outputs = [result(primitive, list(inputs), place) for place in range(len(group))]
            results.append(outputs[group.index(rank)])
            gradients.append(gradient(primitive, outputs, group.index(rank)))
        check(forward, results, script.DTYPES)
        check(backward, gradients, script.DTYPES)


@each_form
@each_primitive
def test_the_backward_is_the_transpose_of_the_forward(world, form, primitive):
    left, right = np.sum([seen[form]["products"][primitive] for seen in world[1]], axis=0)
    assert left == pytest.approx(right, rel=1e-12) and abs(left) > 1


@each_form
def test_a_sum_has_the_same_bits_on_every_rank(world, form):
    assert len({seen[form]["digest"] for seen in world[1]}) == 1
    expected = np.sum([script.fractions(rank).astype(np.float64) for rank in range(4)], axis=0)
    assert np.abs(world[1][0][form]["total"] - expected).max() < 1e-6


@pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ operators are not built")
def test_a_reduce_scatter_has_the_bits_of_an_all_reduce_which_adds_ranks_in_order(world):
    total = script.fractions(0)
    for rank in range(1, 4):
        total = total + script.fractions(rank)
    np.testing.assert_array_equal(world[1][0]["native"]["total"], total)
    assert all(seen["native"]["part of total"] for seen in world[1])


@each_form
@pytest.mark.parametrize("axes", GROUPS)
def test_payload_counts_every_run_and_one_message_a_dtype(world, form, axes):
    """Forward and backward run RUNS = 3 times; a backward is handed what the forward returned."""
    sizes = dict.fromkeys(script.DTYPES, 0)
    for dtype, shape in zip(script.DTYPES, script.SHAPES, strict=True):
        sizes[dtype] += DTYPE_BYTES[dtype] * int(np.prod(shape))
    n = len(GROUPS[axes][0])
    # collective -> (payloads in units of the inputs, messages of a run)
    runs = {
        "all_reduce": (2, 2),  # AllReduce, and the backward of Broadcast
        "all_gather": (1 + 1 / n, 2),
        "reduce_scatter": (n + 1, 2),
        "all_to_all": (2, 2),
        "send": (2, 2),
        "broadcast": (1, 1),
    }
    wanted = {
        (collective, dtype): (round(3 * units * size), 3 * calls)
        for collective, (units, calls) in (runs if n > 1 else {}).items()
        for dtype, size in sizes.items()
    }
    axis = {"dense": "dp x tp"}.get(axes, axes)
    for seen in world[1]:
        rows = seen[form]["traffic"][axes]
        assert {(row["collective"], row["dtype"]): (row["payload_bytes"], row["calls"]) for row in rows} == wanted
        assert {row["axis"] for row in rows} <= {axis}
        assert seen[form]["after reset"] == []


@each_form
@each_primitive
def test_equal_calls_are_not_merged_and_unused_ones_not_removed(world, form, primitive):
    for rank, seen in enumerate(world[1]):
        results, (row,) = seen[form]["repeated"][primitive]
        group = group_of("dp", rank)
        inputs = [np.arange(2) + 10 * peer for peer in group]
        assert results == [result(primitive, inputs, group.index(rank)).tolist()] * 3
        assert row["calls"] == 4 and row["payload_bytes"] == 32


@each_form
def test_independent_calls_meet_in_one_order_on_all_ranks(world, form):
    for rank, seen in enumerate(world[1]):
        for run, results in enumerate(seen[form]["independent"]):
            expected = []
            for i in range(4):
                expected.append(sum(i + 4 * peer + run for peer in group_of("dp", rank)))
                expected.append(10 * (i + 4 * (rank ^ 1) + run))  # tp is (0, 1) and (2, 3)
                expected.append(100 * sum(i + 4 * peer + run for peer in range(4)))
            assert results == expected


@each_form
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_in_any_number_go_by_rank_and_their_gradients_come_back(world, form, dtype):
    counts = script.rows_between()
    given = [np.arange(24).reshape(8, 3) + 100 * rank for rank in range(4)]
    starts = np.cumsum(counts, 1) - counts
    for rank, seen in enumerate(world[1]):
        shape, came, back = seen[form]["exchange"][dtype]
        assert shape == (12, 3)
        parts = [given[r][starts[r, rank] : starts[r, rank] + counts[r, rank]] for r in range(4)]
        np.testing.assert_array_equal(came, np.concatenate(parts))
        np.testing.assert_array_equal(back, 2 * given[rank][: counts[rank].sum()])


@each_form
def test_rows_are_counted_by_the_rank_that_they_go_to(world, form):
    counts = script.rows_between()
    for rank, seen in enumerate(world[1]):
        rows = {row["dtype"]: row for row in seen[form]["exchange"]["traffic"]}
        there, back = counts[rank], counts[:, rank]
        for dtype, item in (("float32", 4), ("float64", 8)):
            assert rows[dtype]["collective"] == "all_to_all_v" and rows[dtype]["calls"] == 2
            assert rows[dtype]["payload_bytes"] == 3 * item * (there.sum() + back.sum())
            away = there.sum() + back.sum() - 2 * counts[rank, rank]
            assert rows[dtype]["wire_bytes"] == 3 * item * away


@each_form
def test_more_rows_than_there_is_room_for_are_an_error(world, form):
    assert all(seen[form]["exchange"]["no room"] for seen in world[1])


@each_form
def test_every_bfloat16_survives_a_sum(world, form):
    for seen in world[1]:
        np.testing.assert_array_equal(seen[form]["halves"], script.halves(0))


@each_form
def test_a_subgroup_is_the_ranks_at_its_places(world, form):
    assert [seen[form]["subgroup"] for seen in world[1]] == [[0, 3], [1, 2], [1, 2], [0, 3]]


@each_form
def test_axes_of_the_expert_view_have_rows_of_their_own(world, form):
    assert [seen[form]["experts"] for seen in world[1]] == [([0, 1, 2, 3], "ep")] * 4


@each_form
def test_what_cannot_be_sent_is_refused_when_the_graph_is_built(world, form):
    for seen in world[1]:
        dtype, shape = seen[form]["errors"]
        assert "all_reduce takes tensors of Float64, Float32, BFloat16, Int32, but one is Int64" in dtype
        assert "all_to_all takes tensors whose dim 0 is a multiple of 4, but one is [6, 2]" in shape


@pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ operators are not built")
def test_a_collective_does_not_wait_for_another_one_that_a_second_thread_runs(world):
    assert all(seen["two threads"] for seen in world[1])


def test_messages_of_a_channel_arrive_whole_and_in_order_with_receives_posted_ahead(world):
    for rank, seen in enumerate(world[1]):
        assert not any(seen["channels"]["ready before it was sent"])
        assert seen["channels"]["back"] == (rank + 1) % 4
        check(seen["channels"]["ahead"], script.numbers((rank - 1) % 4), script.DTYPES)


def test_a_channel_counts_what_it_sends(world):
    sizes: dict[str, tuple[int, int]] = {"float32": (4, 1)}
    for dtype, shape in zip(script.DTYPES, script.SHAPES, strict=True):
        payload, calls = sizes.get(dtype, (0, 0))
        sizes[dtype] = payload + DTYPE_BYTES[dtype] * int(np.prod(shape)), calls + 1
    for seen in world[1]:
        rows = seen["channels"]["traffic"]
        assert {row["dtype"]: (row["payload_bytes"], row["calls"]) for row in rows} == sizes
        assert {(row["axis"], row["collective"]) for row in rows} == {("dp x tp", "send")}
        assert all(row["wire_bytes"] == row["payload_bytes"] for row in rows)


def test_what_is_left_in_a_channel_is_an_error_on_every_rank_of_its_group(world):
    left = "channel unmatched over tp: rank 1 did not wait for float32 [1048576] from rank 0; "
    left += "rank 1 sent 1 to rank 0, which asked for 0"
    assert [seen["channels"]["unmatched"] for seen in world[1]] == [left, left, None, None]


def test_a_message_of_another_size_and_a_distant_peer_are_errors(world):
    for rank, seen in enumerate(world[1]):
        assert seen["channels"]["short"] == "asked for float32 [2, 2], but 12 bytes came"
        far = (rank + 2) % 4
        assert seen["channels"]["far"] == f"channel ahead carries nothing from place {rank} to place {far}"


def test_ranks_share_the_cores_of_their_machine_and_keep_what_they_have(world):
    for seen in world[1]:
        before, after, at_the_end = seen["cores"]
        assert after == at_the_end and set(after) <= set(before)
        taken = [core for other in world[1] for core in other["cores"][1]]
        if len(before) >= 4:
            assert sorted(taken) == before  # each once
        else:
            assert taken == [before[place % len(before)] for place in range(4)]


def test_the_host_helpers_reach_all_ranks(world):
    for seen in world[1]:
        assert seen["host"]["broadcast"] == {"from": 2}
        assert seen["host"]["all_gather"] == ["", "a", "ab", "abc"]
        assert seen["host"]["reduce_max"] == [3, 0]
        assert np.isnan(seen["host"]["reduce_max of nan"][0])


@pytest.mark.parametrize("where", ["host", "channels", *FORMS])
def test_a_rank_that_waits_leaves_the_core_to_one_that_works(world, where):
    # Spinning would take a whole core, or what other ranks leave of it.
    shares = [seen[where]["share of a core while waiting"] for seen in world[1]]
    assert max(shares) < 0.3, shares


def test_a_world_of_another_size_is_the_product_error(world):
    for seen in world[1]:
        assert seen["other size"].startswith("layout: pp 1 x dp 8 x cp 1 x tp 1 = 8, but the world has 4 ranks; ")


def test_the_backend_says_which_operators_run_and_why_the_slower_ones_do(world):
    for seen in world[1]:
        assert seen["not built"] == "mpi (Python operators, slower: the C++ ones are not built)"
        if LIBRARY.exists():
            assert seen["chosen"] == "mpi (C++ operators)"
            assert seen["foreign"] == "mpi (Python operators, slower: Open MPI 5.0.8 is not of MPICH's ABI)"
        else:
            assert seen["chosen"] == seen["not built"]


def test_an_abort_ends_ranks_that_wait_in_a_graph_with_its_code(world):
    assert world[0] == 7


def test_one_rank_needs_no_operator(machine):
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    made = collectives.connect(Mesh(Layout(dp=1), machine("any")))

    class Step(nn.Cell):
        def __init__(self):
            super().__init__()
            self.primitives = nn.CellList([getattr(made, name)("loss") for name in PRIMITIVES])

        def construct(self, x):
            for primitive in self.primitives:
                x = primitive.backward(primitive.forward((x,)))[0]
            return x

    assert Step()(Tensor(np.array([3], np.int64))).asnumpy() == [3]
    assert made.traffic().rows() == Traffic().rows() == []
    assert (made.rank, made.world.size, made.describe()) == (0, 1, "local")
    assert made.world.all_gather("a") == ["a"] and made.world.broadcast("b") == "b"
    assert made.world.reduce_max([1.5]).tolist() == [1.5]
    with pytest.raises(ValueError, match="channel x: a group of one rank has nobody to send to"):
        made.Channel("pp", "x", ())
    with pytest.raises(ValueError, match="root 1 is outside a group of 1 rank"):
        made.Broadcast("loss", root=1)


def test_a_layout_of_several_ranks_in_a_world_of_one_is_the_product_error(machine):
    with pytest.raises(ConfigError, match="= 2, but the world has 1 rank"):
        collectives.connect(Mesh(Layout(dp=2), machine("any")), backend="local")
