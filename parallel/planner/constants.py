"""What hardware and framework make of the formulas: a few numbers for each device and framework, from data files.

`constants/*.yaml` are written by the fit (`benchmarks/planner_fit.py`) from published runs, and keep its error. None is
of a model or of a source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from models.checks import check, nearest

FOLDER = Path(__file__).parent / "constants"


@dataclass(frozen=True)
class Constants:
    """How much of what a machine promises a framework gets. Times in seconds, the others fractions or counts."""

    matmul: float = 0.8
    """Of the peak, in matmuls so large that nothing else matters."""
    attention: float = 0.5
    """Of the peak, in attention's core, whose causal half alone counts."""
    scores: float = 0.0
    """Passes over attention's matrix of scores that a kernel makes in memory, forward; none where it is fused."""
    memory: float = 0.8
    """Of the memory's bandwidth, in passes over memory."""
    passes: float = 1.0
    """Bytes that norms, rotary, gates and sums move, over what a fused kernel would."""
    logit_passes: float = 1.0
    """Over logits in fp32, in one direction, over what a fused cross-entropy makes."""
    kernel: float = 2e-5
    """Gaps between the kernels of one pass over a layer."""
    host: float = 0.0
    """The least that a host needs to launch a layer's forward; its backward takes twice as long."""
    host_tp: float = 0.0
    """The same for each rank of tp, where tp is above 1."""
    inner: float = 0.8
    """Of the bandwidth inside a node or supernode."""
    outer: float = 0.7
    """Of the bandwidth of the outermost network."""
    call: float = 1e-5
    """Fixed cost of one collective beside its steps' latency."""
    call_rank: float = 0.0
    """The same for each rank of a group inside a node: rings wait for every hop."""
    call_far: float = 1e-5
    """The same where the group spans nodes."""
    message: float = 0.0
    """What a message between stages on different nodes waits beside."""
    hide_tp: float = 0.0
    """Of tensor-parallel traffic that computation hides."""
    hide_dp: float = 0.5
    """Of gradients' traffic over dp, where there is backward to hide it behind."""
    hide_gather: float = 0.0
    """Of weights that are gathered behind the optimizer, by the next forward."""
    hide_ep: float = 0.0
    """Of dispatch and combine."""
    hide_cp: float = 0.5
    """Of the ring's traffic, behind attention's core."""
    hide_pp: float = 0.5
    """Of a message between stages; the rest delays the sender too."""
    spread: float = 0.0
    """Of a step, that it is longer for each doubling of the ranks above a node."""
    optimizer: float = 1.0
    """Time of the optimizer's pass over its state, over what memory's bandwidth gives."""
    step: float = 0.0
    """What every step takes beside."""
    imbalance: float = 1.0
    """The busiest rank's rows of experts over the mean."""
    experts: float = 0.9
    """Of the rate of a dense matmul, in grouped ones."""
    saved: float = 1.0
    """Bytes of saved activations, over the formula's."""
    score_bytes: float = 0.0
    """Of a score of attention's matrix, as an attention kernel saves them that is not fused."""
    logit_bytes: float = 4.0
    """Of one logit, as it is saved for the backward."""
    logits: float = 2.0
    """Bytes of the gradient of the logits beside them, over an activation's."""
    gradient_copies: float = 0.0
    """Copies of one micro-batch's gradients beside their sums, while ranks of dp add them up."""
    reserve: float = 1.0
    """GiB that framework and driver keep on a device."""
    fragments: float = 0.03
    """Of what is allocated, that fragmentation adds."""
    weight_bytes: float = 4.0
    """Of a weight and of its gradient in each form that is kept."""
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 8.0
    """Of the optimizer's state of one weight, that ZeRO 1 cuts."""
    own_bytes: float = 4.0
    """Of the copy of weights that ZeRO 1 and 2 update."""
    message_bytes: float = 2.0
    """Of a weight that ranks of dp gather."""
    item_bytes: float = 2.0
    """Of one number of an activation, and of a message of one."""
    stream_bytes: float = 2.0
    """Of one number that stages pass on, and of the gradients that tp sums where blocks are entered."""
    buffers: float = 0.0
    """GiB of a communicator's buffers."""

    def of_numbers(self, weight: int, item: int) -> Constants:
        """Those of Busway, which are of mixed precision, where weights, sums and what is saved have numbers of `weight`
        bytes, and what linears take `item`."""
        scaled = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "own_bytes", "message_bytes", "stream_bytes")
        wider = {name: getattr(self, name) * weight / 4 for name in (*scaled, "logit_bytes")}
        saved = {name: getattr(self, name) * (weight / 4) / (item / 2) for name in ("saved", "logits")}
        return replace(self, item_bytes=item, **wider, **saved)


@dataclass(frozen=True)
class Fit:
    """The constants of one device and framework, and how well they were fitted."""

    constants: Constants
    error: Mapping[str, Any]
    """`rows`, `median_abs_err`, `p90_abs_err`, and what they were fitted on."""
    chosen: str
    """DEVICE/FRAMEWORK that they are of, and why where another was asked for."""


@cache
def tables() -> dict[str, dict[str, Any]]:
    """device -> the content of its file."""
    return {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}


def _file(path: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        whole = isinstance(table, dict) and table["pooled"] in table["frameworks"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        whole = False
    check(whole, f"rank.device {path}", "is no file of constants", "name one that `busway report --refit` wrote")
    return table


def constants(device: str, framework: str, kernel: str | None = None, features: Iterable[str] = ()) -> Fit:
    """The constants of a device and framework; those of an attention kernel, and of features that a run may have on or
    off, stand beside them.

    `device` may be a file of the same form, such as `busway report --refit` writes. An unknown framework takes what is
    pooled over the device; an unknown device is an error that names the nearest. Raises `ConfigError`.
    """
    table = _file(Path(device)) if device.endswith(".yaml") else tables().get(device)
    check(table is not None, f"rank.device {device}", "has no constants", nearest(device, tables()))
    name = framework if framework in table["frameworks"] else table["pooled"]
    entry = dict(table["frameworks"][name])
    values = {f.name: entry[f.name] for f in fields(Constants) if f.name in entry}
    found = replace(Constants(), **values)
    found = replace(found, **entry.get("attention_kernels", {}).get(kernel, {}))
    for feature in sorted(features):
        found = replace(found, **entry.get("features", {}).get(feature, {}))
    chosen = f"{device}/{name}" if name == framework else f"{device}/{name}, as {framework} is not known there"
    return Fit(found, entry.get("error", {}), chosen)
