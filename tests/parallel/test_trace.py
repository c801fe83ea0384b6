"""The recorder of spans, the clocks of several machines, and the times that collectives take of themselves."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel import collectives, trace
from parallel.trace import COMPUTE, Recorder, clock_offset


def test_a_recorder_that_is_off_keeps_nothing():
    recorder = Recorder()
    with recorder.span(COMPUTE, "before"):
        pass
    recorder.on = True
    begin = time.monotonic()
    with recorder.span(COMPUTE, "while", stage=3):
        pass
    recorder.on = False
    with recorder.span(COMPUTE, "after"):
        pass
    (span,) = recorder.spans
    assert (span.thread, span.name, span.details) == (COMPUTE, "while", {"stage": 3})
    assert begin <= span.start <= span.end <= time.monotonic()


class World:
    """Rank `rank` of two machines of two ranks each, whose clocks are far apart."""

    clocks = (1000.0, 1000.0, 50.0, 50.0)

    def __init__(self, rank, monkeypatch, tmp_path):
        self.rank, self.now = rank, 0.0
        boot = tmp_path / "boot_id"
        boot.write_text(f"machine {rank // 2}")
        monkeypatch.setattr(trace, "BOOT", boot)
        monkeypatch.setattr(trace.time, "monotonic", lambda: self.clocks[rank] + self.now)

    def barrier(self):
        self.now += 1

    def all_gather(self, value):
        _, own = value
        elapsed = [stamp - self.clocks[self.rank] for stamp in own]
        late = [0.3] + [0.0] * (len(own) - 1)  # each of the others left one barrier late
        gathered = [
            (f"machine {rank // 2}", [clock + e + slow for e, slow in zip(elapsed, late, strict=True)])
            for rank, clock in enumerate(self.clocks)
        ]
        return gathered[: self.rank] + [value] + gathered[self.rank + 1 :]


@pytest.mark.parametrize(("rank", "offset"), [(0, 0.0), (1, 0.0), (2, -950.0), (3, -950.0)])
def test_clocks_of_other_machines_are_set_by_barriers(rank, offset, monkeypatch, tmp_path):
    assert clock_offset(World(rank, monkeypatch, tmp_path)) == pytest.approx(offset, abs=1e-6)


LIBRARY = Path(collectives.__file__).with_name("_mpi_ops.so")


def test_operators_of_both_forms_record_what_they_count(tmp_path):
    mpiexec, world = Path(sys.executable).with_name("mpiexec"), Path(__file__).with_name("trace_world.py")
    command = [str(mpiexec), "-n", "2", sys.executable, "-P", str(world), str(tmp_path / "seen")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = pickle.loads((tmp_path / "seen").read_bytes())
    assert seen.keys() == ({"native", "python"} if LIBRARY.exists() else {"python"})
    for before, window, spans, counted, after in seen.values():
        assert before == after == []
        found = [(span.name, span.details["axis"], span.details["dtype"], span.details["bytes"]) for span in spans]
        one = [("all_reduce dp", "dp", "float32", 400), ("all_reduce dp", "dp", "int32", 12)]
        two = [("send dp", "dp", "float32", 400), ("send dp", "dp", "int32", 12)]
        assert found == one * 3 + two * 3
        assert sum(span.details["bytes"] for span in spans) == counted
        assert all(window[0] <= span.start < span.end <= window[1] for span in spans)
