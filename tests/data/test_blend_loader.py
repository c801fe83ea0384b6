"""The order of samples over datasets and epochs, and its delivery to ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from models.checks import ConfigError
from trainer.data.blend import BLOCK, Blend
from trainer.data.loader import Loader, evaluation_batches, places
from trainer.data.packed import PackedDataset

SEQ = 4


@pytest.fixture
def two(write_counting) -> list[PackedDataset]:
    """Datasets of 100 and 37 samples whose first tokens tell them apart."""
    first = write_counting([50] * 8 + [1], "first")
    second = write_counting([149], "second", start=10_000)
    return [PackedDataset(data, SEQ, holdout=0) for data in (first, second)]


def take(loader: Loader, steps: int) -> list:
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches


def test_every_block_holds_the_quotas_of_the_weights(two) -> None:
    blend = Blend(two, [3, 1], seed=1)
    for block in range(3):
        sources = [blend.locate(n)[0] for n in range(block * BLOCK, (block + 1) * BLOCK)]
        assert np.bincount(sources).tolist() == [768, 256]


@pytest.mark.parametrize(
    ("weights", "expected"),
    # Largest remainder by hand: 1024/3 = 341.33; 0.7, 0.2, 0.1 of 1024 = 716.8, 204.8, 102.4.
    [([1, 1, 1], [342, 341, 341]), ([0.7, 0.2, 0.1], [717, 205, 102]), ([5], [1024])],
)
def test_quotas_follow_the_largest_remainder(two, weights, expected) -> None:
    assert Blend([two[0]] * len(weights), weights, seed=0).quotas.tolist() == expected


def test_each_sample_comes_once_an_epoch_of_its_dataset(two) -> None:
    blend = Blend(two, [0.8, 0.2], seed=7)
    seen: list[list[int]] = [[], []]
    for n in range(3 * BLOCK):
        source, index = blend.locate(n)
        seen[source].append(index)
    # Within a block the ranks come in any order, so an epoch is exact over the whole blocks that hold it.
    for source, size in enumerate((100, 37)):
        counts = np.bincount(seen[source], minlength=size)
        assert len(counts) == size and counts.max() - counts.min() <= 1


def test_an_epoch_of_one_block_is_exact_and_the_next_is_another_order(write_counting) -> None:
    packed = PackedDataset(write_counting([BLOCK * SEQ + 1]), SEQ, holdout=0)
    blend = Blend([packed], [1.0], seed=3)
    epochs = [[blend.locate(n)[1] for n in range(e * BLOCK, (e + 1) * BLOCK)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(BLOCK))
    assert epochs[0] != epochs[1]


def test_the_seed_fixes_the_order(two) -> None:
    def order(seed: int) -> list:
        return [Blend(two, [1, 1], seed).locate(n) for n in range(500)]

    assert order(1) == order(1) != order(2)


def test_a_weight_below_one_sample_in_a_block_is_an_error_that_names_it(two) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.weight 0\.0001 .*raise it to at least"):
        Blend(two, [1, 0.0001], seed=0)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_together_take_what_one_rank_takes(two, ranks: int) -> None:
    blend = Blend(two, [2, 1], seed=5)
    alone = take(Loader(blend, 24, 1, 0, micro_batch=2), 3)
    shares = [take(Loader(blend, 24, ranks, index, micro_batch=2), 3) for index in range(ranks)]
    for step in range(3):
        for field in range(3):
            parts = [share[step][field] for share in shares]
            assert parts[0].shape == (12 // ranks, 2 * SEQ) and parts[0].dtype == np.int32
            assert np.array_equal(np.stack(parts, 1).reshape(12, -1), alone[step][field])


def test_what_ranks_compute_at_once_depends_on_ranks_x_micro_batch_alone() -> None:
    for ranks, size in ((1, 4), (2, 2), (4, 1)):
        shares = [np.reshape(places(16, ranks, index, size), (-1, size)) for index in range(ranks)]
        steps = [sorted(np.concatenate(together).tolist()) for together in zip(*shares, strict=True)]
        assert steps == np.arange(16).reshape(4, 4).tolist()


def test_a_batch_is_the_blends_samples_in_order(two) -> None:
    blend = Blend(two, [2, 1], seed=5)
    batch = take(Loader(blend, 8, 2, 1, micro_batch=2, start=16), 1)[0]
    rows = batch.tokens.reshape(4, SEQ)
    assert [row.tolist() for row in rows] == [blend.sample(n).tokens.tolist() for n in (18, 19, 22, 23)]


def test_a_loader_goes_on_from_what_was_consumed_even_with_other_ranks(two) -> None:
    blend = Blend(two, [2, 1], seed=5)
    straight = take(Loader(blend, 8, 1, 0, micro_batch=1), 6)
    first = Loader(blend, 8, 2, 0, micro_batch=1)
    take(first, 4)
    assert first.consumed == 32
    rest = take(Loader(blend, 8, 1, 0, micro_batch=1, start=first.consumed), 2)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(rest, straight[4:], strict=True))


def test_an_error_in_the_thread_reaches_the_step(write_dataset) -> None:
    packed = PackedDataset(write_dataset([[1] * 20 + [99] + [1] * 20]), SEQ, holdout=0, vocab=50)
    loader = Loader(Blend([packed], [1.0], seed=0), 10, 1, 0, micro_batch=10)
    with pytest.raises(Exception, match="holds the token id 99"):
        next(loader)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_close_ends_the_thread(two) -> None:
    before = threading.active_count()
    loader = Loader(Blend(two, [1, 1], seed=0), 4, 1, 0, micro_batch=4)
    next(loader)
    assert loader.wait_s > 0
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_a_batch_that_ranks_cannot_share_is_refused(two) -> None:
    with pytest.raises(ValueError, match="2 ranks cannot share 8 samples in micro-batches of 3"):
        Loader(Blend(two, [1, 1], seed=0), 8, 2, 0, micro_batch=3)


def test_evaluation_is_the_same_for_any_number_of_ranks(two) -> None:
    alone = list(evaluation_batches(two, 3, 8, 1, 0, 1))
    shares = [list(evaluation_batches(two, 3, 8, 4, index, 2)) for index in range(4)]
    assert len(alone) == 3
    for step, batch in enumerate(alone):
        for field in range(3):
            together = np.concatenate([share[step][field].reshape(2, SEQ) for share in shares])
            assert np.array_equal(together, batch[field])


def test_evaluation_counts_each_sample_once_where_they_run_out(two) -> None:
    batches = list(evaluation_batches(two, 1000, 8, 1, 0, 8))
    assert len(batches) == 18  # 137 samples
    rows = np.concatenate([batch.tokens.reshape(8, SEQ) for batch in batches])
    learnt = np.concatenate([(batch.labels.reshape(8, SEQ) >= 0).all(axis=1) for batch in batches])
    assert learnt.sum() == 137 and learnt[:137].all()
    expected = {packed.sample(i).tokens[0] for packed in two for i in range(len(packed))}
    assert {row[0] for row in rows[learnt]} == expected and len(expected) == 137
