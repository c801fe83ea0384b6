"""Bad recipes, bad inputs and bad machines: one clear line and an exit code, before anything is built or started."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from parallel.layout import Layout
from trainer import __main__ as entry
from trainer import cli, machine, run_directory
from trainer.compose import compose_recipe
from trainer.data.indexed import IndexedWriter
from trainer.data.tokenizer import train_bpe
from trainer.errors import MachineError

WRONG = {
    "train.stepz=3": ("unknown key train.stepz", "did you mean 'train.steps'?"),
    "trian=3": ("unknown key trian",),
    "optimiser.lr=3": ("unknown key optimiser.lr", "did you mean 'optimizer.lr'?"),
    "model.rope_scaling.fator=2": ("unknown key model.rope_scaling.fator", "'model.rope_scaling.factor'"),
    "data.sources=[{path: a, weigth: 2}]": ("data.sources[].weigth", "did you mean 'data.sources[].weight'?"),
    "+new.key=1": ("unknown key new.key",),
    "lr=cosin": ("lr=cosin is unknown", "did you mean 'cosine'?"),
    "topology=cluster": ("topology=cluster is unknown", "cloudmatrix384_roce, dgx_a100"),
    "topology.machin.members=8": ("topology.machin is no key, level or plane of laptop", "did you mean 'machine'?"),
    "model=null": ("model=None is unknown", "tiny_dense"),
    "train.steps=many": ("train.steps must be of type int", "'many'"),
    "train.steps=1.5": ("train.steps must be of type int", "1.5"),
    "train.steps=null": ("train.steps must be of type int", "None"),
    "train.steps=???": ("train.steps is missing", "set train.steps="),
    "data.sources=stdlib": ("data.sources must be of type list of source", "'stdlib'"),
    "optimizer.betas=[a,b]": ("optimizer.betas[0]", "'a'"),
    "train.steps=0": ("train.steps must be at least 1, but is 0", "set train.steps=1 or more"),
    "optimizer.lr=-1": ("optimizer.lr must be above 0",),
    "optimizer.betas=[0.9]": ("optimizer.betas must be two numbers", "[0.9,0.95]"),
    "lr.schedule=cosin": ("lr.schedule must be one of", "did you mean 'cosine'?"),
    "train.precision=fp8": ("train.precision must be one of", "bf16"),
    "train.name=a/b": ("train.name must be one folder's name", "train.out"),
    "launcher.kind=slurm": ("launcher.kind must be one of", "mpi"),
    "launcher.kind=msrun": ("launcher.kind msrun starts no ranks on CPU", "launcher.kind=mpi"),
    "model.heads=5": ("model.kv_heads must divide model.heads 5", "nearest"),
    "train.global_batch=5": (
        "train.global_batch 5 must be a multiple of layout.dp 1 x layout.micro_batch 2",
        "or train.global_batch=4 or 6",
    ),
    "layout.dp=3": ("train.global_batch 4 must be a multiple of layout.dp 3",),
    "data.seq_len=65": ("data.seq_len must not exceed model.max_length 64, but is 65", "shorten data.seq_len"),
    "train.seed=1,2": ("train.seed=1,2 gives several values", "--multirun"),
    "train=null": ("train is a section of keys", "set train.KEY=…"),
    "model=tiny_dense": ("takes no model=…", "set model.KEY=…"),
    "train.steps=3=4": ("cannot read an override", "key=value"),
    "topology.rank.speed=3": ("topology.rank.speed is no key of a topology file",),
    "topology.levels=[]": ("topology.levels must list at least one level",),
    "checkpoint.resume=nowhere": ("nowhere is no checkpoint", "name a folder step-…"),
    "checkpoint.init_from=nowhere": ("nowhere is not a weight directory",),
    "data.sources=[]": ("data.sources is empty", "busway data build"),
    "data.sources=[{path: nowhere}]": ("nowhere does not exist", "give the prefix of a built dataset"),
    "data.tokenizer=null": ("data.tokenizer is missing", "tokenizer.json"),
    "data.tokenizer=nowhere.json": ("tokenizer nowhere.json is not a file", "tokenizer.json"),
    "data.tokenizer=bpe:301": ("data.tokenizer asks for 301 entries, but the model's is 300", "model.vocab=301"),
    "data.tokenizer=bpe:x": ("data.tokenizer must be a tokenizer.json or bpe:N", "bpe:4096"),
}
"""Override of the small recipe -> what must be said of it."""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """What is wrong is found before any dataset is built and without MindSpore."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mindspore", None)
    for name in ("trainer.build", "trainer.worker"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def fails(capsys, small_recipe, tmp_path):
    """`fails(code, override, …)` runs `busway train` with the small recipe; the one line that it printed."""

    def run(code, *overrides, recipe=small_recipe):
        before = sorted(tmp_path.rglob("*"))
        out = [] if any(word.startswith("train.out=") for word in overrides) else [f"train.out={tmp_path}/runs"]
        assert cli.main(["train", str(recipe), *out, *overrides]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("busway: ") and "Traceback" not in line
        assert "; " in line  # the remedy
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.fixture
def dataset(tmp_path):
    """The prefix of a built dataset of ids below 300."""
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for _ in range(20):
            writer.add(np.arange(300))
    return tmp_path / "data"


def trained_on(prefix):
    return f"data.sources=[{{path: {prefix}}}]", "data.tokenizer=null"


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_named_with_its_rule_and_remedy(fails, override):
    line = fails(2, override)
    for text in WRONG[override]:
        assert text in line


def test_an_unknown_recipe_names_those_that_there_are(fails):
    assert "unknown recipe 'llama3_8'; did you mean 'llama3_8b'?" in fails(2, recipe="llama3_8")
    assert "known: deepseek_v3, llama3_405b" in fails(2, recipe="gpt")


def test_a_large_recipe_asks_for_the_users_own_text(fails):
    assert "data.sources is empty; this recipe trains on your own text" in fails(2, recipe="llama3_8b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train: {stepz: 3}", ("unknown key train.stepz", "did you mean 'train.steps'?")),
        ("trian: {steps: 3}", ("unknown key trian",)),
        ("train: {steps: [1}", ("is not YAML", "line 1", "mend the file")),
        ("- a\n- b", ("must hold keys and values",)),
        ("", ("must hold keys and values",)),
        (b"\xff\xfe\x00", ("cannot read the recipe", "it is not text")),
        ("defaults: [{model: gpt}]", ("gpt",)),
        ("train: {steps: 3}", ("is missing; set ",)),
    ],
    ids=["nested key", "section", "syntax", "list", "empty", "binary", "group member", "no model"],
)
def test_a_recipe_file_that_is_wrong_is_named(fails, tmp_path, content, said):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = fails(2, recipe=file)
    for text in said:
        assert text in line


