"""From raw text to an indexed dataset: tokenise in parallel, keep the order, commit by rename.

A build writes PREFIX.bin and PREFIX.idx, PREFIX.loss_mask.{bin,idx} when a document has a prompt whose loss is
not to be taken, and PREFIX.json, which says how the dataset was made. PREFIX.idx comes last and is what makes a
dataset, so an interrupted build leaves none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from trainer.data.indexed import IndexedWriter, bin_path, dtype_for, idx_path
from trainer.data.packed import loss_mask_prefix
from trainer.data.sources import Document, TextFiles, text_files
from trainer.data.tokenizer import end_of_document, load_tokenizer, vocab_size
from trainer.errors import InputError, MachineError
from trainer.files import DATASETS, sha256_of, write_text
from trainer.machine import die_with_parent, writing_to

CHUNK_BYTES = 1 << 20
CHUNK_DOCUMENTS = 1024


@dataclass(frozen=True)
class Manifest:
    """PREFIX.json: how a dataset was made."""

    tokenizer_sha256: str
    vocab: int
    """One more than the tokenizer's largest id."""
    end_of_document: int
    documents: int
    tokens: int
    sources: list[str]


class Encoded(NamedTuple):
    """One document as tokens."""

    tokens: np.ndarray
    """int32, end of document included."""
    prompt: int
    """How many of them, from the first on, are not to be learnt."""


def manifest_path(prefix: str | Path) -> Path:
    """Where the manifest of a dataset lies."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest beside a dataset; None for one that Busway did not build.

    Raises:
        InputError: the file is not such a manifest.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no manifest of a dataset ({error}); remove it and build again") from error


def build(
    paths: Sequence[str],
    tokenizer_path: str | Path,
    out_prefix: str | Path,
    processes: int = 1,
    end_of_document_name: str | None = None,
    glob: str = "*",
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Tokenise the documents of `paths` and write them to `out_prefix`.

    Args:
        paths: directories, .txt and .jsonl files, or ``stdlib``, read in this order.
        tokenizer_path: a tokenizer.json.
        processes: 1 tokenises here, with the library's own threads; more start as many processes.
        end_of_document_name: the token that ends a document; None looks for the usual ones.
        glob: which file names of directories are taken.
        overwrite: replace a dataset of that name.
        report: takes one line about what was built.

    Raises:
        InputError: a source or the tokenizer is missing or malformed, there is no text in the sources, no source
            is a directory that `glob` could choose from, or a file of that name exists.
        MachineError: the dataset cannot be written, or a process was killed.
    """
    if not overwrite:
        _check_free(out_prefix)
    tokenizer_path = Path(tokenizer_path).expanduser()
    tokenizer = load_tokenizer(tokenizer_path)
    end = end_of_document(tokenizer, end_of_document_name)
    vocab = vocab_size(tokenizer)
    sources = [text_files(path, glob) for path in paths]
    if glob != "*" and all(source.named for source in sources):
        raise InputError(f"--glob {glob} picks files of directories, and {', '.join(paths)} is none; leave it out")
    begin = time.perf_counter()
    with (
        IndexedWriter(out_prefix, dtype_for(vocab)) as writer,
        IndexedWriter(loss_mask_prefix(out_prefix), np.uint8) as mask,
    ):
        prompts = 0
        with _progress_bar(sources) as advance:
            for encoded in _encode_all(sources, tokenizer_path, tokenizer, end, processes, advance):
                writer.add(encoded.tokens)
                mask.add(np.arange(len(encoded.tokens)) >= encoded.prompt)
                prompts += encoded.prompt
        if not writer.lengths:
            raise InputError(f"there is no text in {', '.join(paths)}; give files with text in them")
        manifest = Manifest(
            tokenizer_sha256=sha256_of(tokenizer_path),
            vocab=vocab,
            end_of_document=end,
            documents=len(writer.lengths),
            tokens=sum(writer.lengths),
            sources=list(paths),
        )
        if not prompts:
            mask.discard()
        _clear(out_prefix)
        write_text(manifest_path(out_prefix), json.dumps(asdict(manifest), indent=2) + "\n")
    report(_summary(manifest, bin_path(out_prefix), sources, time.perf_counter() - begin))
    return manifest


