"""Pipeline schedules: which exist, that each can run, what the checker refuses, what a rank holds."""

from __future__ import annotations

import random
import re
from collections import defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest

from models.checks import ConfigError
from parallel.schedules import (
    NAMES,
    RECEIVE,
    SEND,
    Action,
    Columns,
    Schedule,
    check_schedule,
    make,
    messages,
    peaks,
    requests,
)

CHUNKS = {"interleaved": (2, 3, 4), "zb_v": (2,), "dualpipe_v": (2,)}
V_SHAPED = ("zb_v", "dualpipe_v")


def legal(name: str, pp: int, micro_batches: int) -> bool:
    least = 2 * pp if name == "dualpipe_v" else 1
    return pp == 1 or (micro_batches >= least and (name != "interleaved" or micro_batches % pp == 0))


def can_run(schedule: Schedule) -> bool:
    """Runs the ranks with real queues, again and again until nothing moves: slow, and nothing shared with the checker.

    False where a rank stands still, or takes another message out of a queue than the one it needs.
    """
    last = 2 * schedule.pp - 1 if schedule.name in V_SHAPED else None
    home = [last - s if last and s >= schedule.pp else s % schedule.pp for s in range(schedule.pp * schedule.vpp)]
    queues, made, position = defaultdict(deque), set(), [0] * schedule.pp
    moved = True
    while moved:
        moved = False
        for rank in range(schedule.pp):
            while position[rank] < len(schedule.actions[rank]):
                kind, micro_batch, stage = schedule.actions[rank][position[rank]]
                if kind != "F" and (rank, "F" if kind in "BI" else "I", micro_batch, stage) not in made:
                    break
                step = 1 if kind == "F" else -1
                source, target = stage - step, stage + step
                if kind != "W" and 0 <= source < len(home):
                    queue = queues[home[source], rank, step]
                    if not queue:
                        break
                    if queue.popleft() != (micro_batch, source):
                        return False
                made.add((rank, "I" if kind == "B" else kind, micro_batch, stage))
                if kind != "W" and 0 <= target < len(home):
                    queues[rank, home[target], step].append((micro_batch, stage))
                position[rank] += 1
                moved = True
    return position == [len(rank) for rank in schedule.actions]


@pytest.mark.parametrize("pp", [*range(1, 9), 16])
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_passes_the_checker_for_all_sizes(name, pp):
    for micro_batches in range(1, 33) if pp < 16 else (1, 3, 16, 32):
        if not legal(name, pp, micro_batches):
            continue
        for vpp in CHUNKS.get(name, (1,)):
            schedule = make(name, pp, vpp, micro_batches)
            check_schedule(schedule)
            if micro_batches in (1, 8, 16):
                assert can_run(schedule)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_takes_backwards_and_weight_halves_in_the_order_of_micro_batches(name):
    """So that the sums of weight gradients are the same to the bit under every schedule."""
    schedule = make(name, 4, CHUNKS.get(name, (1,))[0], 12)
    for rank, actions in enumerate(schedule.actions):
        for stage in schedule.stages_of(rank):
            for kinds in ("F", "BI", "BW"):
                assert [m for kind, m, s in actions if kind in kinds and s == stage] == list(range(12))


