"""The names of settings: which there are, and which one a misspelt name probably means."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

from stable_rlhf.config.elsewhere import here
from stable_rlhf.config.presets import not_of_controller, owners
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import settings_class


def setting_types(top: type, controller: str) -> dict[str, Any]:
    """The type of every setting, by its name on the command line. ``top``: the class Config."""
    parts = {"": top, **{f"{name}.": section for name, section in SECTIONS.items()}}
    parts["kl.settings."] = settings_class(controller)
    whole = {
        prefix + name: hint for prefix, part in parts.items() for name, hint in typing.get_type_hints(part).items()
    }
    return {name: hint for name, hint in whole.items() if name not in (*SECTIONS, "kl.settings")}


def suggestion(name: str, known: Iterable[str], controller: str, otherwise: str) -> str:
    """The settings that were probably meant: with that name in any section, of that name in another library, or with a
    similar name.

    ``known``: every name that may be meant. ``otherwise``: what is said where none is similar.
    """
    known = list(known)
    section, _, field = name.rpartition(".")
    exact = [setting for setting in known if setting.endswith(f".{field}") and section != "kl.settings"]
    within = fields_of(section, controller)  # compared without the prefix, which would make any two names similar
    near = [f"{section}.{one}" for one in difflib.get_close_matches(field, within, n=1, cutoff=0.7)]
    whole = [] if within else difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if not (near or exact) and section != "kl.settings" and (named := here(field)) is not None:
        return named
    if section == "kl.settings" and (owners(field) or not near):
        return not_of_controller(field, controller)
    close = near or exact or whole
    return f". Did you mean {' or '.join(close)}?" if close else otherwise


def fields_of(section: str, controller: str) -> list[str]:
    """The names of the fields of a section, or of kl.settings; empty for an unknown section."""
    if section == "kl.settings":
        return controllers_settings(controller)
    return [field.name for field in dataclasses.fields(SECTIONS[section])] if section in SECTIONS else []


def controllers_settings(controller: str) -> list[str]:
    return [field.name for field in dataclasses.fields(settings_class(controller))]
