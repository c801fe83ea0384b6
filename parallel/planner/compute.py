"""What one pass of a layer computes on one rank, in seconds, and what it moves over tp, cp and ep.

A matmul takes its FLOPs at the reachable rate and its operands at the memory's, one after the other: small or narrow
ones are slower by that. Backward, each half of a linear (input and weight gradient) costs what forward does; attention
and passes over memory belong to the input's half.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from parallel.planner.communication import Network
from parallel.planner.constants import Constants
from parallel.planner.machine import Machine, expert_factors, factors
from parallel.planner.shape import RECOMPUTE, Candidates, Column, Shape

FLASH_BACKWARD = 2.5
"""Attention's backward over its forward, which it runs again (FlashAttention-2, arXiv 2307.08691)."""

TERMS = ("matmul", "attention", "passes", "kernels", "tp", "cp", "ep")


@dataclass
class Pass:
    """Seconds of one pass of one kind by `TERMS`; what is hidden is not in it."""

    seconds: dict[str, Column] = field(default_factory=dict)

    def add(self, term: str, value: Column) -> None:
        self.seconds[term] = self.seconds.get(term, 0.0) + value

    @property
    def total(self) -> Column:
        return sum(self.seconds.values(), 0.0)


@dataclass
class Passes:
    """Of one kind of segments: the forward, and the two halves of the backward."""

    forward: Pass = field(default_factory=Pass)
    input: Pass = field(default_factory=Pass)
    weight: Pass = field(default_factory=Pass)
    core: Column = 0.0
    """Of the forward, attention's core, which `selective` recompute runs again."""


def matmul_seconds(
    machine: Machine, constants: Constants, rows: Column, into: Column, out: Column, share: float | Column = 1.0
) -> Column:
    """[rows, into] times [into, out]; `share` of the reachable rate."""
    flops = 2 * rows * into * out / (machine.flops * constants.matmul * share)
    moved = constants.item_bytes * (rows * into + into * out + rows * out)
    return flops + moved / (machine.memory_bandwidth * constants.memory)


