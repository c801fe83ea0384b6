"""How a configuration says what is wrong with it: the field, the rule, the remedy, in one line.

Every room raises `ConfigError`, and the command line prints its message and exits with code 2.
This module imports nothing but the standard library.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """A value that the user wrote breaks a rule. The message is one line: field, rule, remedy."""


def check(holds: bool, field: str, rule: str, remedy: str) -> None:
    """Raise `ConfigError` naming `field`, `rule` and `remedy` unless `holds`.

    `rule` carries the offending value, as in ``"must be at least 1, but is 0"``.
    """
    if not holds:
        raise ConfigError(f"{field} {rule}; {remedy}")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raise `ConfigError` unless `value` is at least `least`, and finite."""
    check(value >= least, field, f"must be at least {least}, but is {value}", f"set {field}={least} or more")
    check(value < math.inf, field, f"must be finite, but is {value}", f"set {field} to a number of at least {least}")


def check_above(field: str, value: float, bound: float) -> None:
    """Raise `ConfigError` unless `value` is greater than `bound`, and finite."""
    check(value > bound, field, f"must be above {bound}, but is {value}", f"set {field} to a number above {bound}")
    check(value < math.inf, field, f"must be finite, but is {value}", f"set {field} to a number above {bound}")


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`; the remedy names the nearest."""
    choices = list(choices)
    if value not in choices:  # asked first, as it takes long to find the nearest
        remedy = nearest(value, choices, f"set {field} to one of them")
        check(False, field, f"must be one of {', '.join(choices)}, but is {value!r}", remedy)


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A remedy for an unknown `name`: "did you mean X?" or, with nothing close, `otherwise` or the list of `known`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else otherwise or f"known: {', '.join(known)}"


def nearest_divisor(number: int, wish: int, legal: Callable[[int], bool] = lambda divisor: True) -> int:
    """The divisor of `number` closest to `wish` among those that are `legal`, as 1 must be."""
    divisors = (d for d in range(1, number + 1) if number % d == 0 and legal(d))
    return min(divisors, key=lambda d: (abs(d - wish), d))
