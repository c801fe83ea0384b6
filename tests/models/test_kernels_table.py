"""Which implementation a run gets, what it says about it, and the compile step that decides it."""

from __future__ import annotations

import ctypes
import runpy
from pathlib import Path

import pytest
from setuptools import Distribution

from models import kernels
from models.checks import ConfigError
from models.kernels import KERNELS, NAMES, ascend, choose, native, plain, plain_experts

BUILD = runpy.run_path(str(Path(kernels.__file__).parent / "build.py"))


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "")


def test_cpu_takes_the_compiled_kernels(compiled):
    chosen = choose("auto", "fp32", "CPU")
    assert all(getattr(chosen, name) is KERNELS[name]["native"] for name in NAMES)
    assert chosen.describe() == "kernels: native"


def test_the_fp64_reference_multiplies_and_updates_weights_in_plain_operators(compiled):
    chosen = choose("auto", "fp64", "CPU")
    assert chosen.AdamW is plain.AdamW and chosen.Matmul is plain.Matmul and chosen.Attention is native.Attention
    why = "the fp64 reference multiplies and updates weights in plain operators"
    assert chosen.describe() == f"kernels: native; plain Matmul, AdamW ({why})"


def test_experts_are_plain_altogether_where_their_matmul_is(compiled, monkeypatch):
    """Native operators leave rows unwritten that plain ones read."""
    monkeypatch.setattr(native, "missing_matmul", lambda: "no dnnl_sgemm")
    chosen = choose("auto", "fp32", "CPU")
    assert chosen.Rows is plain_experts.Rows and chosen.Routing is plain_experts.Routing
    assert chosen.Matmul is plain.Matmul
    assert chosen.Attention is native.Attention and "no dnnl_sgemm; slower" in chosen.describe()


def test_plain_can_be_asked_for(compiled):
    chosen = choose("plain", "fp32", "Ascend")
    assert all(getattr(chosen, name) is KERNELS[name]["plain"] for name in NAMES)
    assert chosen.describe() == "kernels: plain (train.kernels=plain)"


def test_without_a_library_everything_is_plain_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    native.missing.cache_clear()
    chosen = choose("auto", "fp32", "CPU")
    native.missing.cache_clear()
    assert chosen.RMSNorm is plain.RMSNorm
    why = "no compiled kernels: install g++, then Busway again (`make setup` or `pip install .`)"
    assert chosen.describe() == f"kernels: plain ({why}; slower)"


def test_ascend_takes_fused_operators_where_precision_and_mindspore_have_them(monkeypatch):
    chosen = choose("auto", "bf16", "Ascend")
    assert chosen.Attention is ascend.Attention and chosen.CrossEntropy is plain.CrossEntropy
    assert chosen.choices["CrossEntropy"].reason == "no fused operator"
    assert chosen.BlockAttention is ascend.BlockAttention
    in_fp32 = choose("auto", "fp32", "Ascend")
    assert in_fp32.Rotary is ascend.Rotary and in_fp32.BlockAttention is plain.BlockAttention
    assert in_fp32.choices["Attention"].reason == "the fused operator takes bf16"
    assert {choice.implementation for choice in choose("auto", "fp64", "Ascend").choices.values()} == {"plain"}
    monkeypatch.delattr(ascend.auto_generate, "SwigluGrad")
    assert choose("auto", "bf16", "Ascend").choices["SwiGLU"].reason == "this MindSpore has no SwigluGrad"


def test_a_misspelt_kind_names_the_nearest():
    with pytest.raises(ConfigError, match=r"train.kernels .*'plian'.*did you mean 'plain'"):
        choose("plian", "fp32", "CPU")


def build_extension(folder: Path, inplace: bool) -> Path:
    """Runs build_ext as setup.py would, on an operator library of one function; returns where the library belongs."""
    package = folder / "package"
    package.mkdir()
    (package / "answer.cc").write_text('extern "C" int answer() { return 42; }\n')
    distribution = Distribution(
        {"packages": ["package"], "ext_modules": [BUILD["operators"]("package._answer", str(package))]}
    )
    command = BUILD["BuildOperators"](distribution)
    command.inplace, command.build_lib = inplace, str(folder / "build")
    command.ensure_finalized()
    command.run()
    return folder / ("" if inplace else "build") / "package" / "_answer.so"


@pytest.mark.parametrize("inplace", [True, False])
def test_a_library_is_built_for_an_editable_and_for_an_ordinary_install(monkeypatch, tmp_path, inplace):
    if native.missing():
        pytest.skip(native.missing())
    monkeypatch.chdir(tmp_path)
    assert ctypes.CDLL(str(build_extension(tmp_path, inplace))).answer() == 42


@pytest.mark.parametrize("inplace", [True, False])
def test_a_missing_compiler_is_said_and_no_error(monkeypatch, tmp_path, capfd, inplace):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert not build_extension(tmp_path, inplace).exists()
    printed = capfd.readouterr()
    assert "busway: compiled nothing; without package._answer runs are slower" in printed.out
    assert "package._answer: " in printed.err and "no-compiler" in printed.err


def test_a_library_for_a_newer_cpu_is_not_used(monkeypatch, tmp_path):
    """A stand-in library that misses a feature, as the real one does on a CPU older than its own."""
    source, library = tmp_path / "cpu.cc", tmp_path / "_native.so"
    source.write_text('extern "C" const char* busway_missing_cpu_feature() { return "avx512f"; }\n')
    try:
        BUILD["compile_library"]([str(source)], str(library))
    except OSError as error:
        pytest.skip(f"no compiler: {error}")
    monkeypatch.setattr(native, "LIBRARY", library)
    native.missing.cache_clear()
    chosen = choose("auto", "fp32", "CPU")
    native.missing.cache_clear()
    assert chosen.SwiGLU is plain.SwiGLU
    assert "compiled for another CPU (no avx512f here): install Busway again (`make clean setup`" in chosen.describe()
