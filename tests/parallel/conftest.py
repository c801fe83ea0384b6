from __future__ import annotations

import pytest

from parallel.topology import Topology, load


def build(*members: int | str) -> Topology:
    return load(
        {
            "name": "machine",
            "rank": {"name": "core", "memory_gib": None, "memory_bandwidth": None, "peak_tflops": None},
            "planes": {"bus": {"injection": None}},
            "levels": [
                {"name": "abcdef"[i], "members": count, "bandwidth": None, "latency": None, "plane": "bus"}
                for i, count in enumerate(members)
            ],
        }
    )


@pytest.fixture(scope="session")
def machine():
    """`machine(2, 4)`: a topology of levels a, b, … with the given members."""
    return build
