"""One model, every layout, the same loss: in the fp64 reference, within the design's 1e-9 of the one-rank run.

Loss and gradient norm of every step, the held-out loss and the final weights. Documents are masked, heads of keys are
fewer than ranks in some layouts, and layers are more than stages in none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EQUAL = 1e-9
MODEL = (
    "model.layers=2", "model.heads=8", "model.kv_heads=2", "model.vocab=304", "model.qk_norm=true",
    "data.mask_documents=true", "data.tokenizer=bpe:304", "train.global_batch=8", "train.steps=3", "train.eval_every=3",
    "train.eval_batches=1", "train.precision=fp64", "optimizer.lr=3e-4", "layout.micro_batch=1",
)  # fmt: skip
LAYOUTS = {
    1: {
        "one micro-batch": "micro_batch=8",
        "recompute full": "recompute=full",
        "recompute selective": "recompute=selective",
        "recompute layer 1": "recompute=[1]",
    },
    2: {
        "tp": "tp=2",
        "tp, sequence parallel": "tp=2 sequence_parallel=true micro_batch=2",
        "gpipe": "pp=2 schedule=gpipe",
        "zb_h1": "pp=2 schedule=zb_h1 recompute=full",
        "ring": "cp=2",
        "ulysses": "cp=2 cp_method=ulysses micro_batch=2",
        "zero 1": "dp=2 zero=1",
        "zero 2": "dp=2 zero=2",
    },
    4: {
        "tp beyond the heads of keys": "tp=4 sequence_parallel=true",
        "tp x interleaved": "tp=2 pp=2 vpp=2 schedule=interleaved",
        "zb_v with zero": "pp=2 schedule=zb_v dp=2 zero=2",
        "hybrid": "cp=4 cp_method=hybrid",
        "cp x tp, sequence parallel, another order": "cp=2 tp=2 sequence_parallel=true order=[cp,tp,dp,pp]",
        "uneven stages": "pp=4 stages=[0,1,1,0]",
    },
}


@pytest.fixture(scope="module")
def runs(busway, tmp_path_factory):
    """Layout -> its run; all of one number of ranks in one world."""

    def words(name: str, layout: str) -> list[str]:
        keys = [f"layout.{key}" for key in layout.split()]
        return ["train", *busway.words(name, "launcher.kind=none", *MODEL, *keys)]

    found = {}
    for ranks, layouts in LAYOUTS.items():
        names = {f"{ranks} ranks: {name}": layout for name, layout in layouts.items()}
        if ranks == 1:
            names = {"one rank": "dp=1"} | names
        commands = [words(re.sub(r"\W+", "-", name), layout) for name, layout in names.items()]
        file = tmp_path_factory.mktemp("world") / "commands.json"
        file.write_text(json.dumps(commands))
        mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
        driver = [sys.executable, "-P", str(Path(__file__).with_name("world.py")), str(file)]
        done = subprocess.run([*mpiexec, *driver], cwd=busway.folder, env=busway.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found |= {name: busway.run(re.sub(r"\W+", "-", name)) for name in names}
    return found


def worst(first, other):
    """The largest relative difference of two sequences."""
    first, other = np.asarray(first), np.asarray(other)
    return float(np.max(np.abs(first - other) / np.abs(first)))


@pytest.mark.parametrize("layout", [f"{ranks} ranks: {name}" for ranks, names in LAYOUTS.items() for name in names])
def test_a_layout_trains_the_model_of_one_rank(runs, layout):
    first, other = runs["one rank"], runs[layout]
    assert [row["step"] for row in other.rows] == [1, 2, 3]
    assert other.summary["world_size"] == int(layout.split()[0])
    for key in ("loss", "grad_norm"):
        assert worst([row[key] for row in first.rows], [row[key] for row in other.rows]) <= EQUAL, key
    assert worst([first.summary["eval_loss"]], [other.summary["eval_loss"]]) <= EQUAL
    weights = other.weights()
    for name, value in first.weights().items():
        assert np.max(np.abs(value - weights[name])) <= EQUAL * np.max(np.abs(value)), name
