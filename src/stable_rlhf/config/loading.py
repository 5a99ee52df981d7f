"""Settings from the command line and from files, and messages about wrong ones."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from stable_rlhf.config.checks import alternatives, as_meant, is_list, wanted
from stable_rlhf.config.config import Config
from stable_rlhf.config.files import PREFIX, over, read_settings, read_value, recipe_names
from stable_rlhf.config.help import short_help
from stable_rlhf.config.names import controllers_settings, fields_of, setting_types, suggestion
from stable_rlhf.config.presets import PRESETS, preset_section
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import CONTROLLERS, settings_class
from stable_rlhf.errors import ConfigError

_TOP = [field.name for field in dataclasses.fields(Config) if field.name not in SECTIONS]
_SEE_HELP = "; `stable-rlhf train --help-all` lists them"


def parser(preset: str, controller: str, command: str = "train") -> ArgumentParser:
    """Every setting of Config as an argument, the preset's values as defaults; ``kl.settings`` are the controller's.

    No abbreviations, no other names.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the docstring below each field is its help
    usage = f"stable-rlhf {command} [FILE] [--config FILE] [--section.field VALUE ...]"
    made = ArgumentParser(
        prog=f"stable-rlhf {command}", usage=usage, exit_on_error=False, allow_abbrev=False, print_config=None
    )
    recipes = ", ".join(recipe_names())
    file = f"YAML file of settings, or {PREFIX}NAME for one that ships with the package: {recipes}. The first argument "
    file += "may be the FILE alone. Settings on the command line override it"
    made.add_argument("--config", metavar="FILE", action=ActionConfigFile, help=file)
    made.add_class_arguments(Config, skip=set(SECTIONS))
    for name, section in SECTIONS.items():
        made.add_class_arguments(section, name, skip={"settings"} if name == "kl" else set())
        if name == "kl" and controllers_settings(controller):
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


HELP, HELP_ALL = ("-h", "--help"), "--help-all"
"""Options that ask for the settings that runs change most, and for every setting."""


def help_text(arguments: Sequence[str], command: str) -> str:
    """The settings that the arguments ask for, with the defaults of the preset and the settings of the controller that
    the arguments name."""
    files, others = files_and_flags([name for name in arguments if name not in (*HELP, HELP_ALL)])
    made = parser(*_chosen([_content(file) for file in files], others), command)
    if HELP_ALL not in arguments:
        return re.sub(r"\bNone\b", "null", short_help(made, command))
    shown = io.StringIO()
    made.print_help(shown)
    return re.sub(r"\bNone\b", "null", shown.getvalue())  # Python's name for what YAML and the command line call null


def load_config(arguments: Sequence[str]) -> Config:
    """Defaults < preset < FILE or --config FILE < --section.field VALUE, in this order. Raises ConfigError."""
    given = given_settings(arguments)
    config = Config.from_preset(given.pop("preset", "safe"), **given)
    config.model.check_source()
    return config


def given_settings(arguments: Sequence[str], beside: Collection[str] = ()) -> dict[str, Any]:
    """The settings that files and flags give, as in a file; those of flags win. Raises ConfigError.

    ``beside``: names at the top of a file that are not settings and are left out.
    """
    files, flags = files_and_flags(arguments)
    contents = [{name: value for name, value in _content(file).items() if name not in beside} for file in files]
    preset, controller = _chosen(contents, flags)
    merged: dict[str, Any] = {}
    for file, content in zip(files, contents, strict=True):
        _check_names(file, content, controller)
        merged = over(merged, content)
    made = parser(preset, controller)
    types_of = setting_types(Config, controller)
    in_files = {f"{name}.{field}": value for name in SECTIONS for field, value in merged.get(name, {}).items()}
    lists = {name: as_meant(value, types_of[name]) for name, value in in_files.items() if is_list(types_of.get(name))}
    made.set_defaults({name: value for name, value in lists.items() if isinstance(value, list)})  # `--NAME+ x` adds
    flags = list(_as_typed(flags, types_of))
    given, complete = (_parse(made, flags, controller, defaults) for defaults in (False, True))
    for name, fields in given.items():
        if name in SECTIONS:
            fields |= {field: complete[name][field] for field in fields if isinstance(complete[name][field], list)}
    return over(merged, given)


def setting_value(name: str, text: str, controller: str) -> Any:
    """A value of a setting as people write it: 1e-4 a number, null, [a, b] a list; a text where the setting is one.

    Raises ConfigError for a name that is not a setting of Config with this controller.
    """
    hint = known_type(name, controller)
    options = alternatives(hint)
    if types.NoneType in options and text in ("null", "None", "~"):
        return None
    if is_list(hint) and list[str] in options and not text.lstrip().startswith("["):
        return [text]
    if str in options or any(typing.get_origin(option) is Literal for option in options):
        return text
    return read_value(text)


