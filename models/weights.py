"""Weights: the tensors that a graph reads, each made of one or more parameters stacked along their first dim.

Queries, keys and values are three parameters and one weight, as one wide matmul is faster than three narrow
ones. Checkpoints and initial values know parameters (`ParameterSpec`); graphs and optimizers know weights.
This module imports no MindSpore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from models.config import ParameterSpec

BLOCK_ROWS = 256
"""Rows that one counter of the generator covers; part of the definition of a model's start."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the graph; `parts` are stacked along dim 0."""

    name: str
    parts: tuple[ParameterSpec, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stacked tensor."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.parts[0].decays

    def stack(self, read: Callable[[ParameterSpec], np.ndarray]) -> np.ndarray:
        """The weight's value, from a function that gives each parameter's."""
        values = [read(part) for part in self.parts]
        return values[0] if len(values) == 1 else np.concatenate(values)

    def split(self, value: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
        """(parameter name, its rows of `value`), the inverse of `stack`."""
        row = 0
        for part in self.parts:
            yield part.name, value[row : row + part.shape[0]]
            row += part.shape[0]


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
    return [Weight(name, tuple(parts)) for name, parts in weights.items()]


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


def initial_reader(seed: int, std: float) -> Callable[[ParameterSpec], np.ndarray]:
    """A function for `Weight.stack` that draws initial values."""
    return lambda spec: draw(spec, seed, std)


def mapping_reader(values: Mapping[str, np.ndarray]) -> Callable[[ParameterSpec], np.ndarray]:
    """A function for `Weight.stack` that looks parameters up by name."""
    return lambda spec: values[spec.name]