def _summary(manifest: Manifest, path: Path, sources: Sequence[TextFiles], seconds: float) -> str:
    skipped = sum(len(source.skipped) for source in sources)
    return (
        f"{path}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.documents / seconds:,.0f} documents/s, {manifest.tokens / seconds:,.0f} tokens/s"
        + (f"; {skipped:,} files are not UTF-8 text and were left out" if skipped else "")
    )


def _check_free(prefix: str | Path) -> None:
    masks = loss_mask_prefix(prefix)
    for path in (idx_path(prefix), bin_path(prefix), manifest_path(prefix), idx_path(masks), bin_path(masks)):
        if path.exists():
            raise InputError(f"{path} exists; name another --out, or add --overwrite to replace what is there")


def _clear(prefix: str | Path) -> None:
    """Remove what would make an older dataset of this name valid, before a part of the new one stands there."""
    with writing_to(prefix, DATASETS):
        for old in (prefix, loss_mask_prefix(prefix)):
            idx_path(old).unlink(missing_ok=True)
        bin_path(loss_mask_prefix(prefix)).unlink(missing_ok=True)


@contextmanager
def _progress_bar(sources: Sequence[TextFiles]) -> Iterator[Callable[[int, int], None]]:
    """A progress bar where stderr is a terminal, else nothing; gives what to call with documents and bytes done."""
    console = Console(stderr=True)
    rate = TextColumn("{task.percentage:>3.0f}% {task.fields[rate]}")
    columns = TextColumn("{task.description}"), BarColumn(), rate, TimeRemainingColumn()
    done, begin = 0, time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("tokenising", total=sum(source.size for source in sources), rate="")

        def advance(documents: int, size: int) -> None:
            nonlocal done
            done += documents
            bar.update(task, advance=size, rate=f"{done / (time.perf_counter() - begin):,.0f} documents/s")

        yield advance


def _chunks(sources: Iterable[TextFiles]) -> Iterator[list[Document]]:
    """The documents in order, in pieces that are worth sending to a process."""
    chunk: list[Document] = []
    size = 0
    for source in sources:
        for document in source:
            chunk.append(document)
            size += document.size
            if size >= CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_all(
    sources: Iterable[TextFiles],
    tokenizer_path: Path,
    tokenizer: Tokenizer,
    end: int,
    processes: int,
    advance: Callable[[int, int], None],
) -> Iterator[Encoded]:
    """The encoded documents in their order."""
    if processes == 1:
        encoded_chunks = ((chunk, encode(tokenizer, end, chunk)) for chunk in _chunks(sources))
    else:
        encoded_chunks = _encode_in_processes(_chunks(sources), tokenizer_path, end, processes)
    for chunk, encoded in encoded_chunks:
        yield from encoded
        advance(len(chunk), sum(document.size for document in chunk))


def _encode_in_processes(
    chunks: Iterator[list[Document]], tokenizer_path: Path, end: int, processes: int
) -> Iterator[tuple[list[Document], list[Encoded]]]:
    # A few chunks a process are under way at a time, so that memory stays bounded whatever the sources' size.
    under_way: deque[tuple[list[Document], Future]] = deque()
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_process, initargs=(tokenizer_path, end)
    )
    try:
        for chunk in chunks:
            under_way.append((chunk, pool.submit(_encode_here, chunk)))
            if len(under_way) > 3 * processes:
                done, future = under_way.popleft()
                yield done, future.result()
        while under_way:
            done, future = under_way.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise MachineError("a tokenising process was killed, perhaps by want of memory; use fewer processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def encode(tokenizer: Tokenizer, end: int, documents: Sequence[Document]) -> list[Encoded]:
    """Each document as its prompt's tokens, its text's and the end of document.

    A prompt is encoded apart from its response, so that no token lies across the two.
    """
    prompts = tokenizer.encode_batch_fast([document.prompt or "" for document in documents], add_special_tokens=False)
    texts = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
    return [
        Encoded(np.asarray([*prompt.ids, *text.ids, end], np.int32), len(prompt.ids))
        for prompt, text in zip(prompts, texts, strict=True)
    ]


_here: tuple[Tokenizer, int]
"""What a tokenising process works with: its tokenizer and the end of document."""


def _start_process(tokenizer_path: Path, end: int) -> None:
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone answers it
    die_with_parent()
    if os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)  # the parent was killed while this process started
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _here = load_tokenizer(tokenizer_path), end


def _encode_here(documents: list[Document]) -> list[Encoded]:
    return encode(*_here, documents)
