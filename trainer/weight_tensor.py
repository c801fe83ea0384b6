"""One tensor of a safetensors file, memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Of the format -> of numpy."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, not yet read."""

    file: Path
    dtype: str
    """As the format spells it: F64, F32, F16 or BF16; `trainer.quantised` knows one more."""
    shape: tuple[int, ...]
    data: np.ndarray
    """Its bytes, a view of the memory-mapped file."""

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return self.data.nbytes

    def read(self, region: tuple[slice, ...]) -> np.ndarray:
        """A copy of a region in float32, or in float64 where the file has that."""
        kind = "uint16" if self.dtype == "BF16" else DTYPES[self.dtype]
        stored = self.data.view(np.dtype(kind).newbyteorder("<")).reshape(self.shape)[region]
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.promote_types(stored.dtype, np.float32))
