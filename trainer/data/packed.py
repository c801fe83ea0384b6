"""Packing: documents of an indexed dataset joined into one stream and cut into samples of one length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.indexed import IndexedDataset, bin_path, idx_path, starts_of
from trainer.data.permutation import Permutation
from trainer.errors import InputError

NO_LOSS = -1
"""The label of a position at which no loss is taken."""

HOLDOUT_SEED = 20_240_229
"""Fixed for ever: a held-out document stays held out in every run, whatever `train.seed` is."""


class Sample(NamedTuple):
    """One packed sequence of S tokens."""

    tokens: np.ndarray
    """int32 [S]."""
    labels: np.ndarray
    """int32 [S]: the next token, or `NO_LOSS`."""
    first_key: np.ndarray
    """int32 [S]: the first place in the sample that this position may attend to."""


def loss_mask_prefix(prefix: str | Path) -> str:
    """Where the loss mask of a dataset lies: uint8 of the same shape, 1 where the token is to be learnt."""
    return f"{prefix}.loss_mask"


class PackedDataset:
    """Samples of `seq_len` tokens from one split of an indexed dataset.

    The documents of the split, whose end-of-document tokens are in the data already, are one stream; sample i
    is its tokens i S to (i + 1) S, and the token after them is the last label. Held-out documents are chosen
    by a fixed function of their index until they make up the share `holdout` of all tokens, so that the two
    splits never share a document. Of a lone document the last `holdout` of its tokens are held out.

    Args:
        indexed: the documents.
        seq_len: S.
        split: ``"train"`` or ``"holdout"``.
        holdout: share of the tokens that is held out.
        mask_documents: attention and labels stop at the boundary of a document.
        vocab: ids from here on are an error when they are read; None checks only for negative ones.
        name: what the user calls the text, for errors; None for the dataset's own prefix.

    Raises:
        InputError: the split is too short for one sample, the tokens are not integers, or the loss mask does
            not fit its dataset.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_len: int,
        split: str = "train",
        holdout: float = 0.02,
        mask_documents: bool = False,
        vocab: int | None = None,
        name: str | None = None,
    ) -> None:
        if indexed.dtype.kind not in "iu":
            raise InputError(f"{indexed.prefix} holds {indexed.dtype.name}, not token ids; give a dataset of integers")
        self.indexed = indexed
        self.seq_len = seq_len
        self.mask_documents = mask_documents
        self.vocab = vocab
        self.documents, offsets, lengths = _split(indexed, split, holdout)
        """int64: indices of the documents of this split, ascending."""
        self._starts = starts_of(lengths)
        self.tokens = int(self._starts[-1])
        self._check_long_enough(name or indexed.prefix, split)
        self._loss_mask = loss_mask_of(indexed)
        # Neighbours in the split that are neighbours in the file are read as one piece.
        firsts = np.flatnonzero(np.diff(self.documents, prepend=-2) != 1)
        self._piece_starts = self._starts[firsts]
        self._piece_offsets = offsets[firsts]

    def __len__(self) -> int:
        return (self.tokens - 1) // self.seq_len

    def sample(self, index: int) -> Sample:
        """Sample `index` of `len(self)`.

        Raises:
            InputError: a token id is negative or not in the vocabulary; names the file and the byte.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, size = index * self.seq_len, self.seq_len
        tokens = self._read(self.indexed, start, size + 1)
        self._check_ids(tokens, start)
        tokens = tokens.astype(np.int32)
        labels = tokens[1:].copy()
        if self._loss_mask is not None:
            labels[self._read(self._loss_mask, start, size + 1)[1:] == 0] = NO_LOSS
        first_key = np.zeros(size, np.int32)
        if self.mask_documents:
            places = np.arange(start, start + size + 1)
            begins = self._starts[np.searchsorted(self._starts, places, side="right") - 1]
            labels[(begins == places)[1:]] = NO_LOSS
            first_key = np.maximum(begins[:-1] - start, 0).astype(np.int32)
        return Sample(tokens[:-1], labels, first_key)

    def _read(self, source: IndexedDataset, start: int, length: int) -> np.ndarray:
        """[length] tokens of the stream from `start` on, out of `source` (the tokens or their loss mask)."""
        pieces, end = [], start + length
        while start < end:
            at, stop = self._find(start)
            stop = min(end, stop)
            pieces.append(source.flat[at : at + stop - start])
            start = stop
        return np.concatenate(pieces)

    def _find(self, place: int) -> tuple[int, int]:
        """Where the token at `place` of the stream lies in the file, and up to which place others follow it there."""
        piece = int(np.searchsorted(self._piece_starts, place, side="right")) - 1
        last = piece + 1 == len(self._piece_starts)
        stop = self.tokens if last else int(self._piece_starts[piece + 1])
        return int(self._piece_offsets[piece] + place - self._piece_starts[piece]), stop

    def _check_ids(self, tokens: np.ndarray, start: int) -> None:
        bad = tokens < 0 if self.vocab is None else (tokens < 0) | (tokens >= self.vocab)
        if not bad.any():
            return
        at, _ = self._find(start + int(bad.argmax()))
        rule = "which is negative" if self.vocab is None else f"outside a vocabulary of {self.vocab:,}"
        raise InputError(
            f"{bin_path(self.indexed.prefix)}: byte {at * self.indexed.dtype.itemsize} holds the token id "
            f"{tokens[bad][0]}, {rule}; build the dataset with the model's tokenizer"
        )

    def _check_long_enough(self, name: str, split: str) -> None:
        if self.tokens > self.seq_len:
            return
        share = math.ceil(1000 * (self.seq_len + 1) / max(self.indexed.tokens, 1)) / 1000
        remedy = "give more text or a smaller data.seq_len"
        if split == "holdout" and share < 1:
            remedy = f"raise data.holdout to at least {share}, or give more text"
        raise InputError(
            f"{name} has {self.tokens:,} tokens in its {split} split, and one sample takes data.seq_len + 1 = "
            f"{self.seq_len + 1:,}; {remedy}"
        )


def _split(indexed: IndexedDataset, split: str, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents of a split, their places in the file and their tokens: int64 [documents] each."""
    filled = np.flatnonzero(indexed.lengths)
    if len(filled) == 1 and share > 0:
        offset, length = indexed.offsets[filled], indexed.lengths[filled]
        learnt = length - math.ceil(share * int(length[0]))
        return (filled, offset + learnt, length - learnt) if split == "holdout" else (filled, offset, learnt)
    held_out = _held_out(indexed.lengths, share)
    documents = np.flatnonzero(held_out if split == "holdout" else ~held_out)
    return documents, indexed.offsets[documents], indexed.lengths[documents]


