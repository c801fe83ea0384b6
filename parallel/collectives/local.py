"""The backend of a world of one rank: no communicator, no operator, nobody to abort, nothing to account for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class LocalWorld:
    """The world of one rank. See `parallel.collectives.interface.World`."""

    rank = 0
    size = 1

    def broadcast(self, value: Any, root: int = 0) -> Any:
        return value

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def reduce_max(self, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, np.float64)


class LocalBackend:
    """Never asked for an operator or a transport, since every group has one rank."""

    note = "local"
    dtypes = ()
    timed = True

    def __init__(self) -> None:
        self.world = LocalWorld()
