"""Settings from the command line and YAML files, and messages about wrong ones."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
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
from stable_rlhf.config.presets import PRESETS, preset_section
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import CONTROLLERS, settings_class
from stable_rlhf.errors import ConfigError

_TOP = [field.name for field in dataclasses.fields(Config) if field.name not in SECTIONS]


def parser(preset: str, controller: str, command: str = "train") -> ArgumentParser:
    """Every setting of Config as an argument, the preset's values as defaults; ``kl.settings`` are the controller's.

    No abbreviations, no other names.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the docstring below each field is its help
    made = ArgumentParser(prog=f"stable-rlhf {command}", exit_on_error=False, allow_abbrev=False, print_config=None)
    made.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of settings; settings on the command line override it"
    )
    made.add_class_arguments(Config, skip=set(SECTIONS))
    for name, section in SECTIONS.items():
        made.add_class_arguments(section, name, skip={"settings"} if name == "kl" else set())
        if name == "kl" and _names_of(controller):
            made.add_class_arguments(settings_class(controller), "kl.settings")
    changes = {f"{name}.{field}": value for name in SECTIONS for field, value in PRESETS[preset].get(name, {}).items()}
    changes.pop("kl.settings", None)
    settings = preset_section(preset, "kl", {"controller": controller})["settings"]
    changes |= {f"kl.settings.{name}": value for name, value in settings.items()}
    made.set_defaults({"preset": preset, **changes})
    for action in made._actions:  # jsonargparse offers a file for each section, which `--config` has already
        if action.dest in (*SECTIONS, "kl.settings"):
            action.help = argparse.SUPPRESS
    return made


def parser_for(arguments: Sequence[str], command: str) -> ArgumentParser:
    """The parser for a command line, with the defaults of the preset and the settings of the controller that it
    names."""
    files, others = taken_out("--config", arguments)
    return parser(*_chosen([_content(Path(file)) for file in files], others), command)


def load_config(arguments: Sequence[str]) -> Config:
    """Defaults < preset < --config FILE < --section.field VALUE, in this order. Raises ConfigError."""
    files, arguments = taken_out("--config", arguments)
    contents = [_content(Path(file)) for file in files]
    preset, controller = _chosen(contents, arguments)
    for file, content in zip(files, contents, strict=True):
        _check_names(Path(file), content, controller)
    made = parser(preset, controller)
    arguments = [*(f"--config={file}" for file in files), *arguments]  # what is given here wins, wherever it stands
    given, complete = (_parse(made, arguments, controller, defaults) for defaults in (False, True))
    for section, field in (("reward", "functions"), ("reward", "trust_remote_code")):
        if field in given.get(section, {}):  # `--reward.functions+ x` adds to the default
            given[section][field] = complete[section][field]
    return Config.from_preset(given.pop("preset", "safe"), **given)


def _chosen(contents: Sequence[Mapping[str, Any]], arguments: Sequence[str]) -> tuple[str, str]:
    """(preset, controller) that files and command line name. An unknown name is skipped here; the parser refuses it."""

    def last(option: str, in_files: Iterable[Any], known: Iterable[str], default: str) -> str:
        try:
            given, _ = taken_out(option, arguments)
        except ConfigError:  # it has no value
            given = []
        return next((name for name in reversed([*in_files, *given]) if name in list(known)), default)

    preset = last("--preset", (content.get("preset") for content in contents), PRESETS, "safe")
    sections = [content.get("kl") for content in contents]
    controllers = (section.get("controller") for section in sections if isinstance(section, dict))
    own = Config(preset=preset).kl.controller
    return preset, last("--kl.controller", controllers, CONTROLLERS, own)


def _parse(made: ArgumentParser, arguments: Sequence[str], controller: str, defaults: bool) -> dict[str, Any]:
    try:
        settings = made.parse_args(list(arguments), defaults=defaults).as_dict()
    except (ArgumentError, argparse.ArgumentError) as error:
        raise ConfigError(_in_one_sentence(str(error), controller)) from error
    settings.pop("config", None)
    return settings


