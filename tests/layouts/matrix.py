"""Layouts that must train the model of one rank, by number of ranks: name -> keys.

A key without a section is one of `layout`. Those of `model` choose the model, and with it the one-rank run that a
layout is compared with.
"""

from __future__ import annotations

from typing import NamedTuple

MODEL = (
    "model.layers=2", "model.heads=8", "model.kv_heads=2", "model.vocab=304", "data.tokenizer=bpe:304",
    "data.mask_documents=true", "train.global_batch=8", "optimizer.lr=3e-4",
)  # fmt: skip
TIED = "model.tied_embeddings=true model.qkv_bias=true"
NORMED = "model.qk_norm=true"
ODD = "model.qk_norm=true model.hidden=38 model.head_dim=6"
"""Whose norms four ranks cannot cut into equal pieces."""

EXPERTS = (
    "model.qk_norm=true model.moe.experts=8 model.moe.top_k=2 model.moe.ffn=24 model.moe.aux_coef=0.01 "
    "metrics.routing=true"
)
"""As Qwen3-MoE."""
LATENT = (
    "model.latent.kv_rank=16 model.latent.q_rank=24 model.latent.nope=8 model.latent.rope=4 model.latent.value=8 "
    "model.layers=3 model.moe.experts=8 model.moe.top_k=3 model.moe.ffn=24 model.moe.shared=1 model.moe.first_dense=1 "
    "model.moe.score=sigmoid model.moe.groups=4 model.moe.top_groups=2 model.moe.scale=2.5 model.moe.bias_rate=0.001 "
    "model.moe.aux_coef=0.01 model.moe.z_coef=0.001 metrics.routing=true"
)
"""As DeepSeek-V3."""
GLOBAL = f"{EXPERTS} model.moe.aux_loss=global"
"""Balanced over dp x micro_batch sequences, which must be as many as the one-rank run's one."""

MICRO_BATCH = f"{EXPERTS} model.moe.aux_loss=micro_batch"
"""Balanced over a micro-batch of one replica."""
CAPACITY = f"{EXPERTS} model.moe.capacity=1.0"
"""With drops, by the tokens that a rank computes at once: those of one sequence, as in the one-rank run."""
FURTHER = f"{LATENT} model.mtp.depth=1"
"""With multi-token prediction."""

