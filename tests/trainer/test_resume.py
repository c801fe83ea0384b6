"""One curve across stops, crashes, signals and damage."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from models import huggingface
from models.checks import ConfigError
from parallel.collectives.local import LocalWorld
from trainer import checkpoint, run_directory
from trainer.compose import compose_recipe
from trainer.errors import InputError
from trainer.weight_files import config_of_json

STEPS = 6


EXPERTS = (
    "layout.ep=2", "model.moe.experts=2", "model.moe.top_k=2", "model.moe.ffn=24", "model.moe.score=sigmoid"
)  # fmt: skip
"""Where nothing compares, no rank may get more copies than it has room for."""


@pytest.fixture(scope="module")
def straight(busway):
    return busway.train("straight", "checkpoint.every=1", "checkpoint.keep=2", "train.eval_every=4")


def test_checkpoints_come_at_the_interval_and_the_newest_stay(straight):
    assert straight.checkpoints == ["step-00000005", "step-00000006"]
    assert checkpoint.load(straight.newest).step == STEPS


def test_stopped_and_resumed_is_bit_identical_to_straight(busway, straight):
    half = busway.train("halves", "train.stop_at=3")
    assert half.checkpoints == ["step-00000003"] and half.summary["restarts"] == 0
    whole = busway.train("halves", "checkpoint.resume=auto")
    assert "training starts at step 4" in whole.stdout
    assert whole.losses == straight.losses
    for kind in ("model", "first", "second"):
        ours, theirs = (run.newest / f"{kind}.safetensors" for run in (whole, straight))
        assert ours.read_bytes() == theirs.read_bytes()
    assert [value for _, value in whole.curves()["loss"]] == [np.float32(loss) for loss in straight.losses]
    assert (whole.summary["status"], whole.summary["restarts"], whole.summary["steps"]) == ("done", 1, STEPS)
    assert whole.summary["tokens"] == straight.summary["tokens"]


def test_a_damaged_checkpoint_is_passed_over_and_what_it_held_is_done_again(busway, straight):
    """Rows, curves and checkpoints past the resumed step are superseded."""
    shutil.copytree(straight.path, busway.out / "damaged")
    weights = busway.out / "damaged" / "checkpoints" / "step-00000006" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with (busway.out / "damaged" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # a row that a crash cut short
    run = busway.train("damaged", "checkpoint.resume=auto", "train.eval_every=4")
    (said,) = [line for line in run.stdout.splitlines() if "passing over" in line]
    assert "step-00000006/model.safetensors does not match its checksum" in said
    assert run.losses == straight.losses and run.evaluations == straight.evaluations[:1] + run.evaluations[1:]
    steps = list(range(1, STEPS + 1))
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 4, 5, 5, 6, 6]
    assert [(line["step"], line["event"]) for line in run.lines if "event" in line] == [(5, "resumed")]
    for folder, factor in (("", 1), ("samples", 4), ("tokens", 128)):
        for tag, curve in run.curves(folder).items():
            expected = [4, 6] if tag.startswith("eval_loss") else steps
            assert [x for x, _ in curve] == [factor * step for step in expected], tag
    assert run.checkpoints == ["step-00000005", "step-00000006"]
    assert checkpoint.load(run.newest).step == STEPS


def test_resuming_a_finished_run_leaves_its_results(busway, straight):
    shutil.copytree(straight.path, busway.out / "finished")
    run = busway.train("finished", "checkpoint.resume=auto", "train.eval_every=4")
    assert run.losses == straight.losses
    assert run.summary == {**straight.summary, "restarts": 1}


@pytest.mark.slow
def test_an_older_checkpoint_can_begin_another_run(busway, straight):
    """Under another layout too: checkpoints do not know it."""
    older = straight.path / "checkpoints" / "step-00000005"
    run = busway.train("branch", f"checkpoint.resume={older}", "layout.dp=2")
    assert [row["step"] for row in run.rows] == [6]
    assert run.losses[0] == pytest.approx(straight.losses[-1], rel=1e-6)
    assert run.summary["restarts"] == 1 and run.summary["world_size"] == 2


def test_a_checkpoint_converts_to_hugging_faces_format(busway, straight):
    out = busway.folder / "theirs"
    busway("convert", "to-hf", straight.newest, out)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == 300
    config, model = config_of_json(out / "config.json"), compose_recipe(str(busway.recipe), []).recipe.model
    assert config == replace(model, head_dim=model.head_width)
    ours, theirs = load_file(straight.newest / "model.safetensors"), load_file(out / "model.safetensors")
    assert huggingface.names(config).keys() == ours.keys()
    assert {name: value.tobytes() for name, value in theirs.items()} == {
        name: ours[our_name].tobytes() for our_name, name in huggingface.names(config).items()
    }


def test_a_checkpoints_weights_can_begin_another_run(busway, straight):
    """At a learning rate too small to move a weight, so that what was read is what is saved again."""
    overrides = (f"checkpoint.init_from={straight.newest}", "optimizer.lr=1e-30", "train.steps=1", "train.eval_every=1")
    run = busway.train("fine_tuned", *overrides)
    assert run.losses[0] < straight.losses[0]  # of the same samples
    assert run.evaluations[0]["eval_loss"] == straight.evaluations[-1]["eval_loss"]
    weights = [path / "model.safetensors" for path in (run.newest, straight.newest)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def wait_for_rows(busway, name, count, process):
    """Until `count` rows are there."""
    metrics = busway.out / name / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_signal_saves_and_the_run_goes_on_as_one_curve(busway, straight):
    forever = ("train.steps=1000000", "layout.dp=2", "layout.micro_batch=2")
    process = busway.start("train", *busway.words("signalled", *forever))
    wait_for_rows(busway, "signalled", 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    assert err == "stopping after the current step; once more stops at once, without saving\n"
    run = busway.run("signalled")
    step = run.rows[-1]["step"]
    assert f"stopped after step {step}" in out
    assert run.checkpoints == [f"step-{step:08d}"]
    assert (run.summary["status"], run.summary["exit_code"], run.summary["steps"]) == ("stopped", 75, step)
    run = busway.train("signalled", *forever, "checkpoint.resume=auto", f"train.stop_at={step + 3}")
    assert [row["step"] for row in run.rows] == list(range(1, step + 4))
    assert [x for x, _ in run.curves()["loss"]] == list(range(1, step + 4))
    assert (run.summary["status"], run.summary["exit_code"], run.summary["restarts"]) == ("done", 0, 1)
    # Two ranks of the same global batch: the first steps are those of one rank.
    assert run.losses[:3] == pytest.approx(straight.losses[:3], rel=1e-5)


def test_ctrl_c_stops_a_run_of_one_rank_too(busway):
    process = busway.start("train", *busway.words("interrupted", "train.steps=1000000"))
    wait_for_rows(busway, "interrupted", 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    assert "stopped after step" in out
    assert err == "stopping after the current step; once more stops at once, without saving\n"
    (saved,) = (busway.out / "interrupted" / "checkpoints").iterdir()
    assert f"stopped after step {checkpoint.load(saved).step}," in out


def test_a_killed_rank_ends_the_run_and_is_named(busway):
    process = busway.start("train", *busway.words("killed", "train.steps=1000000", "layout.dp=2"))
    wait_for_rows(busway, "killed", 2, process)
    run = busway.out / "killed"
    victim = re.search(r"process (\d+)", (run / "logs" / "rank-0001.log").read_text())
    psutil.Process(int(victim[1])).kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, (out, err)
    assert err.startswith("busway: rank 1: was killed by signal 9 (SIGKILL)") and len(err.splitlines()) <= 6
    left = [p for p in psutil.process_iter(["cmdline"]) if str(run.resolve()) in (p.info["cmdline"] or [])]
    assert left == []
    summary = busway.run("killed").summary
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    assert summary["steps"] == busway.run("killed").rows[-1]["step"]


def test_a_second_signal_ends_a_run_at_once_and_the_summary_says_so(busway):
    process = busway.start("train", *busway.words("hurried", "train.steps=1000000", "checkpoint.every=1000000"))
    wait_for_rows(busway, "hurried", 1, process)
    os.kill(process.pid, signal.SIGSTOP)  # so that both have come when it next looks
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("stopped at once; what was not saved is lost\n")
    summary = busway.run("hurried").summary
    assert (summary["status"], summary["exit_code"]) == ("stopped_at_once", 130)


@pytest.mark.parametrize("model", [(), pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=["dense", "experts"])
def test_a_loss_that_is_not_finite_stops_both_ranks_and_spares_the_last_good_checkpoint(busway, model):
    overrides = ("layout.dp=2", "optimizer.lr=1e30", "checkpoint.every=1")
    run = busway.train(f"wild-{len(model)}", *overrides, *model, code=16)
    step = run.rows[-1]["step"] + 1
    assert re.fullmatch(
        rf"busway: rank \d: step {step}: the loss is \S+ and the gradient norm is \S+; .+\n", run.stderr
    )
    assert "smaller optimizer.lr" in run.stderr
    assert run.lines[-1]["step"] == step and run.lines[-1]["event"] == "not_finite"
    assert (run.summary["status"], run.summary["exit_code"], run.summary["steps"]) == ("not_finite", 16, step - 1)
    assert checkpoint.load(run.newest).step == step - 1
    assert [x for x, _ in run.curves()["loss"]] == [row["step"] for row in run.rows]
    assert f"step {step}  not finite" in run.stdout


def test_a_disk_that_fills_up_is_a_machine_error_and_the_earlier_checkpoint_stands(busway, mounted):
    with mounted("size=1200k") as disk:
        overrides = ("layout.dp=2", "checkpoint.every=1", "checkpoint.keep=100", f"train.out={disk}")
        _, err = busway("train", *busway.words("full", *overrides), code=3)
        (line,) = err.splitlines()
        assert line.startswith("busway: rank 0: cannot write ") and "No space left on device" in line
        assert "free some space or set train.out to another disk" in line
        folders = sorted(Path(disk, "full", "checkpoints").iterdir())
        assert folders and checkpoint.load(folders[-1]).step == len(folders)


@pytest.fixture(scope="module")
def began(busway, straight):
    """`began(override)`: what a resume of the straight run with it says; None: it may go on."""

    def resume(*overrides):
        words = busway.words("straight", "checkpoint.resume=auto", *overrides)
        recipe = compose_recipe(words[0], words[1:]).recipe
        try:
            run_directory.create(recipe, "small")
        except ConfigError as error:
            return str(error)
        return None

    return resume


@pytest.mark.parametrize(
    "override",
    ["train.seed=1", "model.layers=2", "data.seq_len=16", "optimizer.lr=0.001", "lr.warmup=2", "train.global_batch=8",
     "train.precision=bf16", "data.mask_documents=true"],
)  # fmt: skip
def test_a_recipe_that_would_change_the_numbers_may_not_go_on(began, override):
    key, _, value = override.partition("=")
    message = began(override)
    assert f"holds another recipe's run: {key} was " in message and value.lower() in message.lower()
    assert message.endswith("choose another train.name, or resume with the recipe that began it")


@pytest.mark.parametrize(
    "override",
    ["train.steps=9", "train.stop_at=2", "train.eval_every=1", "train.eval_batches=1", "train.log_every=2",
     "train.kernels=plain", "layout.dp=2", "layout.micro_batch=1", "topology=cloudmatrix384", "launcher.kind=mpi",
     "checkpoint.every=3", "checkpoint.keep=1", "metrics.tags=megatron"],
)  # fmt: skip
def test_keys_that_do_not_change_the_numbers_may_change(began, override):
    assert began(override) is None


def test_a_folder_without_a_recipe_is_no_run(busway, straight):
    (busway.out / "other").mkdir()
    words = busway.words("other", "checkpoint.resume=auto")
    with pytest.raises(ConfigError, match="is not a run directory, as it holds no recipe.yaml"):
        run_directory.create(compose_recipe(words[0], words[1:]).recipe, "small")


def save(folder, step, keep=2):
    tensors = {"weights": lambda: {"w": np.full(3, step, np.float32)}}
    state = {"step": step, "samples": 0, "callbacks": {}}
    return checkpoint.save(folder, LocalWorld(), tensors, {"model.yaml": "layers: 2"}, state, keep)


def test_going_back_to_a_step_removes_the_checkpoints_past_it(tmp_path):
    """A run that went back to step 2 must not later resume from steps that it left behind."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    checkpoint.drop_after(tmp_path, 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    (save(tmp_path, 1) / "model.safetensors").write_bytes(b"")
    said = []
    with pytest.raises(InputError, match="holds no whole checkpoint; name one with checkpoint.resume=PATH"):
        checkpoint.newest(tmp_path, said.append)
    assert len(said) == 1


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.unfinished")
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1
    with pytest.raises(InputError, match="is no checkpoint, as it has no manifest.json"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.yaml", "state.json", "manifest.json"])
def test_any_damage_is_found_and_named(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(data[:-2] if damage == "shorter" else data[:-9] + b"?" + data[-8:])
    with pytest.raises(InputError) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "; " in str(error.value)
    said = []
    assert checkpoint.newest(tmp_path, said.append).step == 1
    assert len(said) == 1 and str(path) in said[0]
