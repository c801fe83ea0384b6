"""What is in an indexed dataset: statistics, and samples as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.data.indexed import IndexedDataset
from trainer.data.packed import loss_mask_of
from trainer.data.permutation import Permutation
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import InputError

QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
PIECE = 1 << 24
EXCERPT = 400


def describe(prefix: str | Path) -> str:
    """Statistics of a dataset, which is read through and checked with its loss mask, as lines for people."""
    data = IndexedDataset(prefix)
    mask = loss_mask_of(data)
    learnt = data.tokens if mask is None else sum(np.count_nonzero(piece) for piece in _pieces(mask.flat))
    lengths = largest = "none"
    if len(data):
        quantiles = np.quantile(data.lengths, list(QUANTILES.values()), method="nearest")
        lengths = ", ".join(f"{name} {length:,}" for name, length in zip(QUANTILES, quantiles, strict=True))
    if data.tokens:
        largest = f"{max(int(piece.max()) for piece in _pieces(data.flat)):,}"
    return "\n".join(
        (
            f"documents         {len(data):,}",
            f"tokens            {data.tokens:,} ({data.dtype.name})",
            f"document lengths  {lengths}",
            f"largest token id  {largest}",
            f"masked share      {(data.tokens - learnt) / max(data.tokens, 1):.2%}",
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
        tokens = data[document][:EXCERPT].astype(np.int64)
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
