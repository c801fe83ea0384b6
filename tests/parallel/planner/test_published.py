"""Published runs as columns, and the benchmark of the planner's accuracy over them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RUN = {
    "source": "a cluster", "framework": "megatron", "model": "GPT", "layers": "8", "hidden": "1024", "heads": "16",
    "seq_len": "2048", "hardware": "A100-80GB", "n_devices": "8", "tp": "2", "pp": "2", "global_batch": "32",
    "micro_batch": "1", "measured_step_time_s": "1.5",
}  # fmt: skip
KEYS = [
    "rows", "refused", "median_abs_err", "p90_abs_err", "memory_median_abs_err", "spearman_median", "regret_p90",
    "fits_recall", "oom_recall",
]  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def figures(benchmarks, tmp_path, monkeypatch, capsys):
    """The last line that the benchmark prints of runs."""

    def run(*runs: dict[str, str]) -> dict:
        import planner_accuracy

        path = tmp_path / "runs.csv"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, sorted({name for each in runs for name in each}))
            writer.writeheader()
            writer.writerows(runs)
        monkeypatch.setattr(sys, "argv", ["planner_accuracy.py", str(path)])
        planner_accuracy.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_figures_that_a_file_has_nothing_for_are_null(figures):
    found = figures(RUN)
    assert list(found) == KEYS
    assert found["rows"] == 1 and found["refused"] == 0 and found["median_abs_err"] > 0
    assert all(found[key] is None for key in KEYS[4:])


@pytest.mark.parametrize(
    "change",
    [
        {"hardware": "", "framework": ""},
        {"hardware": "H900", "peak_tflops_bf16": "1200", "framework": "another", "source": ""},
        {"tp": "", "pp": "", "global_batch": "", "micro_batch": "", "seq_len": ""},
        {"tp": "0", "pp": "0", "cp": "0", "micro_batch": "0"},
        {"hidden": "", "heads": "", "params_b": "1.3"},
        {"dp": "3", "global_batch": "7"},
        {"n_devices": "10", "experts": "6", "topk": "2", "ep": "4"},
        {"pp": "4", "vpp": "3", "layers": "10", "attention_kernel": "unheard of", "recompute": "anything", "zero": "2"},
        {"sequence_parallel": "False", "framework": "mindformers", "hardware": "", "moe_ffn": "512", "experts": "8"},
    ],
)
def test_a_blank_or_unknown_field_is_no_reason_to_refuse(figures, change):
    found = figures(RUN | change)
    assert found["refused"] == 0 and found["median_abs_err"] > 0


def test_absent_columns_read_as_blank(figures):
    found = figures({key: RUN[key] for key in ("layers", "hidden", "n_devices", "measured_step_time_s")})
    assert found["rows"] == 1 and found["refused"] == 0 and found["median_abs_err"] > 0


@pytest.mark.parametrize(
    ("said", "stage"),
    [("zero-2", 2), ("ZeRO3", 3), ("hsdp", 3), ("FSDP2", 3), ("true", 1), ("1.0", 1), ("none", 0), ("zero-1 + SP", 1)],
)
def test_a_zero_stage_is_read_from_how_it_is_called(benchmarks, said, stage):
    from planner.published import row

    assert row(RUN | {"dp": "2", "zero": said, "citation": ""}).columns["zero"] == stage


def test_a_run_without_layers_is_refused_and_counts_as_wrong(figures):
    held = {"outcome": "ok", "measured_step_time_s": ""}
    found = figures(RUN | held, RUN | held | {"layers": ""}, RUN | held | {"outcome": "oom", "layers": "4000"})
    assert (found["rows"], found["refused"], found["fits_recall"], found["oom_recall"]) == (3, 1, 0.5, 1.0)


def test_layouts_of_one_problem_are_ranked(figures):
    layouts = ({"tp": "1", "pp": "1"}, {"tp": "8", "pp": "1"}, {"tp": "1", "pp": "8"})
    found = figures(*[RUN | layout | {"measured_step_time_s": str(i + 1)} for i, layout in enumerate(layouts)])
    assert -1 <= found["spearman_median"] <= 1 and found["regret_p90"] in (0.0, 1.0, 2.0)


def test_parameters_tell_what_no_column_says(benchmarks):
    from planner.published import row

    found = row(
        RUN
        | {"model": "Llama 2 7B", "layers": "32", "hidden": "4096", "heads": "32", "vocab": "32000", "params_b": "6.74"}
    )
    assert found.shape["ffn"] == pytest.approx(11008, rel=0.03) and found.shape["gates"] == 2