LAYOUTS = {
    1: {
        "one micro-batch": f"micro_batch=8 {NORMED}",
        "recompute full": f"recompute=full {NORMED}",
        "recompute selective": f"recompute=selective {NORMED}",
        "recompute layer 1": f"recompute=[1] {NORMED}",
    },
    2: {
        "tp": f"tp=2 {NORMED}",
        "tp, tied": f"tp=2 {TIED}",
        "tp, sequence parallel": f"tp=2 sequence_parallel=true micro_batch=2 {NORMED}",
        "tp, sequence parallel, recompute full, tied": f"tp=2 sequence_parallel=true recompute=full {TIED}",
        "gpipe": f"pp=2 schedule=gpipe {NORMED}",
        "1f1b, tied": f"pp=2 micro_batch=2 {TIED}",
        "1f1b, late receive": f"pp=2 early_receive=false {NORMED}",
        "interleaved": f"pp=2 vpp=2 schedule=interleaved {NORMED}",
        "zb_h1, recompute full": f"pp=2 schedule=zb_h1 recompute=full {NORMED}",
        "zb_v, tied": f"pp=2 schedule=zb_v {TIED}",
        "dualpipe_v": f"pp=2 schedule=dualpipe_v recompute=selective {NORMED}",
        "ring": f"cp=2 {NORMED}",
        "ulysses": f"cp=2 cp_method=ulysses micro_batch=2 {NORMED}",
        "dp": f"dp=2 micro_batch=4 {NORMED}",
        "dp, small buckets": f"dp=2 bucket_mib=0.02 {NORMED}",
        "zero 1": f"dp=2 zero=1 {NORMED}",
        "zero 2": f"dp=2 zero=2 bucket_mib=0.02 {NORMED}",
        "zero 3": f"dp=2 zero=3 micro_batch=2 {NORMED}",
        "zero 3, prefetch, recompute full, tied": f"dp=2 zero=3 prefetch=true recompute=full {TIED}",
        "ep": f"dp=2 ep=2 micro_batch=2 {EXPERTS}",
        "ep, latent": f"dp=2 ep=2 {LATENT}",
        "ep, two-level": f"dp=2 ep=2 dispatch=two_level {EXPERTS}",
        "ep over tp": f"tp=2 ep=2 {LATENT}",
        "ep over tp, sequence parallel": f"tp=2 ep=2 sequence_parallel=true {EXPERTS}",
        "ep over tp, sequence parallel, latent": f"tp=2 ep=2 sequence_parallel=true recompute=full {LATENT}",
        "ep over ring": f"cp=2 ep=2 {LATENT}",
        "ep over ulysses": f"cp=2 cp_method=ulysses ep=2 recompute=selective {EXPERTS}",
        "etp": f"dp=2 etp=2 {EXPERTS}",
        "ep, capacity": f"dp=2 ep=2 {CAPACITY}",
        "etp, capacity": f"dp=2 etp=2 {CAPACITY}",
        "experts, global balance": f"cp=2 ep=2 {GLOBAL}",
        "experts x 1f1b": f"pp=2 {LATENT}",
        "experts x zero 3": f"dp=2 zero=3 {EXPERTS}",
        "further tokens x tp, sequence parallel": f"tp=2 sequence_parallel=true recompute=full {FURTHER}",
        "further tokens x zb_v": f"pp=2 schedule=zb_v {FURTHER}",
    },
    4: {
        "tp beyond the heads of keys": f"tp=4 sequence_parallel=true {NORMED}",
        "tp x interleaved": f"tp=2 pp=2 vpp=2 schedule=interleaved {NORMED}",
        "tp x zb_h1, sequence parallel, tied": f"tp=2 sequence_parallel=true pp=2 schedule=zb_h1 {TIED}",
        "tp x dp, zero 1": f"tp=2 dp=2 zero=1 {TIED}",
        "tp x dp, sequence parallel, zero 3": f"tp=2 sequence_parallel=true dp=2 zero=3 {NORMED}",
        "zb_v x zero 2": f"pp=2 schedule=zb_v dp=2 zero=2 {NORMED}",
        "dualpipe_v x zero 3": f"pp=2 schedule=dualpipe_v dp=2 zero=3 micro_batch=1 {NORMED}",
        "zb_h1 x zero 3, prefetch, tied": f"pp=2 schedule=zb_h1 dp=2 zero=3 prefetch=true {TIED}",
        "four stages, gpipe": f"pp=4 schedule=gpipe {NORMED} model.layers=4",
        "four stages, zb_h1": f"pp=4 schedule=zb_h1 {NORMED} model.layers=4",
        "uneven stages": f"pp=4 stages=[0,1,1,0] {NORMED}",
        "hybrid": f"cp=4 cp_method=hybrid {NORMED}",
        "ulysses beyond the heads of keys": f"cp=4 cp_method=ulysses recompute=[0] {NORMED}",
        "ring x zero 3": f"cp=2 dp=2 zero=3 {NORMED}",
        "ring x tp, sequence parallel, another order": (
            f"cp=2 tp=2 sequence_parallel=true order=[cp,tp,dp,pp] {NORMED}"
        ),
        "ring x 1f1b, tied": f"cp=2 pp=2 order=[pp,cp,tp,dp] {TIED}",
        "hsdp, zero 3": f"dp=4 zero=3 zero_group=2 {NORMED}",
        "hsdp, zero 2": f"dp=4 zero=2 zero_group=2 {TIED}",
        "zero 1, padded": f"dp=4 zero=1 bucket_mib=0.02 {ODD}",
        "zero 3, padded": f"dp=2 cp=2 zero=3 {ODD}",
        "ep of four": f"dp=4 ep=4 {LATENT}",
        "ep of four, two-level": f"dp=4 ep=4 dispatch=two_level {LATENT}",
        "ep of four, four outer groups": f"dp=4 ep=4 dispatch=two_level outer_groups=4 {EXPERTS}",
        "ep of four, two-level, capacity": f"dp=4 ep=4 dispatch=two_level {CAPACITY}",
        "ep over hybrid": f"cp=4 cp_method=hybrid ep=4 {EXPERTS}",
        "ep over dp x tp, zero 2": f"dp=2 tp=2 ep=4 zero=2 {EXPERTS}",
        "ep x gpipe": f"pp=2 dp=2 ep=2 schedule=gpipe {EXPERTS}",
        "ep x interleaved": f"pp=2 vpp=2 dp=2 ep=2 schedule=interleaved {EXPERTS}",
        "ep x interleaved, zero 2": f"pp=2 vpp=2 dp=2 ep=2 schedule=interleaved zero=2 {LATENT}",
        "ep over tp x zb_h1": f"tp=2 pp=2 ep=2 schedule=zb_h1 {LATENT}",
        "ep x zb_v": f"pp=2 dp=2 ep=2 schedule=zb_v recompute=full {LATENT}",
        "ep x dualpipe_v": f"pp=2 dp=2 ep=2 schedule=dualpipe_v {EXPERTS}",
        "ep x etp": f"dp=4 ep=2 etp=2 {LATENT}",
        "ep x etp, two-level": f"dp=4 ep=2 etp=2 dispatch=two_level {EXPERTS}",
        "ep x zero 1": f"dp=4 ep=2 zero=1 {EXPERTS}",
        "ep x zero 3": f"dp=4 ep=2 zero=3 {LATENT}",
        "ep x hsdp, zero 2": f"dp=4 ep=2 zero=2 zero_group=2 {EXPERTS}",
        "further tokens x ep x 1f1b, zero 3": f"pp=2 dp=2 ep=2 zero=3 {FURTHER}",
        "further tokens x ring x tp": f"cp=2 tp=2 recompute=selective {FURTHER} model.tied_embeddings=true",
        "ep over ring x tp": f"cp=2 tp=2 ep=4 sequence_parallel=true order=[cp,tp,dp,pp] {LATENT}",
    },
    8: {
        "tp x pp x dp, sequence parallel, zero 1": f"tp=2 sequence_parallel=true pp=2 dp=2 zero=1 {NORMED}",
        "tp x ring x interleaved": f"tp=2 cp=2 pp=2 vpp=2 schedule=interleaved sequence_parallel=true {NORMED}",
        "tp x ring x dp, zero 3": f"tp=2 cp=2 dp=2 zero=3 recompute=full {TIED}",
        "tp of eight": f"tp=8 sequence_parallel=true {NORMED}",
        "zb_v x hsdp, zero 3": f"pp=2 schedule=zb_v dp=4 zero=3 zero_group=2 {NORMED}",
        "zb_h1 x zero 2, four stages, tied": f"pp=4 schedule=zb_h1 dp=2 zero=2 {TIED} model.layers=4",
        "dualpipe_v x tp, four stages": f"pp=4 schedule=dualpipe_v tp=2 {NORMED} model.layers=6",
        "hybrid of eight": f"cp=8 cp_method=hybrid cp_ulysses=4 {NORMED}",
        "tp x pp x dp in another order, zero 3": f"tp=2 pp=2 dp=2 zero=3 order=[dp,pp,cp,tp] schedule=gpipe {TIED}",
        "ep of eight": f"dp=8 ep=8 {EXPERTS}",
        "ep of eight, two-level": f"dp=4 tp=2 ep=8 dispatch=two_level outer_groups=4 {LATENT}",
        "ep x etp, two-level, zero 3": f"dp=8 ep=4 etp=2 dispatch=two_level zero=3 {EXPERTS}",
        "ep over dp x tp x zb_h1, zero 1": f"dp=2 tp=2 pp=2 ep=4 zero=1 schedule=zb_h1 sequence_parallel=true {LATENT}",
    },
}  # fmt: skip
"""Keys that stand nowhere have their defaults."""

