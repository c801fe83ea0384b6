"""What `train.precision` means: the dtype of weights and optimizer, how linears round, and the peak that MFU reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.checks import check


@dataclass(frozen=True)
class Precision:
    """One precision on one device."""

    name: str
    dtype: type
    """Of weights, gradients, optimizer state and sums; a NumPy type."""
    rounding: str
    """How linears take their operands (`models.layers.Rounding`)."""
    peak: str
    """Key of the topology's `peak_tflops`."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return np.dtype(self.dtype).itemsize


def choose(name: str, device: str) -> Precision:
    """The precision `name` on `CPU` or `Ascend`; `auto` is bf16 on Ascend and fp32 on CPU."""
    if name == "auto":
        name = "bf16" if device == "Ascend" else "fp32"
    check(
        name != "fp64" or device == "CPU",
        "train.precision",
        f"fp64 is a reference for the CPU, but this machine has {device} devices",
        "set train.precision=bf16 or fp32",
    )
    if name == "bf16":
        return Precision(name, np.float32, "native" if device == "Ascend" else "emulated", "bfloat16")
    dtype = np.float64 if name == "fp64" else np.float32
    return Precision(name, dtype, "none", np.dtype(dtype).name)
