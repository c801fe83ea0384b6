"""What schedules cost in simulated time, beside published formulas and numbers, and how a timeline is drawn."""

from __future__ import annotations

import random
import re

import pytest
from rich.text import Text

from parallel.schedules import NAMES, Timeline, Times, bubble_formula, draw, make, peaks, simulate

VPP = {"interleaved": 2, "zb_v": 2, "dualpipe_v": 2}


def timeline(name: str, pp: int, micro_batches: int, times: Times | None = None, vpp: int | None = None) -> Timeline:
    return simulate(make(name, pp, vpp or VPP.get(name, 1), micro_batches), times or Times())


def idle(found: Timeline) -> float:
    """The makespan beyond what a rank computes; all ranks compute equally long."""
    return found.makespan - found.busy[0]


@pytest.mark.parametrize("seed", range(20))
def test_bubbles_are_those_of_the_formulas(seed):
    rng = random.Random(seed)
    pp, f, i = rng.choice((1, 2, 3, 4, 6, 8, 16)), rng.uniform(1, 2), rng.uniform(1, 2)
    w = rng.uniform(0.1, 1)
    m, vpp = rng.randint(1, 20), rng.choice((2, 3, 4))
    times = Times(forward=f, backward=i + w, input=i, weight=w)
    print("seed", seed, "pp", pp, "m", m, "vpp", vpp, times)
    for name in ("gpipe", "1f1b"):
        found = timeline(name, pp, m, times)
        assert found.makespan == pytest.approx((m + pp - 1) * (f + i + w))
        assert found.bubble == pytest.approx(bubble_formula(found.schedule, times).share)
        assert found.bubble == pytest.approx((pp - 1) / (m + pp - 1))
    found = timeline("interleaved", pp, m * pp, times, vpp)
    assert idle(found) / found.busy[0] == pytest.approx((pp - 1) / (vpp * m * pp))
    assert found.bubble == pytest.approx(bubble_formula(found.schedule, times).share)
    found = timeline("zb_h1", pp, m, times)
    if m >= pp:
        assert idle(found) == pytest.approx((pp - 1) * (f + i - w))
    else:
        assert found.makespan == pytest.approx((m + pp - 1) * (f + i) + w)
    assert found.bubble == pytest.approx(bubble_formula(found.schedule, times).share)


# Qi et al., arXiv:2401.10241: T_F, T_B, T_W and T_comm of table 9, bubble rates of 1F1B and ZB-H1 of table 5.
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421),
]


@pytest.mark.parametrize(("pp", "m", "f", "i", "w", "transfer", "one_f_one_b", "zb_h1"), PUBLISHED)
def test_bubbles_with_measured_times_and_transfers_are_those_published(pp, m, f, i, w, transfer, one_f_one_b, zb_h1):
    times = Times(forward=f, backward=i + w, input=i, weight=w, transfer=transfer)
    assert round(timeline("1f1b", pp, m, times).bubble, 4) == one_f_one_b
    assert round(timeline("zb_h1", pp, m, times).bubble, 4) == zb_h1


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8, 16])
def test_a_rank_of_zb_v_never_waits_between_its_first_and_last_action(pp):
    """Section 6 of the same: no bubble where F = I = W. What is left of the makespan is that rank r starts r later."""
    for m in (2 * pp - 1, 2 * pp, 3 * pp):
        found = timeline("zb_v", pp, m)
        for starts, ends, busy in zip(found.starts, found.ends, found.busy, strict=True):
            assert ends[-1] - starts[0] == busy
        assert idle(found) == pp - 1


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
@pytest.mark.parametrize("weight", [0.5, 0.75, 1.0])
def test_dualpipe_v_waits_no_longer_than_published(pp, weight):
    """The table in DeepSeek-AI's DualPipe: (PP/2 - 1)(F&B + B - 3W) with PP = 2 pp, F&B = F + B without overlap."""
    times = Times(forward=1, backward=1 + weight, input=1, weight=weight)
    for m in (2 * pp, 3 * pp + 1):
        bound = (pp - 1) * (1 + 2 * (1 + weight) - 3 * weight)
        assert 0 < idle(timeline("dualpipe_v", pp, m, times)) <= bound


