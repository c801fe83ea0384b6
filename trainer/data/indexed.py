"""Megatron's indexed format, which Megatron-LM, MindSpeed and MindFormers share: PREFIX.bin and PREFIX.idx.

PREFIX.bin holds the tokens of all documents one after the other. PREFIX.idx, little-endian, holds:

    bytes  what
    9      the magic ``MMIDIDX\\0\\0``
    8      version, 1
    1      dtype code of the tokens (`DTYPES`)
    8      number of sequences, S
    8      number of document indices, D (one more than there are documents)
    4 S    int32: tokens of each sequence
    8 S    int64: byte in PREFIX.bin at which each sequence starts
    8 D    int64: the sequence with which each document starts, and S at the end
    S      int8: mode of each sequence (multimodal data only)

(megatron/core/datasets/indexed_dataset.py, `_IndexWriter`.) A reader trusts nothing in these files: what does
not fit together is an `InputError` that names the file, the byte and the remedy.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from trainer.errors import InputError
from trainer.files import DATASETS, PARTIAL, flush
from trainer.machine import writing_to

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
REMEDY = "remove it and build or copy the dataset again"


def dtype_for(vocab: int) -> np.dtype:
    """The dtype for token ids below `vocab`: uint16 below 65,500, Megatron's own bound, else int32."""
    return np.dtype("<u2") if vocab < 65_500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """The file that holds the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file that holds the index; a dataset exists when this file does."""
    return Path(f"{prefix}.idx")


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n pieces that follow one another starts, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


