"""Installing Busway elsewhere, with and without a compiler, and the two promises of `make train`. Minutes long."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
SMALL = ["train.steps=4", "train.log_every=1", "model.layers=1", "train.eval_every=0"]
LIBRARIES = ["models/kernels/_native.so", "parallel/collectives/_mpi_ops.so"]


def sources(folder: Path) -> Path:
    """A copy of what git tracks, as a clone would be."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def install(folder: Path, **environ: str) -> tuple[Path, str]:
    """`pip install .` of a copy, as two steps, so that this environment lends its dependencies but not its headers.

    pip builds the wheel in isolation from a fresh environment; it is installed into a folder of its own. Gives that
    folder, and what the build printed.
    """
    subprocess.run([sys.executable, "-m", "venv", folder / "fresh"], check=True)
    wheel = [folder / "fresh/bin/pip", "wheel", "-v", "--no-deps", "-w", folder, sources(folder / "sources")]
    built = subprocess.run(wheel, env={**os.environ, **environ}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, *folder.glob("*.whl")]
    subprocess.run(command, check=True)
    return target, built.stdout + built.stderr


def operators(folder: Path) -> list[str]:
    """The compiled libraries below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.so"))


def train_beside_folders_of_the_same_names(folder: Path, target: Path) -> str:
    """Run the installed program where `models/`, `trainer/` and `recipes/` hold something else; its output."""
    work = folder / "work"
    for name in ("models", "trainer", "recipes", "parallel"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    result = subprocess.run(
        [str(target / "bin" / "busway"), "train", *SMALL],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_an_install_works_beside_folders_of_the_same_names(tmp_path):
    target, output = install(tmp_path)
    assert operators(target) == LIBRARIES
    assert "busway: compiled models.kernels._native and parallel.collectives._mpi_ops\n" in output
    printed = train_beside_folders_of_the_same_names(tmp_path, target)
    assert "kernels: native" in printed
    assert "collectives: mpi (C++ operators)" in printed


def test_without_a_compiler_it_works_on_plain_operators_and_says_so(tmp_path):
    target, output = install(tmp_path, CXX="no-such-compiler")
    assert not operators(target)
    assert "no-such-compiler" in output
    assert "busway: compiled nothing; without models.kernels._native and parallel.collectives._mpi_ops" in output
    printed = train_beside_folders_of_the_same_names(tmp_path, target)
    assert "kernels: plain (no compiled kernels: install g++" in printed
    assert "slower" in printed


def test_make_setup_compiles_once_a_compiler_is_there(tmp_path):
    sources(tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.done").touch()

    def done(compiler: str) -> bool:
        return subprocess.run(["make", "--question", "setup", f"CXX={compiler}"], cwd=tmp_path).returncode == 0

    assert done("no-such-compiler")
    assert not done("sh")  # a program that is there
    for library in LIBRARIES:
        (tmp_path / library).touch()
    assert done("sh")


def test_the_built_in_recipe_learns(tmp_path):
    busway = Path(sys.executable).parent / "busway"
    result = subprocess.run([busway, "train"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny_moe-1/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert statistics.mean(losses[-3:]) < 0.75 * statistics.mean(losses[:3])
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluations == sorted(evaluations, reverse=True)
