"""A block of experts on 1, 2 and 4 ranks beside a dense one of the same FLOPs: `python benchmarks/experts.py`.

4,096 tokens of width 256, spread over the ranks, go to 4 of 16 experts of ffn 128 each, with the balance loss; the
dense feed-forward has ffn 512. Norm, block and skip connection, forward and backward with the weights' gradients in one
graph, fp32. Experts are spread over all ranks, by flat and by two-level dispatch (two outer groups); the dense block is
the same on every rank, which has nothing to send. Two threads on one rank, one a rank on more: four ranks share two
cores. In turn in one run, the median of the slowest rank. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RANKS = (1, 2, 4)
TOKENS, LENGTH, ROUNDS = 4096, 256, 25


def launch(ranks: int) -> dict[str, float]:
    """Milliseconds of each block in a world of `ranks`."""
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if mpiexec is None:
        sys.exit("experts.py needs mpiexec, which the mpich package brings")
    threads = {"OMP_NUM_THREADS": str(max(1, 2 // ranks)), "OMP_WAIT_POLICY": "passive"}
    command = [mpiexec, "-n", str(ranks), sys.executable, __file__, "--worker"]
    done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def worker() -> None:
    """One rank; rank 0 prints."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn
    from mpi4py import MPI

    from models.attention import rotary_tables
    from models.config import ModelConfig
    from models.experts import experts_block
    from models.feed_forward import feed_forward_block
    from models.kernels import choose
    from models.shapes import ExpertsConfig
    from models.weights import initial_reader
    from parallel import collectives
    from parallel.expert import ExpertParallel
    from parallel.layout import Layout
    from parallel.mesh import Mesh
    from parallel.topology import load
    from trainer.compose import compose_recipe

    class Step(nn.Cell):
        """Forward and backward of a segment."""

        def __init__(self, segment, tables) -> None:
            super().__init__()
            self.segment, self.tables = segment, tables

        def construct(self, x, tokens, labels, first_key, *weights):
            context = (tokens, labels, first_key) + self.tables
            y, saved = self.segment.forward(x, weights, context)
            return self.segment.backward(y, saved, weights, context)

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    comm = MPI.COMM_WORLD
    shapes = {"layers": 1, "hidden": 256, "heads": 8, "kv_heads": 4, "vocab": 64, "ffn": 512}
    config = ModelConfig(**shapes, moe=ExpertsConfig(experts=16, top_k=4, ffn=128))
    kernels = choose("auto", "fp32", "CPU")
    tables = tuple(Tensor(table) for table in rotary_tables(config, LENGTH))
    tokens, rng = TOKENS // comm.size, np.random.default_rng(comm.rank)
    x = Tensor(rng.standard_normal((tokens, 256)).astype(np.float32))
    inputs = (x, *(Tensor(np.zeros(tokens, np.int32)) for _ in range(3)))

    def step(segment):
        read = initial_reader(1, 0.06)
        weights = [Tensor(np.float32(weight.stack(read))) for weight in segment.weights]
        cell = Step(segment, tables)
        return lambda: cell(*inputs, *weights)[0].asnumpy()

    blocks = {"dense": step(feed_forward_block(ModelConfig(**shapes), 0, kernels, "none"))}
    block = experts_block(config, 0, kernels, "none")
    if comm.size == 1:
        blocks["local"] = step(block)
    machine = load(compose_recipe("tiny_moe", []).recipe.topology)
    for dispatch in ("flat", "two_level") if comm.size > 1 else ():
        layout = Layout(dp=comm.size, ep=comm.size, dispatch=dispatch, micro_batch=tokens // LENGTH)
        parts = config, collectives.connect(Mesh(layout, machine)), kernels
        blocks[dispatch] = step(ExpertParallel(*parts).apply(block))
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(ROUNDS):
        for name, run in blocks.items():
            comm.Barrier()
            begin = time.perf_counter()
            run()
            times[name].append(comm.allreduce(1e3 * (time.perf_counter() - begin), max))
    if comm.rank == 0:
        print(json.dumps({name: median(values[5:]) for name, values in times.items()}))


def main() -> None:
    """Measure and print."""
    print(f"{'ranks':>5}{'block':>12}{'ms':>10}{'over dense':>12}")
    found = {}
    for ranks in RANKS:
        times = launch(ranks)
        for name, value in times.items():
            found[f"{name}_{ranks}"] = round(value / times["dense"], 3)
            print(f"{ranks:>5}{name:>12}{value:>10.2f}{found[f'{name}_{ranks}']:>12.2f}", flush=True)
    print(json.dumps({"over_dense": found}))


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