class Compute:
    """Prices the passes of every kind of a model's segments under columns of layouts."""

    def __init__(
        self, shape: Shape, seq_len: Column, candidates: Candidates, machine: Machine, constants: Constants
    ) -> None:
        self.shape, self.seq_len, self.candidates, self.constants = shape, seq_len, candidates, constants
        self.machine, self.network = machine, Network(machine, constants, least=candidates.order is None)
        c = candidates
        self.tokens = c.micro_batch * seq_len / c.cp
        """Of a micro-batch on one rank, before tp cuts them."""
        self.stream = np.where(c.sequence_parallel, self.tokens / c.tp, self.tokens)
        """Tokens between blocks."""
        self.tp_group = self.network.group(factors(c, ("tp",)))

    def matmul(self, rows: Column, into: Column, out: Column, share: float | Column = 1.0) -> Column:
        """[rows, into] times [into, out]; `share` of the reachable rate."""
        return matmul_seconds(self.machine, self.constants, rows, into, out, share)

    def memory_pass(self, elements: Column, item: Column | None = None) -> Column:
        """Reading and writing `elements` numbers, of `item` bytes where they are not what linears take."""
        constants = self.constants
        moved = elements * (constants.item_bytes if item is None else item) * constants.passes
        return moved / (self.machine.memory_bandwidth * constants.memory)

    def linear(self, passes: Passes, rows: Column, into: Column, out: Column, share: float | Column = 1.0) -> None:
        """A matrix, forward and both halves backward."""
        seconds = self.matmul(rows, into, out, share)
        for each in (passes.forward, passes.input, passes.weight):
            each.add("matmul", seconds)

    def layer(self, sparse: bool) -> Passes:
        """A decoder layer, without or with experts."""
        passes = Passes()
        self.attention(passes)
        if sparse:
            self.experts(passes)
        else:
            self.linear(passes, self.tokens, self.shape.hidden, self.shape.gates * self.shape.ffn / self.candidates.tp)
            self.linear(passes, self.tokens, self.shape.ffn / self.candidates.tp, self.shape.hidden)
            gates = self.memory_pass(self.tokens * (self.shape.gates + 1) * self.shape.ffn / self.candidates.tp)
            passes.forward.add("passes", gates)
            passes.input.add("passes", 2 * gates)
        passed = self.stream * self.shape.hidden * (10 + 4 * np.asarray(self.shape.sandwich))
        norms = self.memory_pass(passed, self.constants.stream_bytes)
        passes.forward.add("passes", norms)
        passes.input.add("passes", 1.5 * norms)
        for each, share in ((passes.forward, 1.0), (passes.input, 1.0), (passes.weight, 0.5)):
            each.add("kernels", self.constants.kernel * share)
        s = self.shape
        entered = np.where(np.asarray(s.q_rank) > 0, 0, s.hidden)  # latent attention is entered by its latents
        latents = np.where(np.asarray(s.kv_rank) > 0, s.q_rank + s.kv_rank + s.rope, 0)
        block = np.where(s.shared, s.hidden, 0) if sparse else s.hidden  # routed rows are dispatched
        self.tensor(passes, entered + block, latents, s.hidden + block, 2)
        self.host(passes)
        return passes

    def attention(self, passes: Passes) -> None:
        """Projections, and the core: causal, so that on average half of the keys count."""
        s, c, rows = self.shape, self.candidates, self.tokens
        latent = np.asarray(s.kv_rank) > 0
        keys = np.maximum(s.kv_heads / c.tp, 1) * s.head_dim
        dense = self.matmul(rows, s.hidden, s.query / c.tp + 2 * keys)
        queries = np.where(
            np.asarray(s.q_rank) > 0,
            self.matmul(rows, s.hidden, s.q_rank) + self.matmul(rows, s.q_rank, s.query / c.tp),
            self.matmul(rows, s.hidden, s.query / c.tp),
        )
        narrow = queries + self.matmul(rows, s.hidden, s.kv_rank + s.rope)
        narrow = narrow + self.matmul(rows, s.kv_rank, s.heads * (s.nope + s.value) / c.tp)
        seconds = np.where(latent, narrow, dense) + self.matmul(rows, s.values / c.tp, s.hidden)
        for each in (passes.forward, passes.input, passes.weight):
            each.add("matmul", seconds)
        width = (s.query + s.values) / c.tp
        core = rows * self.seq_len * width / (self.machine.flops * self.constants.attention)
        turned = self.memory_pass(rows * 2 * (s.query / c.tp + 2 * keys))
        matrix = rows * self.seq_len * s.heads / c.tp * self.constants.scores * self.constants.item_bytes
        core = core + matrix / (self.machine.memory_bandwidth * self.constants.memory)
        passes.core = core
        passes.forward.add("attention", core)
        passes.input.add("attention", FLASH_BACKWARD * core)
        passes.forward.add("passes", turned)
        passes.input.add("passes", turned)
        self.context(passes, core, keys)

    def context(self, passes: Passes, core: Column, keys: Column) -> None:
        """Rings pass keys and values on beside attention's core; Ulysses exchanges heads before and behind it."""
        s, c, item = self.shape, self.candidates, self.constants.item_bytes
        inside, places = c.ulysses, c.cp // c.ulysses
        keys = np.where(np.asarray(s.kv_rank) > 0, s.query / c.tp, keys)
        share = np.maximum(keys / inside, np.minimum(s.head_dim, keys))
        (size, stride) = factors(c, ("cp",))[0]
        near = self.network.group([(np.minimum(inside, size), stride)])
        outputs = self.constants.stream_bytes * s.query / c.tp
        moved = self.tokens * (item * (s.query / c.tp + 2 * inside * share) + outputs)
        heads = np.where(inside > 1, self.network.all_to_all(moved, near, 2), 0.0)
        level = self.network.level_between(stride * inside, np.maximum(places - 2, 0))
        block = item * self.tokens * inside * 2 * share
        one = np.where(places > 1, self.network.message(block, level), 0.0)
        ring = (places - 1) * one
        hidden = self.constants.hide_cp
        passes.forward.add("cp", heads + np.maximum(ring - core, ring * (1 - hidden)))
        backward = 2 * ring + one  # with their gradients, which go on once more
        passes.input.add("cp", heads + np.maximum(backward - FLASH_BACKWARD * core, backward * (1 - hidden)))

    def experts(self, passes: Passes) -> None:
        """Router, dispatch, the experts that a rank holds on the rows that it gets, shared experts."""
        s, c, k = self.shape, self.candidates, self.constants
        own = self.tokens / c.tp
        copies = own * s.top_k * k.imbalance * c.etp
        width = s.expert_ffn / c.etp
        held = np.maximum(s.experts / c.ep, 1)
        moved = k.item_bytes * held * (s.gates + 1) * s.hidden * width
        weights = moved / (self.machine.memory_bandwidth * k.memory)  # every expert's are read, however few its rows
        self.linear(passes, own, s.hidden, s.experts)
        for into, out in ((s.hidden, s.gates * width), (width, s.hidden)):
            self.linear(passes, copies, into, out, k.experts)
        for each in (passes.forward, passes.input, passes.weight):
            each.add("matmul", weights)
        shared = s.shared * s.expert_ffn / c.tp
        self.linear(passes, self.tokens, s.hidden, s.gates * shared)
        self.linear(passes, self.tokens, shared, s.hidden)
        rows = self.memory_pass(copies * (4 * s.hidden + (s.gates + 1) * width) + own * 2 * s.experts)
        passes.forward.add("passes", rows)
        passes.input.add("passes", 2 * rows)
        for each in (passes.forward, passes.input):
            each.add("kernels", k.kernel)
        self.dispatch(passes, copies)

    def dispatch(self, passes: Passes, copies: Column) -> None:
        """Rows go to their experts and back, in either direction of the pass; with tp without sequence parallelism each
        rank's share is gathered behind."""
        s, c, k = self.shape, self.candidates, self.constants
        group = self.network.group(expert_factors(c, "ep"))
        there = self.network.all_to_all(k.item_bytes * copies * s.hidden, group)
        for each, item in ((passes.forward, k.item_bytes), (passes.input, k.stream_bytes)):
            gathered = self.network.half(item * self.tokens * s.hidden, self.tp_group)
            each.add("ep", 2 * there * (1 - k.hide_ep))
            each.add("tp", np.where(c.sequence_parallel, 0.0, gathered) * (1 - k.hide_tp))

    def tensor(self, passes: Passes, entered: Column, latents: Column, left: Column, calls: int) -> None:
        """Blocks are entered with `entered` numbers a token, and with `latents`, and left with `left`, in `calls`
        messages each way.

        Where they are left forward, and entered backward, ranks sum; gradients of the stream in its own precision. With
        sequence parallelism a sum is a reduce-scatter, and its transpose an all-gather; what was entered is gathered
        once more for the weights' gradients.
        """
        c, k = self.candidates, self.constants
        item, stream = k.item_bytes, k.stream_bytes
        enter, summed, leave = (
            self.network.half(self.tokens * size, self.tp_group, calls) * (1 - k.hide_tp)
            for size in (item * (entered + latents), stream * entered + item * latents, item * left)
        )
        passes.forward.add("tp", np.where(c.sequence_parallel, enter + leave, 2 * leave))
        passes.input.add("tp", np.where(c.sequence_parallel, summed + leave, 2 * summed))
        passes.weight.add("tp", np.where(c.sequence_parallel, enter, 0.0))

    def host(self, passes: Passes) -> None:
        """Where a host launches kernels more slowly than they run, the pass takes as long as it needs."""
        c, k = self.candidates, self.constants
        least = k.host + k.host_tp * np.where(np.asarray(c.tp) > 1, c.tp, 0)
        for each in (passes.forward, passes.input, passes.weight):
            each.add("kernels", np.maximum(least - each.total, 0.0))

    def embedding(self) -> Passes:
        """Rows looked up, and summed over tp."""
        passes, k = Passes(), self.constants
        rows = self.memory_pass(self.tokens * 2 * self.shape.hidden, k.stream_bytes)
        size = k.stream_bytes * self.tokens * self.shape.hidden
        passes.forward.add("passes", rows)
        passes.weight.add("passes", 2 * rows)
        passes.forward.add("tp", 2 * self.network.half(size, self.tp_group) * (1 - k.hide_tp))
        return passes

    def head(self) -> Passes:
        """The last norm, logits and their loss, in fp32; modules of multi-token prediction add a layer and a head."""
        passes, s, c, k = Passes(), self.shape, self.candidates, self.constants
        heads = 1 + np.asarray(s.further)
        self.linear(passes, self.tokens * heads, s.hidden, s.vocab / c.tp)
        moved = np.maximum(4, k.stream_bytes) * self.tokens * heads * 2 * s.vocab / c.tp * k.logit_passes
        logits = moved / (self.machine.memory_bandwidth * k.memory)
        passes.forward.add("passes", logits)
        passes.input.add("passes", logits)
        self.tensor(passes, s.hidden * heads, 0, 0, 1)
        return passes

    def passes(self, sparse: bool = True) -> dict[str, Passes]:
        """Of each of `shape.KINDS`; without experts in the model no `sparse`."""
        found = {"embedding": self.embedding(), "dense": self.layer(False), "head": self.head()}
        if sparse:
            found["sparse"] = self.layer(True)
        if np.any(self.shape.further):
            behind = found["sparse" if sparse else "dense"]
            for name in ("forward", "input", "weight"):
                for term, seconds in getattr(behind, name).seconds.items():
                    getattr(found["head"], name).add(term, self.shape.further * seconds)
        return found

    @staticmethod
    def again(passes: Passes, code: Column) -> Column:
        """What a recompute (index into `RECOMPUTE`) runs again of a layer's forward."""
        full, selective = (np.asarray(code) == RECOMPUTE.index(name) for name in ("full", "selective"))
        return np.where(full, passes.forward.total, np.where(selective, passes.core, 0.0))