def _in_one_sentence(message: str, controller: str) -> str:
    """jsonargparse's message as setting, value and remedy. A message of another form is only put on one line."""
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        name = found[1].split("=")[0]
        if not name.startswith("--"):
            return f"unexpected {name!r}: a setting is given as --section.field VALUE, a file as --config FILE"
        return f"unknown setting {name}{_suggestion(name.lstrip('-'), controller)}"
    if found := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        name = f"{found[1]}.{found[2]}"
        return f"unknown setting --{name}{_suggestion(name, controller)}"
    found = re.search(r'Parser key "([\w.]+)"|argument --([\w.]+): expected', message)
    name = found[1] or found[2] if found else ""
    if fields := _fields(name, controller):
        return f"--{name} is a section: give its fields one by one, such as --{name}.{fields[0]} VALUE"
    hints = _hints(controller)
    if name not in hints:
        return " ".join(message.split())
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    return f"{name}{f'={values[-1]!r}' if values else ' has no value'}: {wanted(hints[name])}"


def _hints(controller: str) -> dict[str, Any]:
    """The type of every setting, by its name on the command line."""
    parts = {"": Config, **{f"{name}.": section for name, section in SECTIONS.items()}}
    parts["kl.settings."] = settings_class(controller)
    whole = {
        prefix + name: hint for prefix, part in parts.items() for name, hint in typing.get_type_hints(part).items()
    }
    return {name: hint for name, hint in whole.items() if name not in (*SECTIONS, "kl.settings")}


def _suggestion(name: str, controller: str, also: Iterable[str] = ()) -> str:
    """The settings that were probably meant: with that name in any section, or with a similar name."""
    known = [*also, *_hints(controller)]
    section, _, field = name.rpartition(".")
    if section == "kl.settings":  # compared without the prefix, which would make any two names similar
        close = difflib.get_close_matches(field, _names_of(controller), n=1, cutoff=0.7)
        otherwise = f"; kl.controller={controller} has {', '.join(_names_of(controller)) or 'no settings'}"
        return f". Did you mean kl.settings.{close[0]}?" if close else otherwise
    close = [setting for setting in known if setting.endswith(f".{field}") and section in ("", "kl")]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    otherwise = "; `stable-rlhf train --help` lists them"
    return f". Did you mean {' or '.join(close)}?" if close else otherwise


def _content(file: Path) -> dict[Any, Any]:
    """The content of a YAML file. Raises ConfigError unless it is a mapping in which no name is given twice."""
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
    return content


def _check_names(file: Path, content: Mapping[Any, Any], controller: str) -> None:
    """Raises ConfigError for a name in a file that is not a setting, a section or a section's setting."""
    for name, value in content.items():
        if name in SECTIONS:
            _check_section(file, name, value, controller)
        elif name not in _TOP:
            close = _suggestion(str(name), controller, [*_TOP, *SECTIONS])
            raise ConfigError(f"--config {file}: unknown setting {name!r}{close}")


def _check_section(file: Path, name: str, value: Any, controller: str) -> None:
    fields = _fields(name, controller)
    if not isinstance(value, dict):
        has = f"a section is a mapping of its fields: {', '.join(fields) or 'none'}"
        raise ConfigError(f"--config {file}: {name}={value!r}: {has}")
    for field in value:
        if field not in fields:
            close = _suggestion(f"{name}.{field}", controller)
            raise ConfigError(f"--config {file}: unknown setting {f'{name}.{field}'!r}{close}")
    if name == "kl" and "settings" in value:
        _check_section(file, "kl.settings", value["settings"], controller)


class _SafeLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice. YAML's own loaders silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _fields(section: str, controller: str) -> list[str]:
    """The names in a section, or in kl.settings; empty if there is no such section."""
    if section == "kl.settings":
        return _names_of(controller)
    return [field.name for field in dataclasses.fields(SECTIONS[section])] if section in SECTIONS else []


def _names_of(controller: str) -> list[str]:
    return [field.name for field in dataclasses.fields(settings_class(controller))]


def taken_out(option: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the values that a command line gives to an option, the other arguments)."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    made.add_argument(option, action="append", default=[], dest="values")
    try:
        known, others = made.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{option} has no value: give one") from error
    return known.values, others
