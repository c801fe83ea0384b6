"""Plans, help and data tools come in seconds: what needs no MindSpore runs without it. Rooms import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FREE = (
    "models.config", "models.checks", "models.shapes", "models.weights", "models.huggingface", "models.families",
    "parallel.topology", "parallel.rank_table", "parallel.layout", "parallel.mesh", "parallel.traffic",
    "parallel.dispatch", "parallel.memory", "parallel.allocation", "parallel.planner", "parallel.planner.explain",
    "parallel.schedules", "trainer.cli", "trainer.train", "trainer.recipe", "trainer.compose", "trainer.run_directory",
    "trainer.checkpoint", "trainer.convert", "trainer.launch", "trainer.launch.keeper", "trainer.launch.rank",
    "trainer.metrics", "trainer.plan", "trainer.planning", "trainer.plan_report", "trainer.probe", "trainer.report",
)  # fmt: skip
COMMANDS = (
    ("--help",), ("--version",), ("train", "--help"), ("data", "--help"), ("data", "build", "--help"),
    ("data", "inspect", "--help"), ("convert", "--help"), ("convert", "from-hf", "--help"),
    ("convert", "to-hf", "--help"), ("train", "--help-keys"), ("explain", "--help"), ("plan", "--help"),
    ("train", "llama3_8b", "--cfg", "job"), ("topology", "--help"), ("topology", "import", "--help"),
    ("topology", "export", "--help"), ("topology", "probe", "--help"), ("report", "--help"),
    ("topology", "show", "cloudmatrix384", "topology.supernode.members=64"),
)  # fmt: skip

# Runs commands with MindSpore blocked, as an import of None is an ImportError; prints their exit codes.
BLOCKED = """
import contextlib, importlib, io, sys
sys.modules["mindspore"] = None
for name in sys.argv[1].split():
    importlib.import_module(name)
from trainer import cli
for command in sys.argv[2].split(";"):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = cli.main(command.split())
        except SystemExit as ended:
            code = ended.code
    print(command, code, len(printed.getvalue()) > 5, sep=";")
assert not [name for name in sys.modules if name.startswith("mindspore.")]
"""


def test_help_recipes_and_data_work_with_mindspore_blocked():
    rooms = [f"trainer.data.{path.stem}" for path in (ROOT / "trainer" / "data").glob("[a-z]*.py")]
    words = [" ".join((*FREE, *rooms)), ";".join(" ".join(command) for command in COMMANDS)]
    done = subprocess.run([sys.executable, "-P", "-c", BLOCKED, *words], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{' '.join(command)};0;True" for command in COMMANDS]


def imported(room):
    """(file, module) of every import in a room, those inside functions too."""
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                yield path, node.module


@pytest.mark.parametrize(("room", "above"), [("models", {"parallel", "trainer"}), ("parallel", {"trainer"})])
def test_a_room_imports_none_above_it(room, above):
    found = list(imported(room))
    assert len(found) > 20
    wrong = [f"{path}: {module}" for path, module in found if module.split(".")[0] in above]
    assert wrong == []
