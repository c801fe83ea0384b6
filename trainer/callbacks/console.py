"""A line a row on the console, and a progress bar where a terminal is there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trainer import metrics
from trainer.callbacks.base import Callback
from trainer.metrics import Row

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.step import Outcome


class Terminal(RichConsole):
    """rich's console, for which a reader that has gone (`busway train | head`) is no reason to end the run."""

    def on_broken_pipe(self) -> None:
        """The rest goes nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain_table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without lines: columns of words, and columns of numbers behind them."""
    table = Table(*words, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


WIDE = 150
"""Columns that every table fits into."""


def short(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def terminal(tables: bool = False) -> RichConsole:
    """The console of this process, which prints text as it is. A terminal too narrow for `tables` wraps their lines,
    but loses none."""
    width = max(WIDE, shutil.get_terminal_size().columns) if tables else None
    return Terminal(width=width, soft_wrap=True, highlight=False, markup=False)


class Console(Callback):
    """Rank 0's view of the run."""

    def __init__(self, console: RichConsole) -> None:
        self.console = console
        self.progress: Progress | None = None

    def on_start(self, loop: Loop) -> None:
        """Starts the bar."""
        self.say(f"training starts at step {loop.step + 1}")
        if self.console.is_terminal:
            columns = (
                TextColumn("steps"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.bar = self.progress.add_task("steps", total=loop.last_step, completed=loop.step)
            self.progress.start()

    def after_step(self, loop: Loop, outcome: Outcome) -> None:
        """Moves the bar."""
        if self.progress:
            self.progress.update(self.bar, completed=loop.step)

    def on_row(self, loop: Loop, row: Row) -> None:
        """One line."""
        self.say(line(row, loop.last_step, loop.meter.median_step_s))

    def on_evaluation(self, loop: Loop, row: Row) -> None:
        """One line."""
        self.say(f"step {row[metrics.STEP]}  held-out loss {row[metrics.EVAL_LOSS]:.4f}")

    def on_event(self, loop: Loop, row: Row) -> None:
        """One line."""
        details = "  ".join(f"{k} {v}" for k, v in row.items() if k not in (metrics.STEP, metrics.EVENT))
        self.say(f"step {row[metrics.STEP]}  {row[metrics.EVENT].replace('_', ' ')}  {details}".rstrip())

    def on_end(self, loop: Loop) -> None:
        """Says where the results are."""
        if loop.status == "stopped":
            self.say(f"stopped after step {loop.step}, which is saved; go on with checkpoint.resume=auto")
        else:
            self.say(f"done after step {loop.step}; results are in {loop.run}")

    def on_close(self, loop: Loop) -> None:
        """Takes the bar away."""
        if self.progress:
            self.progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text)


def line(row: Row, last_step: int, step_s: float) -> str:
    """A row for people; `step_s` is the step that the estimate of the time left goes by."""
    mfu = "-" if row[metrics.MFU] is None else f"{row[metrics.MFU]:.1%}"
    eta = timedelta(seconds=round(step_s * (last_step - row[metrics.STEP])))
    return (
        f"step {row[metrics.STEP]:>{len(str(last_step))}}/{last_step}  loss {row[metrics.LOSS]:.4f}  "
        f"grad norm {row[metrics.GRAD_NORM]:.3f}  lr {row[metrics.LR]:.2e}  "
        f"{row[metrics.TOKENS_PER_S]:,.0f} tokens/s ({row[metrics.TOKENS_PER_S_PER_RANK]:,.0f} a rank)  "
        f"MFU {mfu}  memory {row[metrics.MEMORY_GIB]:.2f} GiB  eta {eta}"
    )
