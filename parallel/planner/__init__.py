"""The planner: the best layout of a model on a machine, and why.

`Problem` asks, `Search` answers with `Estimate`s, `Plan` says what one means, `explain` compares. Prices are formulas
over NumPy columns (`compute`, `communication`, `memory`, `price`), with constants of device and framework from data
files; everything that is printed comes from `evaluate`, which plays the schedule that the engine runs. No MindSpore
here, and nothing of the trainer.
"""

from __future__ import annotations

from parallel.planner.evaluate import Estimate, evaluate
from parallel.planner.plan import Plan
from parallel.planner.problem import Problem
from parallel.planner.search import Result, Search

__all__ = ["Estimate", "Plan", "Problem", "Result", "Search", "evaluate"]
