"""The order of samples over several datasets, as a function of the sample's number alone.

Sample numbers come in blocks of 1,024. Each dataset gets a fixed quota of every block (largest remainder of its
weight), so that sample n is found without a list: its place in the block, permuted by (seed, block), says which
dataset, and which of the quota; that gives its number within the dataset, hence the epoch and, permuted by
(seed, source, epoch), the sample. Nothing here depends on ranks, so neither does the order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.checks import ConfigError
from trainer.data.packed import PackedDataset, Sample
from trainer.data.permutation import Permutation

BLOCK = 1024


def quotas(weights: Sequence[float]) -> np.ndarray:
    """int64 [sources]: places in a block of `BLOCK` for each weight, by the method of largest remainder.

    Raises:
        ConfigError: a weight is so small beside the others that its share of a block is nothing.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: BLOCK - counts.sum()]] += 1
    for source in np.flatnonzero(counts == 0):
        raise ConfigError(
            f"data.sources[{source}].weight {weights[source]} is less than one sample in {BLOCK:,} of the blend; "
            f"raise it to at least {np.sum(weights) / BLOCK:.3g}, or leave the source out"
        )
    return counts


class Blend:
    """Samples 0, 1, 2, … without end from weighted datasets; each dataset is read once an epoch of its own.

    Args:
        datasets: all with the same `seq_len`.
        weights: one a dataset, of any scale.
        seed: fixes the order.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float], seed: int) -> None:
        if not datasets or len(datasets) != len(weights):
            raise ValueError(f"{len(datasets)} datasets and {len(weights)} weights")
        self.datasets = list(datasets)
        self.seed = seed
        self.seq_len = datasets[0].seq_len
        self.quotas = quotas(weights)
        self._ends = np.cumsum(self.quotas)

    def locate(self, number: int) -> tuple[int, int]:
        """(source, sample in it) of the sample `number` of the run."""
        block, place = divmod(number, BLOCK)
        slot = Permutation(BLOCK, (self.seed, block))(place)
        source = int(np.searchsorted(self._ends, slot, side="right"))
        quota = int(self.quotas[source])
        index = block * quota + slot - int(self._ends[source] - quota)
        size = len(self.datasets[source])
        epoch, place = divmod(index, size)
        return source, Permutation(size, (self.seed, source, epoch))(place)

    def sample(self, number: int) -> Sample:
        """The sample `number` of the run."""
        source, index = self.locate(number)
        return self.datasets[source].sample(index)
