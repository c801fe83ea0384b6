"""What ranks ask of HCCL in a step, on shapes alone (`recording`): members of a group agree, and nobody waits for ever.

All ranks of small layouts, and layouts of 768 ranks of a supernode by their distinct roles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, pairwise, zip_longest

import pytest
import recording
from changed import changed
from matrix import CI, MATRIX, MODEL

from parallel.mesh import DENSE, EXPERT
from parallel.traffic import DTYPE_BYTES, Traffic
from trainer.compose import compose_recipe
from trainer.recipe import Recipe

Calls = tuple[recording.Call, ...]
AXES = DENSE + EXPERT[1:]

LAYOUTS = [name for name, entry in MATRIX.items() if entry.ranks > 1]
QWEN = ("data.sources=[{path: unread}]", "layout.tp=8", "layout.sequence_parallel=true")
SUPERNODE = (
    "pp=4 dp=24 train.global_batch=192",
    "pp=4 dp=24 schedule=zb_v zero=3 zero_group=8 train.global_batch=192",
    "pp=4 dp=12 cp=2 schedule=interleaved vpp=2 zero=2 zero_group=4 train.global_batch=96",
    "pp=2 dp=12 cp=4 cp_method=hybrid schedule=zb_h1 order=[tp,pp,cp,dp] train.global_batch=96",
    "pp=8 dp=12 schedule=dualpipe_v zero=1 recompute=selective train.global_batch=192",
)
"""Of qwen3_32b on 768 ranks, with the above."""


@cache
def small(precision: str) -> Recipe:
    overrides = ("data.seq_len=32", "layout.tp=1", "layout.pp=1", f"train.precision={precision}")
    return compose_recipe("tiny_dense", [*MODEL, *overrides]).recipe


@cache
def records(name: str, precision: str) -> tuple[recording.Ranks, list[recording.Record]]:
    """All ranks of a layout of the matrix."""
    entry = MATRIX[name]
    model = [word for word in entry.model if not word.startswith("metrics.")]
    ranks = recording.Ranks(changed(small(precision), [f"launcher.ranks={entry.ranks}", *model, *entry.layout]))
    return ranks, [ranks.record(rank) for rank in range(entry.ranks)]


def check_sequences(records: Sequence[recording.Record]) -> None:
    """Raise AssertionError unless all members of each group ask the same of it, and receives are for what is sent."""
    members: dict[str, dict[int, Calls]] = {}
    made: dict[str, tuple[int, ...]] = {}
    split: dict[int, dict[int, Calls]] = {}
    for record in records:
        if id(record.calls) not in split:  # those of ranks of one role are one list
            calls: dict[int, list[recording.Call]] = {}
            for call in record.calls:
                if call.operator not in ("wait", "end"):
                    calls.setdefault(call.group, []).append(call)
            split[id(record.calls)] = {group: tuple(own) for group, own in calls.items()}
        for group, (name, ranks) in enumerate(record.groups):
            assert made.setdefault(name, ranks) == ranks, f"{name}: {made[name]} or {ranks}"
            members.setdefault(name, {})[record.rank] = split[id(record.calls)].get(group, ())
    seen: set[tuple[int, ...]] = set()
    for name, sequences in members.items():
        assert set(sequences) == set(made[name]), f"{name} is of ranks {made[name]}, but {set(sequences)} made it"
        ordered = [sequences[rank] for rank in made[name]]
        if tuple(map(id, ordered)) not in seen:
            seen.add(tuple(map(id, ordered)))
            for rank, other in zip(made[name][1:], ordered[1:], strict=True):
                _compare(name, made[name][0], ordered[0], rank, other)
            _check_exchanges(name, ordered)


def _compare(name: str, a: int, of_a: Calls, b: int, of_b: Calls) -> None:
    for number, (one, other) in enumerate(zip_longest(of_a, of_b)):
        if one is None or other is None or one.wanted != other.offered:
            raise AssertionError(f"{name}: call {number} is {one} on rank {a} and {other} on rank {b}")


def _check_exchanges(name: str, sequences: Sequence[Calls]) -> None:
    for number, calls in enumerate(zip(*sequences, strict=True)):
        if calls[0].gives:
            gives, takes = ([call[field] for call in calls] for field in (-2, -1))
            assert gives == list(zip(*takes, strict=True)), f"{name}: call {number}: {gives}, but {takes}"


OTHER = {"isend": "irecv", "irecv": "isend"}


def run(records: Sequence[recording.Record]) -> int:
    """Run all ranks, each in its order, to their ends; the number of calls.

    Collectives and `create_group` return when all members have called them, and a ``wait`` when as many messages as
    were waited for have been sent. A send does not wait, but the ``end`` of a graph does: until whatever its rank sent
    was asked for, and what it asked for was sent. Raises AssertionError where ranks wait for ever.
    """
    by_rank = {record.rank: record for record in records}
    position = dict.fromkeys(by_rank, 0)
    arrived: dict[str, list[int]] = {}
    asleep: dict[str, int] = {}
    count: Counter[tuple[str, str]] = Counter()
    under_way: dict[int, set[tuple[str, str]]] = {rank: set() for rank in by_rank}
    ready = list(by_rank)
    while ready:
        rank = ready.pop()
        calls, groups = by_rank[rank].calls, by_rank[rank].groups
        while position[rank] < len(calls):
            operator, group = calls[position[rank]][:2]
            name, ranks = groups[group]
            if operator in OTHER:
                count[operator, name] += 1
                under_way[rank].add((operator, name))
                if name in asleep:
                    ready.append(asleep.pop(name))
            elif operator == "wait":
                if count["isend", name] <= count["wait", name]:
                    asleep[name] = rank
                    break
                count["wait", name] += 1
            elif operator == "end":
                late = (name for own, name in under_way[rank] if count[OTHER[own], name] < count[own, name])
                if name := next(late, ""):
                    asleep[name] = rank
                    break
                under_way[rank].clear()
            else:
                waiting = arrived.setdefault(name, [])
                waiting.append(rank)
                if len(waiting) < len(ranks):
                    break
                for other in waiting[:-1]:
                    position[other] += 1
                ready += waiting[:-1]
                waiting.clear()
            position[rank] += 1
    stuck = {rank: name for name, ranks in arrived.items() for rank in ranks} | {r: name for name, r in asleep.items()}
    what = [f"rank {rank} in {by_rank[rank].calls[position[rank]]} of {stuck[rank]}" for rank in sorted(stuck)]
    assert not stuck, f"these wait for ever: {'; '.join(what)}"
    return sum(position.values())


BF16 = ("ep over tp, sequence parallel, latent", "further tokens x ep x 1f1b, zero 3")
"""Whose linears give and take bf16 in every test run, beside those of `CI`; the others' in `make test-slow`."""
each_recorded = pytest.mark.parametrize(
    ("layout", "precision"),
    [(name, "fp32") for name in LAYOUTS]
    + [pytest.param(n, "bf16", marks=[] if n in CI + BF16 else [pytest.mark.slow]) for n in LAYOUTS],
)