CI = (
    "ring x tp, sequence parallel, another order", "zb_h1 x zero 3, prefetch, tied", "ep over tp",
    "ep x etp, two-level",
)  # fmt: skip
"""Those that every test run tries, for fewer steps."""

FP32 = (
    "one micro-batch", "tp", "tp, sequence parallel", "1f1b, tied", "zb_v, tied", "ring", "ulysses", "dp", "zero 2",
    "zero 3", "tp x interleaved", "hybrid", "tp x dp, sequence parallel, zero 3", "zb_v x zero 2",
    "tp x pp x dp, sequence parallel, zero 1", "tp x ring x dp, zero 3", "ep", "ep, latent",
    "ep over tp, sequence parallel", "ep over ring", "ep of four, two-level", "ep over dp x tp, zero 2", "ep x etp",
)  # fmt: skip
"""Those that are compared in fp32 too, with what a perturbation of the start does."""


BALANCED = {
    "global": {
        "global balance, two ranks of one sequence": (2, f"dp=2 ep=2 micro_batch=1 {GLOBAL}"),
        "global balance, one share of two sequences": (2, f"tp=2 ep=2 micro_batch=2 {GLOBAL}"),
        "global balance over zb_h1, zero 2": (4, f"pp=2 dp=2 ep=2 schedule=zb_h1 zero=2 micro_batch=1 {GLOBAL}"),
    },
    "micro_batch": {
        "balance of a micro-batch": (1, f"micro_batch=2 {MICRO_BATCH}"),
        "balance of a micro-batch over ring": (2, f"cp=2 ep=2 micro_batch=2 {MICRO_BATCH}"),
        "balance of a micro-batch over tp": (2, f"tp=2 ep=2 micro_batch=2 {MICRO_BATCH}"),
    },
}
"""By form of the balance loss, layouts that share it: over two sequences, unlike the one-rank run of `MATRIX`."""


class Entry(NamedTuple):
    """One layout."""

    name: str
    ranks: int
    layout: tuple[str, ...]
    """Overrides of `layout`."""
    model: tuple[str, ...]
    """Overrides of `model`."""

    @property
    def keys(self) -> str:
        """Those of the layout, as a user would read them."""
        return " ".join(word.removeprefix("layout.") for word in self.layout)

    @property
    def kind(self) -> str:
        """What the model is like."""
        sections = {word.split(".")[1].split("=")[0] for word in self.model}
        if "moe" not in sections:
            return "dense"
        return ("DeepSeek-V3" if "latent" in sections else "Qwen3-MoE") + ", MTP" * ("mtp" in sections)


def entry(name: str, ranks: int, keys: str) -> Entry:
    """A line of `LAYOUTS`. Without `micro_batch` it is 1."""
    words = keys.split()
    layout = [f"layout.{word}" for word in words if "." not in word.partition("=")[0]]
    if not any(word.startswith("layout.micro_batch=") for word in layout):
        layout.append("layout.micro_batch=1")
    return Entry(name, ranks, tuple(layout), tuple(word for word in words if word.startswith(("model.", "metrics."))))


MATRIX = {name: entry(name, ranks, keys) for ranks, layouts in LAYOUTS.items() for name, keys in layouts.items()}
