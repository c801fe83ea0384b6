"""Grouped-query attention with rotary positions, as segments over packed queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.config import ModelConfig
from models.kernels import Kernels
from models.layers import Linear, Norm
from models.segments import COS, FIRST_KEY, SIN, Residual, Segment
from models.shapes import RopeScaling
from models.weights import Weight, weights_of


@dataclass(frozen=True)
class Heads:
    """The heads of one attention, as far as they are held here."""

    queries: int
    keys: int
    """Heads of keys, and of values."""
    width: int
    temperature: float = 1.0
    """By which scores are multiplied beside 1 / sqrt(width)."""

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.temperature / math.sqrt(self.width)


class HeadNorm(Segment):
    """RMSNorm over each head's queries and keys (Qwen3)."""

    saves, keeps = 1, 2

    def __init__(self, weights: Sequence[Weight], heads: Heads, eps: float, kernels: Kernels) -> None:
        super().__init__(weights)
        self.heads, self.eps = heads, eps
        self.kernel = kernels.HeadNorm(heads.queries, heads.keys, eps)

    def forward(self, x, weights, context):
        """Saves its input."""
        return self.kernel.forward(x, weights[0], weights[1]), (x,)

    def backward_input(self, dy, saved, weights, context):
        """All three gradients come from one pass over memory."""
        dx, dq, dk = self.kernel.backward(saved[0], weights[0], weights[1], dy)
        return dx, (dq, dk)


class SelfAttention(Segment):
    """Packed qkv [T, (heads + 2 kv_heads) head_dim] to the heads' outputs [T, heads head_dim]."""

    saves = 3

    def __init__(self, heads: Heads, kernels: Kernels) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = kernels.Attention(heads.queries, heads.keys, heads.scale, kernels.documents)

    def forward(self, x, weights, context):
        """Saves qkv, its output and the log-sum-exp a row, from which the backward makes the scores again."""
        o, lse = self.kernel.forward(x, context[COS], context[SIN], context[FIRST_KEY])
        return o, (x, o, lse)

    def backward_input(self, dy, saved, weights, context):
        """No weights: nothing is kept."""
        qkv, o, lse = saved
        return self.kernel.backward(qkv, context[COS], context[SIN], context[FIRST_KEY], o, lse, dy), ()


def attention_block(config: ModelConfig, layer: int, kernels: Kernels, rounding: str) -> Residual:
    """norm, qkv projection, [q/k-norm], attention, output projection, around a skip connection."""
    heads = Heads(config.heads, config.kv_heads, config.head_width)
    specs = {spec.name.split(".", 2)[2]: spec for spec in config.layer_parameters(layer)}
    norm = weights_of([specs["attention_norm.weight"]])
    qkv = []
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        parts = tuple(f"{name}_proj.{kind}" for name in "qkv")
        qkv += weights_of([specs[f"attention.{part}"] for part in parts], (f"qkv_proj.{kind}", parts))
    segments = [Norm(norm, config.norm_eps, kernels), Linear(qkv, rounding, kernels)]
    if config.qk_norm:
        norms = weights_of([specs["attention.q_norm.weight"], specs["attention.k_norm.weight"]])
        segments.append(HeadNorm(norms, heads, config.norm_eps, kernels))
    output = weights_of([specs["attention.o_proj.weight"]])
    segments += [SelfAttention(heads, kernels), Linear(output, rounding, kernels)]
    return Residual(segments)


def rotary_tables(config: ModelConfig, length: int, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """cos_SR and sin_SR for positions 0 to length-1, computed in float64; R is half of what turns of a head."""
    width, scaling = config.rotary_width, config.rope_scaling
    half = np.arange(0, width, 2, dtype=np.float64)
    frequencies = config.rope_theta ** (-half / width)
    if scaling.kind == "llama3":
        frequencies = _by_wavelength(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies = _by_turns(frequencies, scaling, config.rope_theta)
    angles = np.outer(np.arange(length, dtype=np.float64), frequencies)
    amplitude = scaling.amplitude
    return (amplitude * np.cos(angles)).astype(dtype), (amplitude * np.sin(angles)).astype(dtype)


def _by_wavelength(frequencies_R: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, a blend between."""
    wavelengths_R = 2 * math.pi / frequencies_R
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend_R = np.clip((scaling.original_length / wavelengths_R - low) / (high - low), 0.0, 1.0)
    return (1 - blend_R) * frequencies_R / scaling.factor + blend_R * frequencies_R


def _by_turns(frequencies_R: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """YaRN's (arXiv 2309.00071, section 3.2): the blend is linear in the dim, between those that turn `beta_fast` and
    `beta_slow` times over the original length."""
    dims = 2 * len(frequencies_R)

    def turning(times: float) -> float:
        return dims * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turning(scaling.beta_fast)), 0)
    high = min(math.ceil(turning(scaling.beta_slow)), dims - 1)
    ramp_R = np.clip((np.arange(len(frequencies_R)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return ramp_R * frequencies_R / scaling.factor + (1 - ramp_R) * frequencies_R
