"""Which copies an expert takes that has room for some."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mindspore import Tensor, nn

from models.experts import Capacity
from models.shapes import ExpertsConfig

pytestmark = pytest.mark.usefixtures("graph_mode")
SEED, TOKENS, TOP_K, EXPERTS = 5, 17, 2, 4


class Kept(nn.Cell):
    def __init__(self, moe):
        super().__init__()
        self.capacity = Capacity(moe)

    def construct(self, indices, weights):
        return self.capacity.forward(indices, weights)


@pytest.mark.parametrize("factor", [0.4, 1.0, 4.0])
@pytest.mark.parametrize("drop", ["position", "probability"])
def test_the_first_or_the_most_probable_stay(drop, factor):
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    chance = np.array([0.55, 0.25, 0.15, 0.05])
    indices = np.stack([rng.choice(EXPERTS, TOP_K, replace=False, p=chance) for _ in range(TOKENS)]).astype(np.int32)
    weights = rng.permutation(TOKENS * TOP_K).reshape(TOKENS, TOP_K) / (TOKENS * TOP_K)
    moe = ExpertsConfig(experts=EXPERTS, top_k=TOP_K, ffn=8, capacity=factor, drop=drop)
    found = Kept(moe)(Tensor(indices), Tensor(weights)).asnumpy()

    room = math.ceil(factor * TOKENS * TOP_K / EXPERTS)
    wanted = np.full(indices.size, -1)
    for expert in range(EXPERTS):
        own = np.flatnonzero(indices.reshape(-1) == expert)
        if drop == "probability":
            own = own[np.argsort(-weights.reshape(-1)[own])]
        wanted[own[:room]] = expert
    np.testing.assert_array_equal(found.reshape(-1), wanted)
