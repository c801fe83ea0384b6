"""The schedules by name, and the numbers for which each exists.

The order of actions follows, for

- ``gpipe``: Huang et al. 2019, arXiv:1811.06965: all forwards, then all backwards;
- ``1f1b``: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1, PipeDream-Flush: backwards as early as can be;
- ``interleaved``: section 2.2.2 there, as Megatron-LM orders it: `vpp` stages a rank, in turns of `pp` micro-batches;
- ``zb_h1``: Qi et al. 2023, arXiv:2401.10241, section 2.1: 1F1B whose weight halves wait for r micro-batches
  on rank r;
- ``zb_v``: section 6 and figure 8 there: two stages a rank in the shape of a V, by hand for passes of equal time. The
  last weight halves run oldest first. Below ``2 * pp - 1`` micro-batches it has a bubble;
- ``dualpipe_v``: DeepSeek-AI's DualPipe repository, after Sea AI Lab's "cut-in-half". Its overlapped pair of a forward
  and a backward is here the one and then the other: the overlap is inside a device, and no order of passes shows it.

Every stage adds up its weight gradients in the order of micro-batches, under every schedule alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from models.checks import check, check_at_least, check_choice, nearest_divisor
from parallel.schedules.schedule import BACKWARD, FORWARD, INPUT, KINDS, V_SHAPED, WEIGHT, Columns, Schedule

NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1", *V_SHAPED)


@lru_cache(maxsize=64)
def make(name: str, pp: int, vpp: int, micro_batches: int) -> Schedule:
    """The schedule `name` (``layout.schedule``) of `micro_batches` a step over `pp` ranks of `vpp` virtual stages.

    Raises `models.checks.ConfigError` for what `check_numbers` forbids.
    """
    check_numbers(name, pp, vpp, micro_batches)
    schedule = Schedule(name, pp, vpp, micro_batches, ())
    return replace(schedule, columns=tuple(_columns(schedule, rank) for rank in range(pp)))


def _columns(schedule: Schedule, rank: int) -> Columns:
    name, pp, m = schedule.name, schedule.pp, schedule.micro_batches
    passes = _interleaved(rank, pp, schedule.vpp, m) if name == "interleaved" else BUILD[name](rank, pp, m)
    found = _numbered(passes, schedule.stages_of(rank))
    return Columns(*(column[found.micro_batches < m] for column in found)) if name == "zb_v" else found


def check_numbers(name: str, pp: int, vpp: int, micro_batches: int) -> None:
    """Raises `models.checks.ConfigError` where a schedule's own rule forbids the numbers.

    A pipeline of one rank has no rule for the micro-batches.
    """
    check_choice("layout.schedule", name, NAMES)
    check_at_least("layout.pp", pp, 1)
    check_at_least("train.global_batch / (layout.dp x layout.micro_batch)", micro_batches, 1)
    _check_vpp(name, vpp)
    if pp > 1:
        _check_micro_batches(name, pp, micro_batches)


def _check_vpp(name: str, vpp: int) -> None:
    if name == "interleaved":
        rule, legal, remedy = "at least 2", vpp >= 2, "set layout.vpp=2 (the nearest), or layout.schedule=1f1b"
    elif name in V_SHAPED:
        rule, legal, remedy = "2", vpp == 2, "set layout.vpp=2"
    else:
        rule, legal, remedy = "1", vpp == 1, "set layout.vpp=1, or layout.schedule=interleaved"
    check(legal, "layout.vpp", f"must be {rule} for layout.schedule={name}, but is {vpp}", remedy)


def _check_micro_batches(name: str, pp: int, count: int) -> None:
    field = f"train.global_batch / (layout.dp x layout.micro_batch) = {count} micro-batches"
    if name == "interleaved" and count % pp:
        below = count // pp * pp
        nearest = f"{below} or {below + pp}" if below else str(pp)
        remedy = (
            f"set layout.pp={nearest_divisor(count, pp)} (the nearest), or a layout.micro_batch for {nearest} of them"
        )
        check(False, field, f"must be a multiple of layout.pp {pp} for layout.schedule=interleaved", remedy)
    elif name == "dualpipe_v":
        remedy = f"set layout.pp={max(1, count // 2)} (the nearest), or a smaller layout.micro_batch, or "
        remedy += "layout.schedule=zb_v"
        rule = f"must be at least 2 x layout.pp {pp} = {2 * pp} for layout.schedule=dualpipe_v"
        check(count >= 2 * pp, field, rule, remedy)


F0, B0, I0, W = (KINDS.index(kind) for kind in (FORWARD, BACKWARD, INPUT, WEIGHT))
"""A pass is written as its kind and four times its chunk, the place of its stage among its rank's. Weight halves are
written without one, as they come in the order of their input halves."""
F1, B1, I1 = (len(KINDS) + kind for kind in (F0, B0, I0))


def _times(*parts: tuple[list[int], int]) -> np.ndarray:
    """Passes one after the other: each list of them so many times, or not where that is none or less."""
    return np.array([each for passes, times in parts for each in passes * times], int)


def _numbered(passes: np.ndarray, stages: Sequence[int]) -> Columns:
    """The actions of a rank of these `stages` by chunk: the n-th forward of a chunk is of micro-batch n, and so is the
    n-th backward, whole or its input half."""
    kinds, chunks = passes % len(KINDS), passes // len(KINDS)
    halves, weights = np.flatnonzero(kinds == I0), np.flatnonzero(kinds == W)
    chunks[weights] = chunks[halves]
    micro_batches = np.empty_like(passes)
    for chunk in range(len(stages)):
        forward = kinds == F0
        for kind in (forward, ~forward & (kinds != W)):
            own = np.flatnonzero(kind & (chunks == chunk))
            micro_batches[own] = np.arange(len(own))
    micro_batches[weights] = micro_batches[halves]
    return Columns(kinds, micro_batches, np.array(stages)[chunks])


def _gpipe(rank: int, pp: int, micro_batches: int) -> np.ndarray:
    return _times(([F0], micro_batches), ([B0], micro_batches))


def _1f1b(rank: int, pp: int, micro_batches: int) -> np.ndarray:
    warm_up = min(pp - rank - 1, micro_batches)
    return _times(([F0], warm_up), ([F0, B0], micro_batches - warm_up), ([B0], warm_up))


def _zb_h1(rank: int, pp: int, micro_batches: int) -> np.ndarray:
    if rank == 0:  # nobody waits for its input gradient, so it keeps the cheaper whole backward
        return _1f1b(rank, pp, micro_batches)
    warm_up = min(pp - rank - 1, micro_batches)
    pairs, waiting = micro_batches - warm_up, min(rank, micro_batches)
    # Weight halves wait for `rank` micro-batches: pairs of the steady state first, then backwards of the cool-down.
    alone = max(0, waiting - pairs)
    steady = (([F0, I0], min(pairs, waiting)), ([F0, I0, W], pairs - waiting))
    return _times(([F0], warm_up), *steady, ([I0], alone), ([I0, W], warm_up - alone), ([W], waiting))


def _interleaved(rank: int, pp: int, vpp: int, micro_batches: int) -> np.ndarray:
    chunks = len(KINDS) * np.arange(vpp).repeat(pp)
    forwards, backwards = (
        np.tile(kind + order, micro_batches // pp) for kind, order in ((F0, chunks), (B0, chunks[::-1]))
    )
    warm_up = min((pp - rank - 1) * 2 + (vpp - 1) * pp, len(forwards))
    turns = np.stack([forwards[warm_up:], backwards[: len(forwards) - warm_up]], 1).ravel()
    return np.concatenate([forwards[:warm_up], turns, backwards[len(forwards) - warm_up :]])


def _zb_v(rank: int, pp: int, micro_batches: int) -> np.ndarray:
    # The steady state needs 2 * pp - 1 micro-batches; with fewer, those that do not exist are left out of it.
    count, below = max(micro_batches, 2 * pp - 1), pp - rank
    return _times(
        ([F0], 2 * below - 1),
        ([F1, F0], rank),
        ([F1, I1, W], below),
        ([F0, I0, W, F1, I1, W], count - 2 * pp + 1 + rank),
        ([I0, W, F1, I1, W], below - 1),
        ([I0, I1], rank),
        ([I0, W], below),
        ([W], 2 * rank),
    )


def _dualpipe_v(rank: int, pp: int, micro_batches: int) -> np.ndarray:
    below = pp - rank - 1
    # From the middle of the cool-down the backwards are split, so that weight halves fill what is left.
    cool_down = ([B1, B0] * (rank + 1))[: rank + 1] + ([I1, I0] * (rank + 1))[rank + 1 :]
    return _times(
        ([F0], 2 * below),
        ([F0, F1], rank + 1),
        ([I1, W, F1], below),
        ([F0, B1, F1, B0], micro_batches - 2 * pp + rank + 1),
        ([B1, F1, B0], below),
        (cool_down, 1),
        ([W, I0], below),
        ([W], rank + 1),
    )


BUILD = {"gpipe": _gpipe, "1f1b": _1f1b, "zb_h1": _zb_h1, "zb_v": _zb_v, "dualpipe_v": _dualpipe_v}
