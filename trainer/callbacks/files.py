"""metrics.jsonl and TensorBoard's event files: one curve across restarts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from trainer import metrics
from trainer.callbacks.base import Callback, Row
from trainer.machine import writing_to

if TYPE_CHECKING:
    from trainer.loop import Loop


class MetricsFile(Callback):
    """Appends every row, evaluation and event; on resume, rows past the resumed step are dropped first."""

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

    def on_end(self, loop: Loop) -> None:
        """Closes the file."""
        self.file.close()


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite `path` without the rows past `step` and without a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if row[metrics.STEP] <= step:
            kept.append(text + "\n")
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, path)


class TensorBoard(Callback):
    """Scalars under the names of `metrics.tags`. A purge step makes a resumed run supersede what it repeats."""

    def __init__(self, tags: list[metrics.Tag], batch_size: int) -> None:
        self.tags = tags
        self.batch_size = batch_size
        self.counts = {metrics.TOKENS: 0, metrics.SAMPLES: 0}

    def on_start(self, loop: Loop) -> None:
        """Opens a new event file, which purges what earlier ones hold from the next step on."""
        with writing_to(loop.run.tensorboard):
            self.writer = EventFileWriter(str(loop.run.tensorboard))
        if loop.step:
            session = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=loop.step + 1, session_log=session))

    def on_row(self, loop: Loop, row: Row) -> None:
        """One scalar a curve whose value the row has."""
        self.counts |= {key: row[key] for key in self.counts if key in row}
        values = self.counts | row | {metrics.BATCH_SIZE: self.batch_size}
        if metrics.STEP_S in row:
            values[metrics.DATA_SHARE] = row[metrics.DATA_WAIT_S] / row[metrics.STEP_S]
        for tag in self.tags:
            if tag.key in row or (metrics.LOSS in row and values.get(tag.key) is not None):
                if values[tag.key] is not None:
                    self._scalar(tag.name, values[tag.key] * tag.factor, values[tag.x])

    on_evaluation = on_row

    def on_end(self, loop: Loop) -> None:
        """Flushes and closes."""
        with writing_to(loop.run.tensorboard):
            self.writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self.writer.add_event(Event(wall_time=time.time(), step=int(step), summary=summary))
