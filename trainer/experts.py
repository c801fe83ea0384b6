"""What dashboards see of experts and of further predictions: what was counted, brought together from the ranks that
hold it, and on request what each token was routed to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from mindspore import ops

from models.config import ModelConfig
from models.experts import AUX, DROPPED, ENTROPY, RoutedExperts, Z
from models.segments import Chain, Segment
from models.weights import assemble, parse_key, whole
from parallel.collectives import Collectives
from trainer import metrics
from trainer.metrics import Row
from trainer.step import Weights


class TallyMeter:
    """Rows about what routers and further predictions counted in the last step. All ranks make each row together."""

    def __init__(self, model: ModelConfig, weights: Weights, collectives: Collectives) -> None:
        self.model, self.weights, self.collectives = model, weights, collectives
        self.specs = {spec.name: spec for spec in model.all_parameters() if spec.update != "adamw"}
        self.dispatched: Counter[str] = Counter()
        """What `sent` was at the last row, and what evaluations have sent since."""
        self.step = 0

    def row(self, step: int, tokens: int) -> Row:
        """`aux_loss` and `z_loss`, means over the step's `tokens`; `mtp_loss`, the further predictions'; each layer's
        `experts`; and `dispatch_bytes`, what all ranks sent to their dispatchers' groups a step, by level."""
        tallies = {name.removesuffix(".tally"): values for name, values in self._whole().items()}
        routers = {name: values for name, values in tallies.items() if name.endswith("router")}
        later = [values for name, values in tallies.items() if name.endswith("prediction")]
        row: Row = {}
        if later:
            row[metrics.MTP_LOSS] = float(np.mean([loss / max(1.0, count) for loss, count in later]))
        if routers:
            experts = self.model.moe.experts
            aux, z = (sum(float(tally[experts + which]) for tally in routers.values()) for which in (AUX, Z))
            layers = {name.split(".")[1]: self._layer(tally) for name, tally in routers.items()}
            for name, bias in tallies.items():
                if name.endswith("bias"):
                    layers[name.split(".")[1]] |= {"bias_min": float(bias.min()), "bias_max": float(bias.max())}
            row |= {metrics.AUX_LOSS: aux / max(1, tokens), metrics.Z_LOSS: z / max(1, tokens)}
            row |= {metrics.EXPERTS: layers, metrics.DISPATCH_BYTES: self._bytes(step)}
        return row

    def _whole(self) -> dict[str, np.ndarray]:
        """Every tally and bias, by name."""
        pieces: dict[str, list] = {}
        for held in self.collectives.world.all_gather(self.weights.counted()):
            for key, values in held.items():
                name, region, run = parse_key(key)
                pieces.setdefault(name, []).append((region, run, values))
        return {name: assemble(whole(spec), pieces[name]) for name, spec in self.specs.items()}

    def sent(self) -> Counter[str]:
        """By this rank, by level, in all."""
        own: Counter[str] = Counter()
        for row in self.collectives.traffic().rows():
            if row["collective"] == "all_to_all_v":
                own[row["level"]] += row["wire_bytes"]
        return own

    def _bytes(self, step: int) -> dict[str, float]:
        """Of a step since the last row, a mean."""
        own = self.sent()
        new = {level: size - self.dispatched[level] for level, size in own.items()}
        steps, self.step, self.dispatched = step - self.step, step, own
        total = Counter()
        for sent in self.collectives.world.all_gather(new):
            total.update(sent)
        return {level: size / steps for level, size in total.items()}

    def _layer(self, tally: np.ndarray) -> dict[str, float]:
        """Load over what it would be if all were even: the largest, and the coefficient of variation; experts without a
        copy; copies that were dropped, as a share; the mean entropy of a token's choice, in nats."""
        moe = self.model.moe
        counts, rest = tally[: moe.experts].astype(np.float64), tally[moe.experts :]
        even = counts.mean() or 1.0
        return {
            "load_max": float(counts.max() / even),
            "load_cv": float(counts.std() / even),
            "dead": int((counts == 0).sum()),
            "dropped": float(rest[DROPPED] / max(1.0, counts.sum())),
            "entropy": float(rest[ENTROPY] * moe.top_k / max(1.0, counts.sum())),
        }


class RoutingRecord:
    """Keeps what every router chose in the passes of a step: `take` gives it, layer -> [micro-batches, T, K]."""

    def __init__(self, segments: Mapping[int, Segment]) -> None:
        self.seen: dict[int, list[np.ndarray]] = {}
        for stage in segments.values():
            for experts in _routed(stage):
                layer = int(experts.weights[0].name.split(".")[1])
                experts.router.record = self._operator(layer)

    def _operator(self, layer: int) -> ops.Custom:
        def keep(indices: np.ndarray) -> np.ndarray:
            self.seen.setdefault(layer, []).append(indices.copy())
            return np.zeros(1, np.int32)

        operator = ops.Custom(keep, out_shape=lambda _: [1], out_dtype=lambda kind: kind, func_type="pyfunc")
        operator.add_prim_attr("side_effect_io", True)
        return operator

    def take(self) -> dict[int, np.ndarray]:
        """What was kept since the last call."""
        taken = {layer: np.stack(chosen) for layer, chosen in self.seen.items()}
        self.seen.clear()
        return taken


def _routed(segment: Segment) -> Iterator[RoutedExperts]:
    if isinstance(segment, RoutedExperts):
        yield segment
    elif isinstance(segment, Chain):
        for piece in segment.segments:
            yield from _routed(piece)
