"""The `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.checks import check, check_above, check_at_least

LEAST_BPE = 257
"""A byte-level vocabulary holds all 256 bytes and one end-of-document token."""


@dataclass
class Source:
    """One text of the blend."""

    path: str
    """Prefix of a built dataset, a directory, a .txt or .jsonl file, or `stdlib` (Python's standard library)."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources' weights."""

    def __post_init__(self) -> None:
        check(bool(self.path), "data.sources[].path", "must not be empty", "name a dataset prefix or a text file")
        check_above("data.sources[].weight", self.weight, 0)


@dataclass(kw_only=True)
class DataSettings:
    """What a run trains on."""

    sources: list[Source] = field(default_factory=list)
    """Paths and weights of the texts: `[{path: PREFIX, weight: 1.0}, …]`; empty means that you give your own."""
    tokenizer: str | None = None
    """A tokenizer.json, or `bpe:N` to train a byte-level BPE of N entries on the sources, which must be raw text."""
    seq_len: int
    """Tokens of one sample."""
    mask_documents: bool = False
    """Stop attention and loss at document boundaries within a sample."""
    holdout: float = 0.02
    """Share of the tokens kept out of training, for evaluation: whole documents, or a lone one's end; 0: none."""

    def __post_init__(self) -> None:
        check_at_least("data.seq_len", self.seq_len, 1)
        check(
            0 <= self.holdout < 1,
            "data.holdout",
            f"must be at least 0 and below 1, but is {self.holdout}",
            "set it to the share of the tokens to keep out of training, as in data.holdout=0.02",
        )
        size = self.bpe_entries
        check(
            size is None or size >= LEAST_BPE,
            "data.tokenizer",
            f"must be a tokenizer.json or bpe:N with N of at least {LEAST_BPE}, but is {self.tokenizer!r}",
            "set it as in data.tokenizer=bpe:4096",
        )

    @property
    def bpe_entries(self) -> int | None:
        """N of ``bpe:N``; None for a file or nothing, 0 where N is not a number."""
        if self.tokenizer is None or not self.tokenizer.startswith("bpe:"):
            return None
        digits = self.tokenizer.removeprefix("bpe:")
        return int(digits) if digits.isdecimal() else 0
