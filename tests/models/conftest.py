from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

SEED = 20


@pytest.fixture
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture
def pynative():
    """Has nothing to compile."""
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def random():
    """`random(shape)`: normal numbers in float64."""
    print(f"seed {SEED}")
    return np.random.default_rng(SEED).standard_normal
