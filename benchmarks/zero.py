"""What ZeRO leaves on a rank: `python benchmarks/zero.py`.

Two data-parallel ranks train a model that is nearly all weights (hidden 1,024, ffn 2,816, fp32; 64 tokens a
micro-batch, two micro-batches a step) without ZeRO and with its three stages, in turn. Of rank 0 it prints

- the bytes of the live weights, sums of gradients and optimizer's tensors, each beside `parallel.memory.state_bytes`,
  with which they must agree exactly;
- how much the peak of the resident memory lies above what the process had before the model was built, less the same of
  a model of the same segments and hidden 64, which is what compiling and running the graphs takes; and what is to be
  expected of it: the live tensors and the largest of what comes and goes beside them.

What comes and goes: without ZeRO the reduced gradients, with stages 1 and 2 the weights that are gathered from what
the optimizer wrote, which is as much; with stage 3 the weights that are whole at once (`State.gathered`), a segment's
gradients and their pieces. The peer is ZeRO 0. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20
SHAPES = {"large": {"hidden": 1024, "ffn": 2816}, "small": {"hidden": 64, "ffn": 64}}
LAYERS, RANKS, STEPS = 12, 2, 3
KINDS = ("weights", "gradients", "optimizer")


def main() -> None:
    """Run every stage, for both models, and print."""
    rows = []
    for zero, prefetch in ((0, False), (1, False), (2, False), (3, False), (3, True)):
        found = {size: launch(size, zero, prefetch) for size in SHAPES}
        large, small = found["large"], found["small"]
        assert all(large[kind] == large["formula"][kind] for kind in KINDS), f"ZeRO {zero}: {large}"
        fixed = small["growth"] - sum(small[kind] for kind in KINDS)
        rows.append({"zero": zero, "prefetch": prefetch, **large, "growth": large["growth"] - fixed, "fixed": fixed})
    shape = f"{LAYERS} layers of hidden {SHAPES['large']['hidden']}"
    print(f"MiB on rank 0 of {RANKS}, {shape}; the live tensors are those of the formula to the byte")
    columns = (*KINDS, "passing", "expected", "peak RSS", "ratio", "of ZeRO 0", "expected")
    print(f"{'ZeRO':12}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        figures = [row[kind] for kind in KINDS] + [row["passing"], row["expected"], row["growth"]]
        shares = [row["growth"] / row["expected"], *(row[key] / rows[0][key] for key in ("growth", "expected"))]
        row |= dict(zip(("ratio", "of_zero_0", "of_zero_0_expected"), (round(s, 3) for s in shares), strict=True))
        cells = [f"{figure / MIB:>12,.1f}" for figure in figures] + [f"{share:>12.2f}" for share in shares]
        print(f"{str(row['zero']) + row['prefetch'] * ' prefetch':12}" + "".join(cells))
    print(json.dumps(rows))


def launch(size: str, zero: int, prefetch: bool) -> dict:
    """What rank 0 found."""
    mpiexec = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(RANKS)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*mpiexec, sys.executable, "-P", __file__, folder, size, str(zero), str(prefetch)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def rank(folder: Path, size: str, zero: int, prefetch: str) -> None:
    """Train for some steps as one rank; rank 0 prints what it holds."""
    import psutil
    from rich.console import Console

    from parallel.memory import Share, state_bytes
    from trainer.build import build, connect
    from trainer.compose import compose_recipe
    from trainer.launch.rank import StopSignal
    from trainer.run_directory import create

    (folder / "text.txt").write_text("the bus runs every ten minutes and a tram every five " * 400)
    shape = {"layers": LAYERS, "heads": 4, "kv_heads": 4, "vocab": 512, **SHAPES[size]}
    recipe = compose_recipe(
        "tiny_dense",
        [*(f"model.{key}={value}" for key, value in shape.items()), f"layout.dp={RANKS}", "layout.tp=1", "layout.pp=1",
         "layout.micro_batch=1", "train.global_batch=4", "data.seq_len=64", "data.tokenizer=bpe:300", "data.holdout=0",
         f"data.sources=[{{path: {folder}/text.txt}}]", f"train.out={folder}", f"train.steps={STEPS}",
         "train.eval_every=0", f"layout.zero={zero}", f"layout.prefetch={prefetch}"],
    ).recipe  # fmt: skip
    collectives = connect(recipe)
    place = collectives.rank
    run, _ = create(recipe, f"rank-{place}")
    before = psutil.Process().memory_info().rss
    console = Console(file=(folder / f"console-{place}").open("w"))
    loop = build(recipe, run, collectives, StopSignal(insist=True), console)
    loop.call("on_start")
    for _ in range(STEPS):
        loop.advance()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    loop.loader.close()
    if place == 0:
        share = Share(recipe.model, recipe.parallel_layout, recipe.train.global_batch)
        formula = state_bytes(share, 4)
        passing = expected_passing(share, formula)
        found = live(loop) | {"formula": formula._asdict(), "passing": passing, "growth": growth}
        print(json.dumps(found | {"expected": sum(found[kind] for kind in KINDS) + passing}))


def live(loop) -> dict[str, int]:
    """Bytes of the tensors that live from step to step."""
    weights = loop.weights
    own = () if weights.masters is weights.values else weights.masters
    return {
        "weights": sum(p.nbytes for p in weights.values),
        "gradients": sum(p.nbytes for p in loop.train_step.finish.accumulators),
        "optimizer": sum(p.nbytes for kind in (own, weights.first, weights.second) for p in kind),
    }


def expected_passing(share, formula) -> int:
    """Bytes of what comes and goes, at its largest."""
    if not formula.gathered:
        return formula.weights
    largest = max(share.segments, key=share.elements)
    return formula.gathered + 4 * (share.elements(largest) + sum(share.pieces([largest]).values()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
