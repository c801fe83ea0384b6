"""`busway topology probe`: which ranks meet where, the fit, the file; and a world that is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from parallel import topology
from trainer import cli
from trainer.compose import compose_topology
from trainer.errors import MachineError
from trainer.probe import KINDS, Fit, described, finish, fit, meetings

FITS = {kind: Fit(10.0 / (i + 1), 3.0, 0.02) for i, kind in enumerate(KINDS)}
RANK = {"dtype": "float32", "tflops": 0.05, "memory_bandwidth": 8.0, "memory_gib": 8.0}


def boxes(**levels):
    """A machine of unknown speed; level -> members."""
    return topology.load(
        {
            "name": "boxes",
            "rank": {"name": "core", "memory_gib": None, "memory_bandwidth": None, "peak_tflops": None},
            "planes": {"network": {"injection": None}},
            "levels": [
                {"name": name, "members": count, "bandwidth": None, "latency": None, "plane": "network"}
                for name, count in levels.items()
            ],
        }
    )


def points(gb_s, us):
    """[bytes, seconds] of a level whose messages take `us` and `gb_s`."""
    return [[size, us * 1e-6 + size / gb_s * 1e-9] for size in (4096, 65536, 1 << 20, 1 << 24)]


def found(ranks, *levels):
    """What ranks measured."""
    kinds = {kind: {"ranks": 2, "points": points(10, 3)} for kind in KINDS}
    return {"ranks": ranks, "levels": dict.fromkeys(levels, kinds), "rank": RANK}


def test_groups_of_a_level_meet_there_first():
    machine = boxes(pair=2, box=3, cluster="any")
    assert meetings(machine, 12) == {
        "pair": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)],
        "box": [(0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11)],
        "cluster": [(0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11)],
    }
    for level, groups in meetings(machine, 12).items():
        assert {machine.level_of(a, b).name for group in groups for a in group for b in group if a != b} == {level}
    assert meetings(machine, 5)["box"] == [(0, 2, 4)]  # 1 and 3 have nobody in the last, half full pair
    assert meetings(boxes(pair=2, same=1), 2) == {"pair": [(0, 1)]}


def test_the_fit_finds_latency_and_bandwidth_and_how_far_it_is_off():
    exact = fit(points(12.5, 7), "messages")
    assert (exact.bandwidth, exact.latency) == pytest.approx((12.5, 7)) and exact.residual < 1e-9
    off = [[size, seconds * (1.1 if i % 2 else 0.9)] for i, (size, seconds) in enumerate(points(12.5, 7))]
    assert fit(off, "messages").residual == pytest.approx(0.1, rel=0.3)
    assert fit([[size, 1e-9 * size**1.01] for size, _ in points(1, 1)], "messages").latency == 0  # not below 0


def test_a_machine_too_busy_to_be_measured_gives_no_topology():
    with pytest.raises(MachineError, match="all_reduce took no longer for more bytes"):
        fit([[4096, 2e-3], [65536, 1e-3], [1 << 20, 1e-4], [1 << 24, 1e-5]], "all_reduce")


def test_the_planner_takes_the_file(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    finish(boxes(pair=2, box="any"), found(4, "pair", "box"), file)
    assert f"take it with topology={file}" in capsys.readouterr().out
    machine = compose_topology(str(file), [])
    assert [(level.ranks, level.bandwidth, level.latency) for level in machine.levels] == [(2, 10, 3), (4, 10, 3)]
    assert (machine.name, machine.capacity, machine.rank.memory_gib) == ("mine", 4, 8.0)
    assert machine.rank.peak_tflops == {"float32": 0.05, "bfloat16": 0.05}
    assert cli.main(["plan", "tiny_dense", f"topology={file}", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["topology"], plan["ranks"]) == ("mine", 4) and plan["step_s"] > 0


def test_links_of_a_mesh_are_measured_one_by_one():
    source = described(compose_topology("atlas_900_a2", []), found(16, "node"), {"node": FITS})
    node = topology.load(source).levels[0]
    assert (node.links, node.bandwidth, node.reach) == ("mesh", 10, 70)


def test_what_is_known_of_a_rank_stays_and_levels_are_as_measured():
    like = compose_topology("dgx_h100", [])
    source = described(like, found(12, "node", "cluster"), {"node": FITS, "cluster": FITS})
    machine = topology.load(source)
    assert machine.rank == like.rank and machine.planes == like.planes
    assert [(level.members, level.bandwidth) for level in machine.levels] == [(8, 10), (None, 10)]  # 12 is no two nodes
    assert (
        "node: GB/s point to point, the fit's residual 2%; 5 in all_reduce, 3.33 in all_gather, 2.5 in all_to_all."
        in (machine.notes)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--like", "dgx_h100", "--ranks", "8"),
            "--ranks 8 are too few to meet at level cluster of dgx_h100, which tak",
        ),
        (("--like", "cloudmatrix384", "--ranks", "1024"), "is more than the 768 that cloudmatrix384 holds"),
        (("--like", "laptopp"), "did you mean 'laptop'?"),
        (("--ranks", "1"), "--ranks must be at least 2"),
        (("--seconds", "0"), "--seconds must be above 0"),
        (("--out", "mine.json"), "must end in .yaml"),
        (("--out", "nowhere/mine.yaml"), "there is no nowhere"),
    ],
)
def test_bad_input_gives_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["topology", "probe", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_mpiexec_one_line_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["topology", "probe", "--ranks", "2"]) == 3
    error = capsys.readouterr().err
    assert "mpiexec is neither beside" in error and error.count("\n") == 1


def start(folder, *words):
    """The command, in a folder of its own."""
    command = [sys.executable, "-P", "-m", "trainer", "topology", "probe", "--ranks", "2", *words]
    environ = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_world_of_two_ranks_is_measured(tmp_path):
    process = start(tmp_path, "--seconds", "2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "laptop_probed.yaml: 2 ranks" in out
    machine = compose_topology(str(tmp_path / "laptop_probed.yaml"), [])
    assert machine.capacity == 2 and machine.levels[0].bandwidth > 0 and machine.rank.peak_tflops["float32"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["laptop_probed.yaml"]


@pytest.mark.slow
def test_one_signal_stops_every_rank(tmp_path):
    process = start(tmp_path, "--seconds", "600")
    while "measuring machine" not in process.stderr.readline():
        assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and time.monotonic() < began + 100
    assert "stopped; no topology was written" in err
    assert list(tmp_path.iterdir()) == []
