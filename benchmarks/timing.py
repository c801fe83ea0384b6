"""Workers that time one thing each, run in turn so that a noisy machine is equally unkind to all of them.

A worker prints `READY`, then answers each line `run N` on stdin with `T <median seconds of N steps> <value>`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

WARM_UP = 3


def serve(step: Callable[[], float]) -> None:
    """The worker's side; `step` does one step and returns its loss."""
    for _ in range(WARM_UP):
        step()
    print("READY", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line.split()[1])):
            begin = time.perf_counter()
            value = step()
            times.append(time.perf_counter() - begin)
        print(f"T {statistics.median(times):.6f} {value:.6f}", flush=True)


class Worker:
    """The driver's side of one worker process."""

    def __init__(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name = name
        self.times: list[float] = []
        self.value = float("nan")
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._until("READY")

    def run(self, steps: int) -> None:
        """Time `steps` steps."""
        self.process.stdin.write(f"run {steps}\n")
        self.process.stdin.flush()
        _, seconds, value = self._until("T ").split()
        self.times.append(float(seconds))
        self.value = float(value)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _until(self, start: str) -> str:
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        error = self.process.stderr.read()[-2000:]
        raise SystemExit(f"{self.name} failed:\n{error}")


def ratio(worker: Worker, peer: Worker) -> float:
    """How many times as fast `worker` is as `peer`: the median over rounds of the ratio within one round."""
    return statistics.median(theirs / ours for ours, theirs in zip(worker.times, peer.times, strict=True))
