"""DeepSeek's published FP8 weights: E4M3 numbers in blocks, each block with a factor in ``NAME_scale_inv``.

They become BF16, as DeepSeek's own fp8_cast_bf16.py makes them (repository deepseek-ai/DeepSeek-V3): the product in
float32, rounded to the nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.errors import InputError
from trainer.weight_tensor import DTYPES, Tensor

FP8 = "F8_E4M3"
SUFFIX = "_scale_inv"


def _e4m3() -> np.ndarray:
    """The 256 values of E4M3 without infinities: sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones is NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    value[code & 127 == 127] = np.nan
    return np.where(code & 128, -value, value).astype(np.float32)


VALUES = _e4m3()


@dataclass(frozen=True)
class Quantised:
    """A matrix of FP8 numbers, in the place of a `Tensor` of BF16; it is multiplied when it is read."""

    stored: Tensor
    scales: Tensor
    block: tuple[int, int]
    """Rows and columns that share a factor."""
    dtype = "BF16"

    @property
    def file(self) -> Path:
        """Where the numbers are."""
        return self.stored.file

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the numbers."""
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        """Of the matrix in BF16."""
        return 2 * self.stored.nbytes

    @property
    def data(self) -> np.ndarray:
        """The matrix's bytes in BF16."""
        bits = (self.read((slice(None), slice(None))).view(np.uint32) >> 16).astype(np.uint16)
        return bits.reshape(-1).view(np.uint8)

    def read(self, region: tuple[slice, ...]) -> np.ndarray:
        """A region in float32, of numbers that BF16 has."""
        rows, columns = (np.arange(size)[span] for size, span in zip(self.shape, region, strict=True))
        scales = self.scales.read((slice(None), slice(None))).astype(np.float32)
        factors = scales[rows // self.block[0]][:, columns // self.block[1]]
        product = VALUES[self.stored.data.reshape(self.shape)[region]] * factors
        bits = product.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return np.where(np.isnan(product), product, rounded.view(np.float32))


def with_factors(found: Mapping[str, Tensor], block: tuple[int, int] | None) -> dict[str, Tensor | Quantised]:
    """`found` with each FP8 matrix and its factors as one. `block` is that of config.json's quantization_config.

    Raises:
        InputError: factors are missing or have another shape, or config.json does not say how large a block is.
    """
    tensors: dict[str, Tensor | Quantised] = {
        name: tensor for name, tensor in found.items() if not _belongs(found, name.removesuffix(SUFFIX), name)
    }
    for name, tensor in found.items():
        if tensor.dtype != FP8:
            continue
        if block is None:
            raise InputError(
                f"{tensor.file}: tensor {name} is of dtype {FP8}, but config.json has no quantization_config; "
                "take the one that was published with the weights"
            )
        scales = found.get(name + SUFFIX)
        wanted = tuple(-(-size // side) for size, side in zip(tensor.shape, block, strict=False))
        if len(tensor.shape) != 2:
            raise InputError(f"{tensor.file}: tensor {name} of dtype {FP8} must be a matrix; save it unquantised first")
        what = ""
        if scales is None:
            what = "is missing"
        elif scales.shape != wanted:
            what = f"must have shape {list(wanted)}, but has {list(scales.shape)}"
        elif scales.dtype not in DTYPES:
            what = f"must be of dtype {', '.join(DTYPES)}, but is {scales.dtype}"
        if what:
            raise InputError(f"{tensor.file}: tensor {name + SUFFIX} {what}; download the weights again")
        tensors[name] = Quantised(tensor, scales, block)
    return tensors


def _belongs(found: Mapping[str, Tensor], matrix: str, name: str) -> bool:
    return name != matrix and matrix in found and found[matrix].dtype == FP8
