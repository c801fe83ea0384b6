"""The shapes of one model, and what follows from them: parameters and FLOPs. No MindSpore here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from models.checks import check, check_above, check_at_least, check_choice

FLOPS_CONVENTION = (
    "6 per matmul parameter and token (embedding look-up not counted), causal attention counted once "
    "(half of s squared), recompute not counted"
)


@dataclass
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was first trained on."""

    kind: str = "none"
    """`none`, or `llama3`: Llama 3.1's piecewise scaling by wavelength."""
    factor: float = 8.0
    """How much longer the low frequencies' wavelengths become."""
    low_freq_factor: float = 1.0
    """Wavelengths above `original_length / low_freq_factor` are scaled by the whole factor."""
    high_freq_factor: float = 4.0
    """Wavelengths below `original_length / high_freq_factor` are left alone; between the two they blend."""
    original_length: int = 8192
    """The context length, in tokens, of the first training."""

    def __post_init__(self) -> None:
        check_choice("model.rope_scaling.kind", self.kind, ("none", "llama3"))
        check_at_least("model.rope_scaling.factor", self.factor, 1)
        check_at_least("model.rope_scaling.original_length", self.original_length, 1)
        check(
            self.high_freq_factor > self.low_freq_factor,
            "model.rope_scaling.high_freq_factor",
            f"must be above low_freq_factor {self.low_freq_factor}, but is {self.high_freq_factor}",
            "the published pair is 4 and 1",
        )


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter as checkpoints name it, whatever the layout: its name, global shape and start."""

    name: str
    shape: tuple[int, ...]
    init: str
    """`normal` (standard deviation `model.init_std`), `ones` or `zeros`."""

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices; norms and biases are left alone."""
        return len(self.shape) > 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class ModelConfig:
    """A decoder-only transformer: grouped-query attention with rotary positions, RMSNorm before each block, SwiGLU."""

    layers: int
    """Number of decoder layers."""
    hidden: int
    """Width of the residual stream."""
    ffn: int
    """Width of the feed-forward block's gate and up projections."""
    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key and value heads; must divide `heads`."""
    vocab: int
    """Number of entries of the embedding and the head."""
    head_dim: int | None = None
    """Width of one head; left out, `hidden / heads`."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """Stretching of the rotary frequencies; see its own keys."""
    norm_eps: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys, as in Qwen3."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections, as in Qwen2."""
    tied_embeddings: bool = False
    """The head shares the embedding's weights."""
    max_length: int = 8192
    """The longest sequence that the model is meant for; `data.seq_len` may not exceed it."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "max_length"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("rope_theta", "norm_eps", "init_std"):
            check_above(f"model.{name}", getattr(self, name), 0)
        check(
            self.heads % self.kv_heads == 0,
            "model.kv_heads",
            f"must divide model.heads {self.heads}, but is {self.kv_heads}",
            f"the nearest that does is {nearest_divisor(self.heads, self.kv_heads)}",
        )
        if self.head_dim is None:
            check(
                self.hidden % self.heads == 0,
                "model.heads",
                f"must divide model.hidden {self.hidden} while model.head_dim is left out, but is {self.heads}",
                f"the nearest that does is {nearest_divisor(self.hidden, self.heads)}, or set model.head_dim",
            )
        check(
            self.head_width >= 2 and self.head_width % 2 == 0,
            "model.head_dim",
            f"must be even and at least 2, as rotary positions turn pairs, but is {self.head_width}",
            "set model.head_dim to an even number",
        )

    @property
    def head_width(self) -> int:
        """Width of one head, given or derived."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of the packed queries, keys and values of one token."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    def layer_parameters(self, layer: int) -> list[ParameterSpec]:
        """The parameters of one layer, in the order in which its segments read them."""
        h, d, prefix = self.hidden, self.head_width, f"layers.{layer}."
        q, kv = self.heads * d, self.kv_heads * d
        rows = {"q": q, "k": kv, "v": kv}
        specs = [ParameterSpec("attention_norm.weight", (h,), "ones")]
        specs += [ParameterSpec(f"attention.{n}_proj.weight", (r, h), "normal") for n, r in rows.items()]
        if self.qkv_bias:
            specs += [ParameterSpec(f"attention.{n}_proj.bias", (r,), "zeros") for n, r in rows.items()]
        if self.qk_norm:
            specs += [ParameterSpec(f"attention.{n}_norm.weight", (d,), "ones") for n in ("q", "k")]
        specs += [
            ParameterSpec("attention.o_proj.weight", (h, q), "normal"),
            ParameterSpec("feed_forward_norm.weight", (h,), "ones"),
            ParameterSpec("feed_forward.gate_proj.weight", (self.ffn, h), "normal"),
            ParameterSpec("feed_forward.up_proj.weight", (self.ffn, h), "normal"),
            ParameterSpec("feed_forward.down_proj.weight", (h, self.ffn), "normal"),
        ]
        return [ParameterSpec(prefix + s.name, s.shape, s.init) for s in specs]

    def parameters(self) -> list[ParameterSpec]:
        """Every parameter of the model, in the order of the forward pass."""
        specs = [ParameterSpec("embedding.weight", (self.vocab, self.hidden), "normal")]
        for layer in range(self.layers):
            specs += self.layer_parameters(layer)
        specs.append(ParameterSpec("norm.weight", (self.hidden,), "ones"))
        if not self.tied_embeddings:
            specs.append(ParameterSpec("head.weight", (self.vocab, self.hidden), "normal"))
        return specs

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(spec.size for spec in self.parameters())

    @property
    def active_parameter_count(self) -> int:
        """Number of parameters that one token meets: all of them in a dense model."""
        return self.parameter_count

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token, forward and backward, by `FLOPS_CONVENTION`.

        A matmul parameter costs 2 forward and 4 backward. Causal attention over s keys does q k^T and p v on
        s/2 keys on average: 2 x 2 x s/2 x heads x head_dim forward, three times that with the backward.
        """
        layer = sum(spec.size for spec in self.layer_parameters(0) if spec.decays)
        matmul = self.layers * layer + self.vocab * self.hidden
        attention = self.layers * 6 * seq_len * self.heads * self.head_width
        return 6 * matmul + attention


def nearest_divisor(number: int, wish: int, legal: Callable[[int], bool] = lambda divisor: True) -> int:
    """The divisor of `number` closest to `wish` among those that are `legal`, as 1 must be."""
    divisors = (d for d in range(1, number + 1) if number % d == 0 and legal(d))
    return min(divisors, key=lambda d: (abs(d - wish), d))
