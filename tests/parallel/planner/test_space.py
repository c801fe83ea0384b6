"""The planner's space holds exactly the layouts that `Layout` itself allows."""

from __future__ import annotations

from itertools import product

import pytest
from problems import dense, problem, sparse

from models.checks import ConfigError
from parallel.layout import ORDER, Layout
from parallel.planner.space import Space, divisors

RANKS, BATCH, SEQ_LEN = 4, 8, 64


def key(layout: Layout) -> tuple:
    """What tells layouts of the space apart; keys without effect have their defaults."""
    schedule = (layout.schedule, layout.vpp) if layout.pp > 1 else ("1f1b", 1)
    group = layout.zero_group or layout.dp * layout.cp if layout.zero else None
    return (
        layout.tp, layout.pp, *schedule, layout.cp, layout.ulysses, layout.ep, layout.etp, layout.dp, layout.zero,
        group, layout.micro_batch, layout.recompute, layout.sequence_parallel and layout.tp > 1,
    )  # fmt: skip


def found(question) -> set[tuple]:
    space = Space(question)
    keys = [
        key(group.layout(row, {}, ORDER))
        for pp, rows in space.coarse()
        for group, _ in space.scheduled(space.fine(pp, rows)[0])
        for row in range(len(group))
    ]
    assert len(keys) == len(set(keys))
    return set(keys)


def allowed(question) -> set[tuple]:
    """Every combination of sizes, as `Layout` judges it, but for what is no better than another. Shard groups are
    all of dp x cp or those of a node."""
    sizes = divisors(RANKS)
    schedules = [("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("zb_v", 2), ("dualpipe_v", 2)]
    schedules += [("interleaved", vpp) for vpp in range(2, question.model.layers + 3)]
    keys = set()
    shapes = product(sizes, sizes, sizes, sizes, schedules, (1, 2, 4), (1, 2, 4), divisors(BATCH), (False, True), sizes)
    for tp, pp, cp, dp, (schedule, vpp), ep, etp, micro_batch, shared, inside in shapes:
        if tp * pp * cp * dp != RANKS or (pp == 1 and schedule != "1f1b") or (shared and tp == 1) or tp % etp:
            continue
        if etp > 1 and question.model.moe.experts % (ep * etp) == 0:
            continue  # as many ranks with whole experts are better
        method = "ring" if inside == 1 else "ulysses" if inside == cp else "hybrid"
        if cp % inside or (cp == 1 and inside > 1):
            continue
        try:
            layout = Layout(
                dp=dp, cp=cp, tp=tp, pp=pp, vpp=vpp, schedule=schedule, ep=ep, etp=etp, micro_batch=micro_batch,
                sequence_parallel=shared, cp_method=method, cp_ulysses=inside if method == "hybrid" else 2,
            )  # fmt: skip
            question.check(layout)
        except ConfigError:
            continue
        whole = dp * cp
        node = next(size for size in (4, 2, 1) if whole % size == 0 and size <= max(4 // tp, 1))
        for zero, recompute in product(range(4), ("none", "selective", "full")):
            for group in {whole} | ({node} if 1 < node < whole else set()):
                if zero and whole > 1 or not zero and group == whole:
                    changed = {"zero": zero, "zero_group": group if zero else None, "recompute": recompute}
                    keys.add(key(Layout(**vars(layout) | changed)))
    return keys


@pytest.mark.parametrize("model", [dense(layers=2), sparse(layers=2), dense(layers=4, kv_heads=1)])
def test_the_space_is_what_layouts_allow(model):
    question = problem(model, RANKS, BATCH, SEQ_LEN)
    assert found(question) == allowed(question)


def test_what_is_fixed_is_held():
    question = problem(sparse(layers=2), RANKS, BATCH, SEQ_LEN, tp=2, schedule="zb_h1", zero=1, recompute="full")
    keys = found(question)
    assert keys == {k for k in found(problem(sparse(layers=2), RANKS, BATCH, SEQ_LEN)) if agrees(k)}
    assert keys


def agrees(k: tuple) -> bool:
    """A schedule asks for a pipeline; ZeRO has no effect on one rank."""
    tp, _, schedule, *_ = k
    dp, zero, recompute = k[8], k[9], k[12]
    whole = dp * k[4]
    return tp == 2 and schedule == "zb_h1" and zero == (1 if whole > 1 else 0) and recompute == "full"
