"""The typed recipe: every key that a user may write, checked, and the reference of all keys made from it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from models.checks import ConfigError, check, nearest
from models.config import ModelConfig
from parallel import topology
from parallel.allocation import positions
from parallel.layout import Layout
from trainer.data.settings import DataSettings, Source
from trainer.launch.settings import LauncherSettings
from trainer.settings import (
    CheckpointSettings,
    LayoutSettings,
    LearningRateSettings,
    MetricsSettings,
    OptimizerSettings,
    PlanSettings,
    TrainSettings,
)

REFERENCE = "see 'busway train --help-keys'"


@dataclass(kw_only=True)
class Recipe:
    """One run: what is trained, on what, how, and where."""

    model: ModelConfig
    data: DataSettings
    train: TrainSettings
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lr: LearningRateSettings = field(default_factory=LearningRateSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    topology: dict[str, Any]
    launcher: LauncherSettings = field(default_factory=LauncherSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)

    def __post_init__(self) -> None:
        self.machine = topology.load(self.topology)
        check(
            self.data.seq_len <= self.model.max_length,
            "data.seq_len",
            f"must not exceed model.max_length {self.model.max_length}, but is {self.data.seq_len}",
            "shorten data.seq_len or raise model.max_length",
        )
        check(
            self.model.mtp.depth < self.data.seq_len,
            "model.mtp.depth",
            f"must be below data.seq_len {self.data.seq_len}, but is {self.model.mtp.depth}",
            f"set model.mtp.depth={self.data.seq_len - 1} or less",
        )
        if self.layout.auto:
            return  # the planner makes a recipe whose layout is known of this one
        self.parallel_layout = self._layout()
        self.parallel_layout.check_batch(self.train.global_batch)
        self.parallel_layout.pipeline(self.train.global_batch)
        self.parallel_layout.check_model(self.model, self.data.seq_len)
        self.machine.check_fits(self.parallel_layout.world_size)
        places = positions(self.machine, self.parallel_layout.world_size, self.plan.without, self.plan.nodes)
        self.placement = places
        """Where on the machine each rank runs."""

    def _layout(self) -> Layout:
        """The layout with what was left out: dp from `launcher.ranks`, the micro-batch from the batch and pp."""
        keys, ranks = layout_keys(self.layout), self.launcher.ranks
        if ranks and not keys["dp"]:
            alone = {"dp": 1, "micro_batch": 1, "zero_group": None, "ep": 1, "etp": 1, "outer_groups": None}
            replica = Layout(**keys | alone).world_size
            check(
                ranks % replica == 0,
                f"launcher.ranks {ranks}",
                f"must be a multiple of the {replica} ranks of one replica",
                f"set launcher.ranks={max(1, round(ranks / replica)) * replica} (the nearest), or change the layout",
            )
            keys["dp"] = ranks // replica
        keys["dp"] = keys["dp"] or 1
        if keys["micro_batch"] is None:
            keys["micro_batch"] = Layout(**keys | {"micro_batch": 1}).whole_micro_batch(self.train.global_batch)
        layout = Layout(**keys)
        if ranks:
            layout.check_world(ranks)
        return layout


def layout_keys(settings: LayoutSettings) -> dict[str, Any]:
    """The keys of `parallel.layout.Layout`."""
    return {key: value for key, value in dataclasses.asdict(settings).items() if key != "auto"}


def typed(config: DictConfig) -> Recipe:
    """The recipe that `config` spells, or `ConfigError` with one line about the first thing that is wrong."""
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), config))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{_key(error)} is missing; set {_key(error)}=…") from error
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(_key(error))) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_wrong_value(error, config)}; {REFERENCE}") from error
    return recipe


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every key in it, to be run again.

    It says nothing of how this start found its directory and its ranks (`train.name`, `checkpoint.resume`,
    `launcher.kind`): another would go into the same directory, or look for a launcher that is not there.
    """
    anew = replace(
        recipe,
        train=replace(recipe.train, name=None),
        checkpoint=replace(recipe.checkpoint, resume="none"),
        launcher=replace(recipe.launcher, kind="auto"),
    )
    return OmegaConf.to_yaml(OmegaConf.structured(anew))


def unknown_key(key: str) -> str:
    """What to say of a key that no section has: the nearest of its section, the one of that name, or the nearest."""
    section, _, name = key.rpartition(".")
    known = [known for known, *_ in all_keys()]
    siblings = [k for k in known if section and k.startswith(section + ".")]
    namesakes = [k for k in known if k.endswith("." + name)]
    sections = {k.split(".")[0] for k in known}
    if key in sections:
        return f"{key} is a section of keys and takes no value itself; set {key}.KEY=…, {REFERENCE}"
    return f"unknown key {key}; {nearest(key, siblings or namesakes or [*known, *sections], REFERENCE)}"


def all_keys(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, what it means) of every key, in order, read from the dataclasses and their docstrings."""
    documents = _field_documents(cls)
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        key, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from all_keys(hint, key + ".")
        elif entry.name == "topology":
            meaning = "The machine as levels; `topology.NAME.KEY` changes a level or a plane of it (docs/topology.md)."
            yield key, "group or file", "", meaning
        else:
            yield key, _type_name(hint), _default(entry), documents[entry.name]
            if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
                yield from all_keys(typing.get_args(hint)[0], key + "[].")


@cache
def known_keys() -> frozenset[str]:
    """The names of `all_keys`."""
    return frozenset(key for key, *_ in all_keys())


def _default(entry: dataclasses.Field) -> str:
    if entry.default is not dataclasses.MISSING:
        value = entry.default
    elif entry.default_factory is not dataclasses.MISSING:
        value = entry.default_factory()
    else:
        return "required"
    if value is None:
        return "left out"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(hint: Any) -> str:
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is list:
        return f"list of {arguments[0].__name__.lower()}"
    return arguments[0].__name__ if arguments else hint.__name__


@cache
def _field_documents(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    documents = {}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            documents[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return documents


def _key(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key or "recipe")
    return f"data.sources[].{key}" if error.object_type is Source else key  # OmegaConf names it within its list alone


def _wrong_value(error: OmegaConfBaseException, config: DictConfig) -> str:
    key = _key(error)
    kind = next((kind for known, kind, *_ in all_keys() if known == key), None)
    if kind is None or "[" in key:
        return f"{key}: {str(error).splitlines()[0].rstrip('.')}"
    return f"{key} must be of type {kind}, but is {OmegaConf.select(config, key)!r}"


def key_reference() -> str:
    """docs/keys.md: every key as a Markdown table, made from the dataclasses."""
    lines = ["# Keys of a recipe", "", "Made from the dataclasses by `python -m trainer.recipe > docs/keys.md`.", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in all_keys()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(key_reference())
