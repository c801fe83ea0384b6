"""What this machine is: its device, its cores and memory, and whether a recipe fits. No MindSpore here."""

from __future__ import annotations

import errno
import glob
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from models.config import ModelConfig
from trainer.errors import MachineError
from trainer.settings import TrainSettings

GIB = 2**30
RESERVE_GIB = 0.6
"""What one rank takes before any model: MindSpore's libraries and runtime, measured on CPU."""


@cache
def device() -> str:
    """`Ascend` where the driver shows a device, else `CPU`."""
    return "Ascend" if glob.glob("/dev/davinci[0-9]*") else "CPU"


def precision(settings: TrainSettings, device_name: str) -> str:
    """`train.precision` with `auto` decided."""
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if device_name == "Ascend" else "fp32"


def available_memory_gib() -> float:
    """Memory that is free for use, bounded by the control group's limit where there is one."""
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available / GIB


def peak_memory_gib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def needed_memory_gib(model: ModelConfig, tokens: int, item_bytes: int, accumulates: bool) -> float:
    """Memory that one rank needs for a step on `tokens` tokens at once.

    Weights, gradients and two moments (and the accumulated gradients), what the segments save, the gradient of
    the logits beside them, and the process itself.
    """
    copies = 5 if accumulates else 4
    elements = copies * model.parameter_count + tokens * (model.saved_elements_per_token() + model.vocab)
    return elements * item_bytes / GIB + RESERVE_GIB


def check_memory(needed_gib_a_rank: float, ranks: int) -> None:
    """Raise `MachineError` unless `ranks` ranks fit into this machine's free memory."""
    needed, available = needed_gib_a_rank * ranks, available_memory_gib()
    if needed > available:
        each = f" ({needed_gib_a_rank:,.1f} for each of {ranks} ranks)" if ranks > 1 else ""
        raise MachineError(
            f"this recipe needs {needed:,.1f} GiB{each}, but this machine has {available:,.1f} GiB free; "
            "make the model, layout.micro_batch or data.seq_len smaller, or use a larger machine"
        )


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns a full disk and missing permissions on `path` into a `MachineError` that says so."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space or set train.out to another disk",
            errno.EDQUOT: "free some space or set train.out to another disk",
            errno.EROFS: "set train.out to a folder that can be written",
            errno.EACCES: "set train.out to a folder that can be written",
            errno.EPERM: "set train.out to a folder that can be written",
            errno.ENOTDIR: "set train.out to a folder",
        }
        if error.errno not in remedies:
            raise
        raise MachineError(f"cannot write {path}: {os.strerror(error.errno)}; {remedies[error.errno]}") from error
