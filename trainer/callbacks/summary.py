"""summary.json: how the run went, with the keys that the design lists."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from models.config import FLOPS_CONVENTION
from parallel.traffic import maximum
from trainer import metrics
from trainer.callbacks.base import Callback
from trainer.errors import EXIT_DONE, EXIT_NOT_FINITE, EXIT_STOPPED, EXIT_STOPPED_AT_ONCE
from trainer.files import RUNS, write_text
from trainer.run_directory import RunDirectory

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.step import Outcome

MEASURED = ("final_loss", "eval_loss", "tokens_per_s", "first_step_s", "step_s", "mfu", "memory_gib", "traffic")
VERSIONS = ("busway", "mindspore", "numpy", "mpi4py", "mpich")
MEMORY_KINDS = {"Ascend": "allocator peak", "CPU": "peak RSS"}
"""What `memory_gib` is on each device."""
EXIT_CODES = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "not_finite": EXIT_NOT_FINITE}


class Summary(Callback):
    """Runs on every rank, as the traffic account is the maximum over ranks; rank 0 writes."""

    name = "summary"

    def __init__(self, memory_kind: str) -> None:
        self.memory_kind = memory_kind
        self.restarts = 0
        self.traffic: list[dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """How often the run was resumed."""
        return {"restarts": self.restarts}

    def load_state(self, state: dict[str, Any]) -> None:
        """One more restart than the checkpoint knew of."""
        self.restarts = state["restarts"] + 1

    def on_start(self, loop: Loop) -> None:
        """A run that is killed leaves no file that speaks of an earlier start."""
        self._write(loop)

    def before_step(self, loop: Loop) -> None:
        """The account of the first step: every other moves the same, but for what is dispatched to experts."""
        if self.traffic is None:
            loop.collectives.reset_traffic()

    def after_step(self, loop: Loop, outcome: Outcome) -> None:
        """Closes the account of the first step."""
        if self.traffic is None:
            self.traffic = maximum(loop.collectives.world.all_gather(loop.collectives.traffic())).rows()

    def on_event(self, loop: Loop, row: dict[str, Any]) -> None:
        """A run that ends on a bad loss has no `on_end`."""
        if loop.status == "not_finite":
            self._write(loop)

    def on_end(self, loop: Loop) -> None:
        """Writes the file."""
        self._write(loop)

    def _write(self, loop: Loop) -> None:
        if loop.collectives.rank != 0:
            return
        content = self.content(loop)
        if content["first_step_s"] is None:
            # No step is done since the start: what an earlier start has measured stands.
            content |= {key: value for key, value in _read(loop.run).items() if key in MEASURED}
        _save(loop.run, content)

    def content(self, loop: Loop) -> dict[str, Any]:
        """The keys of summary.json."""
        meter, layout = loop.meter, loop.mesh.layout
        step_s = meter.median_step_s
        speed = meter.tokens_per_step / step_s if step_s else None
        return {
            "status": loop.status,
            "exit_code": EXIT_CODES.get(loop.status),
            "steps": loop.step,
            "final_loss": meter.last_loss,
            "eval_loss": meter.eval_loss,
            "tokens": loop.step * meter.tokens_per_step,
            "tokens_per_s": speed,
            "first_step_s": meter.first_step_s,
            "step_s": step_s,
            "mfu": meter.mfu(speed) if speed else None,
            "mfu_convention": FLOPS_CONVENTION,
            "flops_per_token": meter.flops_per_token,
            "parameters": loop.model.parameter_count,
            "active_parameters": loop.model.active_parameter_count,
            "memory_gib": meter.memory_peak_gib,
            "memory_kind": self.memory_kind,
            "world_size": layout.world_size,
            "layout": asdict(layout),
            "placement": list(loop.mesh.placement),
            "traffic": self.traffic or [],
            "restarts": self.restarts,
            "versions": {name: _version(name) for name in VERSIONS},
        }


def note_failure(run: RunDirectory, code: int) -> None:
    """Say in summary.json how a run ended that could not say so itself, and how far metrics.jsonl shows it came."""
    if code in EXIT_CODES.values():
        return
    status = "stopped_at_once" if code == EXIT_STOPPED_AT_ONCE else "failed"
    content = _read(run) | {"status": status, "exit_code": code}
    rows = [row for row in metrics.read_rows(run.metrics) if metrics.TOKENS in row]
    if rows:
        step, loss, tokens = (rows[-1][key] for key in (metrics.STEP, metrics.LOSS, metrics.TOKENS))
        content |= {"steps": step, "final_loss": loss, "tokens": tokens}
    _save(run, content)


def _read(run: RunDirectory) -> dict[str, Any]:
    return json.loads(run.summary.read_text()) if run.summary.is_file() else {}


def _save(run: RunDirectory, content: dict[str, Any]) -> None:
    write_text(run.summary, json.dumps(content, indent=1) + "\n", RUNS)


def _version(name: str) -> str | None:
    """None where a package is the system's and not from PyPI, as MPI on a cluster."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
