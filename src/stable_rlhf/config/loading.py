"""Settings from the command line and YAML files, and what is said about those that are wrong."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from stable_rlhf.config.checks import wanted
from stable_rlhf.config.config import Config
from stable_rlhf.config.presets import PRESETS
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import controller_settings
from stable_rlhf.errors import ConfigError

_TOP = [field.name for field in dataclasses.fields(Config) if field.name not in SECTIONS]


_HINTS: dict[str, Any] = {name: hint for name, hint in typing.get_type_hints(Config).items() if name in _TOP} | {
    f"{name}.{field}": hint
    for name, section in SECTIONS.items()
    for field, hint in typing.get_type_hints(section).items()
}
"""The type of every setting, by its name on the command line."""


# The docstring below each field is its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parser(preset: str, command: str = "train") -> ArgumentParser:
    """Every setting of Config as an argument, the preset's values as defaults. No abbreviations, no other names."""
    made = ArgumentParser(prog=f"stable-rlhf {command}", exit_on_error=False, allow_abbrev=False, print_config=None)
    made.add_argument("--config", action=ActionConfigFile, help="YAML file of settings; what is given here wins")
    made.add_class_arguments(Config, skip=set(SECTIONS))
    for name, section in SECTIONS.items():
        made.add_class_arguments(section, name)
    changes = {f"{name}.{field}": value for name in SECTIONS for field, value in PRESETS[preset].get(name, {}).items()}
    made.set_defaults({"preset": preset, **changes})
    return made


def load_config(arguments: Sequence[str]) -> Config:
    """Defaults < preset < --config FILE < --section.field VALUE, in this order. Raises ConfigError."""
    made = parser("safe")
    files, arguments = taken_out("--config", arguments)
    for file in files:
        _check_file(Path(file))
    arguments = [*(f"--config={file}" for file in files), *arguments]  # what is given here wins, wherever it stands
    given, complete = (_parse(made, arguments, defaults) for defaults in (False, True))
    for section, field in (("reward", "functions"), ("reward", "trust_remote_code")):
        if field in given.get(section, {}):  # `--reward.functions+ x` adds to the default
            given[section][field] = complete[section][field]
    config = Config.from_preset(given.pop("preset", "safe"), **given)
    try:
        controller_settings(config.kl.controller, config.kl.settings)
    except ValueError as error:
        names = controller_settings(config.kl.controller, {})
        unknown = [name for name in config.kl.settings if name not in names]
        close = _suggestion(unknown[0], names, otherwise="") if unknown else ""
        raise ConfigError(f"kl.settings: {str(error).rstrip('.')}{close}") from error
    return config


def _parse(made: ArgumentParser, arguments: Sequence[str], defaults: bool) -> dict[str, Any]:
    try:
        settings = made.parse_args(list(arguments), defaults=defaults).as_dict()
    except (ArgumentError, argparse.ArgumentError) as error:
        raise ConfigError(_in_one_sentence(str(error))) from error
    settings.pop("config", None)
    return settings


def _in_one_sentence(message: str) -> str:
    """jsonargparse's message as setting, value and remedy; as it is, on one line, where it has another form."""
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        name = found[1].split("=")[0]
        if not name.startswith("--"):
            return f"unexpected {name!r}: a setting is given as --section.field VALUE, a file as --config FILE"
        return f"unknown setting {name}{_suggestion(name.lstrip('-'), _HINTS)}"
    found = re.search(r'Parser key "([\w.]+)"|argument --([\w.]+): expected', message)
    name = found[1] or found[2] if found else ""
    if name in SECTIONS:
        return f"--{name} is a section: give its fields one by one, such as --{name}.{_fields(name)[0]} VALUE"
    if name not in _HINTS:
        return " ".join(message.split())
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    return f"{name}{f'={values[-1]!r}' if values else ' has no value'}: {wanted(_HINTS[name])}"


def _suggestion(name: str, known: Iterable[str], otherwise: str = "; `stable-rlhf train --help` lists them") -> str:
    """The settings that were probably meant: of that name in any section, or with a name like it."""
    known = list(known)
    close = [setting for setting in known if "." not in name and setting.endswith(f".{name}")]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f". Did you mean {' or '.join(close)}?" if close else otherwise


def _check_file(file: Path) -> None:
    """Raises ConfigError unless the file is a YAML mapping of known settings and sections, none of them twice."""
    try:
        loader = _SafeLoader(file.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {file}: is not UTF-8 text; give a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--config {file}{line}: {getattr(error, 'problem', error)}; repair the YAML") from error
    if not isinstance(content, dict) or not content:
        what = "is empty" if content is None or content == {} else f"is a {type(content).__name__}"
        raise ConfigError(f"--config {file}: {what}; give a mapping of settings, such as `preset: safe`")
    for name, value in content.items():
        if name not in SECTIONS:
            if name not in _TOP:
                close = _suggestion(str(name), [*_TOP, *SECTIONS, *_HINTS])
                raise ConfigError(f"--config {file}: unknown setting {name!r}{close}")
        elif not isinstance(value, dict):
            fields = ", ".join(_fields(name))
            raise ConfigError(f"--config {file}: {name}={value!r}: a section is a mapping of its fields: {fields}")
        elif unknown := [field for field in value if field not in _fields(name)]:
            close = _suggestion(f"{name}.{unknown[0]}", [f"{name}.{field}" for field in _fields(name)])
            raise ConfigError(f"--config {file}: unknown setting {f'{name}.{unknown[0]}'!r}{close}")


class _SafeLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loaders keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _fields(section: str) -> list[str]:
    return [field.name for field in dataclasses.fields(SECTIONS[section])]


def taken_out(option: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(every value that a command line gives to an option, the other arguments)."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    made.add_argument(option, action="append", default=[], dest="values")
    try:
        known, others = made.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{option} has no value: give one") from error
    return known.values, others
