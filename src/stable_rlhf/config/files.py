"""Files of settings: YAML read and written, and the recipes that ship with the package."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stable_rlhf.errors import ConfigError
from stable_rlhf.files import ASSETS
from stable_rlhf.text import kind_of

PREFIX = "recipe:"
RECIPES = ASSETS / "recipes"


def recipe_names() -> list[str]:
    """The recipes that ship with the package: the experiments first, then the presets."""
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    return sorted(names, key=lambda name: not name.startswith("smollm2"))


def settings_file(name: str | Path) -> Path:
    """The path of a file of settings, or of a recipe by ``recipe:NAME``. Raises ConfigError for an unknown recipe."""
    if not str(name).startswith(PREFIX):
        return Path(name)
    chosen, known = str(name).removeprefix(PREFIX), recipe_names()
    if chosen not in known:
        close = difflib.get_close_matches(chosen, known, n=1)
        remedy = f"Did you mean {PREFIX}{close[0]}?" if close else f"The recipes are {', '.join(known)}"
        raise ConfigError(f"{name}: there is no such recipe. {remedy}")
    return RECIPES / f"{chosen}.yaml"


def read_settings(name: str | Path) -> dict[Any, Any]:
    """The content of a file of settings or of a recipe. Raises ConfigError unless it is a mapping in which no name is
    given twice."""
    example = "a mapping of settings, such as `preset: safe`"
    return read_mapping(str(name), settings_file(name), lambda text: _Loader(text).get_single_data(), example)


def read_mapping(name: str, file: Path, load: Callable[[str], Any], example: str) -> dict[Any, Any]:
    """A YAML file's content, by ``load``. Raises ConfigError, which begins with ``name`` and ends with ``example``,
    what to give, unless it is a mapping that is not empty."""
    try:
        content = load(file.read_text(encoding="utf-8"))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text; give a YAML file") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: of a date that there is not
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: {getattr(error, 'problem', error)}; repair the YAML") from error
    if not isinstance(content, dict) or not content:
        what = "is empty" if content is None or content == {} else f"is {kind_of(content)}"
        raise ConfigError(f"{name}: {what}; give {example}")
    return content


def read_value(text: str) -> Any:
    """One value as YAML reads it. Raises ConfigError."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{text!r}: {getattr(error, 'problem', error)}; give a value as YAML has it") from error


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as the YAML that ``read_settings`` reads back to the same values."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False)


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings of settings as one; where both have a setting, it is that of ``above``."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = over(merged[name], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice. YAML's own loaders silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would read as something else."""


for _class in (_Loader, _Dumper):
    # YAML 1.1, which PyYAML reads, wants 1.0e+2; people, JSON and YAML 1.2 write 1e2 or 1e-4.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    # `None` is what Python calls null; as a text it would be a folder or a model of that name.
    _class.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"None$"), ["N"])
