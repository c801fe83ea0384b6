"""Every legal layout of a problem, as columns.

The rules are `Layout`'s own (a test compares with it layout by layout); here they are applied to whole columns. Rows
come in two grains: `coarse` ones have what cuts a model (tp, cp, pp, ep, etp, micro-batch, sequence parallelism),
`fine` ones also schedule, vpp, ZeRO and recompute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np

from parallel import schedules
from parallel.planner.problem import Problem
from parallel.planner.shape import RECOMPUTE, Candidates

COLUMNS = (
    "dp", "cp", "ulysses", "tp", "ep", "etp", "zero", "shards", "micro_batch", "micro_batches", "sequence_parallel",
    "recompute",
)  # fmt: skip


@cache
def divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


@dataclass(frozen=True)
class Space:
    """The legal layouts of a problem. `order` is left open: rows stand for every nesting of the axes."""

    problem: Problem

    def _values(self, key: str, values: list[Any]) -> list[Any]:
        """Those that the user left: all, or the one that was fixed, if it is legal."""
        if key not in self.problem.fixed:
            return values
        return [value for value in values if value == self.problem.fixed[key]]

    @property
    def zeros(self) -> list[int]:
        """ZeRO stages to choose from."""
        return self._values("zero", [0, 1, 2, 3])

    @property
    def codes(self) -> list[int]:
        """Indices into `RECOMPUTE` to choose from."""
        return [RECOMPUTE.index(name) for name in self._values("recompute", list(RECOMPUTE))]

    def coarse(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """For each pp: columns without ZeRO and recompute."""
        problem = self.problem
        for pp in self._values("pp", divisors(problem.ranks)):
            if pp > problem.model.layers + 2 or not self.pipelines(pp):
                continue
            parts = []
            for tp in self._values("tp", divisors(problem.ranks // pp)):
                if not self._tp_is_legal(tp):
                    continue
                for cp in self._values("cp", divisors(problem.ranks // pp // tp)):
                    dp = problem.ranks // pp // tp // cp
                    if self._values("dp", [dp]) and problem.global_batch % dp == 0:
                        rows, inside = self._cut(tp, cp, dp), self._ulysses(tp, cp)
                        parts += [rows | {"ulysses": np.full_like(rows["tp"], size)} for size in inside]
            parts = [part for part in parts if len(part["tp"])]
            if parts:
                yield pp, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _tp_is_legal(self, tp: int) -> bool:
        model = self.problem.model
        keys = model.heads if model.latent.kv_rank else model.kv_heads
        sizes = [model.heads, model.ffn, model.vocab]
        sizes += [model.moe.shared * model.moe.ffn] if model.moe.experts and model.moe.shared else []
        return all(size % tp == 0 for size in sizes) and (tp % keys == 0 or keys % tp == 0)

    def _ulysses(self, tp: int, cp: int) -> list[int]:
        """Legal inner sizes of context parallelism, for which a method that is held asks, unless cp is held too."""
        model, fixed, seq_len = self.problem.model, self.problem.fixed, self.problem.seq_len
        if cp == 1:
            return [1] if "cp" in fixed or "cp_method" not in fixed else []
        heads = model.heads // tp
        keys = max(1, (model.heads if model.latent.kv_rank else model.kv_heads) // tp)
        found = []
        for inside in divisors(cp):
            method = "ring" if inside == 1 else "ulysses" if inside == cp else "hybrid"
            places = cp // inside
            unit = inside * (2 * places if places > 1 else 1)
            legal = seq_len % unit == 0 and heads % inside == 0 and (inside % keys == 0 or keys % inside == 0)
            asked = method == fixed.get("cp_method", method)
            asked = asked and (method != "hybrid" or inside == fixed.get("cp_ulysses", inside))
            if legal and asked:
                found.append(inside)
        return found

    def _cut(self, tp: int, cp: int, dp: int) -> dict[str, np.ndarray]:
        """Experts' axes, micro-batches and sequence parallelism of one cut of the dense layers."""
        problem, moe = self.problem, self.problem.model.moe
        batch, (ep, etp) = problem.global_batch // dp, self.experts(dp * cp * tp, tp)
        micro = self._values("micro_batch", divisors(batch))
        shared = self._values("sequence_parallel", [False, True] if tp > 1 else [False])
        if tp == 1 and problem.fixed.get("sequence_parallel"):
            shared = [False]  # a key of an axis of size 1 has no effect
        columns = np.meshgrid(np.arange(len(ep)), np.array(micro, np.int64), np.array(shared, np.int64), indexing="ij")
        pair, b, sp = (column.ravel() for column in columns)
        whole = (b * problem.seq_len // cp) % tp == 0
        legal = np.ones(len(b), bool) & (whole | ((sp == 0) & (not moe.experts)))
        names = ("ep", "etp", "micro_batch", "micro_batches", "sequence_parallel")
        found = {
            name: column[legal] for name, column in zip(names, (ep[pair], etp[pair], b, batch // b, sp), strict=True)
        }
        fixed = {"dp": dp, "cp": cp, "tp": tp}
        return found | {name: np.full(int(legal.sum()), value, np.int64) for name, value in fixed.items()}

    @cached_property
    def experts(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        """(ep, etp) of a stage of so many ranks and tp.

        Experts are cut in themselves (etp) only where no more ranks can have whole ones: that holds and computes as
        much as ep x etp whole ones would, and sends every row to etp ranks.
        """
        return cache(self._experts)

    def _experts(self, stage: int, tp: int) -> tuple[np.ndarray, np.ndarray]:
        fixed, moe, found = self.problem.fixed, self.problem.model.moe, [(1, 1)]
        if moe.experts:
            eps = [ep for ep in divisors(moe.experts) if stage % ep == 0]
            etps = [fixed["etp"]] if "etp" in fixed else divisors(math.gcd(moe.ffn, tp))
            found = [(ep, etp) for ep, etp in product(eps, etps) if stage % (ep * etp) == 0 and moe.ffn % etp == 0]
            if "etp" not in fixed and "ep" not in fixed:
                found = [(ep, etp) for ep, etp in found if etp == 1 or moe.experts % (ep * etp)]
        ep, etp = np.array([own for own in found if self._values("ep", own[:1])], np.int64).reshape(-1, 2).T
        return ep, etp

    def pipelines(self, pp: int) -> list[tuple[str, int]]:
        """(schedule, vpp) that pp ranks can run, whatever the micro-batches. A schedule or vpp that is held asks for a
        pipeline, unless pp is held too."""
        fixed, layers = self.problem.fixed, self.problem.model.layers
        if pp == 1:
            pipelined = "schedule" in fixed or fixed.get("vpp", 1) > 1
            return [("1f1b", 1)] if "pp" in fixed or not pipelined else []
        found = []
        for name in self._values("schedule", list(schedules.NAMES)):
            if name == "interleaved":
                sizes = range(2, (layers + 2) // pp + 1)
            else:
                sizes = (2,) if name in schedules.V_SHAPED else (1,)
            for vpp in sizes:
                if fixed.get("vpp", vpp) == vpp and pp * vpp <= layers + 2:
                    found.append((name, vpp))
        return found

    def fine(
        self, pp: int, rows: dict[str, np.ndarray], wanted: np.ndarray | None = None
    ) -> tuple[Candidates, np.ndarray]:  # fmt: skip
        """Coarse `rows` with every ZeRO stage, shard group and recompute, or with those that are `wanted`: bool
        [zeros, codes, N]; and the index of each one's row. Their schedule is left open."""
        zeros, shards, kinds = self._zeros(rows)
        if wanted is None:
            wanted = np.ones((len(self.zeros), len(self.codes), len(rows["tp"])), bool)
        choice, code, index = np.nonzero(wanted[kinds] & (zeros >= 0)[:, None, :])
        columns = {name: column[index] for name, column in rows.items() if name in COLUMNS}
        columns |= {"zero": zeros[choice, index], "shards": shards[choice, index]}
        return Candidates("1f1b", pp, 1, order=None, **columns, recompute=np.array(self.codes)[code]), index

    def scheduled(self, base: Candidates) -> Iterator[tuple[Candidates, np.ndarray]]:
        """(layouts, their rows in `base`) of every schedule and vpp that those rows can run."""
        for name, vpp in self.pipelines(base.pp):
            rows = np.flatnonzero(runs(name, base.pp, base.micro_batches))
            if len(rows):
                yield replace(base.take(rows), schedule=name, vpp=vpp), rows

    def _zeros(self, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """[Z, N] ZeRO stages and the ranks of a shard group, -1 where a row has no such choice; of which of `zeros`.

        Shard groups are all of dp x cp, or its ranks inside one block of the machine.
        """
        whole, zeros, groups, kinds = rows["dp"] * rows["cp"], [], [], []
        fixed = self.problem.fixed.get("zero_group")
        for kind, zero in enumerate(self.zeros):
            choices = [whole if fixed is None or not zero else np.full_like(whole, fixed)]
            if zero and fixed is None:
                choices += [np.gcd(whole, np.maximum(block // rows["tp"], 1)) for block in self.problem.machine.blocks]
            for index, group in enumerate(choices):
                legal = (whole > 1) | (zero == 0) | ("zero" in self.problem.fixed)
                legal = legal & (fixed is None or whole % fixed == 0)
                legal = legal & (whole % group == 0) & ((index == 0) | (group > 1))
                for other in choices[:index]:
                    legal = legal & (group != other)
                zeros.append(np.where(legal, np.where(whole > 1, zero, 0), -1))
                groups.append(group)
                kinds.append(kind)
        return np.array(zeros), np.array(groups), kinds


def runs(name: str, pp: int, micro_batches: np.ndarray) -> np.ndarray:
    """Which numbers of micro-batches a schedule of `pp` ranks can run (`parallel.schedules.generate.check_numbers`)."""
    if name == "interleaved":
        return micro_batches % pp == 0
    return micro_batches >= (2 * pp if name == "dualpipe_v" else 1)
