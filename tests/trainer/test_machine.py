"""What a machine has."""

from __future__ import annotations

import psutil
import pytest

from trainer import machine


@pytest.fixture
def control_group(tmp_path, monkeypatch):
    """The folder of this process's control group; fill it with `group(limit)`: 3 GiB used, 2 of them files."""
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)

    def group(limit):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{3 * 2**30}\n")
        (tmp_path / "memory.stat").write_text(f"anon {2**30}\nactive_file {2**29}\ninactive_file {3 * 2**29}\n")

    return group


def test_free_memory_is_what_the_control_group_leaves_with_the_files_that_it_would_give_back(control_group):
    control_group(3 * 2**30 + 2**20)
    assert machine.available_memory_gib() == 1.5 + 2**-10


@pytest.mark.parametrize("limit", ["max", 2**60, None])
def test_a_group_that_leaves_more_than_there_is_changes_nothing(control_group, monkeypatch, limit):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5 * 2**30}))
    if limit is not None:
        control_group(limit)
    assert machine.available_memory_gib() == 5.0
