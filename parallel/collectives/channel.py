"""Point to point, from the host and between graphs: what the stages of a pipeline send each other."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import prod
from typing import Any

from mindspore import Tensor

from parallel.collectives.interface import Group, Pairs, Transport
from parallel.trace import MESSAGES, Recorder
from parallel.traffic import DTYPE_BYTES

PATIENCE = 300e-6
"""Seconds for which a rank that waits offers its core before it sleeps: any sleep takes longer than most messages."""


class Arrival:
    """A message that was asked for."""

    def __init__(
        self, channel: Channel, arrived: Callable[[], bool], tensor: Callable[[], Tensor], what: str,
        waiting: AbstractContextManager[None],
    ) -> None:  # fmt: skip
        self._channel, self._arrived, self._tensor, self.what = channel, arrived, tensor, what
        self._waiting = waiting
        self._ready = False

    def ready(self) -> bool:
        """Whether `wait` returns at once. Asking moves messages along. HCCL cannot tell and always says yes: there the
        device waits, not the host.
        """
        self._ready = self._ready or self._arrived()
        return self._ready

    def wait(self) -> Tensor:
        """The message. Called once."""
        with self._waiting:
            wait(self.ready)
        self._channel.taken(self)
        return self._tensor()


class Channel:
    """Messages between the `pairs` of a group; a `peer` is a place in the group.

    From one rank to another they arrive in the order in which they were sent and must be asked for in that order. No
    channel waits for another: what two ranks order differently, as activations and gradients, takes two channels.
    Made by `Collectives.Channel`, by all ranks of the group in one order.
    """

    def __init__(self, group: Group, transport: Transport, name: str, pairs: Pairs, recorder: Recorder) -> None:
        self.group, self.name, self.ahead = group, name, transport.ahead
        self._pairs = pairs
        self._recorder = recorder
        self.counts: Counter[tuple[int, str, str]] = Counter()
        """What was sent: of each peer and dtype, ``payload`` bytes and ``calls``."""
        self._transport = transport
        self._sending: list[tuple[Callable[[], bool], Tensor]] = []
        self._asked: list[Arrival] = []
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start to send to `peer`. `tensor` is kept until it has left and must not be written to before."""
        self._check(self.group.place, peer)
        self._release()
        dtype = str(tensor.dtype).lower()
        with self._span("send", peer, tensor.shape, dtype):
            self._sending.append((self._transport.send(tensor, peer), tensor))
        self._sent[peer] += 1
        self.counts[peer, dtype, "payload"] += tensor.size * DTYPE_BYTES[dtype]
        self.counts[peer, dtype, "calls"] += 1

    def receive(self, shape: tuple[int, ...], dtype: Any, peer: int) -> Arrival:
        """Ask for the next message of `peer`, a tensor of `shape` and `dtype` (MindSpore's). Does not wait."""
        self._check(peer, self.group.place)
        name = str(dtype).lower()
        arrived, tensor = self._transport.receive(tuple(shape), name, peer)
        self._received[peer] += 1
        what = f"{name} {list(shape)} from rank {self.group.ranks[peer]}"
        self._asked.append(Arrival(self, arrived, tensor, what, self._span("wait for", peer, shape, name)))
        return self._asked[-1]

    def check_drained(self) -> None:
        """Return when everything has left; all ranks of the group call it.

        Raises RuntimeError, on all of them alike, if messages were sent that nobody asked for, or the other way round,
        or were asked for and not waited for.
        """
        with self._recorder.span(MESSAGES, f"wait for all at the {self.name}s' end"):
            states = self._transport.all_gather((self._sent, self._received, [arrival.what for arrival in self._asked]))
        ranks, wrong = self.group.ranks, []
        for a, (sent, _, asked) in enumerate(states):
            wrong += [f"rank {ranks[a]} did not wait for {what}" for what in asked]
            for b, (_, received, _) in enumerate(states):
                if sent[b] != received[a]:
                    wrong.append(f"rank {ranks[a]} sent {sent[b]} to rank {ranks[b]}, which asked for {received[a]}")
        if wrong:
            raise RuntimeError(f"channel {self.name} over {' x '.join(self.group.axes)}: {'; '.join(wrong)}")
        for left, _ in self._sending:
            wait(left)
        self._sending.clear()

    def taken(self, arrival: Arrival) -> None:
        """`arrival` was waited for."""
        self._asked.remove(arrival)
        self._release()

    def _span(self, what: str, peer: int, shape: tuple[int, ...], dtype: str) -> AbstractContextManager[None]:
        size = prod(shape) * DTYPE_BYTES[dtype]
        return self._recorder.span(
            MESSAGES, f"{what} {self.name}", peer=self.group.ranks[peer], bytes=size, dtype=dtype
        )

    def _check(self, *pair: int) -> None:
        if pair not in self._pairs:
            raise ValueError(f"channel {self.name} carries nothing from place {pair[0]} to place {pair[1]}")

    def _release(self) -> None:
        self._sending = [(left, tensor) for left, tensor in self._sending if not left()]


def wait(done: Callable[[], bool]) -> None:
    """Return when `done`. Another rank's work may take long and needs the core: after `PATIENCE` sleep, ever longer."""
    pause, end = 20e-6, time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() < end:
            os.sched_yield()
        else:
            time.sleep(pause)
            pause = min(1.5 * pause, 1e-3)
