"""Whole runs: what a user sees, and what the run directory holds afterwards."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from models.checks import ConfigError
from models.config import FLOPS_CONVENTION
from parallel.layout import Layout
from trainer import cli, launch, machine, run_directory
from trainer.compose import compose_recipe
from trainer.data.indexed import IndexedWriter
from trainer.errors import MachineError
from trainer.metrics import ROW
from trainer.recipe import resolved
from trainer.report import KEY, document, read

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "huggingface"
SUMMARY = """status exit_code steps final_loss eval_loss tokens tokens_per_s first_step_s step_s mfu mfu_convention
flops_per_token parameters active_parameters memory_gib memory_kind world_size layout placement traffic restarts
versions"""
"""The keys that the design promises."""
STEPS = 8


@pytest.fixture(scope="module")
def run(busway):
    """Two ranks, eight steps."""
    overrides = (f"train.steps={STEPS}", "layout.dp=2", "train.eval_every=5", "train.eval_batches=2")
    return busway.train("two", *overrides, "optimizer.lr=1e-2", "checkpoint.every=4")


def test_two_ranks_learn(run):
    assert np.mean(run.losses[-2:]) < 0.97 * np.mean(run.losses[:2])
    first, last = run.evaluations
    assert last["eval_loss"] < first["eval_loss"]
    assert run.losses[0] == pytest.approx(np.log(300), rel=0.02)  # what a model that knows nothing has


def test_the_run_directory_holds_what_the_design_says(run):
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints", "logs", "metrics.jsonl", "plan.yaml", "recipe.yaml", "summary.json", "tb",
    ]  # fmt: skip
    assert run.checkpoints == ["step-00000004", "step-00000008"]
    assert {"rank-0000.log", "rank-0001.log"} <= {path.name for path in (run.path / "logs").iterdir()}


def test_the_saved_recipe_is_the_whole_one(run, busway):
    saved = compose_recipe(str(run.path / "recipe.yaml"), [])
    assert resolved(saved.recipe) == (run.path / "recipe.yaml").read_text()
    assert saved.recipe.optimizer.lr == 1e-2 and saved.recipe.layout.dp == 2
    typed = compose_recipe(str(busway.recipe), []).recipe
    assert saved.recipe.model == typed.model and saved.recipe.data == typed.data


def test_the_plan_says_layout_topology_and_placement(run):
    plan = yaml.safe_load((run.path / "plan.yaml").read_text())
    assert set(plan) == {"layout", "topology", "placement"}
    assert Layout(**plan["layout"]) == Layout(dp=2, micro_batch=2)
    assert (plan["topology"], plan["placement"]) == ("laptop", [0, 1])


def test_every_row_has_the_keys_of_the_design_and_counts_what_was_read(run):
    assert [set(row) for row in run.rows] == [set(ROW)] * STEPS
    assert [row["step"] for row in run.rows] == list(range(1, STEPS + 1))
    assert [row["samples"] for row in run.rows] == [4 * step for step in range(1, STEPS + 1)]
    for row in run.rows:
        assert row["tokens"] == row["samples"] * 32
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / row["step_s"])
        assert row["tokens_per_s_per_rank"] == pytest.approx(row["tokens_per_s"] / 2)
        assert 0 <= row["data_wait_s"] <= row["step_s"]
        assert row["mfu"] is None and row["memory_gib"] > 0 and row["lr"] == 1e-2


def test_evaluations_come_at_the_interval_and_at_the_end(run):
    assert [set(line) for line in run.evaluations] == [{"step", "eval_loss"}] * 2
    assert [line["step"] for line in run.evaluations] == [5, STEPS]


def test_the_summary_has_the_keys_of_the_design(run):
    summary = run.summary
    assert list(summary) == SUMMARY.split()
    assert (summary["status"], summary["exit_code"], summary["steps"], summary["restarts"]) == ("done", 0, STEPS, 0)
    assert summary["final_loss"] == run.losses[-1] and summary["eval_loss"] == run.evaluations[-1]["eval_loss"]
    assert summary["tokens"] == STEPS * 4 * 32 and summary["world_size"] == 2
    assert summary["tokens_per_s"] == pytest.approx(4 * 32 / summary["step_s"])
    assert summary["step_s"] == pytest.approx(np.median([row["step_s"] for row in run.rows[1:]]))
    assert summary["first_step_s"] == pytest.approx(run.rows[0]["step_s"])
    assert (summary["mfu"], summary["mfu_convention"]) == (None, FLOPS_CONVENTION)
    assert (summary["memory_kind"], summary["memory_gib"]) == ("peak RSS", run.rows[-1]["memory_gib"])
    assert summary["layout"]["dp"] == 2 and summary["placement"] == [0, 1]
    assert summary["versions"]["mindspore"] == version("mindspore")


def test_parameters_and_flops_follow_from_the_shapes(run):
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48  # q, o; k, v; gate, up, down
    assert run.summary["parameters"] == run.summary["active_parameters"] == 2 * 300 * 32 + layer + 3 * 32
    assert sum(value.size for value in run.weights().values()) == run.summary["parameters"]
    assert run.summary["flops_per_token"] == 6 * (layer + 300 * 32) + 6 * 32 * 32  # 6 s heads head_dim for half of s^2


def test_the_traffic_of_a_step_is_the_formula(run):
    (row,) = run.summary["traffic"]
    payload = (run.summary["parameters"] + 3) * 4  # loss sum, valid tokens and the wish to stop ride along
    assert row == {
        "axis": "dp", "collective": "all_reduce", "dtype": "float32", "level": "machine",
        "payload_bytes": payload, "wire_bytes": payload, "calls": 1,
    }  # fmt: skip
    assert document(read(run.path))["traffic"] == {
        "equal": True,
        "rows": [{key: row[key] for key in KEY} | {"payload_bytes": [payload] * 2, "wire_bytes": [payload] * 2}],
        "wire_bytes_by_level": {"machine": [payload] * 2},
    }


def test_tensorboard_reads_the_same_curves(run):
    curves = run.curves()
    assert set(curves) == {*ROW[1:], "eval_loss"} - {"mfu"}
    for key, curve in curves.items():
        lines = run.evaluations if key == "eval_loss" else run.rows
        assert [x for x, _ in curve] == [line["step"] for line in lines]
        assert [value for _, value in curve] == [np.float32(line[key]) for line in lines]
    for axis in ("tokens", "samples"):
        by_axis = run.curves(axis)
        assert by_axis[f"loss_by_{axis}"] == [(row[axis], np.float32(row["loss"])) for row in run.rows]
        assert [x for x, _ in by_axis[f"eval_loss_by_{axis}"]] == [run.rows[4][axis], run.rows[7][axis]]


def test_the_console_shows_a_banner_and_a_line_a_step(run):
    assert run.stderr == ""
    banner, _, rest = run.stdout.partition("training starts at step 1\n")
    for text in (
        f"busway {version('busway')}, mindspore {version('mindspore')} on CPU",
        "layout: pp 1 x dp 2 x cp 1 x tp 1 = 2 ranks on laptop; dp in one machine; collectives: mpi",
        "model: 26,976 parameters",
        FLOPS_CONVENTION,
        "kernels: ",
        "tokens a step: 128 = 4 sequences x 32; micro-batches a rank: 1",
        "memory after the model is built: ",
    ):
        assert text in banner
    lines = [line for line in rest.splitlines() if re.match(r"step +\d+/", line)]
    pattern = r"step (\d)/8  loss \d\.\d{4}  grad norm [\d.]+  lr 1.00e-02  [\d,]+ tokens/s \([\d,]+ a rank\)  MFU -  "
    matches = [re.match(pattern + r"memory [\d.]+ GiB  eta \d:\d\d:\d\d$", line) for line in lines]
    assert [int(match[1]) for match in matches] == list(range(1, STEPS + 1))
    assert f"step 5  held-out loss {run.evaluations[0]['eval_loss']:.4f}" in rest
    assert rest.splitlines()[-1] == "done after step 8; results are in runs/two"


def test_the_saved_recipe_starts_a_run_of_its_own(run, busway, tmp_path):
    """Whatever name it had, however it was resumed and launched: those are no part of what is trained."""
    once = ("train.name=mine", "checkpoint.resume=auto", "launcher.kind=none", f"train.out={tmp_path}")
    mine, _ = run_directory.create(compose_recipe(str(run.path / "recipe.yaml"), list(once)).recipe, "unused")
    again = compose_recipe(str(mine.recipe), [])
    path, new = run_directory.create(again.recipe, again.name)
    assert (mine.path.name, path.path.name, new) == ("mine", "mine-1", True)
    assert again.recipe.launcher.kind == "auto"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_reader_that_has_seen_enough_does_not_end_the_run(busway, ranks):
    process = busway.start("train", *busway.words(f"unread-{ranks}", f"layout.dp={ranks}"))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read() == ""
    assert busway.run(f"unread-{ranks}").summary["steps"] == 6


def test_an_error_of_rank_0_ends_every_rank_of_the_users_own_mpiexec(busway, run):
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    refused = busway.train("two", "launcher.kind=none", code=2, above=(mpiexec, "-n", "2"))
    (line,) = (line for line in refused.stderr.splitlines() if line.startswith("busway: "))
    assert "exists already; set checkpoint.resume=auto" in line


def test_ranks_of_the_users_own_mpiexec_give_the_same_run(busway, run):
    """Neither dp nor ranks given: the world comes from the launcher. Gradients add up over two micro-batches."""
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    overrides = ("launcher.kind=none", f"train.steps={STEPS}", "train.stop_at=3", "layout.micro_batch=1")
    own = busway.train("own", *overrides, "optimizer.lr=1e-2", above=(mpiexec, "-n", "2"))
    assert own.summary["world_size"] == 2 and own.summary["steps"] == 3
    assert own.losses == pytest.approx(run.losses[:3], rel=1e-5)
    assert own.stdout.count("training starts") == 1
    assert (own.path / "logs" / "rank-0001.log").is_file()


@pytest.fixture(scope="module")
def precisions(busway):
    """(precision, kernels) -> run; without a launcher all run in one process, which imports MindSpore once."""
    common = ("launcher.kind=none", "layout.micro_batch=4", "train.steps=3", "optimizer.lr=1e-3")
    runs = busway.sweep("precision", *common, "train.precision=fp32,fp64,bf16")
    (plain,) = busway.sweep("plain", *common, "train.kernels=plain")
    return dict(zip(("fp32", "fp64", "bf16", "plain"), [*runs, plain], strict=True))


def test_fp32_follows_fp64_to_its_own_precision(precisions):
    for key in ("loss", "grad_norm"):
        exact = [row[key] for row in precisions["fp64"].rows]
        assert [row[key] for row in precisions["fp32"].rows] == pytest.approx(exact, rel=1e-5)
    assert {value.dtype for value in precisions["fp64"].weights().values()} == {np.dtype(np.float64)}


def test_bf16_follows_fp64_to_its_own_precision_on_fp32_master_weights(precisions):
    exact, rounded = ([row["loss"] for row in precisions[name].rows] for name in ("fp64", "bf16"))
    assert rounded == pytest.approx(exact, rel=2e-3)
    assert rounded != pytest.approx(exact, rel=1e-7)  # it does round
    assert {value.dtype for value in precisions["bf16"].weights().values()} == {np.dtype(np.float32)}


def test_plain_kernels_give_the_numbers_of_the_chosen_ones(precisions):
    for key in ("loss", "grad_norm"):
        chosen = [row[key] for row in precisions["fp32"].rows]
        assert [row[key] for row in precisions["plain"].rows] == pytest.approx(chosen, rel=1e-5)


@pytest.fixture(scope="module")
def reference_data(tmp_path_factory):
    """The fixture's first sequence as a dataset of one sample, and the loss that transformers' logits give on it."""
    numbers = load_file(FIXTURES / "llama.reference.safetensors")
    tokens = numbers["input_ids"][0]
    prefix = tmp_path_factory.mktemp("reference") / "data"
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add(tokens)
    logits = numbers["logits"][0, :-1].astype(np.float64)
    picked = logits[np.arange(len(logits)), tokens[1:]]
    return prefix, len(tokens) - 1, float(np.mean(np.log(np.exp(logits).sum(-1)) - picked))


def model_keys(folder):
    """The overrides that give the recipe the model of a converted folder."""
    model = yaml.safe_load((folder / "model.yaml").read_text())
    sections = {key: model.pop(key) for key, value in list(model.items()) if isinstance(value, dict)}
    flat = model | {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return [f"model.{key}={'null' if value is None else value}" for key, value in flat.items()]


def test_a_run_starts_from_converted_weights_and_from_hugging_faces_own(busway, reference_data):
    prefix, length, loss = reference_data
    ours = busway.folder / "ours"
    busway("convert", "from-hf", FIXTURES / "llama", ours)
    data = [f"data.sources=[{{path: {prefix}}}]", "data.tokenizer=null", f"data.seq_len={length}", "data.holdout=0"]
    runs = busway.sweep(
        "init", *model_keys(ours), *data, "launcher.kind=none", "train.steps=1", "train.global_batch=1",
        "layout.micro_batch=1", f"checkpoint.init_from=null,{ours},{FIXTURES / 'llama'}",
    )  # fmt: skip
    at_random, converted, theirs = (run.losses[0] for run in runs)
    assert converted == theirs == pytest.approx(loss, rel=1e-5)
    assert at_random != pytest.approx(loss, rel=1e-2)


@pytest.mark.slow
def test_a_bias_that_the_weights_have_none_of_begins_at_zero(busway, tmp_path):
    theirs = FIXTURES / "qwen3_moe"
    busway("convert", "from-hf", theirs, busway.folder / "moe")
    with IndexedWriter(tmp_path / "data", np.int32) as writer:
        writer.add(load_file(FIXTURES / "qwen3_moe.reference.safetensors")["input_ids"][0])
    data = [f"data.sources=[{{path: {tmp_path / 'data'}}}]", "data.tokenizer=null", "data.seq_len=32", "data.holdout=0"]
    words = [word for word in model_keys(busway.folder / "moe") if not word.startswith("model.moe.bias_rate")]
    runs = busway.sweep(
        "biased", *words, *data, "launcher.kind=none", "train.steps=1", "train.global_batch=1", "layout.micro_batch=1",
        "optimizer.lr=1e-30", f"checkpoint.init_from={theirs}", "model.moe.bias_rate=0,0.125",
    )  # fmt: skip
    assert runs[0].losses == runs[1].losses
    biases = {name: value for name, value in runs[1].weights().items() if name.endswith("router.bias")}
    assert biases and all(np.isin(np.abs(value), (0, 0.125)).all() and value.any() for value in biases.values())


@pytest.mark.parametrize("learnt", [0, pytest.param(2_700, marks=pytest.mark.slow)])
def test_data_without_labels_ends_the_run_with_the_remedy(busway, tmp_path, learnt):
    """One document of 3,000 tokens, of which the last tenth is held out and the first `learnt` have labels."""
    places = np.arange(3_000)
    for name, dtype, values in (("text", np.uint16, places % 300), ("text.loss_mask", np.uint8, places < learnt)):
        with IndexedWriter(tmp_path / name, dtype) as writer:
            writer.add(values)
    keys = (f"data.sources=[{{path: {tmp_path / 'text'}}}]", "data.tokenizer=null", "train.steps=3")
    run = busway.train(f"unlabelled-{learnt}", *keys, "train.eval_every=3", "layout.dp=2", code=2)
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("busway: ")]
    remedy = "or set train.eval_every=0" if learnt else "where prompts take no loss"
    assert "has a label; see to data.sources, " in line and remedy in line
    assert len(run.rows) == (3 if learnt else 0)


def test_the_nodes_of_a_run_share_the_directory_that_the_first_makes(small_recipe, cache, tmp_path, monkeypatch):
    """As on Ascend, where each node runs one `busway train`; the ranks are not started here."""
    started = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(machine, "device", lambda: "Ascend")
    monkeypatch.setattr(launch, "supervise", lambda start: started.append(start) or 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nodes = ("launcher.nodes=2", "launcher.master_addr=127.0.0.1", f"launcher.master_port={port}")
    words = ["train", str(small_recipe), f"train.out={tmp_path}", "train.name=shared", "layout.dp=2", *nodes]
    for node in (0, 1):
        assert cli.main([*words, f"launcher.node_rank={node}"]) == 0
    assert [list(start.ranks) for start in started] == [[0], [1]]
    assert {start.run_directory for start in started} == {tmp_path / "shared"}


def test_two_runs_of_one_recipe_share_no_directory(small_recipe, tmp_path):
    recipe = compose_recipe(str(small_recipe), [f"train.out={tmp_path}"]).recipe
    for number in (1, 2):
        run, new = run_directory.create(recipe, "small")
        assert run.path == tmp_path / f"small-{number}" and new
    again = compose_recipe(str(small_recipe), [f"train.out={tmp_path}", "checkpoint.resume=auto"]).recipe
    os.utime(tmp_path / "small-1" / "recipe.yaml")  # the one that was started last, whatever its number
    run, new = run_directory.create(again, "small")
    assert run.path == tmp_path / "small-1" and not new


def test_runs_that_start_at_once_share_no_directory(small_recipe, tmp_path):
    recipe = compose_recipe(str(small_recipe), [f"train.out={tmp_path}"]).recipe
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: run_directory.create(recipe, "small")[0].path, range(16)))
    assert sorted(runs) == sorted(tmp_path / f"small-{number}" for number in range(1, 17))


def test_other_nodes_wait_until_the_first_has_made_the_directory_for_this_recipe(small_recipe, tmp_path):
    def recipe(*overrides):
        return compose_recipe(str(small_recipe), [f"train.out={tmp_path}", "train.name=shared", *overrides]).recipe

    first, second = recipe("launcher.node_rank=0"), recipe("launcher.node_rank=1")
    run = run_directory.named(second)
    with pytest.raises(MachineError, match=f"node 0 has not made {run.path}.*folder that all nodes share"):
        run.wait_for(second, seconds=0)
    waiting = threading.Thread(target=run.wait_for, args=(second, 60))
    waiting.start()
    run_directory.create(first, "small")
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    with pytest.raises(ConfigError, match="exists already"):
        run_directory.create(first, "small")
    with pytest.raises(MachineError, match="same recipe"):
        run.wait_for(recipe("train.steps=7"), seconds=0)
