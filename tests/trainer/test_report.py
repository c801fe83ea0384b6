"""`busway report`, as typed, on run directories whose figures are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from models.checks import ConfigError
from parallel.planner import Plan, evaluate
from parallel.planner.constants import constants
from trainer import cli
from trainer.compose import compose_recipe
from trainer.planning import problem_of_layout, with_layout
from trainer.recipe import resolved

PARAMETERS = 2 * 300 * 32 + 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32
BYTES = 4 * (PARAMETERS + 3)
"""A ring's all-reduce over two ranks sends what it is given: gradients, loss sum, valid tokens, the wish to stop."""
ROW = {
    "axis": "dp", "collective": "all_reduce", "dtype": "float32", "level": "machine", "payload_bytes": BYTES,
    "wire_bytes": BYTES, "calls": 1,
}  # fmt: skip
STEP_S, TOKENS = 0.5, 4 * 32
EXPERTS = ("layout.ep=2", "model.moe.experts=4", "model.moe.top_k=1", "model.moe.ffn=24", "metrics.routing=true")


@pytest.fixture
def fast(tmp_path):
    """A file of the machine of two ranks whose speed is known."""
    rank = {"name": "core", "device": "ascend910c", "memory_gib": 8, "memory_bandwidth": 10}
    source = {
        "name": "fast",
        "rank": rank | {"peak_tflops": {"bfloat16": 0.1, "float32": 0.1}},
        "planes": {"memory": {"injection": 5}},
        "levels": [{"name": "machine", "members": 2, "bandwidth": 5, "latency": 2, "plane": "memory"}],
    }
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump(source))
    return f"topology={tmp_path / 'fast.yaml'}"


@pytest.fixture
def finished(tmp_path, small_recipe):
    """`finished(*overrides, **summary)`: the directory of a run of two ranks."""

    def make(*overrides, recipe=None, **summary):
        recipe = recipe or compose_recipe(str(small_recipe), ["layout.dp=2", "layout.micro_batch=2", *overrides]).recipe
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(resolved(recipe))
        figures = {"step_s": STEP_S, "tokens_per_s": TOKENS / STEP_S, "mfu": None, "memory_gib": 0.75}
        kind = {"status": "done", "memory_kind": "peak RSS", "world_size": 2, "traffic": [ROW]}
        (folder / "summary.json").write_text(json.dumps(figures | kind | summary))
        return folder

    return make