@each_recorded
def test_members_of_every_group_ask_for_the_same_and_all_ranks_end(layout, precision):
    _, recorded = records(layout, precision)
    check_sequences(recorded)
    assert run(recorded) == sum(len(record.calls) for record in recorded)


@each_recorded
def test_the_account_is_what_was_handed_to_operators(layout, precision):
    for record in records(layout, precision)[1]:
        payload: Counter = Counter()
        calls: Counter = Counter()
        for call in record.calls[: record.end]:
            axis = " x ".join(word for word in record.groups[call.group][0].split("-") if word in AXES)
            key = axis, collective(call), call.dtype.lower()
            if key[1]:
                payload[key] += call.size * DTYPE_BYTES[key[2]]
                calls[key] += 1
        assert record.account.payload == {key: (payload[key], calls[key]) for key in payload}


@each_recorded
def test_the_account_is_what_the_formulas_say(layout, precision):
    ranks, recorded = records(layout, precision)
    for record in recorded:
        assert record.account.payload == known(ranks.predicted(record.rank))


def known(account: Traffic) -> dict:
    """Without what is dispatched to experts, of which the device alone knows how much it is."""
    return {key: value for key, value in account.payload.items() if key.collective != "all_to_all_v"}


def collective(call: recording.Call) -> str:
    """As in `parallel.traffic`; nothing for what is no primitive."""
    names = {"AllReduce": "all_reduce", "AllGather": "all_gather", "ReduceScatter": "reduce_scatter", "isend": "send",
             "AlltoAllV": "all_to_all" if all(call.gives) else "send"}  # fmt: skip
    if call.operator == "AlltoAllV" and not call.gives:
        return ""
    return names.get(call.operator.split()[0], "")


@each_recorded
def test_ranks_of_one_role_are_alike(layout, precision):
    ranks, recorded = records(layout, precision)
    for first in {ranks.role(record.rank): record for record in reversed(recorded)}.values():
        for expanded in ranks.expand(first):
            real = recorded[expanded.rank]
            assert (expanded.groups, expanded.calls) == (real.groups, real.calls)
            assert first.account.payload == real.account.payload


@pytest.mark.parametrize(
    "layout", [*SUPERNODE[1:2], *(pytest.param(own, marks=pytest.mark.slow) for own in (SUPERNODE[0], *SUPERNODE[2:]))]
)
def test_768_ranks_of_a_supernode_agree_and_end(layout):
    ranks = recording.Ranks(changed(compose_recipe("qwen3_32b", list(QWEN)).recipe, layout.split()))
    assert ranks.mesh.world_size == 768
    roles = {ranks.role(rank): rank for rank in reversed(range(768))}
    recorded = [record for rank in roles.values() for record in ranks.expand(ranks.record(rank))]
    recorded.sort(key=lambda record: record.rank)
    for rank in roles.values():
        assert recorded[rank].account.payload == known(ranks.predicted(rank))
    check_sequences(recorded)
    assert run(recorded) == sum(len(record.calls) for record in recorded)
    last = ranks.record(767)
    assert (recorded[767].groups, recorded[767].calls) == (last.groups, last.calls)


