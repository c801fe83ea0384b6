"""What is in an indexed dataset: statistics, and samples as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.indexed import IndexedDataset, idx_path
from trainer.data.packed import loss_mask_prefix
from trainer.data.permutation import Permutation
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import InputError

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
PIECE = 1 << 24
EXCERPT = 400


@dataclass(frozen=True)
class Statistics:
    """Figures of one dataset."""

    documents: int
    tokens: int
    dtype: str
    lengths: tuple[int, ...]
    """Tokens a document at `QUANTILES`; empty for an empty dataset."""
    largest_id: int | None
    masked: float
    """Share of the tokens whose loss is not taken."""


def statistics(prefix: str | Path) -> Statistics:
    """Read a dataset through, and check its loss mask with it."""
    data = IndexedDataset(prefix)
    mask_prefix = loss_mask_prefix(prefix)
    masked = 0.0
    if idx_path(mask_prefix).exists():
        mask = IndexedDataset(mask_prefix)
        masked = 1 - sum(int(np.count_nonzero(piece)) for piece in _pieces(mask.flat)) / max(mask.tokens, 1)
    quantiles = np.quantile(data.lengths, QUANTILES, method="nearest") if len(data) else ()
    return Statistics(
        documents=len(data),
        tokens=data.tokens,
        dtype=data.dtype.name,
        lengths=tuple(int(length) for length in quantiles),
        largest_id=max((int(piece.max()) for piece in _pieces(data.flat)), default=None),
        masked=masked,
    )


def describe(prefix: str | Path) -> str:
    """`statistics` as lines for people."""
    found = statistics(prefix)
    names = ("shortest", "5 %", "median", "95 %", "longest")
    lengths = ", ".join(f"{name} {length:,}" for name, length in zip(names, found.lengths, strict=False))
    largest = "none" if found.largest_id is None else f"{found.largest_id:,}"
    return "\n".join(
        (
            f"documents         {found.documents:,}",
            f"tokens            {found.tokens:,} ({found.dtype})",
            f"document lengths  {lengths or 'none'}",
            f"largest token id  {largest}",
            f"masked share      {found.masked:.2%}",
        )
    )


def samples(prefix: str | Path, tokenizer_path: str | Path, count: int) -> Iterator[str]:
    """The beginnings of `count` documents from all over the dataset, decoded."""
    data = IndexedDataset(prefix)
    if not len(data):
        return
    tokenizer = load_tokenizer(tokenizer_path)
    order = Permutation(len(data), 0)
    for document in sorted(order(place) for place in range(min(count, len(data)))):
        tokens = data.read(document, 0, min(EXCERPT, int(data.lengths[document]))).astype(np.int64)
        if tokens.size and (tokens.min() < 0 or tokenizer.id_to_token(int(tokens.max())) is None):
            raise InputError(
                f"{prefix}: document {document} has the token id {tokens.max()}, which {tokenizer_path} does not know; "
                "give the tokenizer that the dataset was built with"
            )
        yield (
            f"--- document {document:,}, {data.lengths[document]:,} tokens\n"
            f"{tokenizer.decode(tokens.tolist(), skip_special_tokens=False)}"
        )


def _pieces(flat: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE]
