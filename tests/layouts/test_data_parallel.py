"""The same numbers under every data-parallel layout, in the fp64 reference and within the design's 1e-9.

Documents are masked and prompts teach nothing, so ranks and micro-batches hold different numbers of valid tokens.
"""

from __future__ import annotations

import json
import random
from functools import cache

import numpy as np
import pytest
from worlds import EQUAL, run_world, slug, worst

from trainer.data.build import build
from trainer.data.tokenizer import train_bpe

STEPS = 8
SEED = 7
TEXT = "ask answer bus tram bridge rain stone house minute where when why never always"
LAYOUTS = {
    "dp=1 in one batch": (1, 4), "dp=1 accumulating": (1, 1), "dp=2 in one batch": (2, 2), "dp=2 accumulating": (2, 1),
}  # fmt: skip
"""Ranks and `layout.micro_batch`."""
FIRST = "dp=1 in one batch"
OTHERS = [
    "dp=2 accumulating",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("dp=1 accumulating", "dp=2 in one batch")),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """(prefix, tokenizer) of 80 prompts with responses of very different lengths."""
    print(f"seed {SEED}")
    folder, rng = tmp_path_factory.mktemp("dataset"), random.Random(SEED)
    words = TEXT.split()

    def text(longest):
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, longest)))

    records = [{"prompt": text(20), "response": text(12)} for _ in range(80)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train_bpe([f"{r['prompt']} {r['response']}" for r in records], 280).save(str(folder / "tokenizer.json"))
    build([str(folder / "chat.jsonl")], folder / "tokenizer.json", folder / "chat", 1, report=lambda line: None)
    return folder / "chat", folder / "tokenizer.json"


@pytest.fixture(scope="module")
def run(busway, dataset):
    """The run of a layout, which runs when it is first asked for."""
    prefix, tokenizer = dataset
    common = (
        f"data.sources=[{{path: {prefix}}}]", f"data.tokenizer={tokenizer}", "data.mask_documents=true",
        "train.precision=fp64", "optimizer.lr=3e-4", f"train.steps={STEPS}", "train.eval_every=4",
        "launcher.kind=none",
    )  # fmt: skip

    @cache
    def made(name):
        ranks, size = LAYOUTS[name]
        words = busway.words(slug(name), *common, f"layout.dp={ranks}", f"layout.micro_batch={size}")
        run_world(busway, ranks, [["train", *words]])
        return busway.run(slug(name))

    return made


@pytest.mark.parametrize("layout", OTHERS)
def test_loss_and_gradient_norm_of_every_step_are_those_of_one_rank(run, layout):
    first, other = run(FIRST), run(layout)
    assert [row["step"] for row in other.rows] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert worst([row[key] for row in first.rows], [row[key] for row in other.rows]) <= EQUAL
    key = "eval_loss"
    assert worst([row[key] for row in first.evaluations], [row[key] for row in other.evaluations]) <= EQUAL


@pytest.mark.parametrize("layout", OTHERS)
def test_final_weights_are_those_of_one_rank(run, layout):
    first, other = run(FIRST).weights(), run(layout).weights()
    assert first.keys() == other.keys()
    for name, value in first.items():
        assert value.dtype == np.float64
        assert np.max(np.abs(value - other[name])) <= EQUAL * np.max(np.abs(value)), name


@pytest.mark.parametrize("layout", OTHERS)
def test_a_layout_is_what_it_is_called(run, layout):
    summary = run(layout).summary
    assert (summary["world_size"], summary["layout"]["micro_batch"]) == LAYOUTS[layout]


@pytest.mark.parametrize("layout", OTHERS)
def test_the_traffic_does_not_grow_with_accumulation(run, layout):
    """One reduction a step, however many micro-batches."""
    summary = run(layout).summary
    found = [(row["calls"], row["dtype"], row["payload_bytes"]) for row in summary["traffic"]]
    assert found == [(1, "float64", (summary["parameters"] + 3) * 8)] * (summary["world_size"] > 1)