def test_zero_bubble_schedules_rank_as_published():
    """The same work as 1F1B on four ranks: a stage of 1F1B is two of a V."""
    whole, half = Times(2, 4, 2, 2), Times()
    bubbles = [timeline(name, 4, 16, whole if name in ("1f1b", "zb_h1") else half).bubble for name in NAMES[1:]]
    one_f_one_b, interleaved, zb_h1, zb_v, dualpipe_v = bubbles
    assert one_f_one_b > interleaved > zb_h1 > zb_v == dualpipe_v


@pytest.mark.parametrize("name", NAMES)
def test_every_action_starts_as_soon_as_its_rank_and_its_message_allow(name):
    rng = random.Random(7)
    schedule = make(name, 4, VPP.get(name, 1), 12)
    stages = schedule.stages
    times = Times(
        *([rng.uniform(1, 2) for _ in range(stages)] for _ in range(4)), [rng.random() for _ in range(stages - 1)]
    )
    found = simulate(schedule, times)
    arrival = {}
    for actions, ends in zip(schedule.actions, found.ends, strict=True):
        for action, end in zip(actions, ends, strict=True):
            if message := schedule.outgoing(action):
                boundary = message.stage if message.direction == "activation" else message.stage - 1
                arrival[message] = end + times.transfer[boundary]
    for actions, starts, ends in zip(schedule.actions, found.starts, found.ends, strict=True):
        free = 0.0
        for action, start, end in zip(actions, starts, ends, strict=True):
            assert start == max(free, arrival.get(schedule.incoming(action), 0.0))
            duration = getattr(times, {"F": "forward", "B": "backward", "I": "input", "W": "weight"}[action.kind])
            assert end == start + duration[action.stage]
            free = end
    assert found.makespan == max(ends[-1] for ends in found.ends)
    assert found.bubble == pytest.approx(1 - sum(found.busy) / (4 * found.makespan))


def test_times_for_another_number_of_stages_are_an_error():
    with pytest.raises(ValueError, match="3 values are given for 4 stages"):
        timeline("1f1b", 4, 8, Times(forward=[1, 2, 3]))


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_shows_every_action_where_it_runs(name):
    found = timeline(name, 4, 8)
    *ranks, legend, figures = draw(found, width=120).splitlines()
    assert len(ranks) == 4 and max(map(len, [*ranks, legend, figures])) <= 120
    # A forward is the shortest pass; it takes a whole number of columns, and so does all else.
    columns = int(118 / found.makespan)
    for rank, line in enumerate(ranks):
        assert line.startswith(f"{rank} ") and len(line) == 2 + columns * found.makespan
        drawn = [(cell.group(), cell.start()) for cell in re.finditer(r"[FBIW]\d", line, re.IGNORECASE)]
        expected = [
            (f"{a.kind.lower() if a.stage >= 4 else a.kind}{a.micro_batch}", 2 + columns * start)
            for a, start in zip(found.schedule.actions[rank], found.starts[rank], strict=True)
        ]
        assert drawn == expected
        assert line.count(".") == columns * (found.makespan - found.busy[rank])
    kinds = {action.kind for actions in found.schedule.actions for action in actions}
    assert {part[0] for part in legend.split(", ") if part[1] == " " and part[0] != "."} == kinds
    assert figures.startswith(f"makespan {found.makespan:g}, bubble {found.bubble:.1%}")
    assert (bubble_formula(found.schedule, found.times) is not None) == ("p-1" in figures)
    assert figures.endswith("live activations by rank " + " ".join(map(str, peaks(found.schedule))))


def test_colours_change_nothing_but_colours():
    found = timeline("zb_v", 4, 8)
    coloured = draw(found, colour=True)
    assert coloured != draw(found) and Text.from_markup(coloured).plain == draw(found)


@pytest.mark.parametrize("width", [20, 80, 100, 200])
def test_a_drawing_keeps_within_its_width_and_ends_with_the_makespan(width):
    for name in NAMES:
        ranks = draw(timeline(name, 4, 32), width).splitlines()[:4]
        assert len({len(line) for line in ranks}) == 1 and width - 20 <= len(ranks[0]) <= width


def test_a_letter_tells_more_than_two_stages_of_a_rank_apart():
    line = draw(timeline("interleaved", 2, 2, vpp=3), 200).splitlines()[0]
    assert re.findall(r"F\d[a-c]|f\d[a-c]", line) == ["F0a", "F1a", "f0b", "f1b", "F0c", "F1c"]
