"""`busway convert` there and back, its errors, and the reader behind `checkpoint.init_from`."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import huggingface
from trainer import convert
from trainer.errors import InputError, MachineError
from trainer.weight_files import read_weights, save_safetensors

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "huggingface"
FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen3_moe_normalised", "deepseek_v3")


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    convert.register(parser)
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


def raw_tensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor, read by the format's description alone."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            assert name not in tensors
            tensors[name] = (entry["dtype"], entry["shape"], data[start:stop])
    return tensors


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """The inverse, into one file."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A copy of the checkpoint in FP8 with a layer of multi-token prediction."""
    return Path(shutil.copytree(FIXTURES / "deepseek_v3_published", tmp_path / "published"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "llama"))


def refused(source: Path, out: Path, match: str, command: str = "from-hf") -> None:
    """The conversion ends in one clear line and leaves nothing where OUT would be."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(InputError, match=match) as error:
        run(command, source, out)
    assert "\n" not in str(error.value) and "; " in str(error.value)
    assert error.value.exit_code == 2
    assert sorted(os.listdir(out.parent)) == before


@pytest.mark.parametrize("size", ["5", "1e-4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_keeps_every_byte_and_dtype(family, size, tmp_path):
    assert run("from-hf", FIXTURES / family, tmp_path / "ours", "--max-shard-gb", size) == 0
    assert run("to-hf", tmp_path / "ours", tmp_path / "theirs", "--max-shard-gb", size) == 0
    theirs = raw_tensors(FIXTURES / family)
    assert raw_tensors(tmp_path / "theirs") == theirs
    names = huggingface.names(read_weights(tmp_path / "ours").config)
    assert raw_tensors(tmp_path / "ours") == {ours: theirs[name] for ours, name in names.items()}
    assert (tmp_path / "theirs" / "config.json").read_bytes() == (FIXTURES / family / "config.json").read_bytes()


def test_the_fixtures_cover_bf16_and_a_sharded_index():
    assert {dtype for dtype, _, _ in raw_tensors(FIXTURES / "qwen2").values()} == {"BF16"}
    assert len(list((FIXTURES / "qwen3").glob("*.safetensors"))) > 1


def test_shards_stay_below_the_size_and_the_index_lists_them_as_transformers_does(tmp_path):
    run("from-hf", FIXTURES / "llama", tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "theirs", "--max-shard-gb", "1e-4")
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = {name: len(data) for name, (_, _, data) in raw_tensors(tmp_path / "theirs").items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        listed = {name for name, where in index["weight_map"].items() if where == file}
        assert listed == set(load_file(tmp_path / "theirs" / file))
        assert sum(sizes[name] for name in listed) <= 100_000


def test_small_files_beside_the_weights_travel_both_ways(llama, tmp_path):
    (llama / "tokenizer.json").write_text('{"version": "1.0"}')
    (llama / "a new vocabulary.txt").write_bytes(b"\xff\0")
    (llama / "pytorch_model.bin").touch()
    (llama / "runs").mkdir()
    run("from-hf", llama, tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "theirs")
    theirs = tmp_path / "theirs"
    assert set(os.listdir(theirs)) == set(os.listdir(llama)) - {"pytorch_model.bin", "runs"}
    assert (theirs / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (theirs / "a new vocabulary.txt").read_bytes() == b"\xff\0"


def test_large_files_and_links_to_elsewhere_stay_and_are_named(llama, tmp_path, capsys):
    (tmp_path / "secret").write_text("mine")
    (llama / "notes").symlink_to("../secret")
    (llama / "merges.txt").write_text("a b")
    (llama / "merges").symlink_to("merges.txt")
    with (llama / "film").open("wb") as film:
        film.truncate(64 * 10**6)
    run("from-hf", llama, tmp_path / "ours")
    assert "left out, as large or links to elsewhere: film, notes\n" in capsys.readouterr().out
    assert not {"film", "notes"} & set(os.listdir(tmp_path / "ours"))
    assert (tmp_path / "ours" / "merges").read_text() == "a b" and not (tmp_path / "ours" / "merges").is_symlink()


def test_a_snapshot_in_hugging_faces_cache_is_followed_to_its_blobs(llama, tmp_path):
    (llama / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for file in list(llama.iterdir()):
        file.rename(tmp_path / "models--a--b" / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    run("from-hf", snapshot, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert raw_tensors(tmp_path / "ours")


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        run("from-hf", FIXTURES / "llama", tmp_path / "ours")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "ours").iterdir()} == {0o644}


def test_an_edited_model_yaml_wins_over_the_config_that_came_with_the_weights(tmp_path):
    run("from-hf", FIXTURES / "llama", tmp_path / "ours")
    config = tmp_path / "ours" / "model.yaml"
    config.write_text(config.read_text().replace("max_length: 256", "max_length: 512"))
    run("to-hf", tmp_path / "ours", tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    original = json.loads((FIXTURES / "llama" / "config.json").read_text())
    assert written["max_position_embeddings"] == 512
    assert (written["bos_token_id"], written["eos_token_id"]) == (original["bos_token_id"], original["eos_token_id"])
    assert huggingface.to_config(written) == read_weights(tmp_path / "ours").config


def test_weights_that_never_were_theirs_get_a_new_config(tmp_path):
    run("from-hf", FIXTURES / "qwen3", tmp_path / "ours")
    (tmp_path / "ours" / "huggingface.json").unlink()
    run("to-hf", tmp_path / "ours", tmp_path / "theirs")
    assert read_weights(tmp_path / "theirs").config == read_weights(tmp_path / "ours").config


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_reading_gives_the_same_values_from_both_formats(family, tmp_path):
    run("from-hf", FIXTURES / family, tmp_path / "ours")
    theirs = {}
    for file in (FIXTURES / family).glob("*.safetensors"):
        theirs |= load_file(file)
    for directory in (FIXTURES / family, tmp_path / "ours"):
        weights = read_weights(directory)
        assert list(weights.tensors) == [spec.name for spec in weights.config.parameters()]
        for ours, name in huggingface.names(weights.config).items():
            np.testing.assert_array_equal(weights.tensors[ours].read(()), theirs[name])


def test_bfloat16_is_widened_exactly():
    weights = read_weights(FIXTURES / "qwen2")
    name = "layers.1.attention.k_proj.weight"
    dtype, shape, data = raw_tensors(FIXTURES / "qwen2")["model.layers.1.self_attn.k_proj.weight"]
    value = weights.tensors[name].read(())
    assert dtype == "BF16" and value.dtype == np.float32 and list(value.shape) == shape
    high = np.frombuffer(data, "<u2").reshape(shape)
    np.testing.assert_array_equal(value.view(np.uint32), high.astype(np.uint32) << 16)


def test_float16_is_widened(llama):
    halves = {name: value.astype(np.float16) for name, value in load_file(llama / "model.safetensors").items()}
    save_file(halves, llama / "model.safetensors")
    value = read_weights(llama).tensors["norm.weight"].read(())
    np.testing.assert_array_equal(value, halves["model.norm.weight"].astype(np.float32))


def test_float64_stays_float64(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    doubles = {name: value.astype(np.float64) + 1e-12 for name, value in tensors.items()}
    save_file(doubles, llama / "model.safetensors")
    run("from-hf", llama, tmp_path / "ours")
    value = read_weights(tmp_path / "ours").tensors["norm.weight"].read(())
    assert value.dtype == np.float64
    np.testing.assert_array_equal(value, doubles["model.norm.weight"])


def test_leftovers_of_older_checkpoints_are_ignored(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, llama / "model.safetensors")
    assert run("from-hf", llama, tmp_path / "ours") == 0


def test_a_stored_copy_of_a_tied_head_is_ignored(tmp_path):
    source = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "tied"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    run("from-hf", source, tmp_path / "ours")
    assert "head.weight" not in raw_tensors(tmp_path / "ours")


def test_a_missing_tensor_is_named(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors")
    refused(llama, tmp_path / "ours", r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.mlp.experts.6.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv",
    ],
)
def test_missing_experts_and_factors_are_named(published, tmp_path, tensor):
    tensors = raw_tensors(published)
    del tensors[tensor]
    tensors.pop(f"{tensor}_scale_inv", None)
    write_raw(published / "model.safetensors", tensors)
    refused(published, tmp_path / "ours", rf"tensor {re.escape(tensor)} is missing")


def test_missing_experts_of_a_sharded_checkpoint_are_named(tmp_path):
    source = Path(shutil.copytree(FIXTURES / "qwen3_moe", tmp_path / "qwen3_moe"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    lost = {name for name in index["weight_map"] if ".experts.5." in name}
    tensors = {name: value for name, value in raw_tensors(source).items() if name not in lost}
    for file in source.glob("model*"):
        file.unlink()
    write_raw(source / "model.safetensors", tensors)
    refused(source, tmp_path / "ours", r"experts\.5\.gate_proj\.weight is missing")


def test_published_fp8_becomes_bf16_and_keeps_the_further_layer(published, tmp_path):
    run("from-hf", published, tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "theirs")
    stored, written = raw_tensors(published), raw_tensors(tmp_path / "theirs")
    assert set(written) == {name for name in stored if not name.endswith("_scale_inv")}
    for name, (dtype, shape, content) in written.items():
        if stored[name][0] == "F8_E4M3":
            assert (dtype, shape) == ("BF16", stored[name][1])
        else:
            assert (dtype, shape, content) == stored[name], name
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 1
    weights, again = read_weights(published), read_weights(tmp_path / "theirs")
    assert weights.config == again.config
    for name, tensor in weights.tensors.items():
        everything = (slice(None),) * len(tensor.shape)
        np.testing.assert_array_equal(tensor.read(everything), again.tensors[name].read(everything), name)


def test_a_copy_with_values_of_its_own_is_refused(published, tmp_path):
    tensors = raw_tensors(published)
    name = "model.layers.2.embed_tokens.weight"
    dtype, shape, content = tensors[name]
    tensors[name] = (dtype, shape, bytes(len(content)))
    write_raw(published / "model.safetensors", tensors)
    refused(published, tmp_path / "ours", rf"{re.escape(name)} must be a copy of model\.embed_tokens\.weight")


# OCP 8-bit floating point specification 1.0, table 2: E4M3 has a bias of 7 and no infinities.
E4M3 = {0x00: 0.0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x3C: 1.5, 0x44: 3.0, 0x7E: 448.0, 0xB8: -1.0}


def test_fp8_is_read_as_its_specification_says(published):
    stored = "model.layers.0.mlp.gate_proj.weight"
    tensors = raw_tensors(published)
    dtype, shape, content = tensors[stored]
    tensors[stored] = (dtype, shape, bytes(E4M3) + content[len(E4M3) :])
    kind, factors, _ = tensors[f"{stored}_scale_inv"]
    tensors[f"{stored}_scale_inv"] = (kind, factors, np.full(factors, 0.25, "<f4").tobytes())
    write_raw(published / "model.safetensors", tensors)
    tensor = read_weights(published).tensors["layers.0.feed_forward.gate_proj.weight"]
    assert tensor.read((slice(0, 1), slice(0, len(E4M3)))).tolist() == [[value / 4 for value in E4M3.values()]]


def test_a_part_of_an_fp8_matrix_is_that_part_of_the_whole(published):
    tensor = read_weights(published).tensors["layers.0.feed_forward.gate_proj.weight"]
    whole = tensor.read((slice(None), slice(None)))
    np.testing.assert_array_equal(tensor.read((slice(30, 50), slice(5, 33))), whole[30:50, 5:33])


def test_factors_in_another_precision_give_the_same(published):
    name = "layers.0.feed_forward.gate_proj.weight"
    before = read_weights(published).tensors[name].data.copy()
    tensors = raw_tensors(published)
    for key, (_, shape, content) in tensors.items():
        if key.endswith("_scale_inv"):
            tensors[key] = ("F64", shape, np.frombuffer(content, "<f4").astype("<f8").tobytes())
    write_raw(published / "model.safetensors", tensors)
    np.testing.assert_array_equal(read_weights(published).tensors[name].data, before)


def test_without_its_further_layer_a_checkpoint_is_one_without_further_tokens(published, tmp_path):
    tensors = {name: value for name, value in raw_tensors(published).items() if "layers.2." not in name}
    write_raw(published / "model.safetensors", tensors)
    assert read_weights(published).config.mtp.depth == 0


def test_fp8_without_its_blocks_is_refused(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    del config["quantization_config"]
    (published / "config.json").write_text(json.dumps(config))
    refused(published, tmp_path / "ours", r"is of dtype F8_E4M3, but config\.json has no quantization_config")


def test_an_unknown_tensor_is_named(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float32)
    save_file(tensors, llama / "model.safetensors")
    refused(llama, tmp_path / "ours", r"q_proj\.bias belongs to no parameter")


def test_a_wrong_shape_names_both_shapes(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100]
    save_file(tensors, llama / "model.safetensors")
    refused(llama, tmp_path / "ours", r"lm_head\.weight must have shape \[131, 64\], but has \[100, 64\]")


def test_quantised_weights_are_refused(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, llama / "model.safetensors")
    refused(llama, tmp_path / "ours", r"model\.norm\.weight must be of dtype .* but is I8")


def test_a_truncated_file_is_named(llama, tmp_path):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused(llama, tmp_path / "ours", r"model\.safetensors is no whole safetensors file")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_of_another_kind_is_named(llama, tmp_path, content):
    (llama / "model.safetensors").write_bytes(content)
    refused(llama, tmp_path / "ours", r"model\.safetensors is no whole safetensors file")


def test_weights_in_another_format_are_refused(llama, tmp_path):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, tmp_path / "ours", "neither model.safetensors nor model.safetensors.index.json")


def test_a_missing_shard_is_named(tmp_path):
    source = Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "qwen3"))
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    refused(source, tmp_path / "ours", f"{shard.name} is missing")


def test_an_index_that_lists_what_its_file_lacks_is_named(tmp_path):
    source = Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "qwen3"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "ours", "tensor model.extra.weight is missing, but model.safetensors.index.json lists")


@pytest.mark.parametrize("content", ["", "[]", '{"metadata": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path, content):
    source = Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "qwen3"))
    (source / "model.safetensors.index.json").write_text(content)
    refused(source, tmp_path / "ours", r"model\.safetensors\.index\.json")


def test_a_config_that_is_no_json_is_named(llama, tmp_path):
    (llama / "config.json").write_text("{")
    refused(llama, tmp_path / "ours", r"config\.json is not readable JSON")


def test_another_architecture_is_refused(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "architectures": ["GemmaForCausalLM"]}))
    refused(llama, tmp_path / "ours", "architectures must be one of LlamaForCausalLM, .* but is 'GemmaForCausalLM'")


@pytest.mark.parametrize(("command", "missing"), [("from-hf", "config.json"), ("to-hf", "model.yaml")])
def test_a_directory_without_weights_is_refused(tmp_path, command, missing):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", f"has no {missing}", command)
    refused(tmp_path / "absent", tmp_path / "out", f"has no {missing}", command)
    with pytest.raises(InputError, match="is not a weight directory"):
        read_weights(tmp_path / "empty")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("ffn: 88", "fnn: 88", "fnn"), ("ffn: 88", "ffn: wide", "wide"), ("kv_heads: 2", "kv_heads: 3", "kv_heads")],
)
def test_a_spoilt_model_yaml_is_refused(tmp_path, old, new, named):
    run("from-hf", FIXTURES / "llama", tmp_path / "ours")
    config = tmp_path / "ours" / "model.yaml"
    config.write_text(config.read_text().replace(old, new))
    refused(tmp_path / "ours", tmp_path / "theirs", rf"model\.yaml: .*{named}", "to-hf")


def test_an_out_that_holds_something_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    refused(FIXTURES / "llama", out, "exists and is not an empty directory")
    refused(FIXTURES / "llama", out / "mine", "exists and is not an empty directory")
    assert os.listdir(out) == ["mine"] and (out / "mine").read_text() == "mine"


def test_an_empty_out_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert run("from-hf", FIXTURES / "llama", tmp_path / "out") == 0
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def file_limit():
    """file_limit(bytes) has the system refuse larger files (EFBIG) until the test is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_out_that_cannot_be_written_is_a_machine_error_that_leaves_nothing(tmp_path, file_limit):
    file_limit(100_000)
    with pytest.raises(MachineError) as error:
        run("from-hf", FIXTURES / "llama", tmp_path / "out")
    assert str(error.value) == (
        f"cannot write {tmp_path / 'out'}: File too large; raise the limit on a file's size (ulimit -f) or "
        "set OUT to another disk"
    )
    assert error.value.exit_code == 3
    assert os.listdir(tmp_path) == []


def test_saved_arrays_are_read_back_by_the_library(tmp_path):
    arrays = {"b": np.arange(6.0).reshape(2, 3).T, "a": np.float32([[1, 2]]), "none": np.zeros((0, 4), np.int64)}
    save_safetensors(tmp_path / "x.safetensors", arrays)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("size", ["0", "five", "-1", "nan"])
def test_a_size_without_meaning_is_a_usage_error(tmp_path, size, capsys):
    with pytest.raises(SystemExit) as stop:
        run("from-hf", FIXTURES / "llama", tmp_path / "out", f"--max-shard-gb={size}")
    assert stop.value.code == 2
    assert f"must be a number above 0, but is '{size}'" in capsys.readouterr().err
