"""From the recipe's data section to datasets: the cache, and every error found before it is filled."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from models.checks import ConfigError
from trainer.data.build import build
from trainer.data.prepare import check, prepare
from trainer.data.settings import DataSettings, Source
from trainer.data.tokenizer import load_tokenizer, vocab_size
from trainer.errors import InputError
from trainer.files import sha256_of

PREPARE = """
import os, signal, sys
from trainer.data.prepare import prepare
from trainer.data.settings import DataSettings, Source

def report(line):
    print(line, flush=True)
    if sys.argv[2] in line:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(DataSettings(sources=[Source(sys.argv[1])], tokenizer="bpe:300", seq_len=16, holdout=0.2), 300, report)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "busway"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory of 30 short texts."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"the bus {i} runs every {i % 7} minutes; " * 8)
    return folder


def settings(*paths: object, tokenizer: object = "bpe:300", **more: object) -> DataSettings:
    given = {"holdout": 0.2, "seq_len": 16, **more}
    return DataSettings(sources=[Source(str(path)) for path in paths], tokenizer=tokenizer and str(tokenizer), **given)


def in_a_process(text: Path, kill_at: str = "never", **more: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PREPARE, text, kill_at], stdout=subprocess.PIPE, text=True, **more
    )


def test_raw_text_is_tokenised_once_and_then_found(text: Path, cache: Path) -> None:
    said: list[str] = []
    corpus = prepare(settings(text), 300, said.append)
    assert any("training a tokenizer of 300 entries" in line for line in said)
    (tokenizer_file,) = cache.glob("tokenizer-*.json")
    tokenizer = load_tokenizer(tokenizer_file)
    assert vocab_size(tokenizer) <= 300
    assert tokenizer.decode(corpus.train[0].indexed[4].tolist()) == (text / "04.txt").read_text()
    assert len(corpus.train[0].documents) + len(corpus.holdout[0].documents) == 30
    before = sorted(cache.iterdir())
    again = prepare(settings(text), 300, pytest.fail)
    assert sorted(cache.iterdir()) == before
    assert again.train[0].sample(0).tokens.tolist() == corpus.train[0].sample(0).tokens.tolist()


def test_the_cache_knows_content_and_settings_and_not_the_place(text: Path, cache: Path) -> None:
    def made(*args: object, **more: object) -> int:
        said: list[str] = []
        prepare(settings(*args, **more), 400, said.append)
        return len(said)

    assert made(text) == 3
    assert made(text.rename(text.with_name("moved"))) == 0
    moved = text.with_name("moved")
    assert made(moved, seq_len=8, holdout=0.3) == 0
    assert made(moved, tokenizer="bpe:310") == 3
    (moved / "07.txt").write_text("a change")
    assert made(moved) == 3


