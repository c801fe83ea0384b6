"""The command line: subcommands, and errors as one line and an exit code. No MindSpore until ranks run."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from importlib.metadata import version

from models.checks import ConfigError
from trainer import convert, explain, plan, report, topology, train
from trainer.data import commands as data
from trainer.errors import EXIT_DONE, EXIT_STOPPED_AT_ONCE, BuswayError, exit_code_of

EXIT_CODES = """exit codes:
  0    done
  2    the recipe or an input is wrong
  3    the machine or the launch is wrong
  16   the loss is not finite
  75   stopped by a signal after saving
  130  stopped at once by a second signal
  1    anything else
"""


def parser() -> argparse.ArgumentParser:
    """The parser of `busway`."""
    busway = argparse.ArgumentParser(
        prog="busway",
        description="Train large language models on Ascend supernodes with MindSpore, or small ones on this CPU.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    busway.add_argument("--version", action="version", version=f"busway {version('busway')}")
    commands = busway.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.register(commands.add_parser("train", help="run a recipe; without arguments the built-in small one"))
    plan.register(commands.add_parser("plan", help="search for the best layout of a recipe on a machine"))
    explain.register(commands.add_parser("explain", help="what one layout costs, and why; its pipeline's timeline"))
    topology.register(commands.add_parser("topology", help="draw the machine that a layout is placed on"))
    report.register(commands.add_parser("report", help="what a run measured, beside what is predicted of it"))
    data.register(commands.add_parser("data", help="build and inspect datasets"))
    convert.register(commands.add_parser("convert", help="convert weights from and to Hugging Face's format"))
    return busway


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    busway = parser()
    # argparse takes no positional after an option once the first are taken: `train tiny_dense --cfg job lr=constant`.
    args, rest = busway.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        busway.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        return args.run(args)
    except (ConfigError, BuswayError) as error:
        print(f"busway: {error}", file=sys.stderr)
        return exit_code_of(error)
    except BrokenPipeError:  # `busway … | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        return EXIT_STOPPED_AT_ONCE
    except Exception as error:
        traceback.print_exc()
        return exit_code_of(error)
