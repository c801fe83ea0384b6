"""Layouts and models drawn from the legal space by a seed, each against one rank in the fp64 reference.

`make layouts-random SEED=7 COUNT=100` tries others; a layout is named by its seed and number, which draw it again.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from matrix import MODEL, Entry
from worlds import beyond, difference, predicted, run_all

from models.checks import ConfigError
from parallel.layout import ORDER, Layout
from parallel.schedules import NAMES, V_SHAPED
from trainer.compose import compose_recipe
from trainer.recipe import Recipe

STEPS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--count", 1)))


def draw(seed: int, number: int, recipe: str) -> Entry:
    """A model, and the first layout that is legal for it, of `random.Random("seed/number")`."""
    rng = random.Random(f"{seed}/{number}")
    ranks, (model, composed) = rng.choice((2, 4, 4)), _legal_model(rng, recipe)
    while True:
        keys = _layout(rng, ranks, composed.model.layers, bool(composed.model.moe.experts))
        try:
            layout = Layout(**keys)
            layout.check_model(composed.model, composed.data.seq_len)
            layout.check_batch(composed.train.global_batch)
            layout.pipeline(composed.train.global_batch)
        except ConfigError:
            continue
        words = tuple(f"layout.{key}={_word(value)}" for key, value in keys.items())
        return Entry(f"seed {seed} number {number}", ranks, words, model)


def _legal_model(rng: random.Random, recipe: str) -> tuple[tuple[str, ...], Recipe]:
    """Keys of a model, and the recipe with them. Experts may be drawn for layers that there are not."""
    while True:
        model = tuple(_model(rng))
        try:
            return model, compose_recipe(recipe, [*MODEL, *model]).recipe
        except ConfigError as error:
            assert "must be in a layer" in str(error)


def _model(rng: random.Random) -> list[str]:
    heads = rng.choice((2, 4, 8))
    keys = {
        "model.layers": rng.randint(1, 4),
        "model.hidden": rng.choice((32, 48)),
        "model.head_dim": rng.choice((6, 8)),
        "model.ffn": rng.choice((48, 40, 64)),
        "model.heads": heads,
        "model.kv_heads": rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "data.seq_len": rng.choice((32, 64)),
        "train.global_batch": rng.choice((4, 8)),
    }
    latent, flags = rng.random() < 0.2, ["model.tied_embeddings", "data.mask_documents"]
    flags += [] if latent else ["model.qk_norm", "model.qkv_bias"]
    words = [f"{key}={value}" for key, value in keys.items()] + [f"{key}={_word(rng.random() < 0.5)}" for key in flags]
    if latent:
        words += ["model.latent.kv_rank=16", f"model.latent.q_rank={rng.choice(('null', '24'))}"]
        words += ["model.latent.nope=8", "model.latent.rope=4", "model.latent.value=8"]
    return words + (_experts(rng) if rng.random() < 0.6 else [])


def _experts(rng: random.Random) -> list[str]:
    groups = rng.choice((1, 1, 2, 4))
    keys = {
        "experts": 8,
        "top_k": rng.choice((1, 2, 4)),
        "ffn": rng.choice((16, 24)),
        "shared": rng.choice((0, 0, 1, 2)),
        "first_dense": rng.choice((0, 0, 1)),
        "every": rng.choice((1, 1, 2)),
        "score": rng.choice(("softmax", "sigmoid")),
        "groups": groups,
        "top_groups": rng.choice([n for n in (2, 4) if n <= groups] or [1]),
        "scale": rng.choice((1.0, 2.5)),
        "normalise": _word(rng.random() < 0.5),
        "aux_loss": rng.choice(("sequence", "sequence", "none")),
        "aux_coef": 0.01,
        "z_coef": rng.choice((0, 0.001)),
        "bias_rate": rng.choice((0, 0.001)),
    }
    words = [f"model.moe.{key}={value}" for key, value in keys.items()]
    return [*words, f"model.mtp.depth={rng.choice((0, 0, 0, 1))}", "metrics.routing=true"]


def _layout(rng: random.Random, ranks: int, layers: int, experts: bool) -> dict[str, Any]:
    axes = dict.fromkeys(ORDER, 1)
    while ranks > 1:
        axes[rng.choice(ORDER)] *= 2
        ranks //= 2
    schedule, stage = rng.choice(NAMES), axes["dp"] * axes["cp"] * axes["tp"]
    vpp = 2 if schedule == "interleaved" or schedule in V_SHAPED else 1
    ends = sorted(rng.randint(0, layers) for _ in range(axes["pp"] * vpp - 1))
    stages = tuple(end - begin for begin, end in pairwise([0, *ends, layers]))
    return {
        **axes,
        "schedule": schedule,
        "vpp": vpp,
        "stages": rng.choice((None, None, stages)),
        "sequence_parallel": rng.random() < 0.5,
        "cp_method": rng.choice(("ring", "ulysses", "hybrid")),
        "cp_ulysses": rng.choice((1, 2, 4)),
        "zero": rng.randint(0, 3),
        "zero_group": rng.choice((None, 2)),
        "recompute": rng.choice(("none", "selective", "full", (0,))),
        "micro_batch": rng.choice((1, 1, 2, 4)),
        "order": tuple(rng.sample(ORDER, len(ORDER))),
        "bucket_mib": rng.choice((0, 0.02, 64)),
        "prefetch": rng.random() < 0.5,
        "early_receive": rng.random() < 0.5,
        "ep": rng.choice([n for n in (1, 2, 2, 4, 4) if stage % n == 0]) if experts else 1,
        "etp": rng.choice((1, 1, 2)) if experts else 1,
        "dispatch": rng.choice(("auto", "flat", "two_level")),
        "outer_groups": rng.choice((None, 2, 4)),
    }


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower()


@pytest.fixture(scope="module")
def entries(busway, request):
    seed, count = request.config.getoption("--seed", 1), request.config.getoption("--count", 1)
    return [draw(seed, number, str(busway.recipe)) for number in range(count)]


@pytest.fixture(scope="module")
def runs(busway, entries):
    steps = (f"train.steps={STEPS}", f"train.eval_every={STEPS}", "train.eval_batches=1", "train.precision=fp64")
    return run_all(busway, entries, "random", *steps)


@pytest.mark.parametrize("other", [2, 3])
def test_a_seed_draws_a_legal_layout_and_draws_it_again(small_recipe, other):
    entry = draw(other, 0, str(small_recipe))
    assert entry == draw(other, 0, str(small_recipe)) != draw(other, 1, str(small_recipe))
    layout = compose_recipe(str(small_recipe), [*MODEL, *entry.model, *entry.layout]).recipe.parallel_layout
    assert layout.world_size == entry.ranks


@pytest.mark.layouts
def test_a_drawn_layout_trains_the_model_of_one_rank(runs, entries, number):
    entry = entries[number]
    print(f"{entry.name}: {entry.ranks} ranks, {' '.join(entry.model)} {' '.join(entry.layout)}")
    run = runs[entry.name]
    assert beyond(difference(runs[" ".join(entry.model)], run)) == {}
    assert run.summary["traffic"] == predicted(run)
