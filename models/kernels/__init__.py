"""The kernel table: each fused piece of arithmetic has one name, one signature and up to three implementations.

*plain*   stock MindSpore operators; they define the kernel and run everywhere
*native*  C++ on CPU (`csrc/`, compiled by setup.py), tested against plain
*ascend*  fused operators of Ascend devices

`choose` is the only place that decides which one a run uses, and why; segments are built from what it returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspore import nn

from models.checks import check_choice
from models.kernels import ascend, native, native_experts, plain, plain_experts
from models.kernels.plain import EMPTY_LSE as EMPTY_LSE

NAMES = (
    "Matmul",
    "RMSNorm",
    "HeadNorm",
    "Rotary",
    "Attention",
    "BlockAttention",
    "SwiGLU",
    "CrossEntropy",
    "Embedding",
    "SquareSum",
    "AdamW",
    "Routing",
    "SortPlaces",
    "Rows",
    "GroupedMatmul",
    "ExpertSwiGLU",
)

EXPERTS = ("Routing", "SortPlaces", "Rows", "GroupedMatmul", "ExpertSwiGLU")
"""Which on CPU are all of one room: native ones leave rows unwritten that the plain `GroupedMatmul` would read."""

ROOMS = {"plain": (plain, plain_experts), "native": (native, native_experts), "ascend": (ascend,)}

KERNELS: dict[str, dict[str, type[nn.Cell]]] = {
    name: {
        room: getattr(module, name) for room, modules in ROOMS.items() for module in modules if hasattr(module, name)
    }
    for name in NAMES
}
"""name -> implementation -> class. A kernel without an entry under `ascend` has no fused operator there."""


@dataclass(frozen=True)
class Choice:
    """Which implementation of a kernel a run uses. `reason` says why it is not the fastest; empty when it is."""

    implementation: str
    reason: str = ""


class Kernels:
    """The chosen classes as attributes (`kernels.RMSNorm(eps)`), and `choices`: name -> `Choice`.

    `documents` says whether attention stops at document boundaries; where it does not, Ascend needs no mask.
    """

    Matmul: type[nn.Cell]
    RMSNorm: type[nn.Cell]
    HeadNorm: type[nn.Cell]
    Rotary: type[nn.Cell]
    Attention: type[nn.Cell]
    BlockAttention: type[nn.Cell]
    SwiGLU: type[nn.Cell]
    CrossEntropy: type[nn.Cell]
    Embedding: type[nn.Cell]
    SquareSum: type[nn.Cell]
    AdamW: type[nn.Cell]
    Routing: type[nn.Cell]
    SortPlaces: type[nn.Cell]
    Rows: type[nn.Cell]
    GroupedMatmul: type[nn.Cell]
    ExpertSwiGLU: type[nn.Cell]

    def __init__(self, choices: dict[str, Choice], documents: bool) -> None:
        self.choices = choices
        self.documents = documents
        for name, choice in choices.items():
            setattr(self, name, KERNELS[name][choice.implementation])

    def describe(self) -> str:
        """One line: ``kernels: native; plain AdamW (fp64 updates weights in plain operators)``."""
        named: dict[Choice, list[str]] = {}
        for name, choice in self.choices.items():
            named.setdefault(choice, []).append(name)
        parts = []
        for choice, names in sorted(named.items(), key=lambda entry: -len(entry[1])):
            some = "" if not parts else " " + ", ".join(names)
            parts.append(choice.implementation + some + (f" ({choice.reason})" if choice.reason else ""))
        return "kernels: " + "; ".join(parts)


def choose(kind: str, precision: str, device: str, documents: bool = True) -> Kernels:
    """The implementation of every kernel for this run.

    kind: `auto` (the fastest that works) or `plain`; precision: `fp32`, `fp64` or `bf16`; device: `CPU` or `Ascend`.
    """
    check_choice("train.kernels", kind, ("auto", "plain"))
    if kind == "plain":
        return Kernels({name: Choice("plain", "train.kernels=plain") for name in NAMES}, documents)
    decide = _on_ascend if device == "Ascend" else _on_cpu
    return Kernels({name: decide(name, precision) for name in NAMES}, documents)


def _on_cpu(name: str, precision: str) -> Choice:
    missing = native.missing()
    if missing:
        return Choice("plain", f"{missing}; slower")
    if name in ("Matmul", *EXPERTS) and native.missing_matmul():
        return Choice("plain", f"{native.missing_matmul()}; slower")
    if name in ("Matmul", "AdamW") and precision == "fp64":
        return Choice("plain", "the fp64 reference multiplies and updates weights in plain operators")
    return Choice("native")


def _on_ascend(name: str, precision: str) -> Choice:
    missing = ascend.missing(name, precision)
    return Choice("plain", missing) if missing else Choice("ascend")
