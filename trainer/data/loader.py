"""Batches for one rank, prepared ahead by a thread, with one integer of state."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.blend import Blend
from trainer.data.packed import NO_LOSS, PackedDataset, Sample
from trainer.data.permutation import Permutation

PREFETCH = 2
"""Batches that wait ready for the step."""

EVALUATION_SEED = 0


class Batch(NamedTuple):
    """A rank's share of one step: M micro-batches of `micro_batch` sequences, flattened token-major."""

    tokens: np.ndarray
    """int32 [M, micro_batch * seq_len]."""
    labels: np.ndarray
    """int32 [M, micro_batch * seq_len]: the next token, or -1 where no loss is taken."""
    first_key: np.ndarray
    """int32 [M, micro_batch * seq_len]: index within its own sequence of the first token attended to."""


class Loader:
    """Step k takes the samples start + k B to start + (k + 1) B of the blend, B = `global_batch`.

    Rank `index` of `ranks` (the data view of the mesh) takes its `places` of them, so the batch of all ranks
    together is the same whatever their number is.

    Attributes:
        consumed: samples of the whole run that were handed out, by all ranks; a later `start`.
        wait_s: seconds that the last `next()` waited for its batch.
    """

    def __init__(
        self, blend: Blend, global_batch: int, ranks: int, index: int, micro_batch: int, start: int = 0
    ) -> None:
        self._blend = blend
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._share = places(global_batch, ranks, index, micro_batch)
        self.consumed = start
        self.wait_s = 0.0
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(start,), name="busway-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """This rank's share of the next step; raises what the thread met."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        begin = time.perf_counter()
        item = self._queue.get()
        self.wait_s = time.perf_counter() - begin
        if isinstance(item, BaseException):
            self._stop.set()
            raise item
        self.consumed += self._global_batch
        return item

    def close(self) -> None:
        """End the thread; may be called twice."""
        self._stop.set()
        self._thread.join()

    def _fill(self, start: int) -> None:
        try:
            while not self._stop.is_set():
                samples = [self._blend.sample(start + n) for n in self._share]
                self._put(_stack(samples, self._micro_batch))
                start += self._global_batch
        except BaseException as error:  # handed to the thread that waits in next()
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue


def evaluation_batches(
    datasets: Sequence[PackedDataset], batches: int, global_batch: int, ranks: int, index: int, micro_batch: int
) -> Iterator[Batch]:
    """Rank `index`'s share of at most `batches` global batches of held-out samples, in a fixed order.

    Every held-out sample comes at most once: where they run out, the last batch is filled up with samples
    without labels, and no more batches follow. The order is the same in every run and for any `ranks`.
    """
    ends = np.cumsum([len(dataset) for dataset in datasets])
    total = int(ends[-1])
    order = Permutation(total, EVALUATION_SEED)
    share = places(global_batch, ranks, index, micro_batch)
    for first in range(0, min(total, batches * global_batch), global_batch):
        samples = []
        for number in (first + n for n in share):
            place = order(number % total)
            source = int(np.searchsorted(ends, place, side="right"))
            sample = datasets[source].sample(place - int(ends[source]) + len(datasets[source]))
            if number >= total:
                sample = sample._replace(labels=np.full_like(sample.labels, NO_LOSS))
            samples.append(sample)
        yield _stack(samples, micro_batch)


def places(global_batch: int, ranks: int, index: int, micro_batch: int) -> list[int]:
    """The places in a global batch that rank `index` takes, in its order.

    Each micro-step takes the next `ranks` x `micro_batch` of them, so that what it computes together, and a balance
    loss that counts over it, depends on that product alone.
    """
    if global_batch % (ranks * micro_batch):  # a recipe's is checked by Layout.check_batch
        raise ValueError(f"{ranks} ranks cannot share {global_batch} samples in micro-batches of {micro_batch}")
    first = range(index * micro_batch, global_batch, ranks * micro_batch)
    return [place for begin in first for place in range(begin, begin + micro_batch)]


def _stack(samples: list[Sample], micro_batch: int) -> Batch:
    micro_batches = len(samples) // micro_batch
    return Batch(*(np.stack(field).reshape(micro_batches, -1) for field in zip(*samples, strict=True)))
