"""Published runs as the planner's columns: CSV files whose columns docs/planner.md lists.

A blank field takes a default of its framework (`FRAMEWORKS`), a width that no column gives is solved from the number of
parameters, and what a layout's name says of a known family (`LATENT`) fills in what no column holds.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel.planner.shape import Candidates, Contents, Shape
from parallel.topology import Level, Plane, Rank, Topology

DEVICES = {  # what `hardware` says -> device of the constants, in the order in which they are looked for
    "GB200": "gb200", "GB300": "gb200", "B200": "b200", "B300": "b200", "H200": "h100", "H100": "h100", "H800": "h100",
    "A100": "a100", "A3": "ascend910c", "910C": "ascend910c", "A2": "ascend910b", "910B": "ascend910b",
}  # fmt: skip
HARDWARE = {  # TFLOPS, GB, GB/s of memory, GB/s inside, GB/s between nodes, devices in a node: what blanks become
    "a100": (312.0, 80.0, 2039.0, 300.0, 25.0, 8),
    "h100": (989.5, 80.0, 3350.0, 450.0, 50.0, 8),
    "b200": (2250.0, 180.0, 8000.0, 900.0, 50.0, 8),
    "gb200": (2450.0, 186.0, 8000.0, 900.0, 50.0, 64),
    "ascend910b": (313.0, 64.0, 1600.0, 196.0, 25.0, 8),
    "ascend910c": (376.0, 64.0, 1600.0, 164.0, 164.0, 16),
}
PEAKS = {"900 A2": 376.0}
"""Of what is sold with another peak: facts/hardware.md, the same recipe runs 1.20 times as fast on it as on 800T A2."""


@dataclass(frozen=True)
class Framework:
    """What a blank field means for a framework."""

    sequence_parallel: bool = True
    zero: int = 1
    recompute: str = "none"
    hardware: str = ""
    weighs_head: bool = False
    """Whether stages are cut by the parameters that they multiply with, the head's too (nanotron, models/base.py)."""


FRAMEWORKS = {
    "megatron": Framework(),
    "megatron_fsdp": Framework(zero=3),
    "megatron_deepspeed": Framework(sequence_parallel=False),
    "mindspeed": Framework(zero=0, hardware="Atlas 900 A2 PODc"),
    "mindformers": Framework(sequence_parallel=False, hardware="Atlas 800T A2"),
    "maxtext": Framework(zero=3, recompute="full"),
    "torchtitan": Framework(zero=3),
    "llm_foundry": Framework(zero=3),
    "nanotron": Framework(weighs_head=True),
    "aleph_alpha": Framework(),
}
FEATURES = {  # what a citation says of how a job ran -> the feature whose constants hold
    "after_pp_fix=False": "stalled",
    "MC2 on": "tp_overlap",
    "CoC on": "tp_overlap",
    "overlap ON": "ep_overlap",
    "HybridEP+overlap": "ep_overlap",
}
SLOW, BROKEN = 1e-4, 3.5e-4
"""Seconds a GB and rank that a measured all-gather takes beyond `GATHERED` GB/s: where more, each rank delays a group,
and messages stall."""
GATHERED = 260.0
LATENT = {  # family -> q_rank, kv_rank, nope, rope, value, first dense layers
    "deepseekv3": (1536, 512, 128, 64, 128, 3),
    "deepseekv2": (1536, 512, 128, 64, 128, 1),
    "moonlight": (0, 512, 128, 64, 128, 1),
}
SIZES = {  # families whose widths no column gives, in the order of `_widths`
    "moonlight": (2048, 11264, 16, 16, 163840, 64, 6, 1408, 2),
}


class Setting(NamedTuple):
    """What constants are chosen by."""

    device: str
    framework: str
    kernel: str | None
    features: frozenset[str]


@dataclass(frozen=True)
class Row:
    """One published run."""

    source: str
    framework: str
    device: str
    kernel: str | None
    topology: Topology
    fields: dict[str, str]
    shape: dict[str, float]
    seq_len: int
    layers: tuple[int, int]
    """Without and with experts."""
    schedule: str
    pp: int
    vpp: int
    columns: dict[str, int]
    recompute_share: float
    measured: float | None
    memory: float | None
    """GiB."""
    outcome: str | None
    features: frozenset[str] = frozenset()
    """Of `FEATURES`, and ``slow_network`` where the job's own probe of the network found it so."""

    @property
    def capacity(self) -> float:
        """Bytes of a device."""
        return self.topology.rank.memory_gib * 2**30

    @property
    def problem(self) -> tuple:
        """What runs have in common between which the layout alone differs."""
        names = ("framework", "model", "layers", "hidden", "hardware", "n_devices", "global_batch", "seq_len")
        return (
            *(self.fields.get(name, "") for name in (*names, "vocab", "kv_heads")),
            self.kernel or "",
            self.features,
        )

    @property
    def layout(self) -> tuple:
        """What differs."""
        return (self.pp, self.vpp, self.recompute_share, *self.columns.values())

    @property
    def setting(self) -> Setting:
        return Setting(self.device, self.framework, self.kernel, self.features)


