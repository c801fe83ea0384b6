"""The sections of a recipe that belong to the trainer. Others: `model` in models/config.py, `data` in
trainer/data/settings.py, `launcher` in trainer/launch/settings.py, `topology` in parallel/topology.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from models.checks import check, check_above, check_at_least, check_choice
from parallel.layout import ORDER


@dataclass(kw_only=True)
class TrainSettings:
    """How long, on how much, and at which precision."""

    steps: int
    """Steps of the whole run; the learning rate's horizon."""
    stop_at: int | None = None
    """End after this step without changing the learning rate's horizon."""
    global_batch: int
    """Sequences a step, over all ranks and micro-batches."""
    seed: int = 0
    """Seed of the initial weights and of the sample order."""
    precision: str = "auto"
    """`fp32`; `bf16` with fp32 master weights (on CPU rounded to bf16 around fp32 multiplication); `fp64`, a
    reference for the CPU; `auto`: bf16 on Ascend, fp32 on CPU."""
    kernels: str = "auto"
    """`auto` takes the fastest implementation of each kernel; `plain` forces stock MindSpore operators."""
    eval_every: int = 0
    """Steps between evaluations on the held-out text, and one at the end; 0: never."""
    eval_batches: int = 8
    """Global batches of one evaluation."""
    log_every: int = 1
    """Steps between logged rows."""
    name: str | None = None
    """Name of the run directory; left out, the recipe's name and the first free number."""
    out: str = "runs"
    """Folder that holds run directories."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "eval_batches", "log_every"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("eval_every", "seed"):
            check_at_least(f"train.{name}", getattr(self, name), 0)
        if self.stop_at is not None:
            check_at_least("train.stop_at", self.stop_at, 1)
        check_choice("train.precision", self.precision, ("auto", "fp32", "bf16", "fp64"))
        check_choice("train.kernels", self.kernels, ("auto", "plain"))
        check(
            self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name and len(self.name) < 200),
            "train.name",
            f"must be one folder's name of fewer than 200 letters, but is {self.name!r}",
            "put a parent folder into train.out",
        )

    @property
    def last_step(self) -> int:
        """The step after which the run ends."""
        return self.steps if self.stop_at is None else min(self.stop_at, self.steps)


@dataclass
class OptimizerSettings:
    """AdamW with decoupled weight decay (on matrices alone) and a clip of the global gradient norm."""

    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            check_above(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("weight_decay", "clip"):
            check_at_least(f"optimizer.{name}", getattr(self, name), 0)
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            f"must be two numbers of at least 0 and below 1, but is {self.betas}",
            "the usual pair is [0.9,0.95]",
        )


@dataclass
class LearningRateSettings:
    """How the learning rate goes from 0 through its peak (`optimizer.lr`) to its end."""

    schedule: str = "cosine"
    """`constant`, `linear`, `cosine`, `inverse_sqrt`, `polynomial` or `wsd` (warm-up, stable, decay)."""
    warmup: int = 0
    """Steps of linear warm-up."""
    min: float = 0.0
    """Learning rate at the end of a decay."""
    power: float = 1.0
    """Exponent of `polynomial`."""
    decay: int | None = None
    """Last steps in which `wsd` decays; left out, a fifth of the run."""

    def __post_init__(self) -> None:
        schedules = ("constant", "linear", "cosine", "inverse_sqrt", "polynomial", "wsd")
        check_choice("lr.schedule", self.schedule, schedules)
        for name in ("warmup", "min"):
            check_at_least(f"lr.{name}", getattr(self, name), 0)
        check_above("lr.power", self.power, 0)
        if self.decay is not None:
            check_at_least("lr.decay", self.decay, 1)


@dataclass
class LayoutSettings:
    """Sizes of the parallel axes. Nothing here changes the numbers."""

    auto: bool = False
    """The planner chooses what is left out here before the run starts (`layout=auto`)."""
    dp: int | None = None
    """Groups of ranks that share the global batch (data parallelism); left out, it follows from `launcher.ranks`."""
    tp: int = 1
    """Ranks that share every matrix of a layer (tensor parallelism)."""
    sequence_parallel: bool = False
    """Ranks of tp share the tokens of the stream between blocks too."""
    pp: int = 1
    """Pipeline ranks (pipeline parallelism)."""
    vpp: int = 1
    """Stages that each pipeline rank holds; `interleaved` needs 2 or more, the V schedules mean 2."""
    schedule: str = "1f1b"
    """Order of a pipeline's passes: `gpipe`, `1f1b`, `interleaved`, `zb_h1`, `zb_v` or `dualpipe_v`."""
    stages: list[int] | None = None
    """Layers of each stage; left out, stages are balanced with embedding and head counted as a layer each."""
    cp: int = 1
    """Ranks that share the tokens of every sequence (context parallelism)."""
    cp_method: str = "ring"
    """How attention brings them together: `ring`, `ulysses` (heads over ranks), or `hybrid`."""
    cp_ulysses: int = 2
    """Ranks of `cp` that `hybrid` exchanges heads among, with a ring over the others."""
    ep: int = 1
    """Ranks over which the experts of a layer are spread (expert parallelism), of those of `dp` x `cp` x `tp`."""
    etp: int = 1
    """Ranks that share every matrix of one expert."""
    dispatch: str = "auto"
    """How copies of tokens get to their experts: `flat`, each to its expert's rank; `two_level`, a token once to each
    group of ranks and from there on; `auto`: two-level where a group of `ep` spans a slower network."""
    outer_groups: int | None = None
    """Groups of `ep` that a token goes to once each in two-level dispatch; left out, those that the machine makes, or
    two."""
    zero: int = 0
    """ZeRO: what ranks of `dp` x `cp` cut among them: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights
    too."""
    zero_group: int | None = None
    """Ranks that share one set of pieces, with copies across groups (HSDP); left out, all of `dp` x `cp`."""
    prefetch: bool = False
    """ZeRO 3 gathers the next layer's weights before a layer runs, at the cost of memory."""
    bucket_mib: float = 64
    """Gradients are summed over `dp` x `cp` in messages of up to as many MiB, the last layers' first; 0: in one."""
    early_receive: bool = True
    """A pipeline rank asks for what its next pass needs before it runs a pass; off, once it was sent by unit times,
    as always on Ascend."""
    recompute: Any = "none"
    """What runs forward again instead of being saved: `none`, `selective` (attention's core), `full`, or a list of
    layers."""
    order: list[str] = field(default_factory=lambda: list(ORDER))
    """Nesting of the axes over consecutive ranks, innermost first."""
    micro_batch: int | None = 1
    """Sequences that one rank computes at once; gradients add up over micro-batches. `null`: the
    largest that leaves pp as many micro-batches as it has ranks, or its schedule asks for."""

    def __post_init__(self) -> None:
        for name in ("dp", "micro_batch"):  # None means something here; Layout checks the others
            if getattr(self, name) is not None:
                check_at_least(f"layout.{name}", getattr(self, name), 1)


