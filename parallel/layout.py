"""Sizes of the parallel axes and how they nest.

A `Layout` is what the planner returns, the trainer runs, the checkpoint records and the report explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.checks import check, check_at_least
from models.config import nearest_divisor

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
    tp: int = 1
    """Ranks that share every matrix of a layer."""
    pp: int = 1
    """Pipeline stages."""
    ep: int = 1
    """Ranks over which the experts of a layer are spread."""
    etp: int = 1
    """Ranks that share every matrix of one expert."""
    micro_batch: int = 1
    """Sequences in one forward pass of one replica."""
    order: tuple[str, ...] = ORDER
    """Nesting of the axes over consecutive ranks, innermost first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))
        for axis in ("dp", "cp", "tp", "pp", "ep", "etp", "micro_batch"):
            check_at_least(f"layout.{axis}", getattr(self, axis), 1)
        check(
            sorted(self.order) == sorted(ORDER),
            "layout.order",
            f"must name each of {', '.join(ORDER)} once, but is [{','.join(self.order)}]",
            f"set layout.order=[{','.join(ORDER)}] (innermost first)",
        )
        stage = self.dp * self.cp * self.tp
        check(
            stage % (self.ep * self.etp) == 0,
            f"layout.ep {self.ep} x layout.etp {self.etp} = {self.ep * self.etp}",
            f"must divide dp {self.dp} x cp {self.cp} x tp {self.tp} = {stage}",
            self._expert_remedy(stage),
        )

    def _expert_remedy(self, stage: int) -> str:
        for axis, other in (("ep", self.etp), ("etp", self.ep)):
            if stage % other == 0:
                return f"set layout.{axis}={nearest_divisor(stage // other, getattr(self, axis))} (the nearest)"
        return f"set layout.ep={nearest_divisor(stage, self.ep)} (the nearest) and layout.etp=1"

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
        below, above = count * unit, (count + 1) * unit
        check(
            count > 0 and rest == 0,
            f"train.global_batch {global_batch}",
            f"must be a multiple of layout.dp {self.dp} x layout.micro_batch {self.micro_batch}",
            f"set train.global_batch={f'{below} or {above}' if below else above} (the nearest)",
        )
        return count
