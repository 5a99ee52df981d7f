"""Checks of settings: types, ranges and conflicts. Each error says what is wrong and what to do."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from stable_rlhf.config.elsewhere import here
from stable_rlhf.control import as_whole
from stable_rlhf.errors import ConfigError
from stable_rlhf.text import valid_unicode

Section = TypeVar("Section")


def require(ok: bool, setting: str, value: object, remedy: str) -> None:
    """Raises ConfigError with setting, value and remedy unless ``ok``."""
    if not ok:
        raise ConfigError(f"{setting}={value!r}: {remedy}")


def made(section: type[Section], fields: Mapping[str, Any]) -> Section:
    """A section with these fields. Raises ConfigError, also where the section itself raises a ValueError."""
    try:
        return section(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def positive(section: str, config: object, *names: str) -> None:
    """Requires finite numbers above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0 and math.isfinite(value), f"{section}.{name}", value, "must be greater than 0")


def not_negative(section: str, config: object, *names: str) -> None:
    """Requires finite numbers of 0 or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0 and math.isfinite(value), f"{section}.{name}", value, "must be 0 or more")


def only_with(section: str, config: Any, name: str, acts: bool, condition: str) -> None:
    """Refuses a value other than the default in a field that has no effect, which is if ``acts`` is False."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = getattr(config, name)
    setting = f"{section}.{name}" if section else name
    require(acts or value == default, setting, value, f"has no effect unless {condition}; leave it out")


def is_url(text: object) -> bool:
    """Whether a reward is the address of a server."""
    return isinstance(text, str) and text.lower().startswith(("http://", "https://"))


def url_without_secrets(url: str) -> str:
    """Scheme, host, port and path of a URL. Its name, password and query may be secret and are left out."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_url(setting: str, url: str) -> None:
    """Requires a URL that can be called and that holds no password, because config.yaml would keep it."""
    try:
        parts = urlsplit(url)
        fits = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, an IPv6 address without its bracket
        raise ConfigError(
            f"{setting}: {url.rpartition('@')[2].split('?')[0]!r} is not a URL; give http://HOST:8000/PATH"
        ) from None
    shown = url_without_secrets(url)
    require(fits and url.isprintable() and " " not in url, setting, shown, "give http://HOST:8000/PATH")
    remedy = "has a name or password in it, which config.yaml would keep; set reward.token_env instead"
    require("@" not in parts.netloc, setting, shown, remedy)
    require(not parts.fragment, setting, shown, "has a part after '#', which is never sent to a server; leave it out")


class Named:
    """Base class of settings: refuses a keyword that is not one of them, and names the one that was probably meant."""

    def __new__(cls, *values: Any, **given: Any) -> Self:
        known = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
        if values:
            raise ConfigError(f"{cls.__name__}({values[0]!r}): give each setting by its name, such as {known[0]}=VALUE")
        for name in given:
            if name not in known:
                raise ConfigError(f"{name}={given[name]!r}: unknown setting{cls._suggestion(name, given)}")
        return super().__new__(cls)

    @classmethod
    def _suggestion(cls, name: str, given: Mapping[str, Any]) -> str:
        known = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
        if (named := here(name)) is not None:
            return named
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        return f". Did you mean {close[0]}?" if close else f"; {cls.__name__} has {', '.join(known)}"


def as_meant(value: Any, hint: Any) -> Any:
    """A value as the type that an annotation asks for, where nothing else can be meant.

    A float without a fraction is an int (1e2 is 100), a path is its text, and one entry is a list of one.
    """
    if int in alternatives(hint):
        return as_whole(value)
    if {str, list[str]} & set(alternatives(hint)):
        value = [_text(item) for item in value] if isinstance(value, list) else _text(value)
    return [value] if is_list(hint) and _fits([value], hint) else value


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: (int, NoneType) for ``int | None``."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def is_list(hint: Any) -> bool:
    return any(typing.get_origin(option) is list for option in alternatives(hint))


def check_types(section: str, config: Any) -> None:
    """Requires every field of a dataclass to have its annotated type. An int is accepted as a float; True is not a
    number. A field that ``as_meant`` reads as its type is replaced."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        value = as_meant(getattr(config, field.name), hint)
        object.__setattr__(config, field.name, value)
        setting = f"{section}.{field.name}" if section else field.name
        require(_fits(value, hint), setting, value, wanted(hint))
        for text in value if isinstance(value, list) else [value]:
            ok = not isinstance(text, str) or ("\0" not in text and text == valid_unicode(text))
            require(
                ok, setting, text, "holds a NUL or a byte that is not UTF-8, which no file can hold; choose another"
            )


def wanted(hint: Any) -> str:
    """The type that an annotation asks for, as a remedy: ``int | None`` gives "give a whole number, or null"."""
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return f"{wanted(next(option for option in options if option is not types.NoneType))}, or null"
    if typing.get_origin(hint) is Literal:
        return f"choose one of {', '.join(map(str, options))}"
    if dataclasses.is_dataclass(hint):
        return f"give a dictionary of the fields to change, or {typing.cast(type, hint).__name__}(...)"
    sentences = {
        bool: "give true or false",
        int: "give a whole number",
        float: "give a finite number",
        str: "give a text",
        list[str]: "give a list, such as [first, second]",
        list[float]: "give a list of numbers, such as [1.0, 0.5]",
        list[str | int]: "give a list of texts or whole numbers, such as [<|im_end|>, 2]",
        dict[str, Any]: "give a mapping, such as {name: value}",
    }
    return sentences[hint]


def _fits(value: Any, hint: Any) -> bool:
    options, origin = typing.get_args(hint), typing.get_origin(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
