"""`busway train`: from the command line to ranks that run."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import OmegaConf

from models.checks import ConfigError
from models.config import ModelConfig
from models.shapes import TRAINING
from trainer import checkpoint, launch, machine, precision, run_directory
from trainer.callbacks.console import terminal
from trainer.callbacks.summary import note_failure
from trainer.compose import BUILT_IN, Composed, compose_recipe, known_recipes, sweep
from trainer.data import prepare
from trainer.errors import EXIT_DONE, InputError
from trainer.planning import planned
from trainer.recipe import Recipe, all_keys
from trainer.run_directory import RunDirectory


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `busway train`."""
    add_recipe(parser)
    parser.add_argument("--cfg", choices=["job"], help="print the composed recipe and do nothing")
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of key=a,b in turn")
    parser.add_argument("--help-keys", action="store_true", help="print every key with its meaning")
    parser.set_defaults(run=run)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a recipe and change it."""
    parser.add_argument(
        "recipe", nargs="?", default=BUILT_IN, help=f"a packaged recipe ({', '.join(known_recipes())}) or a YAML file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides: model.layers=2 lr=constant")


def recipe_of(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The recipe that was named, or the built-in one where an override stands in its place, and the overrides."""
    if "=" in args.recipe or args.recipe[:1] in "~+":
        return BUILT_IN, [args.recipe, *args.overrides]
    return args.recipe, args.overrides


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    if args.help_keys:
        for key, kind, default, meaning in all_keys():
            print(f"{key}  ({kind}, {default})" if default else f"{key}  ({kind})", f"    {meaning}", sep="\n")
        return EXIT_DONE
    name, overrides = recipe_of(args)
    if not args.multirun:
        return _one(compose_recipe(name, overrides), args.cfg)
    jobs = sweep(overrides)
    _check_names(jobs)
    for job in jobs:
        _say(f"multirun: {name} {' '.join(job)}")
        code = _one(compose_recipe(name, job), args.cfg)
        if code != EXIT_DONE:
            return code
    return EXIT_DONE


def _one(composed: Composed, cfg: str | None) -> int:
    if composed.recipe.layout.auto and not cfg:
        _check_inputs(composed.recipe)  # before the planner takes its seconds
    composed = planned(composed, _say)
    if cfg:
        print(OmegaConf.to_yaml(composed.config), end="")
        return EXIT_DONE
    return train(composed.recipe, composed.name)


def train(recipe: Recipe, name: str) -> int:
    """Check everything that can be checked, errors of the recipe first, then become a rank or start the ranks."""
    recipe = _with_world(recipe)
    ranks, device = recipe.parallel_layout.world_size, machine.device()
    kind = launch.choose(recipe.launcher, ranks, device)
    _check_inputs(recipe)
    if kind == "none":
        return _be_a_rank(recipe, name)
    cluster = launch.resolve(recipe.launcher, os.environ) if kind == "msrun" else None
    if cluster and cluster.nodes > 1 and recipe.train.name is None:
        raise ConfigError(
            f"train.name is left out, but {cluster.nodes} nodes must find one run directory; set train.name=NAME"
        )
    first = cluster is None or cluster.node_rank == 0
    with _run_directory(recipe, name, first) as run:
        worker = launch.worker_command(run.path, recipe.checkpoint.resume)
        start = launch.compose(recipe.launcher, ranks, run.path, device, os.environ, worker)
        _check_memory(recipe, len(start.ranks))
        _prepare(recipe)
    code = launch.supervise(start)
    if first:
        note_failure(run, code)
    return code


@contextmanager
def _run_directory(recipe: Recipe, name: str, first: bool = True) -> Iterator[RunDirectory]:
    """The run directory, made by the `first` node and awaited by the others; an error inside unmakes a new one."""
    if not first:
        run = run_directory.named(recipe)
        run.wait_for(recipe)
        yield run
        return
    out = Path(recipe.train.out).expanduser()
    had_out = out.exists()
    run, new = run_directory.create(recipe, name)
    try:
        yield run
    except BaseException:
        if new:
            shutil.rmtree(run.path, ignore_errors=True)
            if not had_out:
                with suppress(OSError):  # another run may have begun in it
                    out.rmdir()
        raise


def _prepare(recipe: Recipe) -> None:
    """Tokenise once on this node, before ranks start; they find it in the cache."""
    evaluates = recipe.train.eval_every > 0
    prepare.prepare(recipe.data, recipe.model.vocab, _say, evaluates)


def _say(line: str) -> None:
    terminal().print(line)


