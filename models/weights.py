"""Weights: the tensors that a graph reads, each made of one or more parameters stacked along their first dim.

Queries, keys and values are three parameters and one weight, as one wide matmul is faster than three narrow
ones. Checkpoints and initial values know parameters (`ParameterSpec`); graphs and optimizers know weights.
This module imports no MindSpore.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.config import ParameterSpec

BLOCK_ROWS = 256
"""Rows that one counter of the generator covers; part of the definition of a model's start."""


Region = tuple[tuple[int, int], ...]
Run = tuple[int, int]
Piece = tuple[Region | None, Run | None, Any]
"""(region, run, values) of what a file holds of a parameter: its region, None for all of it, and, where the values are
a run of the region laid out flat, (start, stop) of the run. `values` can be sliced like an array."""


@dataclass(frozen=True)
class Part:
    """A parameter, or the region of it that is held here."""

    spec: ParameterSpec
    region: Region
    """(start, stop) along each dim of the parameter's global shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the region."""
        return tuple(stop - start for start, stop in self.region)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def key(self) -> str:
        """Its name in files: the parameter's, and the region unless that is all of it: ``head.weight[0:8,0:4]``."""
        if self.shape == self.spec.shape:
            return self.spec.name
        return f"{self.spec.name}[{','.join(f'{start}:{stop}' for start, stop in self.region)}]"

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index."""
        return tuple(slice(*span) for span in self.region)

    def cut(self, dim: int, index: int, count: int) -> Part:
        """Piece `index` of `count` equal ones along `dim`. Raises ValueError where they are not equal."""
        start, stop = self.region[dim]
        size, rest = divmod(stop - start, count)
        if rest:
            raise ValueError(f"{self.spec.name}: {stop - start} along dim {dim} is no multiple of {count}")
        span = (start + index * size, start + (index + 1) * size)
        return Part(self.spec, (*self.region[:dim], span, *self.region[dim + 1 :]))


def whole(spec: ParameterSpec) -> Part:
    """All of a parameter."""
    return Part(spec, tuple((0, size) for size in spec.shape))


def parse_key(key: str) -> tuple[str, Region | None, Run | None]:
    """(parameter name, region, run) of a `Part.key`, perhaps with a run behind it: ``head.weight[0:8,0:4]@0:16``."""
    key, _, run = key.partition("@")
    name, _, region = key.partition("[")
    spans = [tuple(map(int, span.split(":"))) for span in region.rstrip("]").split(",")] if region else []
    return name, tuple(spans) or None, tuple(map(int, run.split(":"))) if run else None


def assemble(part: Part, pieces: Iterable[Piece]) -> np.ndarray:
    """`part` out of pieces that together hold all of it. Raises ValueError where they do not."""
    everything = whole(part.spec).region
    flat: dict[Region, list[tuple[Run, Any]]] = {}
    blocks = []
    for region, run, values in pieces:
        if run is None:
            blocks.append((region or everything, values))
        else:
            flat.setdefault(region or everything, []).append((run, values))
    for region, runs in flat.items():
        runs.sort(key=lambda entry: entry[0])
        values = np.concatenate([values[:] for _, values in runs])
        blocks.append((region, values.reshape([stop - start for start, stop in region])))
    result, filled = None, 0
    for region, values in blocks:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(part.region, region, strict=True)]
        if all(start < stop for start, stop in common):
            taken = values[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, region, strict=True))]
            if taken.shape == part.shape:
                return taken
            result = np.empty(part.shape, taken.dtype) if result is None else result
            result[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, part.region, strict=True))] = taken
            filled += taken.size
    if filled != part.size:
        raise ValueError(f"{part.key} is not whole: {filled} of its {part.size} elements are there")
    return result


Reader = Callable[[Part], np.ndarray]
"""Gives a part's values."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the graph; `parts` are stacked along dim 0."""

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stacked tensor."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.parts[0].spec.decays

    @property
    def update(self) -> str:
        """What a step makes of it; see `ParameterSpec`."""
        return self.parts[0].spec.update

    def stack(self, read: Reader) -> np.ndarray:
        """The weight's value, from each part's."""
        values = [read(part) for part in self.parts]
        return values[0] if len(values) == 1 else np.concatenate(values)

    def split(self, value: np.ndarray) -> Iterable[tuple[Part, np.ndarray]]:
        """(part, its rows of `value`), the inverse of `stack`."""
        row = 0
        for part in self.parts:
            yield part, value[row : row + part.shape[0]]
            row += part.shape[0]


def stacked(name: str, specs: Iterable[ParameterSpec]) -> Weight:
    """The weight that stacks all of `specs`."""
    return Weight(name, tuple(map(whole, specs)))


def weights_of(specs: Iterable[ParameterSpec], *stacks: tuple[str, tuple[str, ...]]) -> list[Weight]:
    """Weights of `specs` in their order; each of `stacks` is (name, endings of the parameters that it joins)."""
    weights: dict[str, list[ParameterSpec]] = {}
    for spec in specs:
        name = spec.name
        for stack, endings in stacks:
            for ending in endings:
                if spec.name.endswith(ending):
                    name = spec.name.removesuffix(ending) + stack
        weights.setdefault(name, []).append(spec)
    return [stacked(name, parts) for name, parts in weights.items()]


def draw(spec: ParameterSpec, seed: int, std: float, rows: slice = slice(None)) -> np.ndarray:
    """The initial value of `rows` of a parameter, float32, without drawing the others.

    A counter-based generator (Philox) is keyed by seed and name, and its counter starts anew at every block of
    `BLOCK_ROWS` rows: any rank draws its own slice, and no layout changes what is drawn.
    """
    start, stop, _ = rows.indices(spec.shape[0])
    shape = (stop - start, *spec.shape[1:])
    if spec.init != "normal":
        return np.full(shape, {"ones": 1.0, "zeros": 0.0}[spec.init], np.float32)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()[:16], "little")
    value = np.empty(shape, np.float32)
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        first = block * BLOCK_ROWS
        last = min(first + BLOCK_ROWS, spec.shape[0])
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block]))
        drawn = generator.standard_normal((last - first, *spec.shape[1:]), np.float32)
        low, high = max(first, start), min(last, stop)
        value[low - start : high - start] = drawn[low - first : high - first] * np.float32(std)
    return value


def initial_reader(seed: int, std: float) -> Reader:
    """Draws initial values."""

    def read(part: Part) -> np.ndarray:
        rows, *columns = part.slices
        return draw(part.spec, seed, std, rows)[(slice(None), *columns)]

    return read
