"""Collectives over MPI, in one world of four ranks (collectives_world.py), and of one rank in this process."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from models.checks import ConfigError
from parallel import collectives
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.traffic import Traffic

SCRIPT = Path(__file__).with_name("collectives_world.py")
LIBRARY = Path(collectives.__file__).with_name("_mpi_ops.so")
GROUPS = {
    "dp": [(0, 2), (1, 3)],
    "tp": [(0, 1), (2, 3)],
    "cp": [(0,), (1,), (2,), (3,)],
    "loss": [(0, 2), (1, 3)],
    "dense": [(0, 1, 2, 3)],
    "ep": [(0, 1, 2, 3)],
}
FORMS = [
    "python",
    pytest.param("native", marks=pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ operators are not built")),
]
each_form = pytest.mark.parametrize("form", FORMS)


def load_script():
    spec = importlib.util.spec_from_file_location("collectives_world", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture(scope="module")
def numbers():
    return load_script().numbers


def group_of(axes: str, rank: int) -> tuple[int, ...]:
    return next(group for group in GROUPS[axes] if rank in group)


@each_form
@pytest.mark.parametrize("axes", GROUPS)
def test_tensors_of_every_dtype_are_summed_over_the_group_of_their_axes(world, numbers, form, axes):
    tolerance = {"Float64": 1e-15, "Float32": 1e-6, "BFloat16": 1e-2, "Int32": 0}
    for rank, seen in enumerate(world[1]):
        sums = seen[form]["sums"][axes]
        expected = [sum(numbers(peer)[i].astype(np.float64) for peer in group_of(axes, rank)) for i in range(6)]
        assert " ".join(dtype for dtype, _ in sums) == "Float32 Float64 Int32 Float32 Float32 BFloat16"
        for (dtype, result), wanted in zip(sums, expected, strict=True):
            if wanted.size == 0:
                assert result == (0, 4)
            else:
                assert np.abs(result - wanted).max() <= tolerance[dtype] * np.abs(wanted).max() + 1e-15


@each_form
def test_all_members_of_a_group_hold_the_same_bits(world, form):
    for axes, groups in GROUPS.items():
        for group in groups:
            for one, other in zip(*(world[1][rank][form]["sums"][axes] for rank in (group[0], group[-1])), strict=True):
                np.testing.assert_array_equal(one[1], other[1])


@each_form
def test_payload_counts_every_run_and_one_message_a_dtype(world, numbers, form):
    # RUNS = 3 runs; dp and loss are one group here, and so are dense and ep as sets of ranks, on rows of their own.
    bytes_of = {"float32": 4 * (15 + 129), "float64": 8 * 7, "int32": 4 * 4, "bfloat16": 2 * 12}
    calls = {"dp": 2, "tp": 1, "dp x tp": 1, "ep": 1}
    for seen in world[1]:
        rows = {(row["axis"], row["dtype"]): (row["payload_bytes"], row["calls"]) for row in seen[form]["traffic"]}
        assert rows == {
            (axis, dtype): (3 * count * size, 3 * count)
            for axis, count in calls.items()
            for dtype, size in bytes_of.items()
        }
        assert {row["collective"] for row in seen[form]["traffic"]} == {"all_reduce"}
        assert seen[form]["after reset"] == []


@each_form
def test_equal_calls_are_not_merged_and_unused_ones_not_removed(world, form):
    for rank, seen in enumerate(world[1]):
        assert seen[form]["repeated"] == [sum(peer + 1 for peer in group_of("dp", rank))] * 3
        (row,) = seen[form]["repeated traffic"]
        assert row["calls"] == 4 and row["payload_bytes"] == 16


@each_form
def test_independent_calls_meet_in_one_order_on_all_ranks(world, form):
    for rank, seen in enumerate(world[1]):
        for run, results in enumerate(seen[form]["independent"]):
            expected = []
            for i in range(4):
                for axes, factor in (("dp", 1), ("tp", 10), ("dense", 100)):
                    expected.append(factor * sum(i + 4 * peer + run for peer in group_of(axes, rank)))
            assert results == expected


@each_form
def test_every_bfloat16_survives_the_way_through_float32(world, form):
    every = load_script().halves(0)
    for seen in world[1]:
        np.testing.assert_array_equal(seen[form]["halves"], every)


@each_form
def test_a_dtype_that_cannot_be_summed_is_refused_when_the_graph_is_built(world, form):
    for seen in world[1]:
        error = seen[form]["int64"]
        assert "all_reduce takes tensors of Float64, Float32, BFloat16, Int32, but one is Int64" in error


@pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ operators are not built")
def test_a_collective_does_not_wait_for_another_one_that_a_second_thread_runs(world):
    assert all(seen["two threads"] for seen in world[1])


def test_the_host_helpers_reach_all_ranks(world):
    for seen in world[1]:
        assert seen["host"]["broadcast"] == {"from": 2}
        assert seen["host"]["all_gather"] == ["", "a", "ab", "abc"]
        assert seen["host"]["reduce_max"] == [3, 0]
        assert np.isnan(seen["host"]["reduce_max of nan"][0])


def test_a_rank_that_waits_leaves_the_core_to_one_that_works(world):
    # Spinning would take the whole second.
    assert all(seen["host"]["cpu seconds while waiting"] < 0.5 for seen in world[1])


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
            self.primitive = made.AllReduce("loss")

        def construct(self, x):
            return self.primitive.backward(self.primitive.forward((x,)))[0]

    assert Step()(Tensor(np.array([3], np.int64))).asnumpy() == [3]
    assert made.AllReduce("loss").operator is None
    assert made.traffic().rows() == Traffic().rows() == []
    assert (made.rank, made.world.size, made.describe()) == (0, 1, "local")
    assert made.world.all_gather("a") == ["a"] and made.world.broadcast("b") == "b"
    assert made.world.reduce_max([1.5]).tolist() == [1.5]


def test_a_layout_of_several_ranks_in_a_world_of_one_is_the_product_error(machine):
    with pytest.raises(ConfigError, match="= 2, but the world has 1 rank"):
        collectives.connect(Mesh(Layout(dp=2), machine("any")), backend="local")
