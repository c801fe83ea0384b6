"""`busway plan`, `busway explain` and `layout=auto`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from models.config import ModelConfig
from parallel.layout import Layout
from trainer import cli
from trainer.compose import compose_recipe
from trainer.planning import planned, problem_of

MODEL = (
    "llama3_8b", "topology=cloudmatrix384", "model.layers=4", "model.hidden=512", "model.ffn=1408", "model.heads=8",
    "data.seq_len=512", "train.global_batch=8",
)  # fmt: skip
RANKS = "plan.ranks=4"


def lines(capsys) -> list[str]:
    printed = capsys.readouterr()
    return [*printed.out.splitlines(), *printed.err.splitlines()]


def test_a_plan_is_a_recipe_that_composes_to_its_layout(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *MODEL, RANKS]) == 0
    out = capsys.readouterr().out
    for word in (
        "tokens/s",
        "runner-up: ",
        "where the step goes",
        "HCCL_ALGO=level0:NA;level1:NHR",
        "a package (card)",
    ):
        assert word in out
    file = tmp_path / "plans/llama3_8b/plan.yaml"
    composed = compose_recipe(str(file), [])
    layout = composed.recipe.parallel_layout
    prediction = yaml.safe_load(file.read_text())["plan"]["prediction"]
    assert composed.name == "llama3_8b"
    assert layout.world_size == composed.recipe.launcher.ranks == 4
    assert {key: getattr(layout, key) for key in ("tp", "pp", "dp", "cp", "zero")} == {
        key: prediction["layout"][key] for key in ("tp", "pp", "dp", "cp", "zero")
    }
    assert composed.recipe.placement == (0, 1, 2, 3)
    assert sum(prediction["terms_s"].values()) == pytest.approx(prediction["step_s"])
    assert (tmp_path / "plans/llama3_8b/report.html").stat().st_size > 10_000


def test_json_is_alone_on_stdout_and_files_are_written_only_where_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *MODEL, RANKS, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "plans").exists()
    plan = answer["plan"]
    config = ModelConfig(layers=4, hidden=512, ffn=1408, heads=8, kv_heads=8, vocab=128256)
    tokens = 8 * 512
    assert plan["tokens_per_s"] == pytest.approx(tokens / plan["step_s"])
    assert plan["mfu"] == pytest.approx(
        config.flops_per_token(512) * tokens / plan["step_s"] / (4 * 376e12), rel=0.02
    )  # as kv_heads differ
    assert plan["memory_gib"] < plan["memory_limit_gib"] == 64
    assert all(other["step_s"] >= plan["step_s"] for other in answer["others"])
    assert answer["search"]["simulated"] > 0
    assert cli.main(["plan", *MODEL, RANKS, "--json", f"plan.out={tmp_path}/here"]) == 0
    assert (tmp_path / "here/llama3_8b/plan.yaml").exists()


def test_keys_of_the_command_line_are_held_and_those_of_a_recipe_that_plans_itself(tmp_path):
    composed = compose_recipe("llama3_8b", [*MODEL[1:], RANKS, "layout.tp=2", "layout.bucket_mib=32"], plan=True)
    fixed = problem_of(composed.recipe, composed.given).fixed
    assert fixed["tp"] == 2 and fixed["bucket_mib"] == 32
    assert "pp" not in fixed and "micro_batch" not in fixed
    file = tmp_path / "own.yaml"
    text = yaml.safe_dump({"layout": {"auto": True, "pp": 2}, "plan": {"ranks": 4}}, sort_keys=False)
    file.write_text(
        "defaults: [model: llama3_8b, data: own, topology: cloudmatrix384, optimizer: adamw, lr: cosine, _self_]\n"
        "train: {steps: 1, global_batch: 8}\n" + text
    )
    composed = compose_recipe(str(file), [word for word in MODEL[2:] if "train." not in word])
    said: list[str] = []
    layout = planned(composed, said.append).recipe.parallel_layout
    assert layout.pp == 2 and layout.world_size == 4
    assert said[0].startswith("plan: pp 2 x ")


def test_a_lost_block_leaves_a_plan_for_the_rest():
    words = [*MODEL[1:], RANKS, "plan.without=node:0"]
    composed = planned(compose_recipe("llama3_8b", [*words, "layout=auto"]), lambda line: None)
    assert composed.recipe.placement == (16, 17, 18, 19)
    assert composed.recipe.parallel_layout.world_size == 4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("plan", "tiny_moe", "plan.ranks=2"), "topology laptop: rank.device is not known"),
        (("plan", *MODEL, RANKS, "layout.tp=3"), "no layout of 4 ranks of cloudmatrix384 is legal with layout.tp=3"),
        (("plan", *MODEL, RANKS, "layout.tpp=2"), "unknown key layout.tpp; did you mean 'layout.tp'?"),
        (("plan", *MODEL, "plan.ranks=1000"), "plan.ranks 1000 must be 1 to the 768 that are free"),
        (("plan", *MODEL, RANKS, "plan.overlap.tp=2"), "plan.overlap.tp must be 0 to 1, but is 2"),
        (("plan", *MODEL, RANKS, "layout.stages=[2,2]"), "layout.stages is a split that the planner does not"),
        (("plan", "llama3_405b", "plan.ranks=16"), "no layout fits into 16 ranks of cloudmatrix384, 128 ranks of"),
        (("plan", *MODEL, RANKS, "layout.tp=3"), "layout.tp 3 must divide model.heads 8; set layout.tp="),
        (("plan", *MODEL, RANKS, "layout.tp=4", "layout.pp=2"), "layout.tp=4 x layout.pp=2 must divide the 4 ranks"),
        (("plan", *MODEL, RANKS, "layout.pp=2", "layout.vpp=3", "layout.schedule=1f1b"), "layout.vpp must be 1 for"),
        (("plan", *MODEL, RANKS, "layout.vpp=2", "layout.schedule=1f1b"), "layout.vpp must be 1 for layout."),
        (("plan", *MODEL, RANKS, "layout.pp=2", "layout.vpp=3", "layout.schedule=zb_v"), "layout.vpp must be 2 for"),
        (("plan", *MODEL, RANKS, "layout.ep=2"), "layout.ep 2 x layout.etp 1 must be 1, as the model has no experts"),
        (("plan", *MODEL, RANKS, "layout.micro_batch=3"), "train.global_batch 8 must be a multiple of layout.dp 1 x"),
        (("plan", *MODEL, "plan.without=supernode:0"), "leave no place of cloudmatrix384 free; name fewer blocks"),
        (("explain", *MODEL, "layout=auto", "launcher.ranks=4"), "layout.auto is true, so there is no layout"),
        (("plan", *MODEL, RANKS, "layout.zero_group=3", "layout.dp=4"), "layout.zero_group 3 must divide the 4 ranks"),
        (
            ("plan", *MODEL, RANKS, "layout.pp=2", "layout.schedule=interleaved", "layout.micro_batch=8"),
            "needs a multiple of pp micro-batches, but a batch of 8 makes at most 1 with layout.micro_batch=8; make",
        ),
        (("plan", *MODEL, RANKS, "layout.zero=7"), "layout.zero must be 0 to 3, but is 7"),
        (("plan", *MODEL, RANKS, "layout.recompute=[0]"), "layout.recompute is a list, which the planner does not"),
        (("explain", *MODEL, RANKS, "layout.recompute=bogus"), "layout.recompute"),
        (("plan", *MODEL, "plan.nodes=abc"), "plan.nodes[0] abc must name nodes below the 48 of a supernode"),
        (("plan", "llama3_405b", "plan.ranks=16", "layout.zero=3", "layout.dp=2"), "no layout fits into 16 ranks"),
        (("plan", *MODEL, RANKS, "--top", "0"), "--top must be at least 1"),
        (("explain", *MODEL, "--against", "a.yaml", "--against", "b.yaml"), "--against names 2 recipes"),
        (("train", "layout=auto"), "topology laptop: rank.device is not known"),
        (("train", "llama3_8b", "topology=cloudmatrix384", "layout=auto"), "data.sources is empty; this recipe trains"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_gets_one_line(words, line, capsys):
    assert cli.main(list(words)) == 2
    printed = [text for text in lines(capsys) if text.startswith("busway: ")]
    assert len(printed) == 1
    assert line in printed[0]


def test_explain_compares_a_layout_with_the_best(capsys):
    assert cli.main(["explain", *MODEL, "layout.dp=1", "layout.tp=4", "layout.recompute=full"]) == 0
    out = capsys.readouterr().out
    assert "pp 1 x dp 1 x cp 1 x tp 4 = 4 ranks on cloudmatrix384" in out
    assert "this one is " in out and " slower: " in out
    assert "recompute, s " in out and "sent over package, GB a rank " in out


def test_explain_plans_the_rest_of_a_layout_that_leaves_the_number_of_ranks_open(capsys):
    assert cli.main(["explain", *MODEL, RANKS, "layout.tp=4", "layout.recompute=full"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("held: layout.tp layout.recompute; the rest is what the planner finds for 4 ranks")
    assert "pp 1 x dp 1 x cp 1 x tp 4 = 4 ranks on cloudmatrix384" in out
    assert "the best layout: pp " in out and " slower: " in out


def test_both_sides_of_a_comparison_are_planned_where_they_leave_ranks_open(capsys):
    assert cli.main(["explain", *MODEL, RANKS, "layout.tp=4", "--against", "layout.tp=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == found["compared_with"]["ranks"] == 4
    assert sum(pair[0] for pair in found["difference_sent_bytes"].values()) == sum(
        found["sent_bytes_by_level"].values()
    )


def test_a_longer_batch_is_another_question(capsys):
    own = ["explain", *MODEL, "layout.dp=4", "--alone"]
    assert cli.main([*own, "--against", "train.global_batch=16"]) == 0
    assert "this is the other layout" not in capsys.readouterr().out
    assert cli.main([*own, "--against", "layout.dp=4"]) == 0
    assert "this is the other layout" in capsys.readouterr().out


def test_plans_of_different_work_are_compared_by_their_tokens_per_second(capsys):
    own = ["explain", *MODEL, "layout.dp=4", "--json", "--against", "train.global_batch=16"]
    assert cli.main(own) == 0
    found = json.loads(capsys.readouterr().out)
    gain = found["tokens_per_s"] / (16 * 512 / found["compared_with"]["step_s"]) - 1
    assert gain < 0
    assert found["this_is"] == f"{-gain:.1%} slower by tokens/s, with another train.global_batch"


def test_the_timeline_of_keys_alone_is_that_of_the_plan_around_them(capsys):
    assert cli.main(["explain", *MODEL, RANKS, "layout.pp=2", "layout.schedule=1f1b", "--timeline"]) == 0
    assert "makespan" in capsys.readouterr().out


def test_explain_sets_two_layouts_or_plans_against_each_other(tmp_path, capsys):
    assert cli.main(["plan", *MODEL, RANKS, f"plan.out={tmp_path}"]) == 0
    plan, own = f"{tmp_path}/llama3_8b/plan.yaml", ["layout.dp=1", "layout.tp=4"]
    capsys.readouterr()
    assert cli.main(["explain", *MODEL, *own, "--json", "--against", plan]) == 0
    found = json.loads(capsys.readouterr().out)
    best = yaml.safe_load(Path(plan).read_text())["plan"]["prediction"]
    assert found["compared_with"]["step_s"] == pytest.approx(best["step_s"])
    assert found["this_is"].startswith(f"{found['step_s'] / best['step_s'] - 1:.1%} slower: ")
    own_terms, their_terms = (sum(pair[side] for pair in found["difference_s"].values()) for side in (0, 1))
    assert own_terms == pytest.approx(found["step_s"]) and their_terms == pytest.approx(best["step_s"])
    assert cli.main(["explain", *MODEL, *own, "--json", "--against", "layout.dp=2", "--against", "layout.tp=2"]) == 0
    assert json.loads(capsys.readouterr().out)["compared_with"]["layout"]["tp"] == 2
    assert cli.main(["explain", plan]) == 0
    assert capsys.readouterr().out.rstrip().endswith("this is the best layout")


def test_what_if_says_what_it_costs(tmp_path, capsys):
    assert cli.main(["plan", *MODEL, "train.global_batch=768", "plan.without=[]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_what_if"] is None
    words = ["plan", *MODEL, "train.global_batch=8448", "plan.without=cabinet:3", "--json"]
    assert cli.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    whole = answer["without_what_if"]
    assert (whole["ranks"], answer["plan"]["ranks"]) == (768, 704)
    share = answer["plan"]["tokens_per_s"] / whole["tokens_per_s"] - 1
    assert cli.main(words[:-1] + [f"plan.out={tmp_path}"]) == 0
    what = f"this is {abs(share):.1%} {'more' if share > 0 else 'fewer'} tokens/s on 8.3% fewer ranks"
    assert what in capsys.readouterr().out


def test_ranks_of_one_node_may_stay_idle_too(capsys):
    assert cli.main(["plan", *MODEL, "plan.ranks=7", "plan.allow_idle=true", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["ranks"] == 4


def test_a_machine_whose_ranks_do_not_divide_the_batch_leaves_some_idle(capsys):
    held = ["layout.pp=1", "layout.tp=1", "layout.cp=1", "plan.ranks=17", "plan.allow_idle=true"]
    assert cli.main(["plan", *MODEL, "train.global_batch=16", *held, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["idle_ranks"] == 1


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["topology=atlas_900_a2", "plan.ranks=16", "layout.tp=8", "layout.dp=2"], "the worst, dp < tp, takes "),
        (
            ["topology=cloudmatrix384", "plan.ranks=4", "layout.tp=2", "layout.dp=2"],
            "of 2 nestings the worst, tp < dp, takes ",
        ),
        (
            ["topology=atlas_900_a2", "plan.ranks=8", "layout.tp=2", "layout.dp=4"],
            "it makes no difference: all 2 nestings",
        ),
        (["topology=cloudmatrix384", "plan.ranks=4", "layout.tp=4"], "no two axes have several ranks"),
    ],
)
def test_a_plan_says_whether_placement_matters(keys, line, capsys):
    assert cli.main(["plan", *(word for word in MODEL if not word.startswith("topology=")), *keys, "--json"]) == 0
    assert line in json.loads(capsys.readouterr().out)["placement"]


def test_a_plan_says_how_much_room_experts_would_take(capsys):
    """4 ranks x 8,192 tokens, each to both of its experts: 65,536 rows of 8,192 numbers of 2 bytes."""
    experts = ("model.moe.experts=8", "model.moe.top_k=2", "model.moe.ffn=512", "model.hidden=8192", "model.vocab=512")
    sizes = ("layout.dp=4", "layout.tp=1", "layout.pp=1", "layout.cp=1", "layout.micro_batch=1", "data.seq_len=8192")
    for ep, said in ((4, "room for 4 x it, 1.0 GiB for each buffer"), (1, "")):
        assert cli.main(["explain", *MODEL, RANKS, *experts, *sizes, f"layout.ep={ep}"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert (said in out) and ("have room for" in out) == bool(said)


def alone(capsys, *words: str) -> dict:
    """What is predicted of the layout that `words` spell."""
    assert cli.main(["explain", *MODEL, *words, "--alone", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_recipes_precision_is_what_is_priced(capsys):
    """fp32 at half the peak moves no fewer bytes, and holds as many: in bf16 the engine keeps fp32."""
    layout = ("layout.dp=2", "layout.tp=2")
    mixed, full = (
        alone(capsys, *layout, f"train.precision={name}", "topology.rank.peak_tflops.float32=188")
        for name in ("bf16", "fp32")
    )
    assert full["terms_s"]["matmul"] > 1.9 * mixed["terms_s"]["matmul"]
    assert full["terms_s"]["tp"] > mixed["terms_s"]["tp"]
    assert full["memory_gib"] == pytest.approx(mixed["memory_gib"])
    assert cli.main(["explain", *MODEL, *layout, "train.precision=fp32", "--alone"]) == 2
    assert "rank.peak_tflops.float32 is not known, and a plan needs it" in capsys.readouterr().err


def test_imbalance_takes_time_and_memory_and_overlap_gives_time(capsys):
    experts = ("model.moe.experts=8", "model.moe.top_k=2", "model.moe.ffn=512", "layout.dp=4", "layout.ep=4")
    even, uneven = (alone(capsys, *experts, f"plan.imbalance={share}") for share in (1, 3))
    assert uneven["step_s"] > even["step_s"] and uneven["memory_gib"] > even["memory_gib"]
    seen, hidden = (alone(capsys, *experts, f"plan.overlap.ep={share}")["terms_s"] for share in (0, 1))
    assert seen["ep"] > 0 and "ep" not in hidden


def test_explain_alone_gives_json_of_the_layout(capsys):
    assert cli.main(["explain", *MODEL, "layout.dp=4", "--alone", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Layout(**found["layout"]).world_size == 4
    assert found["wire_bytes_by_level"]["package"] > 0


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["layout.schedule=gpipe"], {"schedule": "gpipe", "pp": 2}),
        (["layout.vpp=2", "layout.schedule=zb_v"], {"schedule": "zb_v", "vpp": 2, "pp": 2}),
        (["layout.cp_method=ulysses"], {"cp_method": "ulysses", "cp": 2}),
        (["layout.pp=1", "layout.schedule=zb_v"], {"schedule": "zb_v", "pp": 1}),
        (["layout.cp=1", "layout.cp_method=ulysses"], {"cp_method": "ulysses", "cp": 1}),
    ],
)
def test_a_technique_that_is_held_asks_for_its_axis_unless_that_is_held_too(words, kept, capsys):
    assert cli.main(["plan", *MODEL, "plan.ranks=2", "--json", *words]) == 0
    answer = json.loads(capsys.readouterr().out)
    for plan in (answer["plan"], *answer["others"]):
        assert {key: plan["layout"][key] for key in kept} == kept


KNOWN = """
name: known
rank: {name: process, device: h100, memory_gib: 2, memory_bandwidth: 10, peak_tflops: {float32: 0.05, bfloat16: 0.05}}
planes: {memory: {injection: null}}
levels: [{name: machine, members: 2, bandwidth: 5, latency: 10, plane: memory}]
"""


@pytest.mark.slow
def test_a_plan_trains_unchanged_as_layout_auto_does_and_sends_what_it_predicted(busway, tmp_path):
    machine, out = tmp_path / "known.yaml", tmp_path / "plans"
    machine.write_text(KNOWN)
    asked = (f"topology={machine}", "train.steps=2", "train.precision=fp32", "layout.tp=2", "layout.micro_batch=2")
    busway("plan", busway.recipe, *asked, f"train.out={busway.out}", f"plan.out={out}")
    busway("train", out / busway.recipe.stem / "plan.yaml", "train.name=planned")
    busway.train("chosen", *asked, "layout.auto=true")
    reports = [json.loads(busway("report", busway.out / name, "--json")[0]) for name in ("planned", "chosen")]
    planned, chosen = (busway.run(name).summary for name in ("planned", "chosen"))
    assert planned["layout"] == chosen["layout"] and planned["layout"]["tp"] == 2
    assert planned["traffic"] == chosen["traffic"]
    for report in reports:
        assert report["source"] == "plan.prediction, which came with the recipe"
        assert report["traffic"]["equal"] and report["predicted"]["step_s"] > 0
