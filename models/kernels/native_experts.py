"""The kernels of experts in C++; see `models.kernels.native`, and `plain_experts`, which defines them."""

from __future__ import annotations

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from models.kernels.native import operator
from models.kernels.plain_experts import Rule


class Routing(nn.Cell):
    """See `plain_experts.Routing`."""

    def __init__(self, rule: Rule, part: tuple[int, int] = (0, 1)) -> None:
        super().__init__(auto_prefix=False)
        flags = (rule.groups, rule.top_groups, rule.sigmoid, rule.normalise, rule.uniform, rule.scale, part[0])
        self.row = Tensor([float(value) for value in flags], mstype.float64)

        def outputs(logits, bias, row, cos):
            tokens, experts = logits
            return [tokens, rule.top_k], [tokens, rule.top_k], [tokens * part[1] // cos[0], 2 * experts], [1]

        def dtypes(logits, *_):
            return mstype.int32, logits, logits, logits

        self.run_forward = operator("routing", outputs, dtypes)
        self.run_backward = operator("routing_backward", _first, _first)

    def forward(self, logits, bias, cos):
        return self.run_forward(logits, bias, self.row, cos)

    def backward(self, logits, indices, dweights, dmass, cos):
        return self.run_backward(logits, indices, dweights, dmass, self.row, cos)


class SortPlaces(nn.Cell):
    """See `plain_experts.SortPlaces`."""

    def __init__(self, buckets: int) -> None:
        super().__init__(auto_prefix=False)
        self.numbers = Tensor(list(range(buckets)), mstype.int32)

        def outputs(keys, *_):
            return keys, [buckets]

        self.run = operator("sort_places", outputs, lambda keys, *_: (keys, keys))

    def forward(self, keys, bounds):
        return self.run(keys, bounds, self.numbers)


class Rows(nn.Cell):
    """See `plain_experts.Rows`."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.run_spread = operator("spread_rows", lambda x, places: [places[0], x[1]], _first)
        self.run_collect = operator("collect_rows", _third, _first)
        self.run_take = operator("take_rows", lambda rows, places: [places[0], rows[1]], _first)

    def spread(self, x, places):
        return self.run_spread(x, places)

    def collect(self, rows, places, like):
        return self.run_collect(rows, places, like)

    def take(self, rows, places):
        return self.run_take(rows, places)


class GroupedMatmul(nn.Cell):
    """See `plain_experts.GroupedMatmul`. Floats are multiplied by oneDNN, doubles by loops."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.run_forward = operator("grouped_matmul", lambda x, w, ends: [x[0], w[0] // ends[0]], _first)
        self.run_input = operator("grouped_matmul_input", lambda dy, w, _: [dy[0], w[1]], _first)
        self.run_weight = operator("grouped_matmul_weight", lambda dy, x, ends: [ends[0] * dy[1], x[1]], _first)

    def forward(self, x, w, ends):
        return self.run_forward(x, w, ends)

    def backward_input(self, dy, w, ends):
        return self.run_input(dy, w, ends)

    def backward_weight(self, dy, x, ends):
        return self.run_weight(dy, x, ends)


class ExpertSwiGLU(nn.Cell):
    """See `plain_experts.ExpertSwiGLU`."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)

        def half(gate_up, *_):
            return [gate_up[0], gate_up[1] // 2]

        def gradients(gate_up, weight, ends, dy):
            return gate_up, weight, dy

        self.run_forward = operator("expert_swiglu", half, _first)
        self.run_backward = operator("expert_swiglu_backward", gradients, lambda x, *_: (x, x, x))

    def forward(self, gate_up, weight, ends):
        return self.run_forward(gate_up, weight, ends)

    def backward(self, gate_up, weight, ends, dy):
        return self.run_backward(gate_up, weight, ends, dy)


def _first(first, *_):
    return first


def _third(_, __, third):
    return third
