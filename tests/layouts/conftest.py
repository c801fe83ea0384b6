"""The table of `make layouts`: what each layout was found to differ from one rank by."""

from __future__ import annotations

from pathlib import Path

import pytest

HEAD = """# Every layout trains the same model

Largest relative difference from the one-rank run: of loss and gradient norm over all steps, of the held-out loss and of
the final weights (each tensor's max|difference| / max|value|). The fp64 reference over 10 steps, within 1e-9; fp32 over
20 steps, loss and gradient norm within the larger of 1e-5 and three times the control's (in brackets: the one-rank run
from a start that is perturbed by one rounding). Of a token's experts in a layer and step, how many times the set is
another in fp32, again with the control's. Models are small ones like those that are named. `make layouts` makes this
file.

| ranks | model | layout | keys | loss | grad norm | held-out | weights | fp32 loss | fp32 grad norm | other experts |
|---|---|---|---|---|---|---|---|---|---|---|
"""


class Table:
    """Rows in the order in which layouts were first seen."""

    def __init__(self) -> None:
        self.exact: dict[str, str] = {}
        self.rounded: dict[str, str] = {}

    def fp64(self, entry, found) -> None:
        """Add what a layout was found to differ by in the reference."""
        cells = [str(entry.ranks), entry.kind, entry.name, f"`{entry.keys}`"]
        cells += [f"{found[key]:.0e}" for key in ("loss", "grad_norm", "eval_loss", "weights")]
        self.exact[entry.name] = "| " + " | ".join(cells)

    def fp32(self, entry, found, control) -> None:
        """The same in fp32."""
        cells = [f"{found[key]:.0e} ({control[key]:.0e})" for key in ("loss", "grad_norm")]
        cells.append(f"{found['flipped']} ({control['flipped'].split()[0]})" if found["flipped"] else "")
        self.rounded[entry.name] = " | " + " | ".join(cells) + " |\n"

    def __str__(self) -> str:
        return HEAD + "".join(row + self.rounded.get(name, " | | | |\n") for name, row in self.exact.items())


TABLE = Table()


@pytest.fixture(scope="session")
def table() -> Table:
    return TABLE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", metavar="FILE", help="write the table of layouts there")
    parser.addoption("--seed", type=int, default=1, help="of the layouts that test_random.py draws")
    parser.addoption("--count", type=int, default=1, help="how many layouts test_random.py draws")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if TABLE.exact:
        terminalreporter.write_line(str(TABLE))
        if file := config.getoption("--table", None):
            Path(file).write_text(str(TABLE))
