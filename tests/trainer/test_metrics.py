"""What dashboards read: names, units and x axes of the curves, and how a row sums up the steps since the last."""

from __future__ import annotations

import numpy as np
import pytest

from models.config import ModelConfig
from models.shapes import ExpertsConfig, PredictionConfig
from trainer import metrics
from trainer.meter import Meter
from trainer.step import Outcome

PEAK_TFLOPS = 0.5
MODEL = ModelConfig(
    layers=2, hidden=8, ffn=8, heads=2, kv_heads=2, vocab=16, moe=ExpertsConfig(experts=2, ffn=8, z_coef=0.1),
    mtp=PredictionConfig(depth=1),
)  # fmt: skip
TOPOLOGY = f"""
name: bench
rank: {{name: core, memory_gib: 2, memory_bandwidth: null, peak_tflops: {{float32: {PEAK_TFLOPS}}}}}
planes: {{bus: {{injection: null}}}}
levels: [{{name: box, members: 8, bandwidth: null, latency: null, plane: bus}}]
"""
# Tag -> the key of the row and its factor, as each project writes them (TFLOP/s a rank: FLOPs a token / 1e12).
MEGATRON = {
    "lm loss": ("loss", 1),
    "learning-rate": ("lr", 1),
    "grad-norm": ("grad_norm", 1),
    "iteration-time": ("step_s", 1),
    "throughput": ("tokens_per_s_per_rank", "tflops"),
}
TORCHTITAN = {
    "loss_metrics/global_avg_loss": ("loss", 1),
    "grad_norm": ("grad_norm", 1),
    "throughput(tps)": ("tokens_per_s_per_rank", 1),
    "tflops": ("tokens_per_s_per_rank", "tflops"),
    "mfu(%)": ("mfu", 100),
    "time_metrics/end_to_end(s)": ("step_s", 1),
    "memory/max_reserved(GiB)": ("memory_gib", 1),
    "memory/max_reserved(%)": ("memory_gib", 100 / 2),
    "n_tokens_seen": ("tokens", 1),
}


@pytest.fixture(scope="module")
def runs(busway):
    """Runs of two ranks with Megatron-LM's and torchtitan's tags, a row every two steps, on a machine whose peak is
    known."""
    (busway.folder / "bench.yaml").write_text(TOPOLOGY)
    overrides = (f"topology={busway.folder}/bench.yaml", "train.steps=5", "train.log_every=2", "train.eval_every=3")
    return busway.sweep("tags", *overrides, "layout.dp=2", "metrics.tags=megatron,torchtitan")


def check_curves(run, curves, expected):
    for tag, (key, factor) in expected.items():
        factor = run.summary["flops_per_token"] / 1e12 if factor == "tflops" else factor
        assert [x for x, _ in curves[tag]] == [row["step"] for row in run.rows], tag
        assert [value for _, value in curves[tag]] == pytest.approx([row[key] * factor for row in run.rows]), tag


def test_rows_come_at_the_interval_and_at_the_end(runs):
    for run in runs:
        assert [row["step"] for row in run.rows] == [2, 4, 5]
        assert [row["samples"] for row in run.rows] == [8, 16, 20]
        assert [line["step"] for line in run.evaluations] == [3, 5]


def test_megatrons_tags_hold_megatrons_values(runs):
    run, curves = runs[0], runs[0].curves()
    check_curves(run, curves, MEGATRON)
    assert curves["batch-size"] == [(step, 4.0) for step in (2, 4, 5)]
    assert curves["lm loss validation"] == [(line["step"], np.float32(line["eval_loss"])) for line in run.evaluations]


def test_megatrons_curves_come_over_samples_too(runs):
    run, curves = runs[0], runs[0].curves("samples")
    assert curves["lm loss vs samples"] == [(row["samples"], np.float32(row["loss"])) for row in run.rows]
    assert [x for x, _ in curves["lm loss validation vs samples"]] == [12, 20]
    assert {tag.removesuffix(" vs samples") for tag in curves} == set(runs[0].curves())


def test_torchtitans_tags_hold_torchtitans_values(runs):
    run, curves = runs[1], runs[1].curves()
    check_curves(run, curves, TORCHTITAN)
    share = [100 * row["data_wait_s"] / row["step_s"] for row in run.rows]
    assert [value for _, value in curves["time_metrics/data_loading(%)"]] == pytest.approx(share)
    assert [x for x, _ in curves["validation_metrics/loss"]] == [3, 5]


def test_mfu_takes_the_peak_of_the_topology(runs):
    for run in runs:
        for row in run.rows:
            flops = row["tokens_per_s"] * run.summary["flops_per_token"]
            assert row["mfu"] == pytest.approx(flops / (2 * PEAK_TFLOPS * 1e12))
        assert run.summary["mfu"] > 0
        assert f"peak: {PEAK_TFLOPS} TFLOP/s a rank (bench)" in run.stdout


def test_megatrons_losses_of_experts_are_means_over_layers_without_coefficients():
    factors = {tag.name: tag.factor for tag in metrics.tags("megatron", MODEL, 1.0, None)}
    assert factors["load_balancing_loss"] == pytest.approx(1 / (3 * 0.001))
    assert factors["z_loss"] == pytest.approx(1 / (3 * 0.1))
    assert "mtp_1 loss" in factors


def test_names_within_a_scheme_differ():
    for scheme in ("busway", "megatron", "torchtitan"):
        names = [tag.name for tag in metrics.tags(scheme, MODEL, 1.0, 64.0)]
        assert len(names) == len(set(names))


def meter(**more):
    given = {"tokens_per_step": 1000, "seq_len": 100, "ranks": 4, "flops_per_token": 2e6, "peak_flops": 1e9}
    return Meter(**given | {"memory_gib": lambda: 1.5, "world_maximum": lambda values: [2 * v for v in values]} | more)


def add(meter, *step_seconds):
    for number, seconds in enumerate(step_seconds, start=1):
        meter.add(Outcome(float(number), 900, number / 2, False), 0.1 * number, 10 * number, seconds, seconds / 10)


def test_a_row_has_the_mean_times_of_its_steps_and_the_rest_of_the_last():
    made = meter()
    add(made, 4.0, 1.0, 3.0)
    row = made.row(3)
    assert (row["step"], row["loss"], row["grad_norm"], row["samples"], row["tokens"]) == (3, 3.0, 1.5, 30, 3000)
    assert row["lr"] == pytest.approx(0.3)
    assert row["step_s"] == pytest.approx(8 / 3) and row["data_wait_s"] == pytest.approx(0.8 / 3)
    assert row["tokens_per_s"] == pytest.approx(1000 / (8 / 3))
    assert row["tokens_per_s_per_rank"] == pytest.approx(row["tokens_per_s"] / 4)
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * 2e6 / 4e9)
    assert row["memory_gib"] == 3.0  # the largest over the ranks
    add(made, 5.0)
    assert made.row(4)["step_s"] == 5.0


def test_the_median_step_leaves_the_first_out_as_it_compiles():
    made = meter()
    assert made.median_step_s is None
    add(made, 60.0)
    assert made.median_step_s == 60.0
    add(made, 1.0, 9.0, 2.0)
    assert (made.first_step_s, made.median_step_s) == (60.0, 2.0)


def test_without_a_peak_mfu_is_null():
    made = meter(peak_flops=None)
    add(made, 1.0)
    assert made.row(1)["mfu"] is None