class IndexedDataset:
    """The documents of PREFIX.bin and PREFIX.idx, memory-mapped.

    Attributes:
        flat: [tokens] all tokens in file order, read-only, on disk.
        offsets: int64 [documents + 1], the place in `flat` where each document starts, and the end.
        lengths: int64 [documents], tokens of each document.
        tokens: their sum.

    Raises:
        InputError: a file is missing, truncated, foreign or corrupted.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.dtype, self.offsets = _read_index(idx_path(prefix))
        self.lengths = np.diff(self.offsets)
        self.tokens = int(self.offsets[-1])
        self.flat = _map_tokens(bin_path(prefix), self.dtype, self.tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        """The tokens of `document`, as a view of the file."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.flat[self.offsets[document] : self.offsets[document + 1]]


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """The dtype and the document offsets [documents + 1] in tokens, from a checked index file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give the prefix of a built dataset") from error
    if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
        at = next(i for i, byte in enumerate(MAGIC) if raw[i] != byte)
        _fail(path, at, "is not Megatron's MMIDIDX", "give a dataset made by 'busway data build' or Megatron-LM")
    if len(raw) < HEADER.size:
        _fail(path, len(raw), f"ends inside the header of {HEADER.size} bytes")
    _, version, code, sequences, indices = HEADER.unpack_from(raw)
    if version != VERSION:
        _fail(path, 9, f"has version {version}, and {VERSION} is what is known")
    if code not in DTYPES:
        _fail(path, 17, f"has the dtype code {code}, and 1 to 8 are what is known")
    needed = HEADER.size + 12 * sequences + 8 * indices
    if len(raw) < needed:
        _fail(
            path,
            len(raw),
            f"ends, where {sequences:,} sequences and {indices:,} document indices need {needed:,} bytes",
        )
    if len(raw) not in (needed, needed + sequences):
        _fail(path, needed, f"is followed by {len(raw) - needed:,} bytes that belong to nothing")
    at_pointers = HEADER.size + 4 * sequences
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(raw, "<i8", sequences, at_pointers)
    documents = np.frombuffer(raw, "<i8", indices, at_pointers + 8 * sequences)
    dtype = DTYPES[code]
    return dtype, _document_offsets(path, dtype, lengths, pointers, documents)


def _document_offsets(
    path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray
) -> np.ndarray:
    """Check the three arrays of an index against each other; int64 [documents + 1] offsets in tokens."""
    sequences = len(lengths)
    at_pointers = HEADER.size + 4 * sequences
    at_documents = at_pointers + 8 * sequences
    bad = lengths < 0
    if bad.any():
        i = int(bad.argmax())
        _fail(path, HEADER.size + 4 * i, f"says that sequence {i} has {lengths[i]} tokens")
    starts = starts_of(lengths)
    bad = pointers != starts[:-1] * dtype.itemsize
    if bad.any():
        i = int(bad.argmax())
        _fail(
            path,
            at_pointers + 8 * i,
            f"says that sequence {i} starts at byte {pointers[i]}, and the lengths before it say "
            f"{starts[i] * dtype.itemsize}",
        )
    if not len(documents) or documents[0] != 0:
        _fail(path, at_documents, "must say that document 0 starts with sequence 0")
    bad = (documents[1:] < documents[:-1]) | (documents[1:] > sequences)
    if bad.any():
        i = int(bad.argmax()) + 1
        _fail(
            path,
            at_documents + 8 * i,
            f"says that document {i} starts with sequence {documents[i]}, after {documents[i - 1]} and of {sequences}",
        )
    if documents[-1] != sequences:
        at = at_documents + 8 * (len(documents) - 1)
        _fail(path, at, f"ends the last document at sequence {documents[-1]} of {sequences}")
    return starts[documents]


def _map_tokens(path: Path, dtype: np.dtype, tokens: int) -> np.ndarray:
    """[tokens] of a .bin file whose size was checked, memory-mapped read-only."""
    try:
        size = path.stat().st_size
        needed = tokens * dtype.itemsize
        if size < needed:
            _fail(path, size, f"ends, where its index needs {needed:,} bytes")
        if size > needed:
            _fail(path, needed, f"is followed by {size - needed:,} bytes that its index does not know")
        return np.memmap(path, dtype, "r", shape=(tokens,)) if tokens else np.zeros(0, dtype)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; copy it beside its .idx") from error


def _fail(path: Path, byte: int, what: str, remedy: str = REMEDY) -> None:
    raise InputError(f"{path}: byte {byte} {what}; {remedy}")


class IndexedWriter:
    """Writes documents to PREFIX.bin and PREFIX.idx; each document is one sequence.

    A context manager: leaving it in peace commits by rename, the index last; leaving it by an exception, or
    never, leaves nothing that a reader would take for a dataset.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | str | type) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.lengths: list[int] = []
        self._bounds = np.iinfo(self.dtype)
        self._partial = Path(f"{self.prefix}.bin{PARTIAL}")
        with writing_to(self._partial, DATASETS):
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by commit and discard

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def add(self, tokens: np.ndarray | list[int]) -> None:
        """Append one document, with its end-of-document token if it is to have one."""
        tokens = np.asarray(tokens)
        if tokens.size and not (self._bounds.min <= tokens.min() and tokens.max() <= self._bounds.max):
            raise InputError(
                f"{self.prefix}: document {len(self.lengths)} has token ids from {tokens.min()} to {tokens.max()}, "
                f"which {self.dtype.name} cannot hold; name the vocabulary's true size"
            )
        with writing_to(self._partial, DATASETS):
            self._file.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(tokens.size)

    def commit(self) -> None:
        """Make what was added a dataset. Does nothing a second time."""
        if self._file.closed:
            return
        partial_index = Path(f"{self.prefix}.idx{PARTIAL}")
        with writing_to(self._partial, DATASETS):
            self._file.close()
            partial_index.write_bytes(self._index())
            flush(self._partial)
            flush(partial_index)
            # An older index must not meet the new tokens, so it goes first.
            idx_path(self.prefix).unlink(missing_ok=True)
            self._partial.replace(bin_path(self.prefix))
            partial_index.replace(idx_path(self.prefix))

    def discard(self) -> None:
        """Forget what was added."""
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses once more
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _index(self) -> bytes:
        lengths = np.asarray(self.lengths, "<i4")
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(lengths) + 1)
        pointers = (starts_of(lengths)[:-1] * self.dtype.itemsize).astype("<i8")
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()