def test_sources_keep_their_weights_and_a_built_one_needs_no_tokenizer(
    text: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    build([str(text)], tokenizer_path, tmp_path / "built")
    mixed = settings(tmp_path / "built", text, tokenizer=tokenizer_path)
    mixed.sources[1].weight = 3.0
    corpus = prepare(mixed, 300)
    assert corpus.weights == [1.0, 3.0]
    assert [len(packed) for packed in corpus.train] == [len(corpus.train[0])] * 2
    assert corpus.samples == 2 * ((corpus.train[0].tokens - 1) // 16)
    corpus = prepare(settings(tmp_path / "built", tokenizer=None, holdout=0.0, seq_len=8, mask_documents=True), 300)
    assert corpus.holdout == []
    assert corpus.train[0].sample(0).tokens.shape == (8,)
    assert corpus.train[0].mask_documents


def test_one_text_file_gives_its_end_to_the_holdout(text: Path) -> None:
    file = text / "one.txt"
    file.write_text("".join(sorted(path.read_text() for path in text.iterdir())))
    corpus = prepare(settings(file), 300)
    assert len(corpus.holdout[0]) > 0
    assert corpus.holdout[0].tokens / corpus.train[0].indexed.tokens == pytest.approx(0.2, abs=0.01)


def test_a_holdout_that_is_too_short_names_the_users_text_and_only_where_it_is_wanted(text: Path) -> None:
    short = settings(text / "03.txt", holdout=0.001)
    with pytest.raises(InputError, match=rf"^{text}/03\.txt has 1 tokens in its holdout split"):
        prepare(short, 300)
    corpus = prepare(short, 300, evaluates=False)
    assert corpus.holdout == [] and corpus.train[0].tokens == corpus.train[0].indexed.tokens - 1


def test_a_text_that_has_not_changed_is_not_read_again(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr("trainer.data.prepare.sha256_of", counted)
    monkeypatch.setattr("trainer.data.prepare.SETTLED_S", -60.0)
    files = sorted(text.iterdir())

    def reads() -> list[Path]:
        read.clear()
        prepare(settings(text), 400, lambda line: None)
        return [path for path in read if path in files]

    assert reads() == files
    assert reads() == []
    # The same size and, as from a copy that keeps it, the same time.
    state = files[3].stat()
    files[3].write_text(files[3].read_text().replace("bus", "car"))
    os.utime(files[3], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert reads() == files
    files[4].write_text("longer " * 100)
    assert reads() == files
    files[5].unlink()
    assert files[5] not in reads()


def test_a_text_that_may_be_changing_is_read_each_time(text: Path, cache: Path) -> None:
    prepare(settings(text), 300)
    assert not list(cache.glob("content-*"))


def test_an_unreadable_text_is_an_error_that_names_it(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("trainer.data.prepare.sha256_of", refused)  # root reads everything
    with pytest.raises(InputError, match=r"cannot read .*00\.txt: Permission denied; make it readable"):
        prepare(settings(text), 300)


def test_two_processes_at_once_do_the_work_once(text: Path) -> None:
    processes = [in_a_process(text) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(said).count("training a tokenizer") == 1
    assert "".join(said).count("tokenising") == 1


@pytest.mark.parametrize("kill_at", ["training", "tokenising"])
def test_a_killed_writer_holds_nobody_up_and_leaves_nothing_valid(text: Path, cache: Path, kill_at: str) -> None:
    killed = in_a_process(text, kill_at)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not list(cache.glob("*.idx"))
    after = in_a_process(text)
    said, _ = after.communicate(timeout=60)
    assert after.returncode == 0
    assert "tokenising" in said and ("training" in said) == (kill_at == "training")


def test_empty_sources_ask_for_the_users_own_text() -> None:
    with pytest.raises(ConfigError) as error:
        check(settings(), 300)
    assert str(error.value) == (
        "data.sources is empty; this recipe trains on your own text: build it with 'busway data build …' and set "
        "data.sources=[{path: PREFIX}] and data.tokenizer=…"
    )


def test_what_does_not_fit_is_found_before_anything_is_built(
    text: Path, tmp_path: Path, tokenizer_path: Path, cache: Path
) -> None:
    build([str(text)], tokenizer_path, tmp_path / "built")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.idx").write_bytes(b"MMIDIDX\0\0\1")
    (tmp_path / "half.bin").touch()
    other = tmp_path / "other.json"
    other.write_text(tokenizer_path.read_text() + "\n")
    ours, built = settings(text, tokenizer=tokenizer_path), tmp_path / "built"
    for given, vocab, kind, said in (
        (settings(tmp_path / "none"), 300, InputError, "none does not exist"),
        (settings(tmp_path / "empty"), 300, InputError, "empty holds no file that matches"),
        (settings(text, tokenizer=tmp_path / "no.json"), 300, InputError, r"no\.json is not a file"),
        (settings(text, tokenizer=None), 300, ConfigError, r"data\.tokenizer is missing, and .*text is raw text"),
        (ours, 279, ConfigError, r"data\.tokenizer .* has a vocabulary of 280, but the model's is 279; set model\.voc"),
        (settings(text, tokenizer="bpe:301"), 300, ConfigError, "asks for 301 entries, but the model's is 300"),
        (settings(built, tokenizer=None), 279, ConfigError, r"data\.sources\[0\]\.path .*built with a vocabulary of 2"),
        (settings(built), 300, ConfigError, "is bpe:300, but .*built is tokenised already"),
        (settings(built, tokenizer=other), 300, ConfigError, "was built with another tokenizer than"),
        (settings(tmp_path / "cut", tokenizer=None), 300, InputError, r"cut\.idx: byte 10 ends inside the header"),
        (settings(f"{built}.idx"), 300, InputError, "is one file of a dataset; give its prefix"),
        (settings(tmp_path / "half"), 300, InputError, r"half\.bin has no \.idx beside it"),
    ):
        with pytest.raises(kind, match=said) as error:
            check(given, vocab)
        assert "\n" not in str(error.value)
    assert not cache.exists()


def test_a_manifest_that_is_none_is_an_error(text: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    build([str(text)], tokenizer_path, tmp_path / "built")
    for content in ("{", "[]", '{"vocab": 3}'):
        (tmp_path / "built.json").write_text(content)
        with pytest.raises(InputError, match=r"built\.json is no manifest of a dataset"):
            check(settings(tmp_path / "built", tokenizer=None), 300)


def test_the_settings_are_an_omegaconf_structured_config() -> None:
    schema = OmegaConf.structured(DataSettings)
    assert OmegaConf.is_missing(schema, "seq_len")
    merged = OmegaConf.merge(
        schema, {"sources": [{"path": "stdlib"}, {"path": "x", "weight": 2}], "tokenizer": "bpe:4096", "seq_len": 64}
    )
    assert OmegaConf.to_object(merged) == DataSettings(
        sources=[Source("stdlib", 1.0), Source("x", 2.0)], tokenizer="bpe:4096", seq_len=64
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seq_len": 0}, r"data\.seq_len must be at least 1, but is 0"),
        ({"holdout": 1.0}, r"data\.holdout must be at least 0 and below 1, but is 1\.0"),
        ({"tokenizer": "bpe:many"}, r"data\.tokenizer must be a tokenizer\.json or bpe:N.*'bpe:many'"),
        ({"tokenizer": "bpe:256"}, r"with N of at least 257"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DataSettings(**{"seq_len": 16, **given})


def test_a_source_needs_a_path_and_a_positive_weight() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\[\]\.weight must be above 0, but is 0"):
        Source("stdlib", 0)
    with pytest.raises(ConfigError, match=r"data\.sources\[\]\.path must not be empty"):
        Source("")


def test_nothing_in_the_data_room_imports_mindspore() -> None:
    program = (
        "import sys; sys.modules['mindspore'] = None\n"
        "import trainer.data.commands, trainer.data.prepare, trainer.data.loader, trainer.data.inspect\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, env={**os.environ})
