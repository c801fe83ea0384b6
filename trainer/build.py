"""One rank's run, put together: recipe → layout → mesh → model → loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import yaml
from rich.console import Console as RichConsole

from models import kernels
from models.attention import rotary_tables
from models.config import FLOPS_CONVENTION
from models.decoder import decoder_segments
from models.weights import Part, Reader, initial_reader
from parallel import collectives as coll
from parallel.apply import Parallelized, parallelize
from parallel.collectives import Collectives, World
from parallel.context import positions
from parallel.mesh import Mesh
from trainer import checkpoint, machine, metrics
from trainer.callbacks.base import Callback
from trainer.callbacks.checkpointer import Checkpointer
from trainer.callbacks.console import Console
from trainer.callbacks.files import MetricsFile, TensorBoard
from trainer.callbacks.routing import Routing
from trainer.callbacks.signals import Signals
from trainer.callbacks.summary import MEMORY_KINDS, Summary
from trainer.callbacks.trace import Trace
from trainer.checkpoint import Checkpoint
from trainer.data.blend import Blend
from trainer.data.loader import Batch, Loader, evaluation_batches, places
from trainer.data.prepare import Corpus, prepare
from trainer.experts import RoutingRecord
from trainer.launch.rank import StopSignal, from_rank_0
from trainer.loop import Loop
from trainer.meter import Meter
from trainer.precision import Precision
from trainer.precision import choose as choose_precision
from trainer.recipe import Recipe
from trainer.run_directory import RunDirectory
from trainer.step import Finish, TrainStep, Weights
from trainer.weight_files import CONFIG, read_weights, yaml_of_config


def connect(recipe: Recipe) -> Collectives:
    """Joins the world of the recipe's layout."""
    return join(Mesh(recipe.parallel_layout, recipe.machine, recipe.placement))


def join(mesh: Mesh) -> Collectives:
    """Sets MindSpore up on this device and joins the world of a mesh."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(machine.device())
    return coll.connect(mesh)


def build(
    recipe: Recipe, run: RunDirectory, collectives: Collectives, signal: StopSignal, console: RichConsole,
    extra: list[Callback] | None = None,
) -> Loop:  # fmt: skip
    """The loop of this rank, at the step from which the run goes on. `extra` callbacks come last."""
    say = _speaker(console, collectives.rank)
    mesh, rank = collectives.mesh, collectives.rank
    resumed = _resumed(recipe, run, collectives.world, say)
    with _start(recipe, resumed) as read:
        step, weights, parallel = assemble(recipe, collectives, machine.device(), read)
    if resumed:
        for kind in ("first", "second"):
            with resumed.reader(kind) as read:
                weights.load(kind, read)

    corpus = prepare(recipe.data, recipe.model.vocab, say, recipe.train.eval_every > 0)
    loader, holdout = _batches(recipe, corpus, mesh, rank, resumed.state["samples"] if resumed else 0)
    precision = choose_precision(recipe.train.precision, machine.device())
    meter = _meter(recipe, mesh, precision, collectives)
    callbacks = _callbacks(recipe, rank, signal, console, meter, _companions(recipe, corpus)) + (extra or [])
    if step.routing:
        callbacks.append(Routing(step.routing, _token_numbers(recipe, mesh, rank)))
    loop = Loop(recipe, run, mesh, collectives, weights, step, loader, holdout, meter, callbacks)
    if rank == 0:
        _banner(loop, precision.name, parallel.kernels.describe(), corpus.samples, say)
        _write_plan(run, mesh, recipe.plan.prediction)
    if resumed:
        loop.resume(resumed)
    return loop


def assemble(
    recipe: Recipe, collectives: Collectives, device: str, read: Reader
) -> tuple[TrainStep, Weights, Parallelized]:
    """This rank's part of the model, its weights as `read` gives them, and the step that trains it."""
    precision = choose_precision(recipe.train.precision, device)
    dtype, layout, seq_len = precision.dtype, collectives.mesh.layout, recipe.data.seq_len
    table = kernels.choose(recipe.train.kernels, precision.name, device, recipe.data.mask_documents)
    segments = decoder_segments(recipe.model, table, precision.rounding)
    schedule = layout.pipeline(recipe.train.global_batch)
    parallel = parallelize(segments, recipe.model, table, collectives, schedule, seq_len, dtype)
    routing = RoutingRecord(parallel.stages) if recipe.metrics.routing else None
    weights = Weights(parallel.weights, parallel.data, read, dtype)
    finish = Finish(weights, table, recipe.optimizer, dtype, recipe.model.moe.bias_rate, _even_share(recipe))
    micro_batches = layout.check_batch(recipe.train.global_batch)
    tables = [table[parallel.positions] for table in rotary_tables(recipe.model, seq_len, dtype)]
    stream = (layout.stream_tokens(seq_len), recipe.model.hidden)
    step = TrainStep(parallel, weights, finish, micro_batches, tables, stream, seq_len, dtype, recipe.model.mtp.depth)
    step.routing = routing
    return step, weights, parallel