@dataclass
class OverlapSettings:
    """Shares of each kind of traffic, 0 to 1, that computation hides; left out, what the constants say."""

    tp: float | None = None
    """Tensor-parallel traffic."""
    cp: float | None = None
    """Keys and values on their ring."""
    ep: float | None = None
    """Dispatch and combine."""
    dp: float | None = None
    """Gradients and weights over dp."""
    pp: float | None = None
    """Messages between stages."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            rule, remedy = f"must be 0 to 1, but is {share}", f"set plan.overlap.{name}=0 for none, 1 for all"
            check(share is None or 0 <= share <= 1, f"plan.overlap.{name}", rule, remedy)


@dataclass
class PlanSettings:
    """What the planner plans for, and which places of the machine ranks run on."""

    ranks: int | None = None
    """Ranks to plan for; left out, `launcher.ranks`, or all that the topology holds."""
    without: Any = field(default_factory=list)
    """Blocks of the machine that are lost, one or a list: `cabinet:3`, counted from 0."""
    nodes: Any = field(default_factory=list)
    """What a scheduler gave: of each block around nodes (a supernode) in order, how many are free, or their numbers."""
    allow_idle: bool = False
    """Fewer ranks may be used where that is faster."""
    imbalance: float | None = None
    """Rows of the busiest rank's experts over the mean, in time and memory; left out, what the constants say."""
    overlap: OverlapSettings = field(default_factory=OverlapSettings)
    """Traffic that is hidden; see its own keys."""
    out: str = "plans"
    """Folder that holds the folders of plans."""
    prediction: dict[str, Any] | None = None
    """What was predicted of the layout: in a plan's own file, for `busway report`."""

    def __post_init__(self) -> None:
        if self.ranks is not None:
            check_at_least("plan.ranks", self.ranks, 1)
        if self.imbalance is not None:
            check_at_least("plan.imbalance", self.imbalance, 1)
        self.without, self.nodes = (
            value if isinstance(value, list) else [] if value is None else [value]
            for value in (self.without, self.nodes)
        )


@dataclass
class CheckpointSettings:
    """When the state is saved, how many are kept, and what a run starts from."""

    every: int = 0
    """Steps between checkpoints; 0: at the end alone. A run that is told to stop saves too."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    resume: str = "none"
    """`none`; `auto`, from the newest checkpoint of the run if there is one; or a checkpoint's folder."""
    init_from: str | None = None
    """Folder of weights to start from: Hugging Face's, a converted one or a checkpoint; shapes must fit the model."""

    def __post_init__(self) -> None:
        check_at_least("checkpoint.every", self.every, 0)
        check_at_least("checkpoint.keep", self.keep, 1)


@dataclass
class MetricsSettings:
    """What dashboards see."""

    tags: str = "busway"
    """Names of the TensorBoard curves: `busway`, `megatron` or `torchtitan`."""
    trace: bool = False
    """Write `trace.json`, a Chrome trace of all ranks' passes, collectives and waiting, of three steps: the second to
    the fourth after the start or a resume. It opens in Perfetto and chrome://tracing."""
    routing: bool = False
    """Write `routing/step-…-rank-….npz`: the experts that each token went to in each layer, of every step. On CPU."""

    def __post_init__(self) -> None:
        check_choice("metrics.tags", self.tags, ("busway", "megatron", "torchtitan"))
