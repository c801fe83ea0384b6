"""Tokenizers: Hugging Face `tokenizers` files, and training a byte-level BPE on the run's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.errors import InputError

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
)
"""Names under which published tokenizers keep their end of document, in the order in which they are looked for."""


def train_bpe(documents: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` entries, with `<|endoftext|>` as id 0; the same for the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Names of special tokens that stand in a text are read as text: only the builder ends a document.

    Raises:
        InputError: the file is missing or no tokenizer.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise InputError(f"tokenizer {path} is not a file; give a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(place))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"tokenizer {path} cannot be read ({error}); give a Hugging Face tokenizer.json") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which is what an embedding must have rows for."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_document(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id that ends a document: of the token `name`, or of the first of `END_NAMES` that there is.

    Raises:
        InputError: there is no such token.
    """
    for candidate in END_NAMES if name is None else (name,):
        found = tokenizer.token_to_id(candidate)
        if found is not None:
            return found
    if name is not None:
        raise InputError(f"the tokenizer has no token {name!r}; name one of its own with --end-of-document")
    raise InputError(
        f"the tokenizer has none of the usual end-of-document tokens ({', '.join(END_NAMES)}); "
        "name its own with --end-of-document"
    )
