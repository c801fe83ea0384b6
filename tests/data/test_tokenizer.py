"""Tokenizers: the BPE trained here, and what is said about files that are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from trainer.data.sources import text_files
from trainer.data.tokenizer import END_OF_TEXT, end_of_document, load_tokenizer, train_bpe, vocab_size
from trainer.errors import InputError


def test_a_trained_tokenizer_gives_every_text_back() -> None:
    texts = [document.text for document in text_files("stdlib")][:20]
    tokenizer = train_bpe(texts, 1000)
    assert vocab_size(tokenizer) == 1000
    for text in (*texts[:3], "naïve 漢字 🚌\n\ttabs  and   spaces", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_is_the_same_in_another_process_with_another_number_of_threads() -> None:
    program = (
        "import hashlib\n"
        "from trainer.data.sources import text_files\n"
        "from trainer.data.tokenizer import train_bpe\n"
        "texts = [document.text for document in text_files('stdlib')][:40]\n"
        "print(hashlib.sha256(train_bpe(texts, 2000).to_str().encode()).hexdigest())\n"
    )
    made = {
        subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={"RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(made) == 1


def test_a_special_tokens_name_in_a_text_is_text(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    ids = tokenizer.encode(f"a {END_OF_TEXT} b").ids
    assert end_of_document(tokenizer) not in ids
    assert tokenizer.decode(ids) == f"a {END_OF_TEXT} b"


def test_a_file_that_is_no_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json is not a file; give a tokenizer\.json"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match=r"bad\.json cannot be read \(.*\); give a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


@pytest.mark.parametrize("name", ["<|end_of_text|>", "</s>", "<|im_end|>", "<eos>"])
def test_the_end_of_document_is_found_by_its_usual_names(name: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "y": 1, name: 2}, "x"))
    assert end_of_document(tokenizer) == 2
    assert end_of_document(tokenizer, "y") == 1


def test_no_end_of_document_is_an_error_that_names_the_option() -> None:
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, "x"))
    with pytest.raises(InputError, match="none of the usual end-of-document tokens.*--end-of-document"):
        end_of_document(tokenizer)
    with pytest.raises(InputError, match="no token '<bye>'.*--end-of-document"):
        end_of_document(tokenizer, "<bye>")


def test_the_vocabulary_counts_to_the_largest_id_where_ids_have_holes() -> None:
    assert vocab_size(Tokenizer(models.WordLevel({"x": 0, "y": 9}, "x"))) == 10