def _token_numbers(recipe: Recipe, mesh: Mesh, rank: int) -> np.ndarray:
    """[micro-batches, tokens] numbers in the global batch of the tokens that this rank routes in a step."""
    layout, length = mesh.layout, recipe.data.seq_len
    taken = places(recipe.train.global_batch, mesh.size("data"), mesh.index("data", rank), layout.micro_batch)
    own = positions(layout, mesh.index("cp", rank), length)
    numbers = (np.array(taken)[:, None] * length + own).reshape(-1, layout.micro_batch * len(own))
    return np.split(numbers, layout.tp, axis=1)[mesh.index("tp", rank)]


def _even_share(recipe: Recipe) -> float:
    """Copies of tokens that each expert of a layer gets in one step if all get as many."""
    moe = recipe.model.moe
    return recipe.train.global_batch * recipe.data.seq_len * moe.top_k / moe.experts if moe.experts else 0.0


def _resumed(recipe: Recipe, run: RunDirectory, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the run goes on from. Rank 0 decides and checks it."""

    def choose() -> Checkpoint | None:
        if recipe.checkpoint.resume == "auto":
            return checkpoint.newest(run.checkpoints, say)
        return None if recipe.checkpoint.resume == "none" else checkpoint.load(Path(recipe.checkpoint.resume).resolve())

    return from_rank_0(world, choose)


@contextmanager
def _start(recipe: Recipe, resumed: Checkpoint | None) -> Iterator[Reader]:
    """Where the weights come from: a checkpoint, a folder of weights, or the generator."""
    if resumed:
        with resumed.reader("weights") as read:
            yield read
        return
    new = initial_reader(recipe.train.seed, recipe.model.init_std)
    if recipe.checkpoint.init_from:
        weights = read_weights(recipe.checkpoint.init_from)

        def read(part: Part) -> np.ndarray:
            fresh = part.spec.update == "balance" and part.spec.name not in weights.tensors
            return (new if fresh else weights.read)(part)  # a bias of the choice that they lack begins at zero

        yield read
    else:
        yield new


def _batches(recipe: Recipe, corpus: Corpus, mesh: Mesh, rank: int, start: int) -> tuple[Loader, list[Batch]]:
    shape = (recipe.train.global_batch, mesh.size("data"), mesh.index("data", rank), mesh.layout.micro_batch)
    loader = Loader(Blend(corpus.train, corpus.weights, recipe.train.seed), *shape, start=start)
    if not corpus.holdout:
        return loader, []
    return loader, list(evaluation_batches(corpus.holdout, recipe.train.eval_batches, *shape))


def _meter(recipe: Recipe, mesh: Mesh, precision: Precision, collectives: Collectives) -> Meter:
    peak_tflops = recipe.machine.rank.peak_tflops.get(precision.peak)
    return Meter(
        tokens_per_step=recipe.train.global_batch * recipe.data.seq_len,
        seq_len=recipe.data.seq_len,
        ranks=mesh.world_size,
        flops_per_token=recipe.model.flops_per_token(recipe.data.seq_len),
        peak_flops=peak_tflops * 1e12 if peak_tflops else None,
        memory_gib=_peak_memory_gib,
        world_maximum=collectives.world.reduce_max,
    )


def _peak_memory_gib() -> float:
    """The allocator's peak on Ascend; on CPU, where it is always 0, the peak resident memory."""
    if machine.device() == "Ascend":
        return ms.runtime.max_memory_allocated() / machine.GIB
    return machine.peak_memory_gib()


def _callbacks(
    recipe: Recipe, rank: int, signal: StopSignal, console: RichConsole, meter: Meter, companions: dict[str, str]
) -> list[Callback]:
    """In order: what changes the run first, then what reports, the summary last."""
    callbacks: list[Callback] = [Signals(signal), Checkpointer(companions)]
    if recipe.metrics.trace:
        callbacks.insert(0, Trace(_speaker(console, rank)))
    if rank == 0:
        batch = recipe.train.global_batch
        tags = metrics.tags(recipe.metrics.tags, recipe.model, meter.flops_per_token, recipe.machine.rank.memory_gib)
        callbacks += [Console(console), MetricsFile(), TensorBoard(tags, batch)]
    return [*callbacks, Summary(MEMORY_KINDS[machine.device()])]


def _companions(recipe: Recipe, corpus: Corpus) -> dict[str, str]:
    """What makes a checkpoint a weight directory: the model's config, and its tokenizer where the recipe names one."""
    companions = {CONFIG: yaml_of_config(recipe.model)}
    if corpus.tokenizer:
        companions["tokenizer.json"] = corpus.tokenizer.read_bytes().decode()
    return companions


def _speaker(console: RichConsole, rank: int) -> Callable[[str], None]:
    if rank != 0:
        return lambda text: None
    return console.print


def _banner(loop: Loop, precision: str, kernel_line: str, samples: int, say: Callable[[str], None]) -> None:
    recipe, meter = loop.recipe, loop.meter
    micro_batches = loop.mesh.layout.check_batch(recipe.train.global_batch)
    peak = "unknown for this machine, so MFU is not given"
    if meter.peak_flops:
        peak = f"{meter.peak_flops / 1e12:,g} TFLOP/s a rank ({recipe.machine.name})"
    say(f"busway {version('busway')}, mindspore {version('mindspore')} on {machine.device()}; run {loop.run}")
    say(f"layout: {loop.mesh.describe()}; collectives: {loop.collectives.describe()}")
    active = f" ({recipe.model.active_parameter_count:,} active)" if recipe.model.moe.experts else ""
    count = f"{recipe.model.parameter_count:,} parameters{active}"
    say(f"model: {count}, {meter.flops_per_token:,} FLOPs a token; {precision}")
    say(f"FLOPs: {FLOPS_CONVENTION}; peak: {peak}")
    say(kernel_line)
    say(
        f"tokens a step: {meter.tokens_per_step:,} = {recipe.train.global_batch} sequences x {recipe.data.seq_len}; "
        f"micro-batches a rank: {micro_batches}"
    )
    taken = recipe.train.steps * recipe.train.global_batch
    epochs = f"{taken / samples:.2g} epochs"
    say(f"data: {samples:,} samples of {recipe.data.seq_len} tokens; the run takes {taken:,} ({epochs})")
    say(f"memory after the model is built: {_peak_memory_gib():.2f} GiB a rank")


def _write_plan(run: RunDirectory, mesh: Mesh, prediction: dict[str, Any] | None) -> None:
    layout = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(mesh.layout).items()}
    plan = {"layout": layout, "topology": mesh.topology.name, "placement": list(mesh.placement)}
    plan |= {"prediction": prediction} if prediction else {}
    with machine.writing_to(run.plan):
        run.plan.write_text(yaml.safe_dump(plan, sort_keys=False))
