"""Parts of a model's configuration that some models have: rotary scaling, latent attention, experts. No MindSpore."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from models.checks import check, check_above, check_at_least, check_choice, nearest_divisor

AUXILIARY = ("sequence", "global", "micro_batch", "none")
DROPS = ("position", "probability")
TRAINING = ("aux_loss", "aux_coef", "z_coef", "bias_rate", "capacity", "drop", "force_uniform")
"""Keys of `ExpertsConfig` that no weights depend on, but for the bias that a `bias_rate` adds to a softmax router."""


@dataclass
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was first trained on."""

    kind: str = "none"
    """`none`; `llama3`: Llama 3.1's piecewise scaling by wavelength; `yarn`: Peng et al., arXiv 2309.00071."""
    factor: float = 8.0
    """How much longer the low frequencies' wavelengths become."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above `original_length / low_freq_factor` are scaled by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below `original_length / high_freq_factor` are left alone; between the two they blend."""
    original_length: int = 8192
    """The context length, in tokens, of the first training."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this over `original_length` are left alone."""
    beta_slow: float = 1.0
    """yarn: those that turn less often are scaled by the whole factor; between the two they blend."""
    mscale: float = 1.0
    """yarn: temperature of the rotated part, over `mscale_all_dim`'s."""
    mscale_all_dim: float = 1.0
    """yarn: temperature of all scores, as DeepSeek applies it; 0: none."""

    def __post_init__(self) -> None:
        check_choice("model.rope_scaling.kind", self.kind, ("none", "llama3", "yarn"))
        check_at_least("model.rope_scaling.factor", self.factor, 1)
        check_at_least("model.rope_scaling.original_length", self.original_length, 1)
        for high, low, pair in (
            ("high_freq_factor", "low_freq_factor", "4 and 1"),
            ("beta_fast", "beta_slow", "32 and 1"),
        ):
            check(
                getattr(self, high) > getattr(self, low),
                f"model.rope_scaling.{high}",
                f"must be above {low} {getattr(self, low)}, but is {getattr(self, high)}",
                f"the published pair is {pair}",
            )

    def temperature(self, mscale: float) -> float:
        """yarn's 0.1 mscale ln(factor) + 1; 1 for other kinds."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0

    @property
    def amplitude(self) -> float:
        """By which cosines and sines are multiplied."""
        if self.mscale and self.mscale_all_dim:
            return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return self.temperature(1.0)


@dataclass
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads come from
    one narrow latent a token, and positions turn a part of each head of their own."""

    kv_rank: int = 0
    """Width of the latent of keys and values; 0: no latent attention."""
    q_rank: int | None = None
    """Width of the latent of queries; left out, they are projected at once."""
    nope: int = 128
    """Dims of a head's queries and keys that positions do not turn."""
    rope: int = 64
    """Dims that positions turn; keys share them over the heads."""
    value: int = 128
    """Width of a head's values."""

    def __post_init__(self) -> None:
        check_at_least("model.latent.kv_rank", self.kv_rank, 0)
        if self.q_rank is not None:
            check_at_least("model.latent.q_rank", self.q_rank, 1)
        for name in ("nope", "rope", "value"):
            check_at_least(f"model.latent.{name}", getattr(self, name), 1)
        for name, why in (("rope", "rotary positions turn pairs"), ("nope", "a head is packed in pairs")):
            width = getattr(self, name)
            rule, remedy = f"must be even, as {why}, but is {width}", f"set model.latent.{name}={width + 1}"
            check(width % 2 == 0, f"model.latent.{name}", rule, remedy)
        check(
            self.value <= self.nope + self.rope,
            "model.latent.value",
            f"must not exceed nope + rope = {self.nope + self.rope}, but is {self.value}",
            f"set model.latent.value={self.nope + self.rope} or less",
        )