def test_stages_lie_in_rounds_or_in_a_v():
    rounds, v = make("interleaved", 4, 3, 4), make("zb_v", 4, 2, 8)
    assert [rounds.stages_of(rank) for rank in range(4)] == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]
    assert [v.stages_of(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [v.rank_of(stage) for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_every_message_is_sent_and_received_once_in_the_order_of_its_channel(name):
    schedule = make(name, 4, CHUNKS.get(name, (1,))[0], 8)
    sent, received = defaultdict(list), defaultdict(list)
    for rank, transfers in enumerate(messages(schedule)):
        for verb, message in transfers:
            assert rank == (message.sender if verb == SEND else message.receiver)
            assert verb in (SEND, RECEIVE)
            (sent if verb == SEND else received)[message.channel].append(message)
    assert sent == received
    # One activation and one gradient for each boundary, but for the turn of a V, which is handed over on its rank.
    boundaries = schedule.stages - 1 - (name in V_SHAPED)
    assert sum(map(len, sent.values())) == 2 * 8 * boundaries


def test_what_both_neighbours_see_of_one_pass():
    schedule = make("1f1b", 4, 1, 8)
    message = schedule.outgoing(Action("F", 5, 1))
    assert message == schedule.incoming(Action("F", 5, 2)) == (1, 2, "activation", 5, 1)
    assert schedule.outgoing(Action("I", 5, 2)) == schedule.incoming(Action("B", 5, 1)) == (2, 1, "gradient", 5, 2)
    assert schedule.incoming(Action("F", 5, 0)) is schedule.outgoing(Action("F", 5, 3)) is None
    assert schedule.incoming(Action("W", 5, 2)) is schedule.outgoing(Action("W", 5, 2)) is None
    assert schedule.incoming(Action("B", 5, 3)) is schedule.outgoing(Action("B", 5, 0)) is None


def damaged(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    return replace(schedule, columns=(*schedule.columns[:rank], columns(actions), *schedule.columns[rank + 1 :]))


def columns(actions: list[Action]) -> Columns:
    kinds, micro_batches, stages = zip(*actions, strict=True)
    return Columns(*map(np.array, (["FBIW".index(kind) for kind in kinds], micro_batches, stages)))


def error_of(schedule: Schedule) -> str:
    with pytest.raises(ValueError) as caught:
        check_schedule(schedule)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_schedule_is_an_error_that_names_the_action(seed):
    draw = random.Random(seed)
    name = draw.choice(NAMES)
    schedule = make(name, draw.choice((2, 3, 4)), draw.choice(CHUNKS.get(name, (1,))), 12)
    rank = draw.randrange(schedule.pp)
    actions = list(schedule.actions[rank])
    damage = draw.choice(("drop", "double", "move"))
    at, to = draw.sample(range(len(actions)), 2)
    victim = actions[at]
    if damage == "drop":
        del actions[at]
    elif damage == "double":
        actions.insert(to, victim)
    else:
        actions.insert(to, actions.pop(at))
    print("seed", seed, damage, victim, "on rank", rank, "of", name, schedule.pp, schedule.vpp)
    broken = damaged(schedule, rank, actions)
    if damage == "move" and can_run(broken):
        check_schedule(broken)
        return
    error = error_of(broken)
    print(error)
    if damage == "move":
        assert re.search(r"micro-batch \d+", error) and re.search(r"stage \d+", error)
    else:
        assert f"rank {rank}: " in error and f"(micro-batch {victim.micro_batch}, stage {victim.stage})" in error


def small(*ranks: str) -> Schedule:
    """A schedule of two ranks out of text such as ``F0 B0``; stage = rank."""
    actions = [[Action(a[0], int(a[1:]), r) for a in rank.split()] for r, rank in enumerate(ranks)]
    return Schedule("1f1b", len(ranks), 1, 2, tuple(map(columns, actions)))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (("F0 F1 B0 B1", "F0 B0 B1"), "rank 1: B(micro-batch 1, stage 1) must be F and B, or F, I and W, once each"),
        (("F0 F1 B0", "F0 B0 F1 B1"), "rank 0: F(micro-batch 1, stage 0) must be"),
        (("F0 F1 B0 B1", "F0 B0 F1 I1"), "rank 1: FI(micro-batch 1, stage 1) must be"),
        (("F0 F1 B0 B1", "F0 B0 F1 F1 B1"), "rank 1: FFB(micro-batch 1, stage 1) must be"),
        (("F0 F1 B0 B1", "F0 B0 F1 B1 W1"), "rank 1: FBW(micro-batch 1, stage 1) must be"),
        (("F0 F1 B0 B1", "F0 B0 F1 B1 F2"), "rank 1: F(micro-batch 2, stage 1) is not among its 2 micro-batches"),
        (("F0 F1 B0 B1", "F0 B0 B1 F1"), "B(micro-batch 1, stage 1) comes before the output of micro-batch 1, stage 1"),
        (
            ("F0 F1 B0 B1", "F0 B0 F1 W1 I1"),
            "W(micro-batch 1, stage 1) comes before the input gradient of",
        ),
        (
            ("F0 B0 F1 B1", "F0 F1 B0 B1"),
            "rank 1 at F(micro-batch 1, stage 1) for the output of micro-batch 1",
        ),
        (
            ("F0 F1 B0 B1", "F1 F0 B0 B1"),
            "the receiver waits for the activation of micro-batch 1 out of stage 0, rank 0 to 1, "
            "but first comes the activation of micro-batch 0 out of stage 0, rank 0 to 1",
        ),
        (("F0 F1 B0 B1", "F0 F1 B1 B0"), "the receiver waits for the gradient of micro-batch 0 out of stage 1"),
    ],
)
def test_the_checker_says_what_is_wrong(ranks, expected):
    assert expected in error_of(small(*ranks))


def test_an_action_on_the_wrong_rank_is_an_error():
    schedule = make("1f1b", 2, 1, 2)
    stray = Action("F", 0, 1)
    broken = damaged(schedule, 0, [stray, *schedule.actions[0]])
    assert error_of(broken) == "rank 0: F(micro-batch 0, stage 1) is not among its 2 micro-batches of stages [0]"


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 5, 16, 24, 32])
def test_live_activations_are_what_the_papers_say(pp, m):
    ranks = range(pp)
    assert check_schedule(make("gpipe", pp, 1, m)) == (m,) * pp
    assert check_schedule(make("1f1b", pp, 1, m)) == tuple(min(m, pp - r) for r in ranks)
    # Qi et al., arXiv:2401.10241, section 2.1: all workers hold as many micro-batches as 1F1B's first.
    assert check_schedule(make("zb_h1", pp, 1, m)) == (min(m, pp),) * pp
    if m >= 2 * pp:
        # Section 6 of the same: p M_B on every rank, two stages each; DualPipe's table: PP + 1, PP stages on pp ranks.
        assert check_schedule(make("zb_v", pp, 2, m)) == (2 * pp,) * pp
        assert pp == 1 or check_schedule(make("dualpipe_v", pp, 2, m)) == (2 * pp + 1,) * pp
    if m % pp == 0 and m >= 2 * pp:
        # Korthikanti et al., arXiv:2205.05198: the first rank holds 1 + (p - 1)/(p v) times 1F1B's p micro-batches.
        for vpp in (2, 4):
            assert check_schedule(make("interleaved", pp, vpp, m))[0] == pp * vpp * (1 + (pp - 1) / (pp * vpp))


