"""What this machine is: its device, its cores and memory, and whether a recipe fits. No MindSpore here."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from models.config import ModelConfig
from parallel.layout import Layout
from parallel.memory import Share, peak_saved_elements, recomputed_elements, state_bytes
from parallel.topology import Topology
from trainer.errors import MachineError

GIB = 2**30
PR_SET_PDEATHSIG = 1
CONTROL_GROUP = Path("/sys/fs/cgroup")
RESERVE_GIB = 0.6
"""What one rank takes before any model: MindSpore's libraries and runtime, measured on CPU."""

SMALLER = "make the model, layout.micro_batch or data.seq_len smaller, or use a larger machine"


@cache
def device() -> str:
    """`Ascend` where the driver shows a device, else `CPU`."""
    return "Ascend" if glob.glob("/dev/davinci[0-9]*") else "CPU"


def available_memory_gib() -> float:
    """Memory that is free for use, bounded by the control group's limit where there is one.

    Pages of files that the group has read count as used there, but are given back when memory is short.
    """
    available, limit = psutil.virtual_memory().available, CONTROL_GROUP / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        used = int((CONTROL_GROUP / "memory.current").read_text())
        parts = (CONTROL_GROUP / "memory.stat").read_text().split()
        files = int(dict(zip(parts[::2], parts[1::2], strict=True))["inactive_file"])
        available = min(available, int(limit.read_text()) - used + files)
    return available / GIB


def peak_memory_gib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def needed_memory_gib(model: ModelConfig, layout: Layout, seq_len: int, global_batch: int, item_bytes: int) -> float:
    """Memory that the fullest rank needs for a step."""
    shares = [Share(model, layout, global_batch, place) for place in range(layout.pp)]
    return max(_needed_bytes(share, seq_len, item_bytes) for share in shares) / GIB + RESERVE_GIB


def _needed_bytes(share: Share, seq_len: int, item_bytes: int) -> int:
    """What is kept from pass to pass; a micro-batch's gradients, with the message that they travel in and its result
    where ranks add them up; what the segments save or recompute, and the gradient of the logits beside them."""
    layout, state = share.layout, state_bytes(share, item_bytes)
    whole = item_bytes * max(map(share.elements, share.segments)) if state.gathered else state.weights
    gradients = whole * (3 if layout.dp * layout.cp > 1 else 1)
    logits = share.head * (layout.micro_batch * seq_len // layout.cp) * share.config.vocab // layout.tp
    passing = max(logits, recomputed_elements(share, seq_len))  # at the end and amid the layers
    return sum(state) + gradients + item_bytes * (peak_saved_elements(share, seq_len) + passing)


def check_memory(needed_gib_a_rank: float, ranks: int) -> None:
    """Raise `MachineError` unless `ranks` ranks fit into this machine's free memory."""
    needed, available = needed_gib_a_rank * ranks, available_memory_gib()
    if needed > available:
        each = f" ({needed_gib_a_rank:,.1f} for each of {ranks} ranks)" if ranks > 1 else ""
        raise MachineError(
            f"this recipe needs {needed:,.1f} GiB{each}, but this machine has {available:,.1f} GiB free; {SMALLER}"
        )


def check_device_memory(needed_gib_a_rank: float, topology: Topology) -> None:
    """Raise `MachineError` unless one rank fits into the memory of its device, where the topology knows it."""
    available = topology.rank.memory_gib
    if available is not None and needed_gib_a_rank > available:
        raise MachineError(
            f"this recipe needs {needed_gib_a_rank:,.1f} GiB a rank, but a {topology.rank.name} of {topology.name} has "
            f"{available:,.1f} GiB; {SMALLER}"
        )


_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space or {set_to} another disk",
    (errno.EFBIG,): "raise the limit on a file's size (ulimit -f) or {set_to} another disk",
    (errno.EACCES, errno.EPERM, errno.EROFS): "{set_to} a folder that can be written",
    (errno.ENOTDIR,): "{set_to} a folder",
    (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EXDEV): (
        "{set_to} another folder"
    ),
    (errno.EIO, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY): (
        "see to the disk or {set_to} another one"
    ),
}
"""What helps against each error that is the fault of the disk or of the path, and not of the program."""


@contextmanager
def writing_to(path: Path | str, set_to: str = "set train.out to") -> Iterator[None]:
    """Turns an error of the disk or the path, while `path` is written, into a `MachineError` that says so.

    `set_to` begins the remedy: what the user sets to have it written elsewhere.
    """
    try:
        yield
    except OSError as error:
        remedy = next((text for numbers, text in _REMEDIES.items() if error.errno in numbers), None)
        if remedy is None:
            raise
        reason = os.strerror(error.errno)
        raise MachineError(f"cannot write {path}: {reason}; {remedy.format(set_to=set_to)}") from error


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