def _held_out(lengths: np.ndarray, share: float) -> np.ndarray:
    """bool [documents]: which documents are held out.

    In an order that is a fixed permutation, until `share` of the tokens is reached. Documents longer than what
    is to be held out are passed over, unless there is no other; one document with tokens in it always stays.
    """
    held_out = np.zeros(len(lengths), bool)
    target = share * lengths.sum()
    if target <= 0:
        return held_out
    order = Permutation(len(lengths), HOLDOUT_SEED)(np.arange(len(lengths)))
    order = order[lengths[order] > 0]
    fitting = order[lengths[order] <= target]
    if not len(fitting):
        fitting = order[[np.argmin(lengths[order])]]
    taken = fitting[starts_of(lengths[fitting])[:-1] < target]
    held_out[taken[: len(order) - 1]] = True
    return held_out


def loss_mask_of(indexed: IndexedDataset) -> IndexedDataset | None:
    """The loss mask beside a dataset, checked to fit it, or None where all tokens are to be learnt."""
    prefix = loss_mask_prefix(indexed.prefix)
    if not idx_path(prefix).exists():
        return None
    mask = IndexedDataset(prefix)
    if not np.array_equal(mask.lengths, indexed.lengths):
        raise InputError(
            f"{idx_path(prefix)} has other documents than {idx_path(indexed.prefix)}; build the dataset again, "
            "or remove the loss mask to learn every token"
        )
    return mask
