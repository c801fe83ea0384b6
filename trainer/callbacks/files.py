"""metrics.jsonl and TensorBoard's event files: one curve across restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from trainer import metrics
from trainer.callbacks.base import Callback
from trainer.files import RUNS, write_text
from trainer.machine import writing_to
from trainer.metrics import Row

if TYPE_CHECKING:
    from trainer.loop import Loop

FLUSH_SECONDS = 2.0
"""A killed run loses at most this much of its curves; a flush a row would cost 1 % of a step of 100 ms."""


class MetricsFile(Callback):
    """Appends every row, evaluation and event; on resume, rows past the resumed step are dropped first."""

    file: TextIO | None = None

    def on_start(self, loop: Loop) -> None:
        """Opens the file."""
        with writing_to(loop.run.metrics):
            drop_rows_after(loop.run.metrics, loop.step)
            self.file = loop.run.metrics.open("a")

    def on_row(self, loop: Loop, row: Row) -> None:
        """One line."""
        with writing_to(loop.run.metrics):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    on_evaluation = on_row
    on_event = on_row

    def on_close(self, loop: Loop) -> None:
        """Closes the file."""
        if self.file:
            self.file.close()


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite `path` without the rows past `step` and without what a kill cut short."""
    kept = [json.dumps(row) + "\n" for row in metrics.read_rows(path) if row[metrics.STEP] <= step]
    if path.exists():
        write_text(path, "".join(kept), RUNS)


class TensorBoard(Callback):
    """Scalars under the names of `metrics.tags`. A purge step makes a resumed run supersede what it repeats.

    TensorBoard purges all curves of a folder by one number, so each x axis has a folder: steps `tb` itself, tokens
    and samples one below it.
    """

    def __init__(self, tags: list[metrics.Tag], batch_size: int) -> None:
        self.tags = tags
        self.batch_size = batch_size
        self.writers: dict[str, EventFileWriter] = {}
        self.flushed = 0.0

    def on_start(self, loop: Loop) -> None:
        """Opens new event files, which purge what earlier ones hold past the resumed step."""
        session = SessionLog(status=SessionLog.START)
        with writing_to(loop.run.tensorboard):
            for x, done in _places(loop).items():
                folder = loop.run.tensorboard if x == metrics.STEP else loop.run.tensorboard / x
                if any(tag.x == x for tag in self.tags):
                    self.writers[x] = EventFileWriter(str(folder))
                    self.writers[x].add_event(Event(wall_time=time.time(), step=done + 1, session_log=session))

    def on_row(self, loop: Loop, row: Row) -> None:
        """A scalar for each curve whose value the row has."""
        values = dict(row)
        if metrics.LOSS in row:
            values[metrics.BATCH_SIZE] = self.batch_size
            values[metrics.DATA_SHARE] = row[metrics.DATA_WAIT_S] / row[metrics.STEP_S]
        places = _places(loop)
        with writing_to(loop.run.tensorboard):
            for x, writer in self.writers.items():
                scalars = [
                    Summary.Value(tag=tag.name, simple_value=values[tag.key] * tag.factor)
                    for tag in self.tags
                    if tag.x == x and values.get(tag.key) is not None
                ]
                for layer, figures in row.get(metrics.EXPERTS, {}).items() if x == metrics.STEP else ():
                    names = {f"experts/{name}/layer_{int(layer):03}": value for name, value in figures.items()}
                    scalars += [Summary.Value(tag=name, simple_value=value) for name, value in names.items()]
                for level, size in row.get(metrics.DISPATCH_BYTES, {}).items() if x == metrics.STEP else ():
                    scalars.append(Summary.Value(tag=f"experts/dispatch_bytes/{level}", simple_value=size))
                writer.add_event(Event(wall_time=time.time(), step=places[x], summary=Summary(value=scalars)))
            if time.monotonic() > self.flushed + FLUSH_SECONDS:
                self.flushed = time.monotonic()
                for writer in self.writers.values():
                    writer.flush()

    on_evaluation = on_row

    def on_close(self, loop: Loop) -> None:
        """Closes the files."""
        with writing_to(loop.run.tensorboard):
            for writer in self.writers.values():
                writer.close()


def _places(loop: Loop) -> dict[str, int]:
    """Where the run stands on each x axis."""
    samples = loop.loader.consumed
    return {metrics.STEP: loop.step, metrics.TOKENS: samples * loop.meter.seq_len, metrics.SAMPLES: samples}
