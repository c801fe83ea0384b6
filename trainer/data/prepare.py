"""From the `data` section of a recipe to datasets that are ready to be read.

Raw text is tokenised once, and a `bpe:N` tokenizer trained once, and both are kept under
``$XDG_CACHE_HOME/busway`` (``~/.cache/busway``). The name of a cached file is a hash of all that it follows from,
so nothing in the cache is ever out of date. One process of a node writes while the others wait for it; the
operating system frees the lock of a writer that is killed, and the next one starts over. The hash of a text's
content is itself kept, under its files' paths, sizes and times, so that only the first process reads them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from models import checks
from trainer.data.build import build, read_manifest
from trainer.data.indexed import IndexedDataset, bin_path, idx_path
from trainer.data.packed import PackedDataset
from trainer.data.settings import DataSettings
from trainer.data.sources import STDLIB, TextFiles, text_files
from trainer.data.tokenizer import end_of_document, load_tokenizer, train_bpe, vocab_size
from trainer.errors import InputError, MachineError
from trainer.files import DATASETS, sha256_of, write_text
from trainer.machine import writing_to

CACHE_VERSION = 1
"""Changes when the same text would be written in another way."""

SETTLED_S = 2.0
"""A file changed less than this ago could change again without a new time, on the coarsest of file systems."""


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and is evaluated on."""

    train: list[PackedDataset]
    holdout: list[PackedDataset]
    """One a source; empty when `data.holdout` is 0 or nobody asked."""
    weights: list[float]
    """Of the sources, for `Blend`."""
    tokenizer: Path | None
    """The tokenizer.json of the text; None where the recipe names none, as datasets that are built need none."""

    @property
    def samples(self) -> int:
        """Different samples to train on, over all sources; of one source, an epoch."""
        return sum(len(packed) for packed in self.train)


def check(settings: DataSettings, model_vocab: int) -> None:
    """Look for every error that can be found without tokenising anything.

    Raises:
        ConfigError: there are no sources, or the tokenizer is missing from the recipe or too large for the model.
        InputError: a path is missing, or a file is malformed or does not fit the others.
    """
    checks.check(
        bool(settings.sources),
        "data.sources",
        "is empty",
        "this recipe trains on your own text: build it with 'busway data build …' and set "
        "data.sources=[{path: PREFIX}] and data.tokenizer=…",
    )
    tokenizer_sha256 = _check_tokenizer(settings, model_vocab)
    for place, source in enumerate(settings.sources):
        if is_built(source.path):
            _check_built(settings, f"data.sources[{place}].path", source.path, model_vocab, tokenizer_sha256)
        else:
            _check_raw(settings, source.path)


def prepare(
    settings: DataSettings,
    model_vocab: int,
    report: Callable[[str], None] = print,
    evaluates: bool = True,
) -> Corpus:
    """Tokenise what is not tokenised yet, and open everything.

    Args:
        settings: checked again here, so that a caller cannot forget to.
        model_vocab: rows of the model's embedding.
        report: takes one line about each step that takes a while; silent when all is cached.
        evaluates: whether the held-out text is wanted too; it is kept out of training either way.
    """
    check(settings, model_vocab)
    raw = {source.path: text_files(source.path) for source in settings.sources if not is_built(source.path)}
    digests = {path: _content_of(files) for path, files in raw.items()}
    tokenizer_path = _tokenizer_for(settings, list(raw.values()), list(digests.values()), report)
    prefixes = [
        _tokenised(raw[source.path], digests[source.path], tokenizer_path, report)
        if source.path in raw
        else Path(source.path).expanduser()
        for source in settings.sources
    ]

    datasets = [IndexedDataset(prefix) for prefix in prefixes]

    def packed(split: str) -> list[PackedDataset]:
        return [
            PackedDataset(
                data, settings.seq_len, split, settings.holdout, settings.mask_documents, model_vocab, source.path
            )
            for data, source in zip(datasets, settings.sources, strict=True)
        ]

    return Corpus(
        train=packed("train"),
        holdout=packed("holdout") if settings.holdout and evaluates else [],
        weights=[source.weight for source in settings.sources],
        tokenizer=tokenizer_path,
    )


def is_built(path: str) -> bool:
    """Whether a source's path is the prefix of a built dataset."""
    return path != STDLIB and idx_path(Path(path).expanduser()).is_file()