def known_type(name: str, controller: str) -> Any:
    """The type of a setting by its full name. Raises ConfigError for an unknown one, with the one probably meant."""
    types_of = setting_types(Config, controller)
    if fields := fields_of(name, controller):
        raise ConfigError(f"{name} is a section: give one of its settings, such as {name}.{fields[0]}=VALUE")
    if name not in types_of:
        raise ConfigError(f"unknown setting {name!r}{suggestion(name, types_of, controller, _SEE_HELP)}")
    return types_of[name]


def files_and_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files of settings, the other arguments). A first argument that is not an option is a file."""
    first = [arguments[0]] if arguments and not arguments[0].startswith("-") else []
    files, others = taken_out("--config", arguments[len(first) :])
    return [*first, *files], others


def _as_typed(flags: Sequence[str], types_of: Mapping[str, Any]) -> Iterator[str]:
    """The arguments with each value written as its type is parsed: 1e2 as 100, None as null, x,y as [x, y]."""
    name = ""
    for flag in flags:
        option, equals, value = flag.partition("=")
        if flag.startswith("--") and equals:
            yield f"{option}={_typed(value, option[2:].removesuffix('+'), types_of)}"
        elif flag.startswith("--"):
            yield flag
        else:
            yield _typed(flag, name, types_of)
        name = "" if equals else option.removeprefix("--").removesuffix("+")


def _typed(text: str, name: str, types_of: Mapping[str, Any]) -> str:
    options = alternatives(hint := types_of.get(name))
    if types.NoneType in options and text in ("None", "~"):
        return "null"
    if int in options and re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d{1,3})?", text):
        return str(as_meant(float(text) if re.search(r"[.eE]", text) else int(text), int))
    if is_list(hint) and not text.lstrip().startswith("[") and text != "null":
        return json.dumps(_items(name, text)) if list[str] in options else f"[{text}]"
    return text


def _items(name: str, text: str) -> list[str]:
    """The texts of a list without brackets, which commas separate. One text alone is taken as it is."""
    if "," not in text:
        return [text]
    if text.lstrip()[0] in "\"'":
        try:
            return read_value(f"[{text}]")
        except ConfigError as error:
            raise ConfigError(f"{name}={error}") from error
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        remedy = "commas separate the items of a list, and one is empty; a text with a comma in it needs brackets and "
        raise ConfigError(f"{name}={text!r}: {remedy}quotes, such as '[\"a,b\"]'")
    return items


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
    types_of = setting_types(Config, controller)
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        name = found[1].split("=")[0]
        if not name.startswith("--"):
            return f"unexpected {name!r}: a setting is given as --section.field VALUE, a file as --config FILE"
        return f"unknown setting {name}{suggestion(name.lstrip('-'), types_of, controller, _SEE_HELP)}"
    if found := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        name = f"{found[1]}.{found[2]}"
        return f"unknown setting --{name}{suggestion(name, types_of, controller, _SEE_HELP)}"
    found = re.search(r'Parser key "([\w.]+)"|argument --([\w.]+): expected', message)
    name = found[1] or found[2] if found else ""
    if fields := fields_of(name, controller):
        return f"--{name} is a section: give its fields one by one, such as --{name}.{fields[0]} VALUE"
    if name not in types_of:
        return " ".join(message.split())
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    return f"{name}{f'={values[-1]!r}' if values else ' has no value'}: {wanted(types_of[name])}"


def _content(file: str) -> dict[Any, Any]:
    try:
        return read_settings(file)
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from error


def _check_names(file: str | Path, content: Mapping[Any, Any], controller: str) -> None:
    """Raises ConfigError for a name in a file that is not a setting, a section or a section's setting."""
    types_of = setting_types(Config, controller)
    for name, value in content.items():
        if name in SECTIONS:
            _check_section(file, name, value, controller)
        elif name not in _TOP:
            close = suggestion(str(name), [*_TOP, *SECTIONS, *types_of], controller, _SEE_HELP)
            close = "; only `stable-rlhf sweep` takes a file with it" if name == "sweep" else close
            raise ConfigError(f"--config {file}: unknown setting {name!r}{close}")


def _check_section(file: str | Path, name: str, value: Any, controller: str) -> None:
    fields = fields_of(name, controller)
    if not isinstance(value, dict):
        has = f"a section is a mapping of its fields: {', '.join(fields) or 'none'}"
        raise ConfigError(f"--config {file}: {name}={value!r}: {has}")
    for field in value:
        if field not in fields:
            close = suggestion(f"{name}.{field}", setting_types(Config, controller), controller, _SEE_HELP)
            raise ConfigError(f"--config {file}: unknown setting {f'{name}.{field}'!r}{close}")
    if name == "kl" and "settings" in value:
        _check_section(file, "kl.settings", value["settings"], controller)


def probable_setting(name: str) -> str:
    """The end of a sentence with the setting that a name means which is none; empty where no setting is like it."""
    return suggestion(name, [*_TOP, *SECTIONS, *setting_types(Config, "safe")], "safe", "")


def taken_out(option: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the values that a command line gives to an option, the other arguments)."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    made.add_argument(option, action="append", default=[], dest="values")
    try:
        known, others = made.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{option} has no value: give one") from error
    return known.values, others
