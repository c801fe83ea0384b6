"""Pipeline schedules as data: made by name, proved by a checker, priced by a simulator, drawn as text.

A schedule is the order of actions on each rank. The engine executes it, the simulator prices it, and what is sent
follows from it: nothing else knows how a pipeline runs. `simulate` gives the timeline of one pipeline; `price`,
`lower_bound` and `peak_live` give the figures of many. No MindSpore here.
"""

from __future__ import annotations

from parallel.schedules.bound import lower_bound, peak_live
from parallel.schedules.check import RECEIVE, SEND, check_schedule, messages, peaks
from parallel.schedules.draw import draw
from parallel.schedules.generate import NAMES, make
from parallel.schedules.price import Price, price
from parallel.schedules.schedule import (
    BACKWARD,
    FORWARD,
    INPUT,
    SPLIT,
    V_SHAPED,
    WEIGHT,
    Action,
    Columns,
    Message,
    Schedule,
)
from parallel.schedules.simulate import Formula, Timeline, Times, bubble_formula, requests, simulate
from parallel.schedules.split import cut

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INPUT",
    "NAMES",
    "RECEIVE",
    "SEND",
    "SPLIT",
    "V_SHAPED",
    "WEIGHT",
    "Action",
    "Columns",
    "Formula",
    "Message",
    "Price",
    "Schedule",
    "Timeline",
    "Times",
    "bubble_formula",
    "check_schedule",
    "cut",
    "draw",
    "lower_bound",
    "make",
    "messages",
    "peak_live",
    "peaks",
    "price",
    "requests",
    "simulate",
]
