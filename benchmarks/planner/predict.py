"""Predictions for published runs, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
from planner.published import Batch, Row, Setting, batches

from parallel.planner.constants import Constants
from parallel.planner.machine import machine
from parallel.planner.memory import GIB, memory
from parallel.planner.price import price
from parallel.schedules.price import price as play

Choice = Callable[[Setting], Constants]


class Runs:
    """Rows as columns, priced as often as a fit asks."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.settings = list(dict.fromkeys(row.setting for row in self.rows))
        self.places = np.array([self.settings.index(row.setting) for row in self.rows], int)
        self._batches: dict[int, list[Batch]] = {}

    @property
    def measured(self) -> np.ndarray:
        """[rows]: seconds of a step; nan where there are none."""
        return np.array([row.measured or np.nan for row in self.rows])

    @property
    def measured_memory(self) -> np.ndarray:
        """[rows]: bytes; nan where there are none."""
        return np.array([row.memory * GIB if row.memory else np.nan for row in self.rows])

    def step_times(self, *choices: Choice) -> np.ndarray:
        """[choices, rows]: predicted seconds of a step."""
        return self._each(_step_times, choices)

    def memories(self, *choices: Choice) -> np.ndarray:
        """[choices, rows]: predicted bytes of the fullest rank."""
        return self._each(_memories, choices)

    def _each(self, figure: Callable[[Batch, Constants], np.ndarray], choices: Sequence[Choice]) -> np.ndarray:
        times = len(choices)
        if times not in self._batches:
            self._batches[times] = batches(self.rows, times)
        found = np.empty((times, len(self.rows)))
        chosen = [[choose(setting) for setting in self.settings] for choose in choices]
        names = [field.name for field in fields(Constants)]
        tables = {name: np.array([[getattr(each, name) for each in line] for line in chosen]) for name in names}
        for batch in self._batches[times]:
            members = list(batch.rows[: len(batch.rows) // times])
            columns = {name: table[:, self.places[members]].ravel() for name, table in tables.items()}
            shared = {name: column[0] if (column == column[0]).all() else column for name, column in columns.items()}
            found[:, members] = figure(batch, Constants(**shared)).reshape(times, -1)
        return found


def _step_times(batch: Batch, constants: Constants) -> np.ndarray:
    where = machine(batch.topology, constants)
    c = batch.candidates
    prices = price(batch.shape, batch.seq_len, c, batch.contents, where, constants)
    return prices.total(play(c.schedule, c.pp, c.vpp, c.micro_batches, prices.times)[0])


def _memories(batch: Batch, constants: Constants) -> np.ndarray:
    held = memory(batch.shape, batch.seq_len, batch.candidates, batch.contents, constants)
    return held.total.max(1)
