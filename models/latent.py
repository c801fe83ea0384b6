"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) as one segment with others inside.

Queries come from a narrow latent of their own, keys and values of all heads from another. A head's keys have a part
that comes from the latent and does not turn, and one that turns, which all heads share. Heads are as wide as both
together; values, which may be narrower, are filled up with zeros on their way through attention.

Shape suffixes: T tokens, H hidden, N heads, D = nope + rope dims of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import ops

from models.attention import Heads, SelfAttention
from models.config import ModelConfig
from models.kernels import Kernels
from models.layers import Linear, Norm
from models.segments import COS, SIN, Chain, Residual, Segment
from models.shapes import LatentConfig
from models.weights import weights_of


class SharedKey(Segment):
    """The part of the keys that all heads share, as it is; where heads lie on several ranks, more happens here."""

    def forward(self, x, weights, context):
        """The identity."""
        return x, ()

    def backward_input(self, dy, saved, weights, context):
        """The identity."""
        return dy, ()


class LatentAttention(Chain):
    """x_TH to the heads' values [T, N value].

    `segments` are, in the order of their weights: queries [T, N D] from x; latent and shared key [T, kv_rank + rope]
    from x; keys and values [T, N (nope + value)] from the latent; the shared key; and attention over packed q, k and v.
    """

    def __init__(self, segments: Sequence[Segment], latent: LatentConfig) -> None:
        super().__init__(segments)
        self.latent = latent
        self.queries, self.down, self.up, self.shared, self.attention = segments
        self.width = latent.nope + latent.rope

    def rebuilt(self, segments: Sequence[Segment]) -> LatentAttention:
        """The same around other segments."""
        return LatentAttention(segments, self.latent)

    def forward(self, x, weights, context):
        """Saves what its segments save."""
        q, saved_q = self.queries.forward(x, self._of(weights, 0), context)
        low, saved_down = self.down.forward(x, self._of(weights, 1), context)
        kv, saved_up = self.up.forward(low[:, : self.latent.kv_rank], self._of(weights, 2), context)
        key, saved_key = self.shared.forward(low[:, self.latent.kv_rank :], self._of(weights, 3), context)
        packed = self.pack(q, kv, key, context)
        o, saved_o = self.attention.forward(packed, (), self.unturned(context, packed))
        values = o.reshape((o.shape[0], -1, self.width))[:, :, : self.latent.value]
        return values.reshape((o.shape[0], -1)), saved_q + saved_down + saved_up + saved_key + saved_o

    def backward_input(self, dy, saved, weights, context):
        """Keeps what its segments keep."""
        do = self.filled(dy.reshape((dy.shape[0], -1, self.latent.value))).reshape((dy.shape[0], -1))
        dpacked, kept_o = self.attention.backward_input(do, self._saved(saved, 4), (), self.unturned(context, dy))
        dq, dkv, dkey = self.unpack(dpacked, context)
        dkey, kept_key = self.shared.backward_input(dkey, self._saved(saved, 3), self._of(weights, 3), context)
        dlatent, kept_up = self.up.backward_input(dkv, self._saved(saved, 2), self._of(weights, 2), context)
        dlow = ops.concat((dlatent, dkey), 1)
        dx, kept_down = self.down.backward_input(dlow, self._saved(saved, 1), self._of(weights, 1), context)
        more, kept_q = self.queries.backward_input(dq, self._saved(saved, 0), self._of(weights, 0), context)
        return dx + more, kept_q + kept_down + kept_up + kept_key + kept_o

    def pack(self, q, kv, key, context):
        """q [T, N D], kv [T, N (nope + value)], key [T, rope] -> [T, 3 N D], turned."""
        tokens, latent = q.shape[0], self.latent
        q = q.reshape((tokens, -1, self.width))
        kv = kv.reshape((tokens, -1, latent.nope + latent.value))
        heads = q.shape[1]
        turned = self.turn(q[:, :, latent.nope :], context[COS], context[SIN])
        key = self.turn(key.reshape((tokens, 1, -1)), context[COS], context[SIN])
        q = ops.concat((q[:, :, : latent.nope], turned), 2)
        k = ops.concat((kv[:, :, : latent.nope], ops.broadcast_to(key, (tokens, heads, latent.rope))), 2)
        return ops.concat((q, k, self.filled(kv[:, :, latent.nope :])), 1).reshape((tokens, -1))

    def unpack(self, dpacked, context):
        """The transpose of `pack`: -> (dq, dkv, dkey)."""
        tokens, latent = dpacked.shape[0], self.latent
        parts = dpacked.reshape((tokens, -1, self.width))
        heads = parts.shape[1] // 3
        dq, dk, dv = parts[:, :heads], parts[:, heads : 2 * heads], parts[:, 2 * heads :]
        turned = self.turn_back(dq[:, :, latent.nope :], context[COS], context[SIN])
        dq = ops.concat((dq[:, :, : latent.nope], turned), 2).reshape((tokens, -1))
        dkey = dk[:, :, latent.nope :].sum(1).reshape((tokens, 1, -1))
        dkey = self.turn_back(dkey, context[COS], context[SIN]).reshape((tokens, -1))
        dkv = ops.concat((dk[:, :, : latent.nope], dv[:, :, : latent.value]), 2).reshape((tokens, -1))
        return dq, dkv, dkey

    def turn(self, x, cos, sin):
        """x [T, n, rope] with its neighbouring dims 2i and 2i + 1 turned, which then stand half of rope apart."""
        first, second = ops.unstack(x.reshape((-1, cos.shape[0], x.shape[1], cos.shape[1], 2)), -1)
        c, s = cos.reshape((1, -1, 1, cos.shape[1])), sin.reshape((1, -1, 1, cos.shape[1]))
        return ops.cast(ops.concat((first * c - second * s, second * c + first * s), 3).reshape(x.shape), x.dtype)

    def turn_back(self, dy, cos, sin):
        """The transpose of `turn`."""
        half = cos.shape[1]
        dy4 = dy.reshape((-1, cos.shape[0], dy.shape[1], 2 * half))
        first, second = dy4[:, :, :, :half], dy4[:, :, :, half:]
        c, s = cos.reshape((1, -1, 1, half)), sin.reshape((1, -1, 1, half))
        return ops.cast(ops.stack((first * c + second * s, second * c - first * s), -1).reshape(dy.shape), dy.dtype)

    def filled(self, values):
        """[T, N, value] to [T, N, D] with zeros."""
        missing = self.width - self.latent.value
        if missing == 0:
            return values
        return ops.concat((values, ops.zeros((values.shape[0], values.shape[1], missing), values.dtype)), 2)

    def unturned(self, context, like):
        """The context for attention that turns nothing: angles of 0."""
        shape = (context[COS].shape[0], self.width // 2)
        return context[:COS] + (ops.ones(shape, context[COS].dtype), ops.zeros(shape, context[COS].dtype))

    def _of(self, weights, i):
        start, stop = self.weight_spans[i]
        return weights[start:stop]

    def _saved(self, saved, i):
        start, stop = self.saved_spans[i]
        return saved[start:stop]


def latent_block(config: ModelConfig, layer: int, kernels: Kernels, rounding: str) -> Residual:
    """norm, latent attention, output projection, around a skip connection."""
    latent, specs = config.latent, {spec.name.split(".", 2)[2]: spec for spec in config.layer_parameters(layer)}

    def linear(name: str) -> Linear:
        return Linear(weights_of([specs[f"attention.{name}_proj.weight"]]), rounding, kernels)

    def norm(name: str) -> Norm:
        return Norm(weights_of([specs[f"{name}_norm.weight"]]), config.norm_eps, kernels)

    temperature = config.rope_scaling.temperature(config.rope_scaling.mscale_all_dim) ** 2
    heads = Heads(config.heads, config.heads, latent.nope + latent.rope, temperature)
    queries = Chain([linear("q_a"), norm("attention.q_a"), linear("q_b")] if latent.q_rank else [linear("q")])
    parts = [queries, linear("kv_a"), Chain([norm("attention.kv_a"), linear("kv_b")])]
    attention = LatentAttention([*parts, SharedKey(), SelfAttention(heads, kernels)], latent)
    return Residual([norm("attention"), attention, linear("o")])
