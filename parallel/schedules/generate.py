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

from collections import deque
from functools import lru_cache
from itertools import chain

from models.checks import check, check_at_least, check_choice, nearest_divisor
from parallel.schedules.schedule import BACKWARD, FORWARD, INPUT, V_SHAPED, WEIGHT, Action, Schedule

NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1", *V_SHAPED)


@lru_cache(maxsize=64)
def make(name: str, pp: int, vpp: int, micro_batches: int) -> Schedule:
    """The schedule `name` (``layout.schedule``) of `micro_batches` a step over `pp` ranks of `vpp` virtual stages.

    Raises `models.checks.ConfigError` for what `check_numbers` forbids.
    """
    check_numbers(name, pp, vpp, micro_batches)
    if name in V_SHAPED:
        build = _zb_v if name == "zb_v" else _dualpipe_v
        ranks = [build(_VRank(rank, pp), micro_batches) for rank in range(pp)]
    elif name == "interleaved":
        ranks = [_interleaved(rank, pp, vpp, micro_batches) for rank in range(pp)]
    else:
        ranks = [_one_stage(name, rank, pp, micro_batches) for rank in range(pp)]
    return Schedule(name, pp, vpp, micro_batches, tuple(tuple(rank) for rank in ranks))


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


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forwards, then one forward and one backward in turns, then the backwards that are left."""
    turns = chain.from_iterable(zip(forwards[warm_up:], backwards, strict=False))
    return [*forwards[:warm_up], *turns, *backwards[len(forwards) - warm_up :]]


def _one_stage(name: str, rank: int, pp: int, micro_batches: int) -> list[Action]:
    forwards = [Action(FORWARD, m, rank) for m in range(micro_batches)]
    backwards = [Action(BACKWARD, m, rank) for m in range(micro_batches)]
    warm_up = micro_batches if name == "gpipe" else min(pp - rank - 1, micro_batches)
    order = _alternate(forwards, backwards, warm_up)
    # Rank 0 defers nothing: nobody waits for its input gradient, so it keeps the cheaper whole backward.
    return _defer_weights(order, rank) if name == "zb_h1" and rank else order


def _defer_weights(order: list[Action], delay: int) -> list[Action]:
    """Splits the backwards of `order` and puts each weight half after the input half `delay` micro-batches later."""
    split: list[Action] = []
    pending: deque[Action] = deque()
    for action in order:
        if action.kind == FORWARD:
            split.append(action)
            continue
        split.append(Action(INPUT, *action[1:]))
        pending.append(Action(WEIGHT, *action[1:]))
        if len(pending) > delay:
            split.append(pending.popleft())
    return [*split, *pending]


def _interleaved(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    forwards, backwards = [], []
    for first in range(0, micro_batches, pp):
        group = range(first, first + pp)
        for chunk in range(vpp):
            forwards += [Action(FORWARD, m, chunk * pp + rank) for m in group]
            backwards += [Action(BACKWARD, m, (vpp - 1 - chunk) * pp + rank) for m in group]
    warm_up = (pp - rank - 1) * 2 + (vpp - 1) * pp
    return _alternate(forwards, backwards, min(warm_up, len(forwards)))


class _VRank:
    """Writes the actions of one rank of a V by chunk, 0 on the way down and 1 on the way up; counts micro-batches."""

    def __init__(self, rank: int, pp: int) -> None:
        self.rank, self.pp = rank, pp
        self.stages = (rank, 2 * pp - 1 - rank)
        self.actions: list[Action] = []
        self.forwards = [0, 0]
        self.backwards = [0, 0]
        self.pending: deque[Action] = deque()

    def forward(self, *chunks: int) -> None:
        for chunk in chunks:
            self.actions.append(Action(FORWARD, self.forwards[chunk], self.stages[chunk]))
            self.forwards[chunk] += 1

    def backward(self, chunk: int, split: bool = False) -> None:
        """The whole backward, or its input half; the weight half is then pending."""
        micro_batch, stage = self.backwards[chunk], self.stages[chunk]
        self.actions.append(Action(INPUT if split else BACKWARD, micro_batch, stage))
        self.backwards[chunk] += 1
        if split:
            self.pending.append(Action(WEIGHT, micro_batch, stage))

    def weight(self) -> None:
        self.actions.append(self.pending.popleft())

    def both_halves(self, chunk: int) -> None:
        self.backward(chunk, split=True)
        self.weight()


def _zb_v(v: _VRank, micro_batches: int) -> list[Action]:
    # The steady state needs 2 * pp - 1 micro-batches; with fewer, those that do not exist are left out of it.
    count = max(micro_batches, 2 * v.pp - 1)
    below = v.pp - v.rank
    v.forward(*[0] * (2 * below - 1))
    v.forward(*[1, 0] * v.rank)
    for _ in range(below):
        v.forward(1)
        v.both_halves(1)
    while v.forwards[1] < count:
        if v.forwards[0] < count:
            v.forward(0)
        v.both_halves(0)
        v.forward(1)
        v.both_halves(1)
    for _ in range(v.rank):
        v.backward(0, split=True)
        v.backward(1, split=True)
    for _ in range(below):
        v.backward(0, split=True)
        v.weight()
    while v.pending:
        v.weight()
    return [action for action in v.actions if action.micro_batch < micro_batches]


def _dualpipe_v(v: _VRank, micro_batches: int) -> list[Action]:
    below = v.pp - v.rank - 1
    v.forward(*[0] * (2 * below))
    v.forward(*[0, 1] * (v.rank + 1))
    for _ in range(below):
        v.both_halves(1)
        v.forward(1)
    for _ in range(micro_batches - 2 * v.pp + v.rank + 1):
        v.forward(0)
        v.backward(1)
        v.forward(1)
        v.backward(0)
    for _ in range(below):
        v.backward(1)
        v.forward(1)
        v.backward(0)
    # From the middle of the cool-down the backwards are split, so that weight halves fill what is left.
    for i in range(2 * (v.rank + 1)):
        v.backward((i + 1) % 2, split=i > v.rank)
    for _ in range(below):
        v.weight()
        v.backward(0, split=True)
    while v.pending:
        v.weight()
    return v.actions
