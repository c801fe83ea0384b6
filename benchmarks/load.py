"""The load of experts with the bias of the choice and without: `python benchmarks/load.py [FOLDER]`.

Trains `tiny_moe` twice, 400 steps each, with sigmoid scores and no balance loss, once with
`model.moe.bias_rate=0.002`, and draws the largest load of an expert over the even one, by layer and step, into
docs/images/load.svg. FOLDER takes the run directories (default: a new one). Wants matplotlib, which nothing else here
does. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer import metrics
from trainer.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
RATES = {"without": 0.0, "with the bias": 0.002}
KEYS = ("train.steps=400", "model.moe.aux_loss=none", "model.moe.score=sigmoid")


def loads(folder: Path, name: str, rate: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps [N], largest load by step and layer [N, L], and the last held-out loss of a run."""
    slug = name.replace(" ", "-")
    words = ["train", "tiny_moe", *KEYS, f"model.moe.bias_rate={rate}", f"train.out={folder}", f"train.name={slug}"]
    subprocess.run([Path(sys.executable).with_name("busway"), *words], check=True, stdout=subprocess.DEVNULL)
    rows = list(metrics.read_rows(RunDirectory(folder / slug).metrics))
    steps = [row for row in rows if metrics.EXPERTS in row]
    values = [[layer["load_max"] for layer in row[metrics.EXPERTS].values()] for row in steps]
    held_out = [row[metrics.EVAL_LOSS] for row in rows if metrics.EVAL_LOSS in row]
    return np.array([row[metrics.STEP] for row in steps]), np.array(values), held_out[-1]


def main() -> None:
    """Train, print and draw."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "busway"
    from matplotlib import pyplot

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    found = {}
    print(f"{'run':16}{'first tenth':>12}{'last tenth':>12}{'held-out loss':>15}")
    for axis, (name, rate) in zip(axes, RATES.items(), strict=True):
        steps, values, loss = loads(folder, name, rate)
        tenth = len(steps) // 10
        first, last = (float(part.mean()) for part in (values[:tenth], values[-tenth:]))
        found[name] = {"first": round(first, 3), "last": round(last, 3), "held_out_loss": round(loss, 4)}
        print(f"{name:16}{first:>12.2f}{last:>12.2f}{loss:>15.4f}", flush=True)
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(steps, values.mean(1), color="tab:blue", linewidth=2, label="mean over layers")
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"{name} (bias_rate={rate:g})", xlabel="step")
    axes[0].set(ylabel="largest load over the even one", ylim=(0.9, None))
    axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "images" / "load.svg", metadata={"Date": None})
    print(json.dumps({"load_max": found}))


if __name__ == "__main__":
    main()
