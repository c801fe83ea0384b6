"""Packing: one stream, cut into samples; loss masks, document masks and the held-out split."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.indexed import IndexedDataset
from trainer.data.packed import PackedDataset
from trainer.errors import InputError

END = 0


def random_documents(seed: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Documents that end in END, empty ones among them, and a loss mask for each."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    documents = [[*rng.integers(1, 1000, rng.integers(0, 30)).tolist(), END] for _ in range(count)]
    documents[3] = []
    masks = [rng.integers(0, 2, len(document)).tolist() for document in documents]
    return documents, masks


def reference(documents, masks, seq_len: int, mask_documents: bool) -> list[tuple[list, list, list]]:
    """What packing must give, a token at a time."""
    stream = [
        (token, learn, number, place == 0)
        for number, (document, mask) in enumerate(zip(documents, masks, strict=True))
        for place, (token, learn) in enumerate(zip(document, mask, strict=True))
    ]
    samples = []
    for start in range(0, len(stream) - seq_len, seq_len):
        tokens, labels, first_key = [], [], []
        for t in range(start, start + seq_len):
            token, _, number, _ = stream[t]
            following, learn, _, begins = stream[t + 1]
            tokens.append(token)
            labels.append(following if learn and not (mask_documents and begins) else -1)
            same = [u for u in range(start, t + 1) if stream[u][2] == number]
            first_key.append(same[0] - start if mask_documents else 0)
        samples.append((tokens, labels, first_key))
    return samples


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_samples_are_the_stream_cut_up(write_dataset, mask_documents: bool, masked: bool, holdout: float) -> None:
    documents, masks = random_documents(3, 60)
    ones = [[1] * len(document) for document in documents]
    data = write_dataset(documents, masks if masked else None, dtype="<u2")
    for seq_len in (1, 7, 64):
        for split in ("train", "holdout") if holdout else ("train",):
            packed = PackedDataset(data, seq_len, split, holdout, mask_documents)
            chosen = packed.documents.tolist()
            rows = [documents[i] for i in chosen], [(masks if masked else ones)[i] for i in chosen]
            expected = reference(*rows, seq_len, mask_documents)
            assert len(packed) == len(expected)
            for index, fields in enumerate(expected):
                sample = packed.sample(index)
                assert [field.tolist() for field in sample] == [list(field) for field in fields]
                assert all(field.dtype == np.int32 and field.shape == (seq_len,) for field in sample)


def test_a_prompt_gives_no_labels_and_its_response_does(write_dataset) -> None:
    data = write_dataset([[11, 12, 13, 21, 22, END], [31, 32, END]], [[0, 0, 0, 1, 1, 1], [1, 1, 1]])
    sample = PackedDataset(data, 8, holdout=0).sample(0)
    assert sample.labels.tolist() == [-1, -1, 21, 22, END, 31, 32, END]


def test_masked_documents_neither_see_nor_predict_each_other(write_dataset) -> None:
    data = write_dataset([[11, 12, END], [21, END], [31, 32, 33, END]])
    sample = PackedDataset(data, 8, holdout=0, mask_documents=True).sample(0)
    assert sample.tokens.tolist() == [11, 12, END, 21, END, 31, 32, 33]
    assert sample.labels.tolist() == [12, END, -1, END, -1, 32, 33, END]
    assert sample.first_key.tolist() == [0, 0, 0, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("share", [0.01, 0.02, 0.1, 0.5])
def test_held_out_documents_are_apart_spread_and_of_the_share_asked_for(write_dataset, share: float) -> None:
    print("seed", 5)
    lengths = np.random.default_rng(5).integers(1, 200, 2000)
    data = write_dataset([[1] * length for length in lengths], dtype="<u2")
    train = PackedDataset(data, 16, "train", share)
    held = PackedDataset(data, 16, "holdout", share)
    assert sorted([*train.documents, *held.documents]) == list(range(2000))
    assert share <= held.tokens / data.tokens <= share + 200 / data.tokens
    assert train.tokens + held.tokens == data.tokens
    by_quarter = np.histogram(held.documents, 4, (0, 2000))[0] / len(held.documents)
    assert by_quarter.min() > 0.05
    again = PackedDataset(IndexedDataset(data.prefix), 64, "holdout", share)
    assert np.array_equal(again.documents, held.documents)


def test_a_document_longer_than_the_holdout_is_passed_over(write_dataset) -> None:
    data = write_dataset([[1] * 10_000, *[[2] * 20] * 50])
    held = PackedDataset(data, 16, "holdout", 0.02)
    assert 0 not in held.documents
    assert held.tokens == 220  # the first multiple of 20 that reaches 2 % of 11,000


def test_too_short_a_corpus_is_an_error_that_says_what_it_has(write_dataset) -> None:
    data = write_dataset([[1] * 40, [1] * 40])
    with pytest.raises(InputError) as error:
        PackedDataset(data, 80, holdout=0, name="my.txt")
    assert str(error.value) == (
        "my.txt has 80 tokens in its train split, and one sample takes data.seq_len + 1 = 81; "
        "give more text or a smaller data.seq_len"
    )
    assert len(PackedDataset(data, 79, holdout=0)) == 1
    with pytest.raises(InputError, match=r"data has 40 tokens in its holdout split.*data\.holdout to at least 0\.813"):
        PackedDataset(data, 64, "holdout", 0.02)


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("others", [0, 2])
def test_a_lone_document_gives_its_end_to_the_holdout(write_counting, mask_documents: bool, others: int) -> None:
    data = write_counting([0] * others + [1001] + [0] * others, start=1)
    train = PackedDataset(data, 16, "train", 0.1, mask_documents)
    held = PackedDataset(data, 16, "holdout", 0.1, mask_documents)
    assert (train.tokens, held.tokens) == (900, 101)  # the share rounded up
    tokens, labels, first_key = train.sample(len(train) - 1)
    assert tokens.tolist() == list(range(881, 897)) and labels.tolist() == list(range(882, 898))
    assert len(held) == 6
    tokens, labels, first_key = held.sample(0)
    assert tokens.tolist() == list(range(901, 917)) and labels.tolist() == list(range(902, 918))
    assert not first_key.any()


def test_a_lone_document_keeps_its_loss_mask(write_dataset) -> None:
    data = write_dataset([range(1, 101)], [[0] * 95 + [1] * 5])
    sample = PackedDataset(data, 9, "holdout", 0.1).sample(0)
    assert sample.labels.tolist() == [-1] * 4 + [96, 97, 98, 99, 100]


def test_the_share_that_the_error_names_is_enough(write_dataset) -> None:
    data = write_dataset([[1] * 1000])
    with pytest.raises(InputError, match=r"has 20 tokens in its holdout split.*raise data\.holdout to at least 0\.065"):
        PackedDataset(data, 64, "holdout", 0.02)
    assert len(PackedDataset(data, 64, "holdout", 0.065)) == 1


@pytest.mark.parametrize("lengths", [[40, 40], [40, 0, 41], [300, 0]])
def test_training_always_keeps_some_text(write_dataset, lengths: list[int]) -> None:
    data = write_dataset([[1] * length for length in lengths])
    train, held = (PackedDataset(data, 2, split, 0.99) for split in ("train", "holdout"))
    assert train.tokens + held.tokens == data.tokens


def test_a_token_outside_the_vocabulary_is_an_error_that_names_the_byte(write_dataset) -> None:
    data = write_dataset([[1, 2], [3, 4, 500, 6]])
    assert PackedDataset(data, 5, holdout=0, vocab=501).sample(0).labels.tolist() == [2, 3, 4, 500, 6]
    with pytest.raises(InputError, match=r"data\.bin: byte 16 holds the token id 500, outside a vocabulary of 500"):
        PackedDataset(data, 5, holdout=0, vocab=500).sample(0)
    negative = write_dataset([[1, 2, 3, -4]], name="negative")
    with pytest.raises(InputError, match=r"negative\.bin: byte 12 holds the token id -4, which is negative"):
        PackedDataset(negative, 3, holdout=0).sample(0)


def test_a_loss_mask_of_another_dataset_is_an_error(write_dataset) -> None:
    data = write_dataset([[1, 2, 3], [4, 5]], [[1, 1], [1, 1, 1]])
    with pytest.raises(InputError, match=r"data\.loss_mask\.idx has other documents than .*data\.idx"):
        PackedDataset(data, 2, holdout=0)


def test_a_dataset_of_floats_is_no_text(write_dataset) -> None:
    data = write_dataset([[1, 2, 3]])
    data.dtype = np.dtype("<f4")
    with pytest.raises(InputError, match="holds float32, not token ids"):
        PackedDataset(data, 2, holdout=0)
