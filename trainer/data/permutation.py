"""A permutation as a function: which sample comes at place i, without a shuffled list.

A Feistel network is a bijection of a power of four; indices that it sends outside the range are sent on
("cycle walking") until they fall inside, which keeps it a bijection (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002; levanter's data/permutation.py does the same).
"""

from __future__ import annotations

import hashlib
from typing import overload

import numpy as np

ROUNDS = 8
_MASK64 = (1 << 64) - 1


class Permutation:
    """A bijection of range(length), fixed by `seed` (an integer or a tuple of them), without state.

    Calling it with an int gives an int, with an array of integers an int64 array of the same shape.
    """

    def __init__(self, length: int, seed: int | tuple[int, ...]) -> None:
        if length < 1:
            raise ValueError(f"a permutation needs a length of at least 1, but got {length}")
        self.length = length
        self._half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        seeds = seed if isinstance(seed, tuple) else (seed,)
        digest = hashlib.sha512(repr(tuple(int(s) for s in seeds)).encode()).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]

    @overload
    def __call__(self, index: int) -> int: ...
    @overload
    def __call__(self, index: np.ndarray) -> np.ndarray: ...

    def __call__(self, index):
        if isinstance(index, np.ndarray):
            return self._permute_array(index)
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of a permutation of {self.length}")
        value = self._network(int(index))
        while value >= self.length:
            value = self._network(value)
        return value

    def _permute_array(self, index: np.ndarray) -> np.ndarray:
        if index.size and (index.min() < 0 or index.max() >= self.length):
            raise IndexError(f"indices {index.min()} to {index.max()} of a permutation of {self.length}")
        values = self._network(index.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.length)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.length]
        return values.astype(np.int64).reshape(index.shape)

    def _network(self, value):
        """One pass over an int or a uint64 array; both wrap at 64 bits, so both give the same numbers."""
        left, right = value >> self._shift(value), value & self._cast(value, self._half_mask)
        for key in self._keys:
            mixed = _mix(right, key) & self._cast(value, self._half_mask)
            left, right = right, left ^ mixed
        return (left << self._shift(value)) | right

    def _shift(self, like):
        return self._cast(like, self._half_bits)

    @staticmethod
    def _cast(like, constant: int):
        # numpy mixes uint64 with a signed integer into float64, so constants follow the kind of the value.
        return np.uint64(constant) if isinstance(like, np.ndarray) else constant


def _mix(value, key: int):
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014) of value + key."""
    cast = Permutation._cast
    mask = cast(value, _MASK64)
    value = (value + cast(value, key)) & mask
    value = ((value ^ (value >> cast(value, 30))) * cast(value, 0xBF58476D1CE4E5B9)) & mask
    value = ((value ^ (value >> cast(value, 27))) * cast(value, 0x94D049BB133111EB)) & mask
    return value ^ (value >> cast(value, 31))
