"""From what is typed to a typed recipe."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import yaml
from changed import changed
from omegaconf import OmegaConf

from models.checks import ConfigError
from parallel import schedules
from trainer import cli
from trainer.compose import BUILT_IN, compose_recipe, known_recipes, sweep
from trainer.recipe import all_keys, key_reference, resolved

KEYS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "keys.md"

# recipe -> parameters of the published checkpoint
PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "deepseek_v3": 671_026_419_200,  # without the layer that predicts a second token
}
ROUNDED = {"pangu_ultra_moe": 718e9}
"""Whose checkpoint's count is not published: the paper's figure, which leaves the embedding out."""
ACTIVE = {
    "mixtral_8x7b": 12.9e9, "qwen3_30b_a3b": 3.3e9, "qwen3_235b_a22b": 22e9, "deepseek_v3": 37e9,
    "pangu_ultra_moe": 39e9,
}  # fmt: skip
TINY = ("tiny_dense", "tiny_moe")

TOPOLOGY = """
name: bench
rank: {name: core, memory_gib: 2, memory_bandwidth: null, peak_tflops: {float32: 0.5}}
planes: {bus: {injection: null}}
levels: [{name: box, members: 8, bandwidth: null, latency: null, plane: bus}]
"""


def recipe_of(*words):
    return compose_recipe(words[0], list(words[1:])).recipe


@pytest.mark.parametrize("name", known_recipes())
def test_every_packaged_recipe_composes_and_says_whose_text_it_wants(name):
    recipe = recipe_of(name)
    assert bool(recipe.data.sources) == (name in TINY)
    assert recipe.machine.name == ("laptop" if name in TINY else "cloudmatrix384")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_equals_the_published_checkpoint(name):
    assert recipe_of(name).model.parameter_count == PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_published(name):
    model = recipe_of(name).model
    left_out = model.vocab * model.hidden if name in ROUNDED else 0
    assert model.active_parameter_count - left_out == pytest.approx(ACTIVE[name], rel=0.03)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_rounded_count_is_met_to_its_digits(name):
    model = recipe_of(name).model
    assert round((model.parameter_count - model.vocab * model.hidden) / 1e9) == ROUNDED[name] / 1e9


def test_all_published_models_have_a_recipe():
    assert set(known_recipes()) == {*PUBLISHED, *ROUNDED, *TINY}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_tiny_recipes_are_legal_for_any_small_world(name, ranks):
    sizes = (f"layout.dp={ranks}", "layout.tp=1", "layout.pp=1", "layout.ep=1")
    recipe = recipe_of(name, *sizes, "data.seq_len=64")
    assert recipe.train.global_batch == 8 and recipe.parallel_layout.world_size == ranks
    model = recipe.model
    for size in (1, 2, 4):
        for dim in (model.layers, model.heads, model.kv_heads, model.hidden, model.ffn, model.vocab, 64):
            assert dim % size == 0


def test_the_built_in_experts_lie_on_1_2_or_4_ranks_beside_the_other_axes():
    recipe = recipe_of(BUILT_IN)
    assert recipe.model.moe.experts
    for axes in ("dp=4", "dp=1 tp=4", "dp=1 cp=4", "dp=2 tp=2", "dp=1 cp=2 tp=2"):
        for ep, pp in product((1, 2, 4), repeat=2):
            other = changed(recipe, [f"ep={ep}", f"pp={pp}", *axes.split()])
            assert other.parallel_layout.world_size == 4 * pp


@pytest.mark.parametrize("schedule", schedules.NAMES)
def test_the_built_in_experts_run_under_every_schedule(schedule):
    vpp = 2 if schedule == "interleaved" else 1
    keys = ["dp=2", "ep=2", "pp=2", f"vpp={vpp}", f"schedule={schedule}"]
    assert changed(recipe_of(BUILT_IN), keys).parallel_layout.world_size == 4


def test_overrides_change_what_they_name_and_nothing_else():
    overrides = ("model.layers=2", "model.hidden=256", "optimizer.lr=1e-4")
    changed = yaml.safe_load(resolved(recipe_of("llama3_8b", *overrides)))
    plain = yaml.safe_load(resolved(recipe_of("llama3_8b")))
    assert (changed["model"]["layers"], changed["model"]["hidden"], changed["optimizer"]["lr"]) == (2, 256, 1e-4)
    for section, key in (("model", "layers"), ("model", "hidden"), ("optimizer", "lr")):
        changed[section][key] = plain[section][key]
    assert changed == plain


def test_a_key_that_the_recipe_leaves_out_can_be_set_without_a_plus():
    assert recipe_of("tiny_dense", "checkpoint.every=7", "launcher.kind=mpi").checkpoint.every == 7
    assert recipe_of("tiny_dense", "+checkpoint.every=7").checkpoint.every == 7


def test_groups_swap_a_whole_section_and_keys_win_over_them():
    recipe = recipe_of("tiny_dense", "model=qwen3_8b", "lr=wsd", "topology=cloudmatrix384", "model.layers=3")
    assert (recipe.model.hidden, recipe.model.qk_norm, recipe.model.layers) == (4096, True, 3)
    assert (recipe.lr.schedule, recipe.machine.name) == ("wsd", "cloudmatrix384")
    assert recipe.train.global_batch == 8


def test_a_topology_file_replaces_the_recipes_topology(tmp_path):
    (tmp_path / "bench.yaml").write_text(TOPOLOGY)
    recipe = recipe_of("llama3_8b", f"topology={tmp_path}/bench.yaml", "model.layers=1")
    assert (recipe.machine.name, recipe.machine.rank.peak_tflops) == ("bench", {"float32": 0.5})
    assert [level.name for level in recipe.machine.levels] == ["box"]


def test_levels_and_planes_are_changed_by_name_in_a_recipe_on_the_command_line_and_over_a_file(tmp_path):
    recipe = recipe_of("llama3_8b", "topology=cloudmatrix384_roce", "topology.supernode.members=64")
    assert [level.ranks for level in recipe.machine.levels][-2:] == [128, None]
    assert OmegaConf.create(resolved(recipe)).topology.supernode.members == 64  # runs again as it ran
    (tmp_path / "mine.yaml").write_text(
        "defaults: [llama3_8b, _self_]\ntopology: {supernode: {members: 32}, unified_bus: {injection: 98}}\n"
    )
    machine = recipe_of(f"{tmp_path}/mine.yaml", "topology.node.bandwidth=150").machine
    assert (machine.capacity, machine.levels[1].bandwidth, machine.levels[1].plane.injection) == (64, 150, 98)
    (tmp_path / "bench.yaml").write_text(TOPOLOGY)
    file = f"topology={tmp_path}/bench.yaml"
    assert recipe_of("tiny_dense", "topology.box.members=9", file).machine.capacity == 9
    with pytest.raises(ConfigError, match="topology.boxx is no key, level or plane of bench; did you mean 'box'"):
        recipe_of("tiny_dense", file, "topology.boxx.members=9")


def test_a_topology_that_is_too_small_for_the_layout_is_refused(tmp_path):
    (tmp_path / "bench.yaml").write_text(TOPOLOGY)
    with pytest.raises(ConfigError, match="16"):
        recipe_of("tiny_dense", f"topology={tmp_path}/bench.yaml", "layout.dp=4", "train.global_batch=64")


@pytest.mark.parametrize("name", ["tiny_dense", "qwen3_32b"])
def test_a_resolved_recipe_is_a_recipe_and_comes_back_the_same(name, tmp_path):
    first = compose_recipe(name, ["checkpoint.every=3", "model.rope_scaling.kind=llama3", "train.name=null"])
    saved = tmp_path / f"{name}-12" / "recipe.yaml"
    saved.parent.mkdir()
    saved.write_text(resolved(first.recipe))
    again = compose_recipe(str(saved), [])
    assert again.recipe == first.recipe and resolved(again.recipe) == saved.read_text()
    assert again.name == name  # the run's name, less its number
    other = compose_recipe(str(saved), ["model.layers=5", "lr.warmup=1"]).recipe
    assert (other.model.layers, other.lr.warmup, other.checkpoint.every) == (5, 1, 3)


def test_groups_beside_a_users_own_file_are_known(tmp_path):
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "slow.yaml").write_text("{schedule: constant, warmup: 7}")
    (tmp_path / "mine.yaml").write_text("defaults: [tiny_dense, _self_]")
    assert recipe_of(str(tmp_path / "mine.yaml"), "lr=slow").lr.schedule == "constant"
    with pytest.raises(ConfigError, match="lr=slwo is unknown; did you mean 'slow'"):
        recipe_of(str(tmp_path / "mine.yaml"), "lr=slwo")


def test_a_users_own_file_may_build_on_packaged_groups(small_recipe):
    composed = compose_recipe(str(small_recipe), [])
    assert composed.name == "small"
    assert (composed.recipe.model.hidden, composed.recipe.lr.schedule, composed.recipe.machine.name) == (
        32, "constant", "laptop",
    )  # fmt: skip
    assert compose_recipe(str(small_recipe), ["lr=wsd"]).recipe.lr.schedule == "wsd"


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ((), 1),
        (("layout.dp=4",), 4),
        (("launcher.ranks=4",), 4),
        (("layout.dp=4", "launcher.ranks=4"), 4),
    ],
    ids=["neither", "dp", "ranks", "both"],
)
def test_dp_and_ranks_follow_from_each_other(small_recipe, overrides, ranks):
    recipe = recipe_of(str(small_recipe), "layout.micro_batch=1", *overrides)
    assert (recipe.parallel_layout.dp, recipe.parallel_layout.world_size) == (ranks, ranks)


def test_dp_and_ranks_that_disagree_are_refused(small_recipe):
    with pytest.raises(ConfigError, match="the world has 2 ranks; set launcher.ranks=4 or layout.dp=2"):
        recipe_of(str(small_recipe), "layout.dp=4", "launcher.ranks=2")


def test_a_key_without_effect_is_accepted():
    """Warm-up and intervals longer than the run, settings of a schedule that is not chosen."""
    recipe_of("tiny_dense", "lr.warmup=1000000", "checkpoint.every=1000000", "train.stop_at=1000000", "lr.power=3")


def test_cfg_job_prints_the_composed_recipe_and_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["llama3_8b", "model.layers=2", "--cfg", "job"], ["llama3_8b", "--cfg", "job", "model.layers=2"]):
        assert cli.main(["train", *words]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert (printed["model"]["layers"], printed["model"]["hidden"], printed["train"]["global_batch"]) == (
            2, 4096, 1024,
        )  # fmt: skip
    assert cli.main(["train", "--cfg", "job", "model.layers=3"]) == 0  # the built-in recipe
    assert yaml.safe_load(capsys.readouterr().out)["model"]["layers"] == 3
    assert list(tmp_path.iterdir()) == []


def test_multirun_runs_every_combination_in_order(capsys):
    words = ["--multirun", "optimizer.lr=1e-3,1e-4", "train.seed=range(0,2)", "lr=cosine", "--cfg", "job"]
    assert cli.main(["train", *words]) == 0
    jobs = capsys.readouterr().out.split("multirun: ")[1:]
    seen = [yaml.safe_load(job.partition("\n")[2]) for job in jobs]
    assert [(job["optimizer"]["lr"], job["train"]["seed"]) for job in seen] == [
        (1e-3, 0), (1e-3, 1), (1e-4, 0), (1e-4, 1),
    ]  # fmt: skip
    assert jobs[0].split("\n")[0] == f"{BUILT_IN} optimizer.lr=0.001 train.seed=0 lr=cosine"


def test_a_list_is_one_value_and_several_values_are_a_sweep():
    assert len(sweep(["optimizer.betas=[0.9,0.95],[0.8,0.9]", "lr=cosine,wsd", "train.steps=3"])) == 4
    assert sweep(["optimizer.betas=[0.9,0.95]"]) == [["optimizer.betas=[0.9,0.95]"]]
    with pytest.raises(ConfigError, match="train.seed=1,2 gives several values; add --multirun"):
        recipe_of("tiny_dense", "train.seed=1,2")


def test_every_key_is_documented_under_its_field():
    documented = {key: (kind, meaning) for key, kind, _, meaning in all_keys()}
    for key, (kind, meaning) in documented.items():
        assert kind and len(meaning) > 10 and meaning.endswith("."), key

    def leaves(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict) and key != "topology":
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    known = set(leaves(OmegaConf.to_container(OmegaConf.create(resolved(recipe_of("tiny_dense"))))))
    assert known == {key for key in documented if "[]" not in key}


def test_help_keys_lists_every_key_with_its_meaning(capsys):
    assert cli.main(["train", "--help-keys"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for key, _, _, meaning in all_keys():
        assert key in printed and meaning in printed


def test_the_page_of_keys_is_made_from_the_dataclasses():
    assert KEYS_PAGE.read_text() == key_reference() + "\n", "make it again: python -m trainer.recipe > docs/keys.md"


def test_explain_draws_the_timeline_of_the_pipeline(capsys):
    words = ["layout.pp=2", "layout.schedule=zb_h1", "layout.micro_batch=2"]
    assert cli.main(["explain", "tiny_dense", "--timeline", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines[:2]] == ["0", "1"]
    assert lines[0].count("F") == lines[1].count("F") == 4 and lines[1].count("W") == 4
    assert "bubble" in lines[-1]
    assert cli.main(["explain", "tiny_dense", "--timeline", "layout.pp=1"]) == 2
    assert "layout.pp is 1, so there is no pipeline to draw" in capsys.readouterr().err