@pytest.fixture
def report(capsys):
    """The report as JSON."""

    def run(*words):
        assert cli.main(["report", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def planned(small_recipe, *overrides):
    """A recipe of two ranks that came from a plan, and what the planner predicts of it."""
    composed = compose_recipe(str(small_recipe), ["layout.dp=2", "layout.micro_batch=2", *overrides])
    problem = problem_of_layout(composed.recipe)
    plan = Plan(problem, evaluate(problem, [composed.recipe.parallel_layout])[0])
    return with_layout(composed, plan).recipe, plan.prediction()


def test_bytes_that_the_formula_gives_are_equal_where_the_speed_is_unknown(finished, report):
    found = report(finished())
    assert found["traffic"]["equal"] and found["traffic"]["rows"][0]["payload_bytes"] == [BYTES, BYTES]
    assert found["traffic"]["wire_bytes_by_level"] == {"machine": [BYTES, BYTES]}
    assert [*found["predicted"]] == ["memory_gib"] and "topology laptop: rank.device is not known" in found["source"]
    assert found["ratio"]["memory_gib"] == 0.75 / found["predicted"]["memory_gib"]


def test_a_byte_that_differs_is_shown_on_both_sides(finished, capsys):
    assert cli.main(["report", str(finished(traffic=[ROW | {"payload_bytes": BYTES + 1}]))]) == 0
    text = capsys.readouterr().out
    assert f"{BYTES + 1:,}" in text and f"{BYTES:,}" in text and "NOT equal to the prediction" in text


def test_emulated_bf16_moves_float32(finished, report):
    assert report(finished("train.precision=bf16"))["traffic"]["equal"]


def test_without_a_stored_prediction_the_planner_says_what_explain_says(finished, report, fast, capsys):
    run = finished(fast)
    assert cli.main(["explain", str(run / "recipe.yaml"), "train.precision=fp32", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    found = report(run)
    assert found["predicted"] == {key: expected[key] for key in ("step_s", "tokens_per_s", "mfu", "memory_gib")}
    assert found["ratio"]["step_s"] == pytest.approx(STEP_S / expected["step_s"])
    assert found["source"].startswith("constants ascend910c/") and found["traffic"]["equal"]


def test_a_prediction_that_came_with_the_recipe_counts_unless_the_layout_is_another(
    finished, report, fast, small_recipe
):
    recipe, expected = planned(small_recipe, fast, "train.precision=fp32")
    recipe.plan.prediction["step_s"] *= 2  # as of other constants
    recipe.plan.prediction["tokens_per_s"] /= 2
    run = finished(recipe=recipe)
    found = report(run)
    assert found["predicted"]["step_s"] == 2 * expected["step_s"] and "came with the recipe" in found["source"]
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    content["layout"]["zero"] = 1
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert "constants" in report(run)["source"]


def test_a_refit_predicts_the_run_it_is_made_from(finished, fast, tmp_path, capsys):
    run, file = finished(fast), tmp_path / "fitted.yaml"
    assert cli.main(["report", str(run), "--refit", str(file)]) == 0
    capsys.readouterr()
    words = (f"topology.rank.device={file}", "train.precision=fp32")  # that of a run on CPU
    assert cli.main(["explain", str(run / "recipe.yaml"), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step_s"] == pytest.approx(STEP_S, rel=1e-4)
    assert cli.main(["explain", str(run / "recipe.yaml"), "train.precision=fp32", "--json"]) == 0
    assert found["memory_gib"] == pytest.approx(json.loads(capsys.readouterr().out)["memory_gib"], rel=1e-3)


def test_experts_are_counted_on_the_routing_of_the_first_step_since_the_start(finished, report):
    run = finished(*EXPERTS)
    in_turn = report(run)
    assert in_turn["routing"] == "in turn"
    (run / "routing").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 2, "event": "resumed"}\n')
    chosen = [np.zeros((1, 64, 1), int), np.zeros((1, 64, 1), int)]  # all go to the expert 0, on rank 0
    for rank, indices in enumerate(chosen):
        np.savez(run / "routing" / f"step-000003-rank-{rank:04}.npz", tokens=np.arange(64), **{"layer.0": indices})
    recorded = report(run)
    assert recorded["routing"] == "recorded"
    rows = [[r for r in found["traffic"]["rows"] if r["collective"] == "all_to_all_v"] for found in (recorded, in_turn)]
    # In turn half of a rank's 64 rows leave it, there and back, forward and backward; with a row go its expert and its
    # weight, and back the weight's gradient. Where all go to rank 0, rank 1 sends all of its own and takes none.
    assert [row["wire_bytes"][1] for (row,) in rows] == [64 * 4 * (2 * 32 + 2), 32 * 4 * (4 * 32 + 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is no run directory: it has no recipe.yaml"),
        ({"recipe.yaml": "a: 1"}, "is no run directory: it has no summary.json"),
        ({"recipe.yaml": "a: 1", "summary.json": "{"}, "is no summary of a run"),
        ({"recipe.yaml": "a: 1", "summary.json": "[]"}, "is no summary of a run"),
        ({"recipe.yaml": "a: 1", "summary.json": '{"status": "failed"}'}, "has not done a step (its status is failed)"),
        ({"recipe.yaml": "a: [", "summary.json": "{}"}, "is not YAML"),
    ],
)
def test_what_is_no_run_gives_one_line(tmp_path, capsys, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("known", "file", "step_s", "message"),
    [
        (True, "fitted.txt", STEP_S, "must end in .yaml"),
        (False, "fitted.yaml", STEP_S, "topology laptop: rank.device is not known"),
        (True, "fitted.yaml", 1e-9, "no speeds predict a step of 1e-09 s on fast"),
    ],
)
def test_a_refit_that_cannot_be_gives_one_line(finished, fast, tmp_path, capsys, known, file, step_s, message):
    run = finished(*[fast] * known, step_s=step_s)
    assert cli.main(["report", str(run), "--refit", str(tmp_path / file)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / file).exists()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("{folder}/other.yaml", "is no file of constants"),
        ("{folder}/none.yaml", "is no file of constants"),
        ("ascend910", "has no constants; did you mean 'ascend910"),
    ],
)
def test_a_device_without_constants_is_named(tmp_path, device, message):
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError) as error:
        constants(device.format(folder=tmp_path), "busway")
    assert message in str(error.value)
