"""The permutation function: a bijection of any range, fixed by its seed."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.permutation import Permutation


@pytest.mark.parametrize("lengths", [range(1, 300), (1023, 1024, 1025, 4095, 4096, 4097, 65_537, 100_003)])
def test_every_index_comes_once(lengths) -> None:
    for length in lengths:
        image = Permutation(length, (5, length))(np.arange(length))
        assert np.array_equal(np.sort(image), np.arange(length)), length


def test_an_int_and_an_array_give_the_same_numbers() -> None:
    for length in (1, 2, 7, 1024, 5000, (1 << 40) + 3):
        permutation = Permutation(length, 3)
        indices = np.unique(np.linspace(0, length - 1, 64).astype(np.int64))
        image = permutation(indices)
        assert [permutation(int(i)) for i in indices] == image.tolist()
        assert image.min() >= 0 and image.max() < length


def test_the_shape_of_an_array_is_kept_and_the_array_itself_left_alone() -> None:
    indices = np.arange(12).reshape(3, 4)
    assert Permutation(12, 0)(indices).shape == (3, 4)
    assert np.array_equal(indices.ravel(), np.arange(12))


def test_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    index = np.arange(1000)
    orders = [Permutation(1000, seed)(index).tolist() for seed in (0, 1, (0, 1), (1, 0), (0, 1, 0))]
    assert len({tuple(order) for order in orders}) == 5
    assert Permutation(1000, (0, 1))(index).tolist() == orders[2]


@pytest.mark.parametrize("length", [10, 100])
def test_over_many_seeds_each_index_lands_everywhere_equally_often(length: int) -> None:
    draws = 1500
    images = np.array(
        [
            [permutation(i) for i in (0, 1, length - 1)]
            for permutation in (Permutation(length, (length, seed)) for seed in range(draws))
        ]
    )
    expected = draws / length
    for column in images.T:
        chi_square = ((np.bincount(column, minlength=length) - expected) ** 2 / expected).sum()
        # Mean length - 1, variance 2 (length - 1): five standard deviations.
        assert abs(chi_square - (length - 1)) < 5 * (2 * (length - 1)) ** 0.5


def test_an_order_keeps_few_neighbours_together() -> None:
    image = Permutation(10_000, 1)(np.arange(10_000))
    assert (np.abs(np.diff(image)) == 1).mean() < 0.002
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05


def test_an_index_outside_is_an_error() -> None:
    for index in (-1, 5, np.array([0, 5]), np.array([-1])):
        with pytest.raises(IndexError, match="permutation of 5"):
            Permutation(5, 0)(index)