def _check_names(jobs: list[list[str]]) -> None:
    named = [word for job in jobs for word in job if word.startswith("train.name=")]
    if len(set(named)) < len(named):
        raise ConfigError(f"{named[0]} would be the name of several runs; leave it out, or sweep over it too")


def _with_world(recipe: Recipe) -> Recipe:
    """With neither `layout.dp` nor `launcher.ranks` given, `launcher.kind=none` takes the world that is there."""
    size = launch.world_from_environment(os.environ)[1]
    if recipe.launcher.kind != "none" or recipe.layout.dp or recipe.launcher.ranks:
        return recipe
    return replace(recipe, launcher=replace(recipe.launcher, ranks=size))


def _be_a_rank(recipe: Recipe, name: str) -> int:
    """This process is a rank that Busway did not start, under a launcher of the user's or alone."""
    local = launch.local_size(os.environ, launch.world_from_environment(os.environ)[1])
    os.environ.update(launch.rank_environment(os.environ, local, len(os.sched_getaffinity(0)), machine.device()))

    def begin() -> RunDirectory:
        with _run_directory(recipe, name) as run:
            _check_memory(recipe, local)
            _prepare(recipe)
        return run

    from trainer.worker import join

    return join(recipe, begin)


def _check_inputs(recipe: Recipe) -> None:
    """What a run needs whatever its layout: a precision of the device, data, and a start that is there and fits."""
    precision.choose(recipe.train.precision, machine.device())
    prepare.check(recipe.data, recipe.model.vocab)
    _check_start(recipe)


def _check_start(recipe: Recipe) -> None:
    """Folders that the run starts from must be there and fit, and the device must be able to record routing."""
    if recipe.metrics.routing and not recipe.model.moe.experts:
        raise InputError("metrics.routing=true needs a model with experts; leave it out")
    if recipe.metrics.routing and machine.device() == "Ascend":
        raise InputError(
            "metrics.routing=true needs operators that are written in Python, which run on CPU alone; leave it out"
        )
    resume, init_from = recipe.checkpoint.resume, recipe.checkpoint.init_from
    if resume not in ("none", "auto"):
        checkpoint.check(Path(resume))
    if init_from:
        from trainer.weight_files import read_weights

        model = read_weights(init_from).config
        theirs, ours = _function_of(model), _function_of(recipe.model)
        for key in theirs | ours:
            if theirs.get(key) != ours.get(key):
                raise InputError(
                    f"checkpoint.init_from={init_from}: its model has {key} {theirs.get(key)}, but model.{key} is "
                    f"{ours.get(key)}; set the model's keys to those of the weights"
                )
        _check_counted(init_from, model, recipe.model)


def _function_of(model: ModelConfig) -> dict[str, object]:
    """What two models must share to compute the same function, less what only training reads."""
    shared = asdict(model) | {"head_dim": model.head_width}
    sections = {key: shared.pop(key) for key in ("rope_scaling", "latent", "moe")}
    unread = {"max_length", "init_std", "mtp"} | ({"kv_heads", "head_dim"} if model.latent.kv_rank else set())
    scaled = model.rope_scaling.kind != "none"
    given = {"rope_scaling": scaled, "latent": model.latent.kv_rank, "moe": model.moe.experts}
    flat = {"latent.kv_rank": model.latent.kv_rank, "moe.experts": model.moe.experts}
    flat |= {key: value for key, value in shared.items() if key not in unread}
    for section, values in sections.items():
        kept = {key: value for key, value in values.items() if section != "moe" or key not in TRAINING}
        flat |= {f"{section}.{key}": value for key, value in kept.items()} if given[section] else {}
    return flat


def _check_counted(init_from: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    """What would be lost or be missing: a bias of the choice, which can begin at zero but not be left out, and layers
    of multi-token prediction."""
    start = f"checkpoint.init_from={init_from}:"
    if theirs.moe.biased and not ours.moe.biased:
        raise InputError(f"{start} its routers have a bias of the choice; set model.moe.bias_rate above 0")
    if theirs.mtp.depth < ours.mtp.depth:
        raise InputError(
            f"{start} its model predicts {theirs.mtp.depth} further tokens, but model.mtp.depth is {ours.mtp.depth}; "
            f"set model.mtp.depth={theirs.mtp.depth}"
        )


def _check_memory(recipe: Recipe, local_ranks: int) -> None:
    item_bytes = precision.choose(recipe.train.precision, machine.device()).item_bytes
    sizes = (recipe.data.seq_len, recipe.train.global_batch, item_bytes)
    needed = machine.needed_memory_gib(recipe.model, recipe.parallel_layout, *sizes)
    if machine.device() == "Ascend":
        machine.check_device_memory(needed, recipe.machine)
    else:
        machine.check_memory(needed, local_ranks)
