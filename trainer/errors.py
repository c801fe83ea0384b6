"""The ways in which a command can end, each with its exit code (README lists them).

0 is success and 1 anything that is not listed here; recipe errors (`models.checks.ConfigError`) are 2.
"""

from __future__ import annotations

from models.checks import ConfigError

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_INPUT = 2
EXIT_MACHINE = 3
EXIT_NOT_FINITE = 16
EXIT_STOPPED = 75
EXIT_STOPPED_AT_ONCE = 130


class BuswayError(Exception):
    """An error that the user is told in one line, without a traceback; `exit_code` says of which kind."""

    exit_code = EXIT_UNEXPECTED


class InputError(BuswayError):
    """A file or argument is wrong: names it, the rule and the remedy."""

    exit_code = EXIT_INPUT


class MachineError(BuswayError):
    """The machine or the launch is wrong: too little memory, no mpiexec, port taken, disk full or read-only."""

    exit_code = EXIT_MACHINE


class NotFiniteError(BuswayError):
    """The loss or the gradient norm is not finite; names the step."""

    exit_code = EXIT_NOT_FINITE


class Stopped(BuswayError):
    """The run was asked to stop by a signal and saved its state."""

    exit_code = EXIT_STOPPED


def exit_code_of(error: BaseException) -> int:
    """The exit code for `error`."""
    if isinstance(error, ConfigError):
        return EXIT_INPUT
    return error.exit_code if isinstance(error, BuswayError) else EXIT_UNEXPECTED
