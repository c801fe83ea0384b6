"""The `launcher` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from models.checks import check, check_at_least, check_choice

KINDS = ("auto", "mpi", "msrun", "none")


@dataclass
class LauncherSettings:
    """How the ranks of a run are started. What is left out comes from the scheduler's variables."""

    kind: str = "auto"
    """`mpi` (CPU), `msrun` (Ascend), `none` (a launcher such as srun has started this process as a rank), or `auto`."""
    ranks: int | None = None
    """Ranks of the whole run, one a die; left out, it follows from the layout."""
    nodes: int | None = None
    """Machines that take part; each runs one `busway train`."""
    node_rank: int | None = None
    """This machine's number among the nodes, from 0."""
    master_addr: str | None = None
    """Address of node 0, as the other nodes reach it."""
    master_port: int | None = None
    """Port on node 0 where the ranks meet; 8118 if left out."""

    def __post_init__(self) -> None:
        check_choice("launcher.kind", self.kind, KINDS)
        if self.ranks is not None:
            check_at_least("launcher.ranks", self.ranks, 1)
        if self.nodes is not None:
            check_at_least("launcher.nodes", self.nodes, 1)
        if self.node_rank is not None:
            check_at_least("launcher.node_rank", self.node_rank, 0)
        if self.master_addr is not None:
            check(bool(self.master_addr), "launcher.master_addr", "must not be empty", "name node 0, or leave it out")
        if self.master_port is not None:
            check(
                1024 <= self.master_port <= 65535,
                "launcher.master_port",
                f"must be between 1024 and 65535, but is {self.master_port}",
                "leave it out for 8118",
            )
