"""Layouts that cannot be: each is one line that names the axis, the rule and what would do, before anything starts."""

from __future__ import annotations

import re
import sys
from functools import cache

import pytest
from changed import changed

from trainer import cli
from trainer.compose import compose_recipe

ILLEGAL = {
    "tp=0": ("layout.tp must be at least 1, but is 0", "set layout.tp=1 or more"),
    "tp=-2": ("layout.tp must be at least 1, but is -2", "set layout.tp=1 or more"),
    "tp=3": ("layout.tp 3 must divide model.heads 8", "set layout.tp=2 (the nearest)"),
    "tp=16": ("layout.tp 16 must divide model.heads 8", "set layout.tp=8 (the nearest)"),
    "tp=8 sequence_parallel=true cp=32": ("layout.tp 8 must divide the 4 tokens", "set layout.tp=4 (the nearest)"),
    "pp=0": ("layout.pp must be at least 1, but is 0", "set layout.pp=1 or more"),
    "pp=11": ("11 stages must not exceed the 8 layers", "set layout.pp=10 (the nearest)"),
    "pp=2 vpp=2": ("layout.vpp must be 1 for layout.schedule=1f1b", "set layout.vpp=1, or layout.schedule=interleaved"),
    "pp=2 schedule=interleaved": ("layout.vpp must be at least 2", "set layout.vpp=2 (the nearest)"),
    "pp=2 schedule=zb_v vpp=3": ("layout.vpp must be 2 for layout.schedule=zb_v", "set layout.vpp=2"),
    "pp=6 vpp=2 schedule=interleaved": (
        "8 micro-batches must be a multiple of layout.pp 6",
        "set layout.pp=4 (the nearest), or",
    ),
    "pp=4 vpp=2 schedule=interleaved dp=4": ("2 micro-batches must be a multiple of layout.pp 4", "set layout.pp=2"),
    "pp=4 schedule=dualpipe_v dp=2": ("4 micro-batches must be at least 2 x layout.pp 4 = 8", "set layout.pp=2"),
    "pp=2 schedule=dualpip": ("layout.schedule must be one of", "did you mean 'dualpipe_v'?"),
    "pp=2 stages=[8]": ("layout.stages [8] must give the layers of each of 2 stages", "list 2 numbers"),
    "pp=2 stages=[3,4]": ("layout.stages [3,4] must add up to model.layers 8", "change the list"),
    "pp=4 stages=[3,0,3,2]": ("must give every stage but the first and the last a layer", "move a layer there"),
    "pp=2 stages=[9,-1]": ("none fewer than 0", "move a layer there"),
    "cp=0": ("layout.cp must be at least 1, but is 0", "set layout.cp=1 or more"),
    "cp=3": ("data.seq_len 128 must be a multiple of 6 for layout.cp 3", "set data.seq_len=126 or 132 (the nearest)"),
    "cp=2 cp_method=rings": ("layout.cp_method must be one of ring", "did you mean 'ring'?"),
    "cp=16 cp_method=ulysses": ("layout.cp 16 must divide the 8 heads", "set layout.cp=8 (the nearest)"),
    "cp=8 tp=2 cp_method=ulysses": ("layout.cp 8 must divide the 4 heads", "set layout.cp=4 (the nearest)"),
    "cp=4 cp_method=hybrid cp_ulysses=3": ("layout.cp_ulysses 3 must divide layout.cp 4", "set layout.cp_ulysses=2"),
    "zero=4": ("layout.zero must be 0 to 3, but is 4", "3 keeps the least"),
    "zero=-1": ("layout.zero must be 0 to 3, but is -1", "3 keeps the least"),
    "dp=4 zero=2 zero_group=3": ("layout.zero_group 3 must divide dp 4 x cp 1 = 4", "set layout.zero_group=2"),
    "dp=3": ("train.global_batch 8 must be a multiple of layout.dp 3", "set layout.dp=2, or train.global_batch=6 or 9"),
    "dp=16": ("train.global_batch 8 must be a multiple of layout.dp 16", "set layout.dp=8, or train.global_batch=16"),
    "micro_batch=3": (
        "a multiple of layout.dp 1 x layout.micro_batch 3",
        "set layout.micro_batch=2, or train.global_batch=6",
    ),
    "micro_batch=0": ("layout.micro_batch must be at least 1, but is 0", "set layout.micro_batch=1 or more"),
    "order=[tp,dp,pp]": ("layout.order must name each of tp, cp, dp, pp once", "set layout.order=[tp,cp,dp,pp]"),
    "order=[tp,tp,dp,pp]": ("layout.order must name each of tp, cp, dp, pp once", "set layout.order=[tp,cp,dp,pp]"),
    "recompute=some": ("layout.recompute must be one of none, selective, full", "did you mean"),
    "recompute=1": ("must be none, selective, full or a list of layers, but is 1", "set layout.recompute=selective"),
    "tp=5 model.heads=12 model.kv_heads=6 model.head_dim=16 model.ffn=480 model.vocab=4200": (
        "layout.tp 5 must divide model.heads 12",
        "set layout.tp=6 (the nearest)",
    ),
    "tp=4 model.heads=12 model.kv_heads=6 model.head_dim=16": (
        "layout.tp 4 must divide model.kv_heads 6 or be a multiple of it",
        "set layout.tp=2 (the nearest)",
    ),
    "cp=4 cp_method=hybrid cp_ulysses=4 model.heads=6 model.kv_heads=6 model.head_dim=16": (
        "layout.cp_ulysses 4 must divide the 6 heads",
        "set layout.cp_ulysses=2 (the nearest)",
    ),
    "cp=4 cp_method=ulysses model.heads=12 model.kv_heads=6 model.head_dim=16": (
        "layout.cp 4 must divide the 6 heads of keys of a rank of tp or be",
        "set layout.cp=2 (the nearest)",
    ),
    "tp=8 sequence_parallel=true data.seq_len=100": ("must divide the 100 tokens", "set layout.tp=4 (the nearest)"),
    "dp=3 micro_batch=3": ("a multiple of layout.dp 3 x layout.micro_batch 3", "set layout.dp=2 layout.micro_batch=1"),
    "tp=2 pp=2 launcher.ranks=7": ("launcher.ranks 7 must be a multiple of the 4 ranks", "set launcher.ranks=8 (the"),
    "tp=2 pp=2 launcher.ranks=5": ("launcher.ranks 5 must be a multiple of the 4 ranks", "set launcher.ranks=4 (the"),
    "recompute=[8]": ("layout.recompute [8] must list layers from 0 to 7", "or set layout.recompute=selective"),
}
"""Keys of the layout of `tiny_dense`, and others with their section -> what must be said of them."""
ILLEGAL_EXPERTS = {
    "dp=4 ep=3": ("layout.ep 3 x layout.etp 1 = 3 must divide dp 4 x cp 1 x tp 1 = 4", "set layout.ep=2 (the nearest)"),
    "dp=2 ep=4": ("layout.ep 4 x layout.etp 1 = 4 must divide dp 2 x cp 1 x tp 1 = 2", "set layout.ep=2 (the nearest)"),
    "dp=4 ep=4 etp=2": ("layout.ep 4 x layout.etp 2 = 8 must divide dp 4", "set layout.ep=2 (the nearest)"),
    "dp=8 ep=8 etp=3": ("layout.ep 8 x layout.etp 3 = 24 must divide dp 8", "set layout.etp=1 (the nearest)"),
    "ep=0": ("layout.ep must be at least 1, but is 0", "set layout.ep=1 or more"),
    "dp=8 ep=8 model.moe.experts=12": ("layout.ep 8 must divide model.moe.experts 12", "set layout.ep=4 (the nearest)"),
    "dp=8 etp=8 model.moe.ffn=100": ("layout.etp 8 must divide model.moe.ffn 100", "set layout.etp=4 (the nearest)"),
    "dp=4 ep=4 dispatch=tow_level": ("layout.dispatch must be one of auto, flat", "did you mean 'two_level'?"),
    "dp=4 ep=4 outer_groups=3": (
        "layout.outer_groups 3 must be above 1 and divide layout.ep 4",
        "set layout.outer_groups=2",
    ),
    "dp=4 ep=4 dispatch=two_level outer_groups=1": (
        "layout.outer_groups 1 must be above 1",
        "set layout.outer_groups=2",
    ),
    "dp=4 ep=4 dispatch=flat outer_groups=2": ("must be left out with layout.dispatch=flat", "leave it out"),
    "tp=4 data.seq_len=126": ("layout.tp 4 must divide the 126 tokens", "set layout.tp=2 (the nearest)"),
    "dp=2 ep=2 model.moe.experts=0": (
        "layout.ep 2 x layout.etp 1 must be 1, as the model has no experts",
        "layout.ep=1",
    ),
    "model.moe.top_k=9": ("model.moe.top_k 9 must not exceed the 8 experts", "set model.moe.top_k=8 or less"),
    "model.moe.groups=3": (
        "model.moe.groups 3 must divide model.moe.experts 8",
        "set model.moe.groups=2 (the nearest)",
    ),
    "model.moe.groups=4 model.moe.top_groups=5": ("model.moe.top_groups 5 must not exceed model.moe.groups 4", "=4"),
    "model.moe.groups=4 model.moe.top_k=4": ("must not exceed the 2 experts that a token chooses from", "top_k=2"),
    "model.moe.capacity=0": ("model.moe.capacity must be above 0, but is 0.0", "set model.moe.capacity to a number"),
    "model.moe.capacity=inf": ("model.moe.capacity must be finite, but is inf", "set model.moe.capacity to a number"),
    "model.moe.z_coef=inf": ("model.moe.z_coef must be finite, but is inf", "set model.moe.z_coef to a number of at"),
    "model.moe.dense_layers=[0,8]": ("model.moe.dense_layers [0,8] must list layers from 0 to 7", "change the list"),
    "model.moe.first_dense=8": ("model.moe.experts 8 must be in a layer", "set model.moe.first_dense=0"),
    "model.moe.aux_loss=sequences": ("model.moe.aux_loss must be one of sequence, global", "did you mean 'sequence'?"),
    "model.moe.ffn=0": ("model.moe.ffn must be at least 1, but is 0", "set model.moe.ffn=1 or more"),
    "model.mtp.depth=128": ("model.mtp.depth must be below data.seq_len 128", "set model.mtp.depth=127 or less"),
}
"""The same of `tiny_moe`."""
CASES = [("tiny_dense", layout, said) for layout, said in ILLEGAL.items()]
CASES += [("tiny_moe", layout, said) for layout, said in ILLEGAL_EXPERTS.items()]
REMEDY = re.compile(r"; set ((?:layout|train|data|launcher|model)\.\w+=[^,;( [\]]+(?: layout\.micro_batch=1)?)")