def test_what_is_kept_between_the_halves_has_a_weight_of_its_own():
    """Qi et al., section 2.3: worker i of ZB-H1, from 1, holds (p - i + 1) M_B + (i - 1) M_W."""
    schedule = make("zb_h1", 8, 1, 32)
    assert peaks(schedule, saved=34, kept=32) == tuple((8 - r) * 34 + r * 32 for r in range(8))
    assert peaks(schedule, saved=0) == (0, *range(2, 9))
    assert peaks(make("1f1b", 4, 1, 8), saved=[1, 10, 100, 1000]) == (4, 30, 200, 1000)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("1f1", 2, 1, 4), "layout.schedule must be one of gpipe, 1f1b,"),
        (("1f1b", 2, 2, 4), "layout.vpp must be 1 for layout.schedule=1f1b, but is 2; set layout.vpp=1, or "),
        (("gpipe", 2, 3, 4), "layout.vpp must be 1 for layout.schedule=gpipe, but is 3"),
        (("zb_h1", 2, 2, 4), "layout.vpp must be 1 for layout.schedule=zb_h1, but is 2"),
        (("interleaved", 2, 1, 4), "layout.vpp must be at least 2 for layout.schedule=interleaved, but is 1; set"),
        (("zb_v", 2, 1, 4), "layout.vpp must be 2 for layout.schedule=zb_v, but is 1; set layout.vpp=2"),
        (("dualpipe_v", 2, 4, 4), "layout.vpp must be 2 for layout.schedule=dualpipe_v, but is 4; set layout.vpp=2"),
        (
            ("interleaved", 4, 2, 6),
            "a multiple of layout.pp 4 for layout.schedule=interleaved; set layout.pp=3 (the nearest), or a "
            "layout.micro_batch for 4 or 8 of them",
        ),
        (("interleaved", 4, 2, 3), "set layout.pp=3 (the nearest), or a layout.micro_batch for 4 of them"),
        (("dualpipe_v", 4, 2, 7), "must be at least 2 x layout.pp 4 = 8 for layout.schedule=dualpipe_v; set"),
        (("1f1b", 2, 1, 0), "train.global_batch / (layout.dp x layout.micro_batch) must be at least 1, but is 0"),
    ],
)
def test_numbers_that_a_schedule_forbids_are_errors_with_key_rule_and_remedy(arguments, expected):
    with pytest.raises(ConfigError) as caught:
        make(*arguments)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    for pp in re.findall(r"layout\.pp=(\d+)", str(caught.value)):
        make(arguments[0], int(pp), *arguments[2:])
    for micro_batches in re.findall(r"layout.micro_batch for (\d+)(?: or (\d+))? of them", str(caught.value)):
        for count in filter(None, micro_batches):
            make(*arguments[:3], int(count))


def ends_held_up(schedule: Schedule) -> bool:
    """Whether all ranks end if a pass ends only when what its rank has sent was asked for, and what it asked for sent.

    Every rank asks for messages as `requests` says.
    """
    due = [requests(schedule, rank) for rank in range(schedule.pp)]
    position, begun, moved = [0] * schedule.pp, [-1] * schedule.pp, True
    under_way, done = [set() for _ in due], {"sent": set(), "asked": set()}
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while (at := position[rank]) < len(actions):
                if begun[rank] < at:
                    asked = {("sent", schedule.incoming(action)) for action in due[rank][at]}
                    under_way[rank] |= asked
                    done["asked"] |= {message for _, message in asked}
                    begun[rank], moved = at, True
                needed = schedule.incoming(actions[at])
                if needed and needed not in done["asked"]:
                    return False
                if any(message not in done[verb] for verb, message in under_way[rank]):
                    break
                made, position[rank], moved = schedule.outgoing(actions[at]), at + 1, True
                under_way[rank] = {("asked", made)} if made else set()
                done["sent"] |= {made}
    return position == [len(actions) for actions in schedule.actions]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pp", [2, 3, 4, 5])
def test_ranks_that_ask_as_stated_end_even_if_passes_wait_for_messages(name, pp):
    for micro_batches in [m for m in (1, pp, 2 * pp, 2 * pp + 1, 5 * pp) if legal(name, pp, m)]:
        for vpp in CHUNKS.get(name, (1,)):
            schedule = make(name, pp, vpp, micro_batches)
            assert ends_held_up(schedule) and ends_held_up(schedule.only("F"))
