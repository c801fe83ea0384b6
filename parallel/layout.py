"""Sizes of the parallel axes and how they nest.

A `Layout` is what the planner returns, the trainer runs, the checkpoint records and the report explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.checks import check, check_at_least, check_choice, nearest_divisor
from models.config import ModelConfig
from parallel import schedules

ORDER = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Layout:
    """The size of every axis; ``pp x dp x cp x tp`` is the number of ranks.

    Experts take the same ranks in another way: inside one pipeline stage ``dp x cp x tp = edp x ep x etp``, so
    ``ep x etp`` divides ``dp x cp x tp`` and ``edp`` (expert data parallelism) is what is left.
    `parallel.mesh` says what each axis means and which ranks form its groups.

    Raises `models.checks.ConfigError` for a size below 1, an order that is no permutation of the axes, and
    expert axes that do not divide.
    """

    dp: int
    """Replicas; each reads its own samples."""
    cp: int = 1
    """Ranks that share the tokens of one sequence."""
    cp_method: str = "ring"
    """How attention brings the ranks of cp together: `ring`, `ulysses` or `hybrid`."""
    cp_ulysses: int = 2
    """Ranks of cp that `hybrid` has inside, with a ring outside."""
    tp: int = 1
    """Ranks that share every matrix of a layer."""
    pp: int = 1
    """Pipeline ranks; each holds `vpp` stages."""
    vpp: int = 1
    """Virtual stages of a pipeline rank; the V schedules mean 2."""
    schedule: str = "1f1b"
    """Order of a pipeline's passes, one of `parallel.schedules.NAMES`."""
    stages: tuple[int, ...] | None = None
    """Layers of each virtual stage; None balances them, embedding and head counted as a layer each."""
    zero: int = 0
    """ZeRO: what the ranks of dp x cp cut: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too."""
    zero_group: int | None = None
    """Ranks that share one set of pieces; None: all of dp x cp."""
    prefetch: bool = False
    """ZeRO 3 gathers the next segment's weights before a segment runs."""
    bucket_mib: float = 64
    """Gradients travel over dp x cp in messages of up to as many MiB, the last layers' first; 0: in one."""
    early_receive: bool = True
    """A pipeline rank asks for what its next pass needs before it runs a pass."""
    recompute: str | tuple[int, ...] = "none"
    """What runs forward again instead of being saved: `none`, `selective`, `full`, or these layers."""
    ep: int = 1
    """Ranks over which the experts of a layer are spread."""
    etp: int = 1
    """Ranks that share every matrix of one expert."""
    dispatch: str = "auto"
    """How copies of tokens get to their experts: `flat`, `two_level`, or what the machine asks for (`auto`)."""
    outer_groups: int | None = None
    """Groups that a token goes to once each in two-level dispatch; None: those that the machine makes, or two."""
    sequence_parallel: bool = False
    """Ranks of tp share the tokens of the stream between blocks."""
    micro_batch: int = 1
    """Sequences in one forward pass of one replica."""
    order: tuple[str, ...] = ORDER
    """Nesting of the axes over consecutive ranks, innermost first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))
        object.__setattr__(self, "stages", self.stages and tuple(self.stages))
        check_choice("layout.schedule", self.schedule, schedules.NAMES)
        if isinstance(self.recompute, str):
            check_choice("layout.recompute", self.recompute, ("none", "selective", "full"))
        else:
            check(
                isinstance(self.recompute, Sequence),
                "layout.recompute",
                f"must be none, selective, full or a list of layers, but is {self.recompute}",
                "set layout.recompute=selective, or [0,1] for the first two layers",
            )
            object.__setattr__(self, "recompute", tuple(self.recompute))
        check_choice("layout.cp_method", self.cp_method, ("ring", "ulysses", "hybrid"))
        check_choice("layout.dispatch", self.dispatch, ("auto", "flat", "two_level"))
        if self.schedule in schedules.V_SHAPED and self.vpp == 1:
            object.__setattr__(self, "vpp", 2)
        for axis in ("dp", "cp", "tp", "pp", "vpp", "cp_ulysses", "ep", "etp", "micro_batch"):
            check_at_least(f"layout.{axis}", getattr(self, axis), 1)
        check_at_least("layout.bucket_mib", self.bucket_mib, 0)
        check(
            sorted(self.order) == sorted(ORDER),
            "layout.order",
            f"must name each of {', '.join(ORDER)} once, but is [{','.join(self.order)}]",
            f"set layout.order=[{','.join(ORDER)}] (innermost first)",
        )
        check(0 <= self.zero <= 3, "layout.zero", f"must be 0 to 3, but is {self.zero}", "3 keeps the least on a rank")
        loss, group = self.dp * self.cp, self.zero_group
        check(
            group is None or (group > 0 and loss % group == 0),
            f"layout.zero_group {group}",
            f"must divide dp {self.dp} x cp {self.cp} = {loss}",
            f"set layout.zero_group={nearest_divisor(loss, group or 1)} (the nearest)",
        )
        stage = self.dp * self.cp * self.tp
        check(
            stage % (self.ep * self.etp) == 0,
            f"layout.ep {self.ep} x layout.etp {self.etp} = {self.ep * self.etp}",
            f"must divide dp {self.dp} x cp {self.cp} x tp {self.tp} = {stage}",
            self._expert_remedy(stage),
        )

        if self.outer_groups is not None:
            self._check_outer_groups(self.outer_groups)

    def _check_outer_groups(self, outer: int) -> None:
        if self.ep == 1:
            return
        given = f"layout.outer_groups {outer}"
        check(self.dispatch != "flat", given, "must be left out with layout.dispatch=flat", "leave it out")
        nearest = nearest_divisor(self.ep, outer, lambda count: count > 1)
        rule = f"must be above 1 and divide layout.ep {self.ep}"
        check(outer > 1 and self.ep % outer == 0, given, rule, f"set layout.outer_groups={nearest} (the nearest)")

    def _expert_remedy(self, stage: int) -> str:
        for axis, other in (("ep", self.etp), ("etp", self.ep)):
            if stage % other == 0:
                return f"set layout.{axis}={nearest_divisor(stage // other, getattr(self, axis))} (the nearest)"
        return f"set layout.ep={nearest_divisor(stage, self.ep)} (the nearest) and layout.etp=1"

    @property
    def ulysses(self) -> int:
        """Ranks of cp among which attention's heads are exchanged; the others form rings."""
        return {"ring": 1, "ulysses": self.cp, "hybrid": self.cp_ulysses}[self.cp_method] if self.cp > 1 else 1

    @property
    def world_size(self) -> int:
        """Ranks that the layout needs: ``pp x dp x cp x tp``."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Copies of each expert inside one pipeline stage: ``dp x cp x tp / (ep x etp)``."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    def product(self) -> str:
        """The product identity as text, outermost axis first: ``pp 4 x dp 2 x cp 1 x tp 3 = 24``."""
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in reversed(ORDER)) + f" = {self.world_size}"

    def techniques(self) -> str:
        """What the sizes of axes do not say, for the banner: ``1f1b, ZeRO 1``; empty where there is nothing."""
        layers = self.recompute if isinstance(self.recompute, str) else f"layers {list(self.recompute)}"
        parts = {
            self.schedule + f" of vpp {self.vpp}" * (self.schedule == "interleaved"): self.pp > 1,
            "sequence parallel": self.tp > 1 and self.sequence_parallel,
            self.cp_method: self.cp > 1,
            f"ZeRO {self.zero}": self.dp * self.cp > 1 and self.zero,
            f"in groups of {self.zero_group}": self.zero and self.zero_group,
            f"recompute {layers}": self.recompute not in ("none", ()),
        }
        return ", ".join(part for part, used in parts.items() if used)

    def stream_tokens(self, seq_len: int) -> int:
        """Tokens of a micro-batch that one rank has between blocks."""
        return self.micro_batch * seq_len // self.cp // (self.tp if self.sequence_parallel else 1)

    def pipeline(self, global_batch: int) -> schedules.Schedule | None:
        """The schedule of one step; None where a step is one graph. Raises `ConfigError` for what its rules forbid.

        ZeRO 3 walks its segments as a pipeline of one stage.
        """
        if self.pp > 1:
            return schedules.make(self.schedule, self.pp, self.vpp, self.check_batch(global_batch))
        walked = self.zero == 3 and self.dp * self.cp > 1
        return schedules.make("1f1b", 1, 1, self.check_batch(global_batch)) if walked else None

    def check_model(self, config: ModelConfig, seq_len: int) -> None:
        """Raise `ConfigError` unless every axis divides what it cuts of a model and of sequences of `seq_len`."""
        sizes = {"heads": config.heads, "ffn": config.ffn, "vocab": config.vocab}
        if config.moe.experts and config.moe.shared:
            sizes["moe.shared x ffn"] = config.moe.shared * config.moe.ffn
        keys = config.heads if config.latent.kv_rank else config.kv_heads
        tp, common = f"layout.tp {self.tp}", math.gcd(*sizes.values())
        tokens = self.micro_batch * seq_len // self.cp  # before they are cut
        cuts_tokens = self.sequence_parallel or config.moe.experts > 0

        def legal(size: int) -> bool:
            return _cuts_keys(size, keys) and not (cuts_tokens and tokens % size)

        remedy = f"set layout.tp={nearest_divisor(common, self.tp, legal)} (the nearest)"
        for name, size in sizes.items():
            check(size % self.tp == 0, tp, f"must divide model.{name} {size}", remedy)
        check(_cuts_keys(self.tp, keys), tp, f"must divide model.kv_heads {keys} or be a multiple of it", remedy)
        if not isinstance(self.recompute, str):
            for layer in self.recompute:
                check(
                    isinstance(layer, int) and 0 <= layer < config.layers,
                    f"layout.recompute [{','.join(map(str, self.recompute))}]",
                    f"must list layers from 0 to {config.layers - 1}",
                    "change the list, or set layout.recompute=selective or full",
                )
        if self.cp > 1:
            self._check_context(config, keys, seq_len)
        if self.pp > 1:
            self._check_stages(config.layers)
        if self.tp > 1 and self.sequence_parallel:
            rule = f"must divide the {tokens} tokens of a micro-batch with layout.sequence_parallel"
            check(tokens % self.tp == 0, tp, rule, f"{remedy}, or layout.sequence_parallel=false")
        if not config.moe.experts:
            given, rule = f"layout.ep {self.ep} x layout.etp {self.etp}", "must be 1, as the model has no experts"
            check(self.ep * self.etp == 1, given, rule, "set layout.ep=1 and layout.etp=1, or model.moe.experts")
        else:
            check(tokens % self.tp == 0, tp, f"must divide the {tokens} tokens of a micro-batch with experts", remedy)
            for axis, name, size in (("ep", "experts", config.moe.experts), ("etp", "ffn", config.moe.ffn)):
                own = getattr(self, axis)
                best = nearest_divisor(math.gcd(size, self.dp * self.cp * self.tp), own)
                rule = f"must divide model.moe.{name} {size}"
                check(size % own == 0, f"layout.{axis} {own}", rule, f"set layout.{axis}={best} (the nearest)")

    def _check_context(self, config: ModelConfig, keys: int, seq_len: int) -> None:
        inside, heads, keys = self.ulysses, config.heads // self.tp, max(1, keys // self.tp)
        name, whole = ("layout.cp_ulysses", self.cp) if self.cp_method == "hybrid" else ("layout.cp", seq_len)
        best = nearest_divisor(math.gcd(heads, whole), inside, lambda size: _cuts_keys(size, keys))
        remedy = f"set {name}={best} (the nearest)"
        check(self.cp % inside == 0, f"layout.cp_ulysses {inside}", f"must divide layout.cp {self.cp}", remedy)
        places = self.cp // inside
        unit = inside * (2 * places if places > 1 else 1)
        below = seq_len // unit * unit
        check(
            seq_len % unit == 0,
            f"data.seq_len {seq_len}",
            f"must be a multiple of {unit} for layout.cp {self.cp} with {self.cp_method}",
            f"set data.seq_len={f'{below} or {below + unit}' if below else unit} (the nearest)",
        )
        remedy += ", or layout.cp_method=ring"
        rule = f"must divide the {heads} heads of a rank of tp, which {self.cp_method} exchanges"
        check(heads % inside == 0, f"{name} {inside}", rule, remedy)
        rule = f"must divide the {keys} heads of keys of a rank of tp or be a multiple of them"
        check(_cuts_keys(inside, keys), f"{name} {inside}", rule, remedy)

    def _check_stages(self, layers: int) -> None:
        count = self.pp * self.vpp
        named = f"layout.pp {self.pp} x vpp {self.vpp} = {count} stages"
        if self.stages is None:
            check(
                count <= layers + 2,
                named,
                f"must not exceed the {layers} layers and the embedding and head, which count as one each",
                f"set layout.pp={max(1, (layers + 2) // self.vpp)} (the nearest)",
            )
            return
        given = f"layout.stages [{','.join(map(str, self.stages))}]"
        check(
            len(self.stages) == count, given, f"must give the layers of each of {count} stages", f"list {count} numbers"
        )
        total = sum(self.stages)
        check(total == layers, given, f"must add up to model.layers {layers}, but does to {total}", "change the list")
        check(
            min(self.stages) >= 0 and all(self.stages[1:-1]),
            given,
            "must give every stage but the first and the last a layer, and none fewer than 0",
            "move a layer there",
        )

    def check_world(self, ranks: int) -> None:
        """Raise `ConfigError` unless the world has as many ranks as the layout needs."""
        remedy = f"set launcher.ranks={self.world_size}"
        fits = [(axis, self._fitting(axis, ranks)) for axis in ORDER]
        fits = [(axis, size) for axis, size in fits if size]
        if fits:
            axis, size = min(fits, key=lambda fit: abs(math.log(fit[1] / getattr(self, fit[0]))))
            remedy += f" or layout.{axis}={size}"
        noun = "rank" if ranks == 1 else "ranks"
        check(self.world_size == ranks, "layout:", f"{self.product()}, but the world has {ranks} {noun}", remedy)

    def _fitting(self, axis: str, ranks: int) -> int:
        """The size of `axis` that makes the product `ranks` with the others as they are; 0 where none does."""
        size, rest = divmod(ranks, self.world_size // getattr(self, axis))
        return 0 if rest else size

    def check_batch(self, global_batch: int) -> int:
        """Micro-batches that each rank runs in one step of `global_batch` sequences.

        Raises `ConfigError` unless `global_batch` is a positive multiple of ``dp x micro_batch``.
        """
        unit = self.dp * self.micro_batch
        count, rest = divmod(global_batch, unit)
        check(
            count > 0 and rest == 0,
            f"train.global_batch {global_batch}",
            f"must be a multiple of layout.dp {self.dp} x layout.micro_batch {self.micro_batch}",
            f"set {self._fitting_batch(global_batch)}",
        )
        return count

    def _fitting_batch(self, global_batch: int) -> str:
        """What makes `global_batch` a multiple of dp x micro_batch: a key of the layout where one is enough, or it."""
        unit = self.dp * self.micro_batch
        below = global_batch // unit * unit
        batch = f"train.global_batch={f'{below} or {below + unit}' if below > 0 else unit} (the nearest)"
        if global_batch < 1:
            return batch
        if global_batch % self.dp == 0:
            return f"layout.micro_batch={nearest_divisor(global_batch // self.dp, self.micro_batch)}, or {batch}"
        if global_batch % self.micro_batch == 0:
            return f"layout.dp={nearest_divisor(global_batch // self.micro_batch, self.dp)}, or {batch}"
        return f"layout.dp={nearest_divisor(global_batch, self.dp)} layout.micro_batch=1, or {batch}"

    def whole_micro_batch(self, global_batch: int) -> int:
        """The largest micro-batch that gives every stage of pp one to work on, in as many as the schedule asks for."""
        share = global_batch // self.dp
        least, unit = {"dualpipe_v": (2, 1), "interleaved": (1, self.pp)}.get(self.schedule, (1, 1))
        counts = (n for n in range(least * self.pp, share + 1) if share % n == 0 and n % unit == 0)
        return share // next(counts, share) if share else 1

    def recompute_of(self, layer: int) -> str:
        """What of a layer runs forward again: `none`, `selective` (attention) or `full`."""
        if isinstance(self.recompute, str):
            return self.recompute
        return "full" if layer in self.recompute else "none"

    def bucket_elements(self, item_bytes: int) -> int:
        """Elements of a message of gradients, at least 1; 0: one message for all. See `buckets`."""
        return max(1, int(self.bucket_mib * 2**20) // item_bytes) if self.bucket_mib else 0


def _cuts_keys(ranks: int, keys: int) -> bool:
    """Whether heads of keys go to ranks evenly: several to a rank, or one to several."""
    return ranks % keys == 0 or keys % ranks == 0


def buckets(sizes: Sequence[int], limit: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the tensors that travel in one message, the last first, of tensors of `sizes` elements.

    A message has up to `limit` elements, or one tensor; 0: all are one message.
    """
    spans, stop, total = [], len(sizes), 0
    for i in reversed(range(len(sizes))):
        if limit and total and total + sizes[i] > limit:
            spans.append((i + 1, stop))
            stop, total = i + 1, 0
        total += sizes[i]
    return (*spans, (0, stop))
