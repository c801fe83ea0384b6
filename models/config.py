"""The shapes of one model, and what follows from them: parameters and FLOPs. No MindSpore here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from models.checks import check, check_above, check_at_least, nearest_divisor
from models.shapes import ExpertsConfig, LatentConfig, PredictionConfig, RopeScaling

FLOPS_CONVENTION = (
    "6 per matmul parameter and token (embedding look-up not counted, of experts those that a token goes to), causal "
    "attention counted once (half of s squared), recompute not counted"
)
TALLIES = 4
"""Numbers of a router's tally behind the experts' counts (`models.experts`)."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter as checkpoints name it, whatever the layout: its name, global shape and start."""

    name: str
    shape: tuple[int, ...]
    init: str
    """`normal` (standard deviation `model.init_std`), `ones` or `zeros`."""
    update: str = "adamw"
    """What a step makes of it: `adamw`; `balance`, the bias of a choice of experts, which moves against their load; or
    `tally`, no parameter at all: what a router counts travels as its gradient."""

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
    sandwich_norm: bool = False
    """RMSNorm behind each block too, before it joins the stream (Pangu Ultra, arXiv 2504.07866)."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Latent attention; see its own keys. `kv_heads` and `head_dim` are not read then."""
    moe: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Experts; see its own keys."""
    mtp: PredictionConfig = field(default_factory=PredictionConfig)
    """Multi-token prediction; see its own keys."""
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
        if self.head_dim is None and not self.latent.kv_rank:
            check(
                self.hidden % self.heads == 0,
                "model.heads",
                f"must divide model.hidden {self.hidden} while model.head_dim is left out, but is {self.heads}",
                f"the nearest that does is {nearest_divisor(self.hidden, self.heads)}, or set model.head_dim",
            )
        if self.latent.kv_rank:
            for name in ("qk_norm", "qkv_bias"):
                rule, remedy = "must be false with model.latent.kv_rank", f"set model.{name}=false"
                check(not getattr(self, name), f"model.{name}", rule, remedy)
        else:
            check(
                self.rope_scaling.kind != "yarn",
                "model.rope_scaling.kind",
                "must not be yarn without model.latent.kv_rank, whose attention alone has its temperature",
                "set model.rope_scaling.kind=llama3 or none",
            )
        check(
            self.latent.kv_rank > 0 or self.head_width >= 2 and self.head_width % 2 == 0,
            "model.head_dim",
            f"must be even and at least 2, as rotary positions turn pairs, but is {self.head_width}",
            "set model.head_dim to an even number",
        )
        if self.moe.experts:
            self._check_layers_of_experts()

    def _check_layers_of_experts(self) -> None:
        moe, count = self.moe, self.layers + self.mtp.depth
        check(
            all(0 <= layer < count for layer in moe.dense_layers),
            f"model.moe.dense_layers [{','.join(map(str, moe.dense_layers))}]",
            f"must list layers from 0 to {count - 1}",
            "change the list",
        )
        check(
            any(map(moe.in_layer, range(count))),
            f"model.moe.experts {moe.experts}",
            f"must be in a layer, but first_dense, every and dense_layers leave none of {count}",
            "set model.moe.first_dense=0 model.moe.every=1 model.moe.dense_layers=[], or model.moe.experts=0",
        )

    @property
    def head_width(self) -> int:
        """Width of one head, given or derived."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def rotary_width(self) -> int:
        """Dims of a head that positions turn."""
        return self.latent.rope if self.latent.kv_rank else self.head_width

    def layer_parameters(self, layer: int) -> list[ParameterSpec]:
        """The parameters of one layer and its router's tally, in the order in which its segments read them."""
        attention = self._latent_attention() if self.latent.kv_rank else self._attention()
        block = self._experts() if self.moe.in_layer(layer) else self._feed_forward("feed_forward", self.ffn)
        specs = [_norm("attention_norm", self.hidden), *attention, *self._behind("attention")]
        specs += [_norm("feed_forward_norm", self.hidden), *block, *self._behind("feed_forward")]
        return [replace(spec, name=f"layers.{layer}.{spec.name}") for spec in specs]

    def block_parameters(self, layer: int, block: str) -> list[ParameterSpec]:
        """Those of one block of a layer, ``attention`` or ``feed_forward``, its norm first; a norm behind it is not."""
        own = (f"{block}_norm", block)
        return [spec for spec in self.layer_parameters(layer) if spec.name.split(".")[2] in own]

    def _behind(self, block: str) -> list[ParameterSpec]:
        return [_norm(f"{block}_out_norm", self.hidden)] if self.sandwich_norm else []

    def _attention(self) -> list[ParameterSpec]:
        h, d = self.hidden, self.head_width
        rows = {"q": self.heads * d, "k": self.kv_heads * d, "v": self.kv_heads * d}
        specs = [_matrix(f"attention.{n}_proj", r, h) for n, r in rows.items()]
        if self.qkv_bias:
            specs += [ParameterSpec(f"attention.{n}_proj.bias", (r,), "zeros") for n, r in rows.items()]
        if self.qk_norm:
            specs += [_norm(f"attention.{n}_norm", d) for n in ("q", "k")]
        return [*specs, _matrix("attention.o_proj", h, rows["q"])]

    def _latent_attention(self) -> list[ParameterSpec]:
        h, latent = self.hidden, self.latent
        query = self.heads * (latent.nope + latent.rope)
        queries = [_matrix("attention.q_proj", query, h)]
        if latent.q_rank:
            queries = [_matrix("attention.q_a_proj", latent.q_rank, h), _norm("attention.q_a_norm", latent.q_rank)]
            queries.append(_matrix("attention.q_b_proj", query, latent.q_rank))
        return [
            *queries,
            _matrix("attention.kv_a_proj", latent.kv_rank + latent.rope, h),
            _norm("attention.kv_a_norm", latent.kv_rank),
            _matrix("attention.kv_b_proj", self.heads * (latent.nope + latent.value), latent.kv_rank),
            _matrix("attention.o_proj", h, self.heads * latent.value),
        ]

    def _feed_forward(self, name: str, width: int) -> list[ParameterSpec]:
        h = self.hidden
        shapes = {"gate": (width, h), "up": (width, h), "down": (h, width)}
        return [_matrix(f"{name}.{part}_proj", *shape) for part, shape in shapes.items()]

    def _experts(self) -> list[ParameterSpec]:
        moe = self.moe
        specs = [_matrix("feed_forward.router", moe.experts, self.hidden)]
        if moe.biased:
            specs.append(ParameterSpec("feed_forward.router.bias", (moe.experts,), "zeros", "balance"))
        specs.append(ParameterSpec("feed_forward.router.tally", (moe.experts + TALLIES,), "zeros", "tally"))
        experts = [self._feed_forward(f"feed_forward.experts.{e}", moe.ffn) for e in range(moe.experts)]
        specs += [spec for gate, up, _ in experts for spec in (gate, up)] + [down for *_, down in experts]
        return specs + (self._feed_forward("feed_forward.shared", moe.shared * moe.ffn) if moe.shared else [])

    def prediction_parameters(self, layer: int) -> list[ParameterSpec]:
        """Those of the module of multi-token prediction around `layer`, one of `later_layers`, without the layer's.

        Before it two norms and the matrix that joins their outputs; behind it a norm, and what the loss is counted in.
        """
        h = self.hidden
        specs = [_norm("embedding_norm", h), _norm("stream_norm", h), _matrix("join_proj", h, 2 * h), _norm("norm", h)]
        specs.append(ParameterSpec("prediction.tally", (2,), "zeros", "tally"))
        return [replace(spec, name=f"layers.{layer}.{spec.name}") for spec in specs]

    @property
    def later_layers(self) -> range:
        """Numbers of the layers of multi-token prediction."""
        return range(self.layers, self.layers + self.mtp.depth)

    def all_parameters(self) -> list[ParameterSpec]:
        """`parameters`, and the tallies among them."""
        specs = [ParameterSpec("embedding.weight", (self.vocab, self.hidden), "normal")]
        for layer in range(self.layers):
            specs += self.layer_parameters(layer)
        specs.append(ParameterSpec("norm.weight", (self.hidden,), "ones"))
        if not self.tied_embeddings:
            specs.append(ParameterSpec("head.weight", (self.vocab, self.hidden), "normal"))
        for layer in self.later_layers:
            *joins, norm, tally = self.prediction_parameters(layer)
            specs += [*joins, *self.layer_parameters(layer), norm, tally]
        return specs

    def parameters(self) -> list[ParameterSpec]:
        """Every parameter of the model, in the order of the forward pass."""
        return [spec for spec in self.all_parameters() if spec.update != "tally"]

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(spec.size for spec in self.parameters())

    @property
    def active_parameter_count(self) -> int:
        """Number of parameters that one token meets: all, but of the routed experts the `top_k` that it goes to.

        Embedding and head count whole, as in the published figures (Pangu's leave the embedding out).
        """
        moe = self.moe
        layers = sum(moe.in_layer(layer) for layer in range(self.layers + self.mtp.depth))
        return self.parameter_count - layers * (moe.experts - moe.top_k) * 3 * self.hidden * moe.ffn

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token, forward and backward, by `FLOPS_CONVENTION`.

        A matmul parameter costs 2 forward and 4 backward. Causal attention over s keys does q k^T and p v on
        s/2 keys on average: 2 x s/2 x heads x (width of keys + width of values) forward, three times that with the
        backward. Each module of multi-token prediction runs the head once more.
        """
        others = sum(spec.size for spec in self.parameters() if not spec.decays)
        embedding = (not self.tied_embeddings) * self.vocab * self.hidden
        heads = self.mtp.depth * self.vocab * self.hidden
        widths = self.latent.nope + self.latent.rope + self.latent.value if self.latent.kv_rank else 2 * self.head_width
        attention = (self.layers + self.mtp.depth) * 3 * seq_len * self.heads * widths
        return 6 * (self.active_parameter_count - others - embedding + heads) + attention


def _matrix(name: str, rows: int, columns: int) -> ParameterSpec:
    return ParameterSpec(f"{name}.weight", (rows, columns), "normal")


def _norm(name: str, width: int) -> ParameterSpec:
    return ParameterSpec(f"{name}.weight", (width,), "ones")
