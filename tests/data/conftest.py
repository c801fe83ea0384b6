"""Small datasets for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from trainer.data.indexed import IndexedDataset, IndexedWriter
from trainer.data.packed import loss_mask_prefix
from trainer.data.tokenizer import train_bpe

WriteDataset = Callable[..., IndexedDataset]


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """write_dataset(documents, masks=None, name="data", dtype="<i4") writes and opens a dataset."""

    def write(
        documents: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]] | None = None,
        name: str = "data",
        dtype: str = "<i4",
    ) -> IndexedDataset:
        prefix = tmp_path / name
        for place, rows, kind in ((prefix, documents, dtype), (loss_mask_prefix(prefix), masks, "u1")):
            if rows is not None:
                with IndexedWriter(place, kind) as writer:
                    for row in rows:
                        writer.add(np.asarray(row, np.int64))
        return IndexedDataset(prefix)

    return write


@pytest.fixture
def write_counting(write_dataset: WriteDataset) -> WriteDataset:
    """write_counting(lengths, name="data") writes documents whose tokens count up, so that a token names its place."""

    def write(lengths: Sequence[int], name: str = "data", start: int = 0) -> IndexedDataset:
        ends = np.cumsum([start, *lengths])
        return write_dataset([range(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)], name=name)

    return write


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(["the bus runs every ten minutes, the tram every five"] * 3, 280).save(str(path))
    return path