@dataclass
class ExpertsConfig:
    """Mixture of experts in the place of a layer's feed-forward block.

    Three keys make the loss depend on the layout by nature: `capacity`, as which tokens are dropped depends on those
    that a rank computes at once; `aux_loss=micro_batch` on `layout.micro_batch`; `aux_loss=global` on dp x micro_batch.
    """

    experts: int = 0
    """Routed experts of a layer; 0: a dense model."""
    top_k: int = 2
    """Experts that a token goes to."""
    ffn: int = 0
    """Width of one expert."""
    shared: int = 0
    """Experts that every token meets beside the routed ones: one block, as wide as so many experts."""
    first_dense: int = 0
    """The first layers that keep a dense block."""
    every: int = 1
    """Of the others, every how many-eth layer has experts: those whose number plus one it divides (Qwen's sparse
    step)."""
    dense_layers: list[int] = field(default_factory=list)
    """More layers that keep a dense block."""
    score: str = "softmax"
    """What the router's logits become: `softmax` over the experts, or `sigmoid` of each with a bias for the choice."""
    groups: int = 1
    """Groups of experts of which a token chooses `top_groups` first, by the sum of the two best of each."""
    top_groups: int = 1
    """See `groups`."""
    normalise: bool = True
    """A token's chosen scores are divided by their sum."""
    scale: float = 1.0
    """By which the routed experts' weights are multiplied."""
    aux_loss: str = "sequence"
    """What the balance loss counts over: each `sequence`, all sequences of one micro-step (`global`), those of one
    micro-batch of a replica (`micro_batch`), or `none`."""
    aux_coef: float = 0.001
    """Coefficient of the balance loss."""
    z_coef: float = 0.0
    """Coefficient of the squared log-sum-exp of the router's logits (Zoph et al., arXiv 2202.08906)."""
    bias_rate: float = 0.0
    """Step by which the bias of the choice moves toward balance after each step (Wang et al., arXiv 2408.15664); 0: it
    stays."""
    capacity: float | None = None
    """Tokens that an expert takes at most, over its even share of those that a rank computes at once; left out, all."""
    drop: str = "position"
    """Which tokens go first where an expert is full: the last by `position`, or those of the least `probability`."""
    force_uniform: bool = False
    """Every token goes to experts in turn whatever the router says: for benchmarks."""

    def __post_init__(self) -> None:
        check_at_least("model.moe.experts", self.experts, 0)
        check_choice("model.moe.score", self.score, ("softmax", "sigmoid"))
        check_choice("model.moe.aux_loss", self.aux_loss, AUXILIARY)
        check_choice("model.moe.drop", self.drop, DROPS)
        for name in ("shared", "first_dense", "aux_coef", "z_coef", "bias_rate"):
            check_at_least(f"model.moe.{name}", getattr(self, name), 0)
        for name in ("top_k", "every", "groups", "top_groups"):
            check_at_least(f"model.moe.{name}", getattr(self, name), 1)
        check_above("model.moe.scale", self.scale, 0)
        if self.capacity is not None:
            check_above("model.moe.capacity", self.capacity, 0)
        if self.experts:
            self._check_choice_of_experts()

    def _check_choice_of_experts(self) -> None:
        check_at_least("model.moe.ffn", self.ffn, 1)
        check(
            self.experts % self.groups == 0,
            f"model.moe.groups {self.groups}",
            f"must divide model.moe.experts {self.experts}",
            f"set model.moe.groups={nearest_divisor(self.experts, self.groups)} (the nearest)",
        )
        check(
            self.top_groups <= self.groups,
            f"model.moe.top_groups {self.top_groups}",
            f"must not exceed model.moe.groups {self.groups}",
            f"set model.moe.top_groups={self.groups} or less",
        )
        choice = self.experts // self.groups * self.top_groups
        check(
            self.top_k <= choice,
            f"model.moe.top_k {self.top_k}",
            f"must not exceed the {choice} experts that a token chooses from",
            f"set model.moe.top_k={choice} or less",
        )

    @property
    def biased(self) -> bool:
        """Whether the choice has a bias."""
        return self.score == "sigmoid" or self.bias_rate > 0

    def in_layer(self, layer: int) -> bool:
        """Whether this layer has experts."""
        sparse = layer >= self.first_dense and (layer + 1) % self.every == 0
        return self.experts > 0 and sparse and layer not in self.dense_layers


@dataclass
class PredictionConfig:
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): behind the layers, modules in a row that
    predict one token further each. They train the model and are no part of its own loss."""

    depth: int = 0
    """Modules, each with a layer; 0: none."""
    coef: float = 0.3
    """By which the mean of their losses is multiplied."""

    def __post_init__(self) -> None:
        check_at_least("model.mtp.depth", self.depth, 0)
        check_at_least("model.mtp.coef", self.coef, 0)