class Refusal(NamedTuple):
    """A row that cannot be priced, and why."""

    why: str
    counts: bool
    """Whether it has a step time or an outcome."""
    outcome: str


def read(files: Iterable[Path], cited: bool = True) -> Iterator[Row | Refusal]:
    """Rows of CSV files; without `cited` nothing is taken from the column ``citation``."""
    for file in files:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            for number, line in enumerate(csv.DictReader(stream), 2):
                fields = {key: value.strip() for key, value in line.items() if key and isinstance(value, str)}
                if not cited:
                    fields["citation"] = ""
                try:
                    yield row(fields)
                except (ValueError, ZeroDivisionError) as error:
                    outcome = fields.get("outcome", "")
                    counts = bool(outcome or fields.get("measured_step_time_s"))
                    yield Refusal(f"{file.name}:{number}: {error}", counts, outcome)


def row(fields: dict[str, str]) -> Row:
    """Raises ValueError saying what cannot be priced."""
    framework = fields.get("framework") or "unknown"
    defaults = FRAMEWORKS.get(framework, Framework())
    fields["hardware"] = fields.get("hardware") or defaults.hardware
    device, topology = _machine(fields)
    widths, layers = _widths(fields)
    n, tp, pp, cp, vpp = (max(1, _int(fields, key, 1)) for key in ("n_devices", "tp", "pp", "cp", "vpp"))
    vpp = vpp if pp > 1 else 1
    dp = _int(fields, "dp", 0) or max(1, n // (tp * pp * cp))
    ep = min(max(1, _int(fields, "ep", 1)), dp * cp * tp) if widths["experts"] else 1
    stage = dp * cp * tp
    ep = next(e for e in range(ep, 0, -1) if stage % e == 0)
    total, micro = _int(fields, "global_batch", 0), max(1, _int(fields, "micro_batch", 1))
    total = total or dp * micro
    micro_batches = max(1, round(total / (dp * micro)))
    recompute, share = _recompute(fields.get("recompute", ""), defaults.recompute, sum(layers), pp)
    zero = _zero(fields.get("zero", "").lower(), defaults.zero)
    sequence = fields.get("sequence_parallel", "")
    said = fields.get("citation", "")
    sequence = (
        defaults.sequence_parallel or "SP on" in said if sequence == "" else sequence.lower() in ("true", "1", "1.0")
    )
    columns = {
        "dp": dp, "cp": cp, "ulysses": 1, "tp": tp, "ep": ep, "etp": 1, "zero": zero if dp * cp > 1 else 0,
        "shards": dp * cp, "micro_batch": micro, "micro_batches": micro_batches,
        "sequence_parallel": int(sequence and tp > 1), "recompute": recompute,
    }  # fmt: skip
    if vpp > 1 and micro_batches % pp:
        vpp = 1
    kernel = fields.get("attention_kernel") or "".join(
        re.findall(r"\[(\w*attention.*|torch|fused)\]", fields.get("model", ""))
    )
    measured, memory = _float(fields, "measured_step_time_s"), _float(fields, "measured_memory_gb")
    return Row(
        fields.get("source", ""), framework, device, kernel or None, topology, fields, widths,
        _int(fields, "seq_len", 4096), layers, "interleaved" if vpp > 1 else "1f1b", pp, vpp, columns, share,
        measured, memory, fields.get("outcome") or None, _features(said, n),
    )  # fmt: skip


def _zero(said: str, default: int) -> int:
    """The stage that a column names: by its number, or as what shards weights too."""
    if not said:
        return default
    if "fsdp" in said or "hsdp" in said:
        return 3
    named = {"none": 0, "false": 0, "true": 1, "parallel_optimizer": 1}
    number = re.search(r"zero-?([0-3])", said) or re.fullmatch(r"([0-3])(?:\.0)?", said)
    if said not in named and not number:
        raise ValueError(f"zero is {said}, which names no stage")
    return named[said] if said in named else int(number[1])


def _features(said: str, ranks: int) -> frozenset[str]:
    found = {feature for words, feature in FEATURES.items() if words in said}
    if probed := re.search(r"AR/AG/RS GB/s measured [\d.]+/([\d.]+)/", said):
        waits = (1 / float(probed[1]) - 1 / GATHERED) / ranks
        found |= {name for name, least in (("slow_network", SLOW), ("stalled", BROKEN)) if waits > least}
    return frozenset(found)


def _machine(fields: dict[str, str]) -> tuple[str, Topology]:
    """Unknown hardware is the known device whose peak is nearest."""
    said = fields.get("hardware", "")
    device = next((device for key, device in DEVICES.items() if key in said), None)
    if device is None:
        peak = _float(fields, "peak_tflops_bf16") or 312.0
        device = min(HARDWARE, key=lambda known: abs(np.log(HARDWARE[known][0] / peak)))
    keys = ("peak_tflops_bf16", "hbm_gb", "hbm_gbps", "intra_node_gbps", "inter_node_gbps", "gpus_per_node")
    sold = next((peak for name, peak in PEAKS.items() if name in said), HARDWARE[device][0])
    values = [_float(fields, key) or known for key, known in zip(keys, (sold, *HARDWARE[device][1:]), strict=True)]
    peak, memory, bandwidth, inner, outer, node = values
    if device == "gb200":
        node = HARDWARE[device][5]  # NVLink joins the trays
    inside, outside = Plane("inside", inner), Plane("outside", outer)
    links, lines = ("mesh", int(node) - 1) if device == "ascend910b" else ("switch", 1)
    levels = (
        Level("node", 0, int(node), int(node), inner / max(lines, 1), 3.0, inside, links),
        Level("cluster", 1, None, None, outer, 10.0, outside),
    )
    rank = Rank("device", memory, bandwidth, {"bfloat16": peak})
    return device, Topology(said or device, rank, (inside, outside), levels)


def _widths(fields: dict[str, str]) -> tuple[dict[str, float], tuple[int, int]]:
    """The model's widths, and its layers without and with experts."""
    name = re.sub(r"[^a-z0-9]", "", fields.get("model", "").lower())
    layers = _int(fields, "layers", 0)
    if not layers:
        raise ValueError("layers is blank")
    experts, moe_ffn = _int(fields, "experts", 0), _int(fields, "moe_ffn", 0)
    numbers = {key: _int(fields, key, 0) for key in ("hidden", "ffn", "heads", "kv_heads", "vocab")}
    top_k, shared = _int(fields, "topk", 2 if experts else 0), _int(fields, "shared_experts", 0)
    latent = next((values for family, values in LATENT.items() if family in name), None)
    known = next((values for family, values in SIZES.items() if family in name), None)
    if known and not numbers["hidden"]:
        numbers = dict(zip(numbers, known[:5], strict=True))
        experts, top_k, moe_ffn, shared = known[5:]
    params = (_float(fields, "params_b") or 0.0) * 1e9
    vocab = numbers["vocab"] or 50304
    hidden = numbers["hidden"]
    if not hidden:
        if not params:
            raise ValueError("neither hidden nor params_b is given")
        hidden = _solved_hidden(params, layers, vocab)
    heads = numbers["heads"] or max(1, hidden // 128)
    kv_heads = numbers["kv_heads"] or heads
    head_dim = 128 if "qwen3" in name or hidden % heads else hidden // heads
    ffn = numbers["ffn"] or _solved_ffn(0 if experts else params, layers, hidden, kv_heads * head_dim, vocab)
    moe_ffn = moe_ffn or ffn
    base = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "vocab": vocab}
    gates, tied = _gates_and_ties(base, layers, params if not experts else 0.0)
    base |= {"gates": gates, "tied": int(tied), "experts": experts, "top_k": top_k, "expert_ffn": moe_ffn}
    base |= {"shared": shared, "q_rank": 0, "kv_rank": 0, "nope": 0, "rope": 0, "value": 0}
    first_dense = 0
    if latent:
        base |= dict(zip(("q_rank", "kv_rank", "nope", "rope", "value"), latent[:5], strict=True))
        base["head_dim"] = 0
        first_dense = min(latent[5], max(1, layers // 4))
        if "deepseekv3" in name and not shared:
            base["shared"] = 1
    sparse = layers - first_dense if experts else 0
    if "maverick" in name:
        sparse = layers // 2
    return base, (layers - sparse, sparse)


def _solved_hidden(params: float, layers: int, vocab: int) -> int:
    """12 L h^2 + 2 V h = parameters, of a GPT."""
    a, b = 12 * layers, 2 * vocab
    return max(128, round((-b + np.sqrt(b * b + 4 * a * params)) / (2 * a) / 128) * 128)


def _solved_ffn(params: float, layers: int, hidden: int, keys: int, vocab: int) -> int:
    """Of a feed-forward with a gate, so that the parameters are as many; 4 h without them, and at the least."""
    own = (params - 2 * vocab * hidden) / layers - 2 * hidden * (hidden + keys)
    gated = round(own / (3 * hidden) / 128) * 128
    return gated if gated > 2.5 * hidden else 4 * hidden


def _gates_and_ties(base: dict[str, float], layers: int, params: float) -> tuple[int, bool]:
    """Of a feed-forward with or without a gate, embeddings tied or not, what comes nearest to the parameters."""
    h, keys = base["hidden"], base["kv_heads"] * base["head_dim"]
    choices = []
    for gates in (2, 1):
        for tied in (False, True):
            own = layers * (2 * h * h + 2 * h * keys + (gates + 1) * h * base["ffn"]) + (2 - tied) * base["vocab"] * h
            choices.append((abs(own - params), gates, tied))
    if not params:
        return (1 if base["ffn"] == 4 * h else 2), False
    return min(choices)[1:]


def _recompute(said: str, default: str, layers: int, pp: int) -> tuple[int, float]:
    """(index into `RECOMPUTE`, share of the layers)."""
    said = (said or default).lower()
    numbers = [int(n) for n in re.findall(r"\d+", said)]
    if said.startswith("full-layers/stage") or said.startswith("select ["):
        return 2, min(1.0, sum(numbers) / layers)
    if block := re.match(r"full/block/(\d+)", said):
        return 2, min(1.0, int(block[1]) * pp / layers)
    if said.startswith("full") or said.startswith("remat"):
        return 2, 1.0
    if said.startswith("selective"):
        return (1, 1.0) if "core" in said or said == "selective" else (1, 0.5)
    return (2, 0.5) if said == "select" else (0, 1.0)


def _float(fields: dict[str, str], key: str) -> float | None:
    value = fields.get(key, "")
    return float(value) if value else None


def _int(fields: dict[str, str], key: str, default: int) -> int:
    value = _float(fields, key)
    return default if value is None else int(value)


@dataclass(frozen=True)
class Batch:
    """Rows of one machine, schedule, pp and vpp as columns."""

    rows: tuple[int, ...]
    """Their places in the list."""
    shape: Shape
    seq_len: np.ndarray
    candidates: Candidates
    contents: Contents
    topology: Topology


def batches(rows: list[Row], times: int = 1) -> list[Batch]:
    """Group `rows` so that each group is priced at once, every row `times` over."""
    groups: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        t = row.topology
        key = (row.schedule, row.pp, row.vpp, t.rank.peak_tflops["bfloat16"], t.rank.memory_bandwidth,
               t.levels[0].members, t.levels[0].reach, t.levels[1].bandwidth)  # fmt: skip
        groups.setdefault(key, []).append(index)
    return [_batch(rows, tuple(members) * times) for members in groups.values()]


def _batch(rows: list[Row], members: tuple[int, ...]) -> Batch:
    own = [rows[i] for i in members]
    first = own[0]
    shape = Shape(**{key: np.array([row.shape[key] for row in own]) for key in first.shape})
    columns = {key: np.array([row.columns[key] for row in own]) for key in first.columns}
    stages = first.pp * first.vpp
    tables = {kind: np.zeros((len(own), stages)) for kind in ("embedding", "dense", "sparse", "head")}
    tables["embedding"][:, 0] = 1
    tables["head"][:, -1] = 1
    for i, row in enumerate(own):
        dense, sparse = row.layers
        edges = _edges(row, stages)
        before = np.minimum(edges, dense)
        if "maverick" in row.fields.get("model", "").lower():
            before = edges / 2
        tables["dense"][i] = np.diff(before)
        tables["sparse"][i] = np.diff(edges - before)
    share = np.array([row.recompute_share for row in own])[:, None]
    parts = Contents(**tables, again=(share, share))
    seq_len = np.array([row.seq_len for row in own])
    candidates = Candidates(first.schedule, first.pp, first.vpp, **columns)
    return Batch(members, shape, seq_len, candidates, parts, first.topology)


def _edges(row: Row, stages: int) -> np.ndarray:
    """First layers of the stages, and the end: as even as whole layers can be."""
    layers, s = sum(row.layers), row.shape
    if stages == 1 or not FRAMEWORKS.get(row.framework, Framework()).weighs_head:
        return np.round(np.linspace(0, layers, stages + 1))
    layer = s["hidden"] * (2 * (s["heads"] + s["kv_heads"]) * s["head_dim"] + (s["gates"] + 1) * s["ffn"])
    costs = np.append(np.full(layers, layer), s["vocab"] * s["hidden"])
    sums, place, ends = np.cumsum(costs), 0, []
    for block, total in enumerate(sums):
        if total > sums[-1] * (place + 1) / stages and place + 1 < stages:
            ends.append(block + 1)
            place += 1
    return np.minimum([0, *ends, *[layers] * (stages - len(ends))], layers).astype(float)