def cache_dir() -> Path:
    """Where tokenizers and tokenised text are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "busway"


def _check_tokenizer(settings: DataSettings, model_vocab: int) -> str | None:
    """Check the tokenizer against the model; its sha256, or None when there is no file."""
    if settings.tokenizer is None:
        return None
    entries = settings.bpe_entries
    if entries is not None:
        _check_fits("data.tokenizer", f"asks for {entries:,} entries", entries, model_vocab)
        return None
    tokenizer = load_tokenizer(settings.tokenizer)
    size = vocab_size(tokenizer)
    _check_fits("data.tokenizer", f"{settings.tokenizer} has a vocabulary of {size:,}", size, model_vocab)
    return sha256_of(Path(settings.tokenizer).expanduser())


def _check_fits(field: str, what: str, size: int, model_vocab: int) -> None:
    checks.check(
        size <= model_vocab,
        field,
        f"{what}, but the model's is {model_vocab:,}",
        f"set model.vocab={size} or more, or use the model's own tokenizer",
    )


def _check_built(settings: DataSettings, field: str, path: str, model_vocab: int, tokenizer_sha256: str | None) -> None:
    checks.check(
        settings.bpe_entries is None,
        "data.tokenizer",
        f"is {settings.tokenizer}, but {path} is tokenised already",
        "name the tokenizer.json that it was built with, or give raw text",
    )
    prefix = Path(path).expanduser()
    IndexedDataset(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    _check_fits(field, f"{path} was built with a vocabulary of {manifest.vocab:,}", manifest.vocab, model_vocab)
    checks.check(
        tokenizer_sha256 in (None, manifest.tokenizer_sha256),
        field,
        f"{path} was built with another tokenizer than {settings.tokenizer}",
        "name that one in data.tokenizer, or build the dataset again",
    )


def _check_raw(settings: DataSettings, path: str) -> None:
    prefix = Path(path).expanduser()
    if path.endswith((".idx", ".bin")) and prefix.is_file():
        raise InputError(f"{path} is one file of a dataset; give its prefix {path[:-4]} in data.sources")
    if not prefix.exists() and bin_path(prefix).is_file():
        raise InputError(f"{bin_path(prefix)} has no .idx beside it; build or copy the dataset again")
    text_files(path)
    checks.check(
        settings.tokenizer is not None,
        "data.tokenizer",
        f"is missing, and {path} is raw text",
        "set data.tokenizer to a tokenizer.json, or to bpe:N to train one of N entries",
    )
    if settings.bpe_entries is None:
        end_of_document(load_tokenizer(settings.tokenizer))


def _tokenizer_for(
    settings: DataSettings, raw: Sequence[TextFiles], digests: Sequence[str], report: Callable[[str], None]
) -> Path | None:
    """The tokenizer.json to use, trained now if it is a `bpe:N` that is not in the cache."""
    if settings.bpe_entries is None:
        return None if settings.tokenizer is None else Path(settings.tokenizer).expanduser()
    entries = settings.bpe_entries
    path = cache_dir() / f"tokenizer-{_key('bpe', version('tokenizers'), entries, *digests)}.json"

    def make() -> None:
        names = ", ".join(files.name for files in raw)
        report(f"data: training a tokenizer of {entries:,} entries on {names}, once; it is kept in {path}")
        texts = (f"{document.prompt or ''}{document.text}" for files in raw for document in files)
        write_text(path, train_bpe(texts, entries).to_str())

    _once(path, make)
    return path


def _tokenised(files: TextFiles, digest: str, tokenizer_path: Path, report: Callable[[str], None]) -> Path:
    """The prefix of the dataset of one raw source, built now if it is not in the cache."""
    prefix = cache_dir() / f"corpus-{_key('corpus', version('tokenizers'), sha256_of(tokenizer_path), digest)}"

    def make() -> None:
        report(f"data: tokenising {files.name}, once; it is kept in {prefix}.bin")
        # An interrupted build may have left files, and no index.
        build([files.name], tokenizer_path, prefix, overwrite=True, report=lambda line: report(f"data: {line}"))

    _once(idx_path(prefix), make)
    return prefix


def _once(path: Path, make: Callable[[], None]) -> None:
    """Call `make`, which makes `path` by rename, unless it is there; one process at a time."""
    if path.exists():
        return
    with writing_to(path, DATASETS):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    try:
        if not path.exists():
            make()
    finally:
        lock.release()


def _content_of(files: TextFiles) -> str:
    """A hash of the bytes and kinds of a source's files, in their order; where they lie does not matter."""
    try:
        states = [file.stat() for file in files.files]
        paths = [str(file.absolute()) for file in files.files]
        known = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]
        record = cache_dir() / f"content-{_key('content', paths, known)}"
        if record.is_file():
            return record.read_text(encoding="utf-8")
        settled = max(max(s.st_mtime, s.st_ctime) for s in states) < time.time() - SETTLED_S
        digest = hashlib.sha256()
        for file in files.files:
            digest.update(f"{file.suffix == '.jsonl'} {sha256_of(file)}\n".encode())
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}; make it readable or leave it out") from error
    if settled:
        # A cache that may not be written may hold all that is needed.
        with suppress(MachineError), writing_to(record, DATASETS):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, digest.hexdigest())
    return digest.hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((CACHE_VERSION, *parts)).encode()).hexdigest()[:16]