def mutated(layout: str, rank: int, change: Callable[[list], None]) -> list[recording.Record]:
    """The records of a layout, with the calls of one rank changed."""
    recorded = list(records(layout, "fp32")[1])
    calls = list(recorded[rank].calls)
    change(calls)
    recorded[rank] = recorded[rank]._replace(calls=calls)
    return recorded


def of_group(record: recording.Record, calls: list, prefix: str) -> list[int]:
    """Where in `calls` those of a group are, by the start of its name."""
    return [i for i, call in enumerate(calls) if record.groups[call.group][0].startswith(prefix)]


def test_a_dropped_collective_is_found():
    layout = "tp x pp x dp, sequence parallel, zero 1"
    record = records(layout, "fp32")[1][3]

    def drop(calls):
        del calls[of_group(record, calls, "busway-tp-2-3-2")[3]]

    message = r"busway-tp-2-3-2: call 3 is \w+.* on rank 2 and \w+.* on rank 3"
    with pytest.raises(AssertionError, match=message):
        check_sequences(mutated(layout, 3, drop))
    with pytest.raises(AssertionError, match="these wait for ever: .*rank 2 in AllReduce .* of busway-tp-2-3-2;"):
        run(mutated(layout, 3, drop))


def test_two_swapped_collectives_are_found():
    layout = "tp, sequence parallel"

    def swap(calls):
        at = next(i for i, call in enumerate(calls) if call.operator == "AllGather")
        other = next(i for i, call in enumerate(calls) if i > at and call.offered != calls[at].offered)
        calls[at], calls[other] = calls[other], calls[at]

    message = r"busway-tp-0-1-2: call \d+ is AllGather Float32 \[\d+\] on rank 0 and .* on rank 1"
    with pytest.raises(AssertionError, match=message):
        check_sequences(mutated(layout, 1, swap))


def test_two_groups_used_in_another_order_are_found():
    """Each group has its order, and yet both ranks wait: for the other's next step, in another group."""
    layout = "tp beyond the heads of keys"
    record = records(layout, "fp32")[1][1]

    def swap(calls):
        of_both = of_group(record, calls, "busway-tp-0-")[2:]  # after both were made
        at = next(k for k, (i, j) in enumerate(pairwise(of_both)) if calls[i].group != calls[j].group)
        i, j = of_both[at : at + 2]
        calls[i], calls[j] = calls[j], calls[i]

    recorded = mutated(layout, 1, swap)
    check_sequences(recorded)
    with pytest.raises(AssertionError, match="these wait for ever: .*rank 0 in .*rank 1 in "):
        run(recorded)


def test_a_message_of_another_shape_is_found():
    layout = "uneven stages"
    record = records(layout, "fp32")[1][2]

    def shorten(calls):
        at = of_group(record, calls, "busway-pp-activation-2-3")[2]
        calls[at] = calls[at]._replace(shape=(7, 7))

    message = r"busway-pp-activation-2-3: call 2 is isend Float32 \[7, 7\] on rank 2 and irecv .* on rank 3"
    with pytest.raises(AssertionError, match=message):
        check_sequences(mutated(layout, 2, shorten))


def stuck(recorded: Sequence[recording.Record]) -> bool:
    try:
        run(recorded)
    except AssertionError as error:
        return "these wait for ever" in str(error)
    return False


PIPELINES = [name for name in LAYOUTS if any(word.startswith("layout.pp=") for word in MATRIX[name].layout)]


@pytest.mark.parametrize("layout", ["1f1b, tied", "interleaved", "four stages, zb_h1", "zb_v, tied", "dualpipe_v"])
def test_messages_in_graphs_of_their_own_would_wait_for_ever(layout):
    """`Send` and `Receive` in cells: each holds its rank up until the other side has come."""
    held = []
    for record in records(layout, "fp32")[1]:
        calls = [[call, call._replace(operator="end")] if call.operator in OTHER else [call] for call in record.calls]
        held.append(record._replace(calls=list(chain(*calls))))
    assert stuck(held)


@pytest.mark.parametrize("layout", PIPELINES)
def test_messages_asked_for_ahead_of_a_graph_would_wait_for_ever(layout, monkeypatch):
    monkeypatch.setattr(recording.hccl.HcclTransport, "ahead", True)
    ranks, recorded = records(layout, "fp32")
    ahead = [ranks.record(record.rank) for record in recorded]
    assert stuck(ahead) == ranks.layout.early_receive


@pytest.mark.parametrize("layout", PIPELINES)
def test_a_rank_makes_no_group_for_messages_that_it_never_uses(layout):
    for record in records(layout, "fp32")[1]:
        used = {call.group for call in record.calls if call.operator in OTHER}
        assert used == {i for i, (name, _) in enumerate(record.groups) if "activation" in name or "gradient" in name}
