"""From what the user typed to a typed recipe: Hydra composes, errors become one line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.checks import ConfigError, nearest
from parallel import topology
from parallel.topology import Topology
from trainer import recipe as recipes
from trainer.recipe import Recipe

BUILT_IN = "tiny_moe"
YAML = (".yaml", ".yml")
PACKAGED = Path(__file__).parent.parent / "recipes"
GROUPS = sorted(folder.name for folder in PACKAGED.iterdir() if folder.is_dir() and any(folder.glob("*.yaml")))


@dataclass(frozen=True)
class Composed:
    """A recipe, and the name that a run directory takes from it."""

    name: str
    config: DictConfig
    recipe: Recipe
    given: frozenset[str] = frozenset()
    """Keys of the layout that the command line sets and, of a recipe that says `layout.auto` itself, those that it sets
    too."""


def compose_recipe(name: str, overrides: list[str], plan: bool = False) -> Composed:
    """Compose the packaged recipe or YAML file `name` with `overrides`; `ConfigError` says what is wrong.

    With `plan` its layout is left to the planner, but for what the command line gives.
    """
    parsed = _parse(overrides)
    given = {override.key_or_group.removeprefix("layout.") for override in parsed if "layout." in override.key_or_group}
    machine = _topology_file(parsed)
    folders = [PACKAGED, Path(name).parent] if Path(name).suffix in YAML else [PACKAGED]
    for override in parsed:
        _check_known(override, folders)
    config = _hydra(name, [_line(override) for override in parsed])
    if machine:
        OmegaConf.update(config, "topology", _with_overrides(machine, parsed), merge=False, force_add=True)
    named = any(override.input_line == "layout=auto" for override in parsed)
    if config.get("layout", {}).get("auto") and not named:
        given |= {*config.layout} - {"auto"}
    elif plan:
        OmegaConf.update(config, "layout.auto", True, force_add=True)
    return Composed(_run_name(name), config, recipes.typed(config), frozenset(given))


def compose_topology(name: str, overrides: list[str]) -> Topology:
    """The packaged topology or YAML file `name` with `overrides` (`topology.supernode.members=64`).

    Raises `ConfigError` that says what is wrong.
    """
    packaged = sorted(file.stem for file in (PACKAGED / "topology").glob("*.yaml"))
    if Path(name).suffix not in YAML and name not in packaged:
        raise ConfigError(f"unknown topology {name!r}; {nearest(name, packaged)} (a file's name ends in .yaml)")
    file = Path(name) if Path(name).suffix in YAML else PACKAGED / "topology" / f"{name}.yaml"
    parsed = _parse(overrides)
    for override in parsed:
        plain = not override.is_delete() and not override.is_sweep_override()
        if not plain or not override.key_or_group.startswith("topology."):
            raise ConfigError(f"{override.input_line} changes no topology; write topology.LEVEL.KEY=VALUE")
    return topology.load(_with_overrides(read_yaml(file, "topology"), parsed))


def sweep(overrides: list[str]) -> list[list[str]]:
    """The lists of overrides that `--multirun` runs one after another: every combination of `a=1,2` and ranges."""
    return BasicSweeper.split_arguments(_parse(overrides), max_batch_size=None)[0]


def known_recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        line = str(error).split("\n")[0]
        raise ConfigError(f"cannot read an override: {line}; write key=value, quoting what the shell takes") from error


def _topology_file(parsed: list[Override]) -> dict | None:
    """`topology=FILE` taken out of the overrides and read; None where a group member or nothing is named."""
    for override in parsed:
        value = override.value()
        if override.key_or_group == "topology" and isinstance(value, str) and value.endswith(YAML):
            parsed.remove(override)
            return read_yaml(Path(value), "topology")
    return None


def _with_overrides(machine: dict, parsed: list[Override]) -> dict:
    """A topology that was read from a file, with what the command line changes in it."""
    config = OmegaConf.create({"topology": machine})
    for override in parsed:
        if override.key_or_group.startswith("topology."):
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    return OmegaConf.to_container(config)["topology"]


def _check_known(override: Override, folders: list[Path]) -> None:
    """`folders` hold the groups: the package's and, beside a file of the user's own, the user's."""
    key = override.key_or_group
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line} gives several values; add --multirun to run each, or quote the value")
    if key in GROUPS and not override.is_delete():
        value = override.value()
        members = sorted({file.stem for folder in folders for file in (folder / key).glob("*.yaml")})
        if not isinstance(value, dict) and value not in members:
            raise ConfigError(f"{key}={value} is unknown; {nearest(str(value), members)}")
    elif key.split(".")[0] == "topology":
        return  # a topology checks its own keys
    elif key not in recipes.known_keys() and not override.is_delete():
        raise ConfigError(recipes.unknown_key(key))


def _line(override: Override) -> str:
    """An override as Hydra takes it: a known key may be set whether the recipe's files name it or not."""
    plain = override.type == OverrideType.CHANGE and override.key_or_group not in GROUPS
    return f"++{override.input_line}" if plain else override.input_line


def _hydra(name: str, overrides: list[str]) -> DictConfig:
    file = Path(name)
    if file.suffix in YAML:
        read_yaml(file, "recipe")
        start = initialize_config_dir(str(file.parent.resolve()), version_base="1.3")
        stem, overrides = file.stem, [*overrides, "hydra.searchpath=[pkg://recipes]"]
    elif name in known_recipes():
        start, stem = initialize_config_module("recipes", version_base="1.3"), name
    else:
        raise ConfigError(f"unknown recipe {name!r}; {nearest(name, known_recipes())} (a file's name ends in .yaml)")
    try:
        with start:
            return compose(stem, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        if group := re.match(r"Could not override '(\w+)'", str(error)):
            raise ConfigError(
                f"recipe {name} takes no {group[1]}=…, as it has no {group[1]} in its defaults list; "
                f"set {group[1]}.KEY=…, or write the group into that list"
            ) from error
        raise ConfigError(f"recipe {name}: {str(error).splitlines()[0]}; {recipes.REFERENCE}") from error


def read_yaml(file: Path, what: str) -> dict:
    """The keys and values of `file`, which is a `what` (recipe, topology) to the user; else `ConfigError`."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read the {what} {file}: {reason}; name a YAML file that is there") from error
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"the {what} {file} is not YAML: {line}; mend the file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the {what} {file} must hold keys and values; see the recipes that Busway ships")
    return content


def _run_name(name: str) -> str:
    """A saved recipe (`runs/NAME/recipe.yaml`, `plans/NAME/plan.yaml`) gives its run's name without the number, others
    their own."""
    file = Path(name)
    if file.suffix not in YAML:
        return name
    if file.stem in ("recipe", "plan"):
        return file.resolve().parent.name.rstrip("0123456789").rstrip("-") or file.stem
    return file.stem
