"""Names of everything that a run reports. Dashboards and tests import them from here.

A row of `metrics.jsonl` has the keys of `ROW`, with experts or further tokens theirs too; TensorBoard shows them under
the names of `metrics.tags`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import ModelConfig

Row = dict[str, Any]
"""A line of metrics.jsonl."""

STEP = "step"
LOSS = "loss"
GRAD_NORM = "grad_norm"
LR = "lr"
TOKENS = "tokens"
SAMPLES = "samples"
TOKENS_PER_S = "tokens_per_s"
TOKENS_PER_S_PER_RANK = "tokens_per_s_per_rank"
STEP_S = "step_s"
DATA_WAIT_S = "data_wait_s"
MFU = "mfu"
MEMORY_GIB = "memory_gib"
EVAL_LOSS = "eval_loss"
AUX_LOSS = "aux_loss"
"""Of the routers' balance, by its coefficient."""
Z_LOSS = "z_loss"
"""Of the routers' logits, by its coefficient."""
MTP_LOSS = "mtp_loss"
"""Of multi-token prediction, a mean over its modules, without its coefficient."""
DISPATCH_BYTES = "dispatch_bytes"
"""level -> bytes that all ranks sent over it in a step to dispatch copies of tokens and to combine them."""
EXPERTS = "experts"
"""layer -> what its router counted (`trainer.experts`)."""
EVENT = "event"
BATCH_SIZE = "batch_size"
"""Sequences a step; a curve of other projects, constant here."""
DATA_SHARE = "data_share"
"""Share of the step that waited for data."""

ROW = (STEP, LOSS, GRAD_NORM, LR, TOKENS, SAMPLES, TOKENS_PER_S, TOKENS_PER_S_PER_RANK,
       STEP_S, DATA_WAIT_S, MFU, MEMORY_GIB)  # fmt: skip


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a metrics.jsonl, none where there is no file; what a kill cut short is passed over."""
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(text)


@dataclass(frozen=True)
class Tag:
    """One TensorBoard curve: its name, the key of the row, a factor of the unit, and the x axis."""

    name: str
    key: str
    factor: float = 1.0
    x: str = STEP


def _of_experts(model: ModelConfig) -> list[Tag]:
    """As Megatron-LM has them: without coefficients, means over layers; of one further token, not of several."""
    moe, layers = model.moe, sum(map(model.moe.in_layer, range(model.layers + model.mtp.depth)))
    coefs = {("load_balancing_loss", AUX_LOSS): moe.aux_coef, ("z_loss", Z_LOSS): moe.z_coef}
    curves = [Tag(name, key, 1 / (coef * layers)) for (name, key), coef in coefs.items() if coef and layers]
    return curves + [Tag("mtp_1 loss", MTP_LOSS)] * (model.mtp.depth == 1)


def tags(scheme: str, model: ModelConfig, flops_per_token: float, memory_total_gib: float | None) -> list[Tag]:
    """The curves of `metrics.tags`, with the names that each project's dashboards read.

    `throughput` means TFLOP/s a rank in Megatron-LM's names. Curves over another x axis carry its name.
    """
    tflops = flops_per_token / 1e12
    if scheme == "megatron":
        curves = [
            Tag("lm loss", LOSS),
            Tag("learning-rate", LR),
            Tag("grad-norm", GRAD_NORM),
            Tag("batch-size", BATCH_SIZE),
            Tag("iteration-time", STEP_S),
            Tag("throughput", TOKENS_PER_S_PER_RANK, tflops),
            Tag("lm loss validation", EVAL_LOSS),
            *_of_experts(model),
        ]
        return curves + [Tag(f"{c.name} vs samples", c.key, c.factor, SAMPLES) for c in curves]
    if scheme == "torchtitan":
        curves = [
            Tag("loss_metrics/global_avg_loss", LOSS),
            Tag("grad_norm", GRAD_NORM),
            Tag("lr", LR),
            Tag("throughput(tps)", TOKENS_PER_S_PER_RANK),
            Tag("tflops", TOKENS_PER_S_PER_RANK, tflops),
            Tag("mfu(%)", MFU, 100.0),
            Tag("time_metrics/end_to_end(s)", STEP_S),
            Tag("time_metrics/data_loading(s)", DATA_WAIT_S),
            Tag("time_metrics/data_loading(%)", DATA_SHARE, 100.0),
            Tag("memory/max_reserved(GiB)", MEMORY_GIB),
            Tag("n_tokens_seen", TOKENS),
            Tag("validation_metrics/loss", EVAL_LOSS),
        ]
        if memory_total_gib:
            curves.append(Tag("memory/max_reserved(%)", MEMORY_GIB, 100.0 / memory_total_gib))
        return curves
    curves = [Tag(key, key) for key in (*ROW[1:], EVAL_LOSS, AUX_LOSS, Z_LOSS, MTP_LOSS)]
    return curves + [Tag(f"{key}_by_{x}", key, x=x) for key in (LOSS, EVAL_LOSS) for x in (TOKENS, SAMPLES)]