def test_a_recipe_file_that_is_not_there_is_named(fails, tmp_path):
    assert "cannot read the recipe mine.yaml: No such file" in fails(2, recipe="mine.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot read the recipe folder.yaml: Is a directory" in fails(2, recipe="folder.yaml")
    assert "cannot read the topology cluster.yaml" in fails(2, "topology=cluster.yaml")


def test_random_overrides_never_end_in_a_traceback(fails, capsys, small_recipe):
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(60):
        word = "".join(rng.choice("abmodel.layers=[]{}:,'\"$~+1 \\/@?") for _ in range(rng.randint(1, 20)))
        if not word.startswith("-"):
            assert cli.main(["train", str(small_recipe), "--cfg", "job", f"train.{word}"]) in (0, 2)
            assert len(capsys.readouterr().err.splitlines()) <= 1, word


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(fails, tmp_path):
    train_bpe(["the bus and the tram"] * 9, 270).save(str(tmp_path / "tokenizer.json"))
    line = fails(2, f"data.tokenizer={tmp_path}/tokenizer.json", "model.vocab=200")
    assert "has a vocabulary of" in line and "but the model's is 200" in line and "set model.vocab=" in line


def test_a_file_that_is_no_tokenizer_is_refused(fails, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "cannot be read" in fails(2, f"data.tokenizer={tmp_path}/tokenizer.json")


@pytest.mark.parametrize("place", ["magic", "end"])
def test_a_corrupted_index_is_named_with_the_byte(fails, dataset, place):
    index = Path(f"{dataset}.idx")
    data = index.read_bytes()
    index.write_bytes(b"X" + data[1:] if place == "magic" else data[:-3])
    line = fails(2, *trained_on(dataset))
    assert str(index) in line and "byte" in line


def test_a_dataset_without_its_other_file_is_refused(fails, dataset):
    Path(f"{dataset}.idx").unlink()
    assert f"{dataset}.bin has no .idx beside it" in fails(2, *trained_on(dataset))


def began(small_recipe, tmp_path, *overrides):
    words = [f"train.out={tmp_path}/runs", "train.name=mine", *overrides]
    recipe = compose_recipe(str(small_recipe), words).recipe
    run_directory.create(recipe, "small")


def test_a_name_that_exists_needs_resume(fails, small_recipe, tmp_path):
    began(small_recipe, tmp_path)
    line = fails(2, "train.name=mine")
    assert "train.name 'mine'" in line and "exists already; set checkpoint.resume=auto" in line


def test_a_run_directory_of_another_recipe_is_refused(fails, small_recipe, tmp_path):
    began(small_recipe, tmp_path, "model.layers=2", "train.seed=3")
    line = fails(2, "train.name=mine", "checkpoint.resume=auto")
    assert "holds another recipe's run: model.layers was 2, but is 1 (and 1 more keys)" in line


def test_weights_of_other_shapes_are_refused(fails, tmp_path):
    llama = Path(__file__).resolve().parents[1] / "fixtures" / "huggingface" / "llama"
    line = fails(2, f"checkpoint.init_from={llama}")
    assert f"checkpoint.init_from={llama}: its model has layers 2, but model.layers is 1" in line


def test_a_folder_that_is_no_checkpoint_is_refused(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is no checkpoint, as it has no manifest.json" in fails(2, f"checkpoint.resume={tmp_path}/empty")


def test_a_launcher_above_of_another_size_is_refused(fails, monkeypatch):
    assert "finds no launcher above this process, but the layout needs 2 ranks" in fails(
        2, "launcher.kind=none", "layout.dp=2"
    )
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "4")
    assert "a world of 4 ranks around this process, but the layout needs 2" in fails(2, "layout.dp=2")


def test_a_name_for_several_runs_is_refused(fails):
    assert "train.name=x would be the name of several runs; leave it out" in fails(
        2, "--multirun", "train.name=x", "train.steps=1,2"
    )


def test_a_model_that_this_machine_cannot_hold_is_refused_before_it_is_made(fails, dataset):
    line = fails(3, *trained_on(dataset), recipe="llama3_405b")
    assert "this recipe needs " in line and " GiB free; make the model" in line
    needs = float(line.split("needs ")[1].split(" GiB")[0].replace(",", ""))
    assert needs > 4 * 4 * 405_853_388_800 / 2**30  # weights, gradients and two moments in fp32


@pytest.fixture
def no_mpiexec(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_a_missing_mpiexec_is_a_machine_error(fails, no_mpiexec):
    line = fails(3, "layout.dp=2")
    assert "mpiexec is neither beside" in line and "pip install mpich" in line


@pytest.mark.parametrize(
    "override", ["train.global_batch=5", "data.sources=[{path: nowhere}]", "train.stepz=1", "data.tokenizer=bpe:400"]
)
def test_errors_of_the_recipe_win_over_those_of_the_machine(fails, no_mpiexec, override):
    fails(2, "layout.dp=2", override)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_read_only_run_directory_is_a_machine_error(fails, mounted, ranks):
    with mounted("ro") as disk:
        line = fails(3, f"train.out={disk}", f"layout.dp={ranks}")
        assert f"cannot write {disk}/small-1: Read-only file system; set train.out to a folder " in line


def test_a_file_in_the_place_of_the_run_directories_is_a_machine_error(fails, tmp_path):
    (tmp_path / "runs").write_text("")
    assert "Not a directory; set train.out to a folder" in fails(3)


def test_a_disk_without_room_for_the_run_directory_is_a_machine_error(capsys, small_recipe, mounted):
    with mounted("nr_inodes=3") as disk:
        assert cli.main(["train", str(small_recipe), f"train.out={disk}"]) == 3
        assert capsys.readouterr().err == (
            f"busway: cannot write {disk}/small-1: No space left on device; "
            "free some space or set train.out to another disk\n"
        )


@pytest.mark.parametrize(
    "words", [["trian"], [], ["train", "--nonsense"], ["train", "--cfg", "all"], ["data"], ["convert", "from-hf"]]
)
def test_a_command_line_that_cannot_be_read_is_a_few_lines_and_exit_code_2(capsys, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 6 and "error: " in lines[-1]


def test_a_failed_start_leaves_no_run_directory_behind(fails, small_recipe, tmp_path):
    """The corrected command must not be told that its directory exists already."""
    fails(3, "train.name=mine", "model.layers=100000")
    assert not (tmp_path / "runs" / "mine").exists()


def test_ctrl_c_while_modules_are_read_ends_the_command_without_a_word(monkeypatch, capfd):
    def interrupted(name, *_):
        if name == "trainer.cli":
            raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "trainer.cli")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=interrupted), *sys.meta_path])
    assert entry.main() == 130
    assert capfd.readouterr() == ("", "")


def test_memory_of_a_device_is_held_against_the_topology(small_recipe):
    recipe = compose_recipe("llama3_8b", ["model.layers=32"]).recipe
    needed = machine.needed_memory_gib(recipe.model, Layout(dp=1), 8192, 1, 4)
    with pytest.raises(MachineError, match=r"needs 1\d\d\.\d GiB a rank, but a die of cloudmatrix384 has 64\.0 GiB"):
        machine.check_device_memory(needed, recipe.machine)
    machine.check_device_memory(63.0, recipe.machine)