@cache
def legal(recipe):
    return compose_recipe(recipe, []).recipe


def test_ranks_and_a_shard_group_make_a_legal_layout_together():
    keys = ["layout.tp=1", "layout.pp=1", "launcher.ranks=4", "layout.zero=3", "layout.zero_group=2"]
    assert compose_recipe("tiny_dense", keys).recipe.parallel_layout.dp == 4


def test_without_a_micro_batch_every_schedule_has_enough():
    for schedule, vpp, count in (("1f1b", 1, 5), ("interleaved", 2, 5), ("dualpipe_v", 2, 10), ("zb_v", 2, 5)):
        keys = ["layout.pp=5", "train.global_batch=10", f"layout.schedule={schedule}", f"layout.vpp={vpp}"]
        layout = compose_recipe("tiny_dense", [*keys, "layout.tp=1"]).recipe.parallel_layout
        assert layout.check_batch(10) == count, schedule


@pytest.mark.parametrize(("recipe", "layout", "said"), CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_an_illegal_layout_is_one_line_with_its_rule_and_what_would_do(
    recipe, layout, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mindspore", None)
    axes = ("tp", "pp", "micro_batch") if recipe == "tiny_dense" else ("dp", "ep", "micro_batch")
    keys = [f"layout.{axis}=1" for axis in axes]
    keys += [key if "." in key.split("=")[0] else f"layout.{key}" for key in layout.split()]
    assert cli.main(["train", recipe, *keys]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    for text in said:
        assert text in line
    assert printed.out == "" and list(tmp_path.iterdir()) == []
    if remedy := REMEDY.search(line):
        changed(legal(recipe), [*keys, *remedy[1].split()])
