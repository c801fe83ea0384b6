"""Constants from data files."""

from __future__ import annotations

from dataclasses import fields

import pytest

from parallel.planner.constants import Constants, constants, tables

FRACTIONS = [
    "matmul", "attention", "memory", "inner", "outer", "hide_tp", "hide_dp", "hide_gather", "hide_ep", "hide_cp",
    "hide_pp", "experts", "fragments", "spread",
]  # fmt: skip
BESIDE = {"error", "attention_kernels", "features"}


@pytest.mark.parametrize("device", tables())
def test_files_name_known_constants_in_their_physical_ranges(device):
    known = {field.name for field in fields(Constants)}
    for entry in tables()[device]["frameworks"].values():
        beside = [values for group in ("attention_kernels", "features") for values in entry.get(group, {}).values()]
        for values in ({k: v for k, v in entry.items() if k not in BESIDE}, *beside):
            assert set(values) <= known
            assert all(value >= 0 for value in values.values())
            assert all(values.get(name, 0) <= 1 for name in FRACTIONS)
        assert entry["error"]["rows"] > 0


def test_an_unknown_framework_takes_what_is_pooled():
    found = constants("a100", "another")
    assert found.constants == constants("a100", "pooled").constants
    assert found.chosen == "a100/pooled, as another is not known there"


def test_kernels_and_features_have_constants_of_their_own():
    entry = tables()["a100"]["frameworks"]["aleph_alpha"]
    found = constants("a100", "aleph_alpha", "torch").constants
    assert found.scores == entry["attention_kernels"]["torch"]["scores"] > 1
    assert constants("a100", "aleph_alpha", "unheard of") == constants("a100", "aleph_alpha")


def test_an_unknown_device_names_what_is_known():
    with pytest.raises(ValueError, match="rank.device a101 has no constants; .*a100"):
        constants("a101", "megatron")


def test_busway_keeps_what_its_own_account_of_memory_counts():
    found = constants("a100", "busway").constants
    assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes, found.own_bytes) == (4, 4, 8, 4)
    assert found.item_bytes * found.saved == 4
