"""Training steps per second of one Llama shape, here and elsewhere: `python benchmarks/step.py`.

4 layers, hidden 256, 8 heads, ffn 688, vocab 1,024, seq 256, batch 4, fp32, one process, 2 threads; forward,
backward, clip of the global norm and AdamW. In turn, in one run:

    busway         the whole trainer: recipe, loop, data, callbacks (metrics.jsonl, TensorBoard)
    transformers   LlamaForCausalLM in torch eager, sdpa attention; `compile`: the same under torch.compile
    bare           a MindSpore step around the same native kernels, with MindSpore's autodiff and nothing else
    stock          a MindSpore step of stock operators

Then the same with experts in the place of the feed-forward blocks (16 of them, top-4, ffn 128 each, 4 heads of keys,
norms on queries and keys, a balance loss): Busway beside transformers' Qwen3MoeForCausalLM. Names of either as
arguments run it alone: `dense`, `moe`.

Busway's loss is that of fresh random tokens; the others repeat one batch, which costs the same and is learnt by heart.
The peers' environment is made beside this file when it is missing (torch 2.13.0, CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from timing import Worker, ratio

HERE = Path(__file__).resolve().parent
VENV = HERE.parent / ".venv-fixtures"
ROUNDS, STEPS = 15, 6
TOKENS = 4 * 256
THREADS = {name: "2" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def peers_python() -> str:
    """The interpreter that has torch and transformers."""
    python = VENV / "bin" / "python"
    requirements = HERE.parent / "tests" / "fixtures" / "requirements.txt"
    if (
        subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode
        if python.exists()
        else 1
    ):
        print(f"making {VENV} for the peers …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", requirements], check=True)
    return str(python)


MOE = (
    "model.kv_heads=4", "model.head_dim=32", "model.qk_norm=true", "model.moe.experts=16", "model.moe.top_k=4",
    "model.moe.ffn=128",
)  # fmt: skip


def main() -> None:
    """Run the comparisons and print their tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)} (all)")
    names = parser.parse_args().names or list(COMPARISONS)
    if unknown := sorted(set(names) - set(COMPARISONS)):
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(COMPARISONS)}")
    result = {}
    for name in names:
        result |= compare(COMPARISONS[name]())
    print(json.dumps(result))


def dense() -> dict[str, Worker]:
    """The workers of the Llama shape, Busway first."""
    torch, ours, steps = peers_python(), sys.executable, HERE / "steps"
    env = {**os.environ, **THREADS, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    passive = {**env, "OMP_WAIT_POLICY": "passive"}
    return {
        "busway": Worker("busway", [ours, "-P", str(steps / "busway_step.py")], passive),
        "transformers": Worker("transformers", [torch, str(steps / "torch_step.py"), "eager"], env),
        "compile": Worker("compile", [torch, str(steps / "torch_step.py"), "compile"], env),
        "bare": Worker("bare", [ours, "-P", str(steps / "bare_step.py")], passive),
        "stock": Worker("stock", [ours, "-P", str(steps / "stock_step.py")], passive),
    }


def moe() -> dict[str, Worker]:
    """Those of the Qwen3-MoE shape."""
    torch, ours, steps = peers_python(), sys.executable, HERE / "steps"
    env = {**os.environ, **THREADS, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    passive = {**env, "OMP_WAIT_POLICY": "passive"}
    return {
        "busway_moe": Worker("busway_moe", [ours, "-P", str(steps / "busway_step.py"), *MOE], passive),
        "transformers_moe": Worker("transformers_moe", [torch, str(steps / "torch_step.py"), "moe"], env),
    }


COMPARISONS = {"dense": dense, "moe": moe}


def compare(workers: dict[str, Worker]) -> dict[str, float]:
    """Run workers in turn; print their table, and give its figures."""
    for first in range(ROUNDS):
        names = list(workers)
        for place in range(len(names)):  # another one begins each round, so that none always follows the same one
            workers[names[(first + place) % len(names)]].run(STEPS)
    for worker in workers.values():
        worker.close()
    speeds = {name: TOKENS / sorted(worker.times)[ROUNDS // 2] for name, worker in workers.items()}
    busway, *peers = workers
    ratios = {name: ratio(workers[busway], workers[name]) for name in workers}
    print(f"{'step':18}{'tokens/s':>10}{'ms/step':>10}{'busway is':>12}{'loss':>9}")
    for name, worker in workers.items():
        times = f"{speeds[name]:>10,.0f}{1e3 * TOKENS / speeds[name]:>10.1f}{ratios[name]:>11.2f}x{worker.value:>9.3f}"
        print(f"{name:18}{times}")
    result = {f"{name}_tokens_per_s": round(speed, 1) for name, speed in speeds.items()}
    return result | {f"ratio_{name}": round(ratios[name], 3) for name in peers}


if __name__ == "__main__":
    main()
