"""`busway data build` and `busway data inspect`."""

from __future__ import annotations

import argparse
import os

from trainer.data.build import build
from trainer.data.inspect import describe, samples
from trainer.data.sources import STDLIB


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `busway data`; each sets `run`: parsed arguments to exit code."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands)
    _add_inspect(commands)


def _add_build(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "build",
        help="tokenise text into an indexed dataset",
        description="Tokenise text into PREFIX.bin and PREFIX.idx, the indexed format of Megatron-LM. JSONL lines have "
        "the key 'text', or 'prompt' and 'response', of which the response alone is learnt.",
    )
    command.add_argument("paths", nargs="+", metavar="PATH", help=f"a directory, a .txt or .jsonl file, or {STDLIB}")
    command.add_argument("--tokenizer", required=True, metavar="FILE", help="a Hugging Face tokenizer.json")
    command.add_argument("--out", required=True, metavar="PREFIX", help="where to write, without a suffix")
    command.add_argument(
        "--processes",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that tokenise (default: one a CPU, %(default)s here)",
    )
    command.add_argument(
        "--end-of-document", metavar="TOKEN", help="the token that ends a document (default: the usual names)"
    )
    command.add_argument("--glob", default="*", metavar="PATTERN", help="file names to take from directories")
    command.add_argument("--overwrite", action="store_true", help="replace a dataset that is at PREFIX")
    command.set_defaults(run=_build)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "inspect",
        help="statistics and decoded samples of an indexed dataset",
        description="Check an indexed dataset and print its statistics; with a tokenizer, samples of its text as well.",
    )
    command.add_argument("prefix", metavar="PREFIX", help="the dataset, without .bin or .idx")
    command.add_argument("--tokenizer", metavar="FILE", help="the tokenizer.json that it was built with")
    command.add_argument(
        "--samples", type=_positive, default=3, metavar="N", help="documents to decode (default: %(default)s)"
    )
    command.set_defaults(run=_inspect)


def _build(args: argparse.Namespace) -> int:
    build(args.paths, args.tokenizer, args.out, args.processes, args.end_of_document, args.glob, args.overwrite)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    print(describe(args.prefix))
    if args.tokenizer:
        for sample in samples(args.prefix, args.tokenizer, args.samples):
            print(sample)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return int(text)
