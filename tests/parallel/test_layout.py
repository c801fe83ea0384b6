"""Sizes of axes: what is legal, and what is said about the rest."""

from __future__ import annotations

import random

import pytest

from models.checks import ConfigError
from parallel.layout import Layout


def error_of(action) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def test_the_world_is_the_product_of_the_dense_axes():
    assert Layout(dp=2, cp=3, tp=4, pp=5, ep=6).world_size == 120


def test_a_world_of_another_size_is_an_error_with_the_product_identity_and_both_remedies():
    error = error_of(lambda: Layout(dp=2, tp=3, pp=4).check_world(16))
    assert error == (
        "layout: pp 4 x dp 2 x cp 1 x tp 3 = 24, but the world has 16 ranks; set launcher.ranks=24 or layout.tp=2"
    )
    error = error_of(lambda: Layout(dp=3, tp=5).check_world(1))
    assert error == "layout: pp 1 x dp 3 x cp 1 x tp 5 = 15, but the world has 1 rank; set launcher.ranks=15"
    Layout(dp=2, tp=3, pp=4).check_world(24)


@pytest.mark.parametrize("seed", range(50))
def test_the_axis_that_the_error_proposes_gives_the_world_its_size(seed):
    draw = random.Random(seed)
    sizes = {axis: draw.choice((1, 2, 3, 4, 6)) for axis in ("dp", "cp", "tp", "pp")}
    ranks = draw.choice((2, 4, 8, 12, 16, 24))
    layout = Layout(**sizes)
    if layout.world_size == ranks:
        layout.check_world(ranks)
        return
    error = error_of(lambda: layout.check_world(ranks))
    alone = [a for a in sizes if any(Layout(**{**sizes, a: n}).world_size == ranks for n in range(1, ranks + 1))]
    print("seed", seed, error)
    if not alone:
        assert " or " not in error
        return
    axis, size = error.split("layout.")[1].split("=")
    assert axis in alone and Layout(**{**sizes, axis: int(size)}).world_size == ranks


def test_a_batch_that_does_not_divide_is_an_error_that_names_the_nearest_legal_ones():
    error = error_of(lambda: Layout(dp=3).check_batch(8))
    assert error == (
        "train.global_batch 8 must be a multiple of layout.dp 3 x layout.micro_batch 1; "
        "set layout.dp=2, or train.global_batch=6 or 9 (the nearest)"
    )
    assert "; set layout.dp=3 layout.micro_batch=1, or" in error_of(lambda: Layout(dp=4, micro_batch=2).check_batch(3))
    assert "; set train.global_batch=4 (the nearest)" in error_of(lambda: Layout(dp=4).check_batch(0))


def test_the_micro_batches_of_all_replicas_make_the_global_batch():
    assert Layout(dp=3, tp=2, micro_batch=4).check_batch(48) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp": 0}, "layout.dp must be at least 1, but is 0; set layout.dp=1 or more"),
        ({"dp": 1, "pp": -1}, "layout.pp must be at least 1, but is -1; set layout.pp=1 or more"),
        (
            {"dp": 2, "tp": 4, "ep": 3},
            "layout.ep 3 x layout.etp 1 = 3 must divide dp 2 x cp 1 x tp 4 = 8; set layout.ep=2 (the nearest)",
        ),
        (
            {"dp": 2, "tp": 4, "ep": 8, "etp": 2},
            "layout.ep 8 x layout.etp 2 = 16 must divide dp 2 x cp 1 x tp 4 = 8; set layout.ep=4 (the nearest)",
        ),
        (
            {"dp": 2, "tp": 4, "ep": 2, "etp": 3},
            "layout.ep 2 x layout.etp 3 = 6 must divide dp 2 x cp 1 x tp 4 = 8; set layout.etp=2 (the nearest)",
        ),
        (
            {"dp": 2, "tp": 4, "ep": 5, "etp": 3},
            "layout.ep 5 x layout.etp 3 = 15 must divide dp 2 x cp 1 x tp 4 = 8; "
            "set layout.ep=4 (the nearest) and layout.etp=1",
        ),
        (
            {"dp": 2, "order": ["tp", "dp"]},
            "layout.order must name each of tp, cp, dp, pp once, but is [tp,dp]; "
            "set layout.order=[tp,cp,dp,pp] (innermost first)",
        ),
    ],
)
def test_an_illegal_layout_is_one_line_that_names_the_key_the_rule_and_the_remedy(sizes, message):
    assert error_of(lambda: Layout(**sizes)) == message
