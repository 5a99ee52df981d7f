"""The cells of a sweep: base settings x a grid of values x seeds, every cell checked before the first one starts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stable_rlhf.config import (
    Config,
    files_and_flags,
    given_settings,
    is_url,
    known_type,
    over,
    read_settings,
    read_value,
    setting_value,
    url_without_secrets,
)
from stable_rlhf.control import as_whole
from stable_rlhf.errors import ConfigError
from stable_rlhf.runs import sweeps
from stable_rlhf.text import quoted

SECTION = "sweep"
"""The mapping of a file that names a sweep: seeds, preset, set."""

OWN = ("seed", "output_dir", "overwrite_output_dir")
"""Settings that the sweep gives to each cell itself."""

MOST = 10_000
"""Cells of a sweep, so that a slip such as `--seeds 1e9` costs a sentence."""

LONGEST = 200
"""Characters of a cell's name: file systems take 255 bytes, and `.yaml` or `.txt` follows."""


class Word(str):
    """A value as it was typed, without brackets or quotes: what it means depends on its setting."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    name: str
    """``preset=safe,optim.learning_rate=0.0001,seed=0``: the name of its folder."""
    arm: str
    """The name without the seed: runs that differ only in the seed are of one arm."""
    seed: int
    config: Config


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was asked for, in the types of the settings, and its cells in the order in which they start."""

    base: dict[str, Any]
    """The settings that every cell has, as in a file."""
    grid: dict[str, list[Any]]
    """Setting -> its values; the first setting is ``preset``."""
    seeds: list[int]
    cells: list[Cell]


def make_sweep(
    arguments: Sequence[str], out: Path, seeds: str | None, presets: str | None, sets: Sequence[str]
) -> Sweep:
    """The sweep of a command line. Seeds vary slowest, so that every arm has its first seed early.

    ``arguments``: FILE and flags, as `train` takes them. ``seeds``, ``presets``, ``sets``: what followed --seeds,
    --preset and each --set; they override the ``sweep`` of a file. Raises ConfigError, naming the cell, before anything
    is written.
    """
    files, flags = files_and_flags(arguments)
    _refuse_own(flags)
    contents = [read_settings(file) for file in files]
    in_file: dict[str, Any] = {}
    for file, content in zip(files, contents, strict=True):
        in_file = over(in_file, _section(file, content))
    grid = _grid(in_file, presets, sets, next((c["preset"] for c in reversed(contents) if "preset" in c), "safe"))
    chosen = _seeds(in_file.get("seeds") if seeds is None else seeds)
    for name in grid:
        if any(flag.startswith("--") and flag[2:].partition("=")[0].rstrip("+") == name for flag in flags):
            raise ConfigError(f"--{name} is given, and the sweep varies {name}: leave one of them out")
    count = len(chosen) * math.prod(map(len, grid.values()))
    if count > MOST:
        raise ConfigError(f"this is a sweep of {count:,} cells, and at most {MOST:,} are made: give fewer values")
    return _made(arguments, out, grid, chosen)


def difference(asked: Sweep, there: Mapping[str, Any]) -> str | None:
    """What keeps a sweep from going on with one on disk (the content of its sweep.yaml), as a clause; None if nothing
    does. More values and more seeds are no difference."""
    base, base_there = _flat(asked.base), _flat(there["base"])
    for name in sorted(base.keys() | base_there.keys()):
        if (name in base, base.get(name)) != (name in base_there, base_there.get(name)):
            return f"{name} is {_shown(base, name)} here and {_shown(base_there, name)} there"
    grid = there["grid"]
    for name in sorted(asked.grid.keys() ^ grid.keys()):
        who = "here, and not there" if name in asked.grid else "there, and not here"
        return f"{name} varies {who}"
    for name, values in (*grid.items(), ("seeds", there["seeds"])):
        asked_for = asked.seeds if name == "seeds" else asked.grid[name]
        left_out = [value for value in values if value not in asked_for]
        if left_out:
            texts = ", ".join(value_text(value) for value in left_out)
            return f"it has {name} {texts}, not asked for here (more values may be asked for, not fewer)"
    return None


def value_text(value: Any) -> str:
    """A value as names and messages have it: 0.0001, true, null, a text as it is. URLs without what may be secret."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        whole = as_whole(value)
        return str(whole) if isinstance(whole, int) else repr(value)
    if isinstance(value, str):
        if is_url(value):
            shown = url_without_secrets(value)
            return shown if shown == value else f"{shown}-{_digest(value)}"
        return value if not _reads_otherwise(value) else json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{value_text(inner)}" for name, inner in value.items()) + "}"
    return "[" + ",".join(map(value_text, value)) + "]"


# -- what was asked for ---------------------------------------------------------------------------------------------


def split_values(option: str, text: str) -> list[Any]:
    """The values of a list with commas. With a bracket or a quote it is read as YAML's list, so that a value can be a
    list or hold a comma."""
    if re.search(r"[\[\]{}'\"]", text):
        try:
            values = read_value(f"[{text}]")
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from error
    else:
        values = [Word(part.strip()) for part in text.split(",")]
    if not values or any(value == "" and isinstance(value, Word) for value in values):
        raise ConfigError(f"{option}: {quoted(text)} has an empty value; give values such as 1,2,3")
    return values


def _section(file: str, content: Mapping[Any, Any]) -> dict[str, Any]:
    """The ``sweep`` of a file, of the right shape."""
    for name in OWN[1:]:
        if name in content:
            raise ConfigError(f"{file}: {name}: a sweep gives each cell its own folder in --out; leave it out")
    if "seed" in content:
        raise ConfigError(f"{file}: seed: a sweep has several; give --seeds, or seeds in `{SECTION}`")
    given = content.get(SECTION, {})
    wanted = "give a mapping of seeds, preset and set"
    if not isinstance(given, dict):
        raise ConfigError(f"{file}: {SECTION}={quoted(given)}: {wanted}")
    for name in given:
        if name not in ("seeds", "preset", "set"):
            raise ConfigError(f"{file}: {SECTION} has no {name!r}: {wanted}")
    varied = given.get("set", {})
    if not isinstance(varied, dict):
        raise ConfigError(f"{file}: {SECTION}.set={quoted(varied)}: give a mapping of settings to lists of values")
    for name, values in (*varied.items(), *((n, given[n]) for n in ("preset",) if n in given)):
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{file}: {SECTION}: {name}={quoted(values)}: give a list of values, such as [1, 2]")
    return given


def _grid(in_file: Mapping[str, Any], presets: str | None, sets: Sequence[str], preset: Any) -> dict[str, list[Any]]:
    """Setting -> values as they were given."""
    varied: dict[str, list[Any]] = {}
    for text in sets:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--")
        if not equals or not name:
            raise ConfigError(f"--set {text}: give SETTING=VALUE,VALUE,... such as optim.learning_rate=1e-4,1e-3")
        if name in varied:
            raise ConfigError(f"--set {name} is given twice: give all of its values in one")
        varied[name] = split_values(f"--set {name}", values)
    varied = {**{str(name): values for name, values in in_file.get("set", {}).items()}, **varied}
    chosen = split_values("--preset", presets) if presets is not None else in_file.get("preset", [preset])
    if "preset" in varied and (presets is not None or "preset" in in_file):
        raise ConfigError("preset is given twice, by --preset and by --set: leave one of them out")
    for name in OWN:
        if name in varied:
            remedy = "give --seeds" if name == "seed" else "--out names the folder of all cells"
            raise ConfigError(f"--set {name}: a sweep gives each cell its own; {remedy}")
    return {"preset": varied.pop("preset", chosen), **varied}


def _seeds(given: Any) -> list[int]:
    """--seeds 5 is 0 to 4; --seeds 3,7 and a list in a file are these."""
    wanted = "give a number of seeds, such as 5, or a list, such as 3,7,11"
    if given is None:
        return [0]
    if isinstance(given, str):
        parts = [part.strip() for part in given.strip("[]").split(",")]
        if not all(re.fullmatch(r"\d+([eE]\d{1,2})?", part) for part in parts if part or len(parts) < 2):
            raise ConfigError(f"--seeds {given}: {wanted}")
        numbers: Any = [int(part) if part.isdigit() else int(float(part)) for part in parts if part]
        given = numbers if len(parts) > 1 or given.startswith("[") else numbers[0]
    if isinstance(given, list) and given and all(type(seed) is int for seed in given):
        if repeated := [seed for i, seed in enumerate(given) if seed in given[:i]]:
            raise ConfigError(f"--seeds: {repeated[0]} is given twice")
        return given
    if type(given) is not int or given < 1:
        raise ConfigError(f"--seeds {given}: {wanted}")
    if given > MOST:
        raise ConfigError(f"--seeds {given}: at most {MOST:,} cells are made; a list such as {given}, is that seed")
    return list(range(given))


def _refuse_own(flags: Sequence[str]) -> None:
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and name in OWN:
            remedy = "give --seeds" if name == "seed" else "--out names the folder of all cells"
            raise ConfigError(f"--{name}: a sweep gives each cell its own; {remedy}")


# -- its cells ------------------------------------------------------------------------------------------------------


def _made(arguments: Sequence[str], out: Path, grid: Mapping[str, list[Any]], seeds: list[int]) -> Sweep:
    arms: list[tuple[dict[str, str], Config]] = []
    values: dict[str, dict[int, Any]] = {name: {} for name in grid}  # setting -> place among its values -> value
    bases: dict[tuple[str, str], dict[str, Any]] = {}
    for places in itertools.product(*(range(len(given)) for given in grid.values())):
        choice = {name: grid[name][place] for name, place in zip(grid, places, strict=True)}
        try:
            key = str(choice["preset"]), str(choice.get("kl.controller"))
            if key not in bases:
                bases[key] = _base(arguments, choice)
            config = _config(bases[key], choice)
        except ConfigError as error:
            typed = ",".join(f"{name}={_as_typed(value)}" for name, value in choice.items())
            raise ConfigError(f"cell {typed}: {error}") from error
        for name, place in zip(grid, places, strict=True):
            values[name][place] = _value(config, name)
        settled = {name: value_text(values[name][place]) for name, place in zip(grid, places, strict=True)}
        arms.append((settled, config))
    for name, found in values.items():
        texts = [value_text(value) for value in found.values()]
        if repeated := [text for i, text in enumerate(texts) if text in texts[:i]]:
            raise ConfigError(f"{name}={repeated[0]} is given twice: each value makes cells of its own")
    cells = [_cell(out, arm, seed, config) for seed, (arm, config) in itertools.product(seeds, arms)]
    _refuse_shared_uploads(cells)
    base = _without(next(iter(bases.values())), grid)
    return Sweep(base=base, grid={name: [*found.values()] for name, found in values.items()}, seeds=seeds, cells=cells)


def _cell(out: Path, settled: Mapping[str, str], seed: int, config: Config) -> Cell:
    """``settled``: setting -> the text of its value."""
    name = _file_name({**settled, "seed": str(seed)})
    folder = str(sweeps.cell_folder(out, name))
    arm = ",".join(f"{setting}={text}" for setting, text in settled.items())
    return Cell(name=name, arm=arm, seed=seed, config=dataclasses.replace(config, seed=seed, output_dir=folder))


def _base(arguments: Sequence[str], choice: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of files and flags, read as those of the preset and the controller of a cell."""
    controller = [f"--kl.controller={choice['kl.controller']}"] if "kl.controller" in choice else []
    return given_settings([*arguments, f"--preset={choice['preset']}", *controller], beside=(SECTION,))


def _config(base: Mapping[str, Any], choice: Mapping[str, Any]) -> Config:
    """The configuration of an arm, its values read in the types of its settings."""
    own = base.get("kl", {}).get("controller")  # from --set, the file or a flag
    controller = own or Config(preset=choice["preset"]).kl.controller
    settings: dict[str, Any] = dict(base)
    for name, value in choice.items():
        known_type(name, controller)
        value = setting_value(name, str(value), controller) if isinstance(value, Word) else value
        for part in reversed(name.split(".")):
            value = {part: value}
        settings = over(settings, value)
    config = Config(**settings)
    config.model.check_source()
    return config


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _without(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Settings, nested, without those of the full names ``names``."""
    inner = {name: [n.removeprefix(f"{name}.") for n in names if n.startswith(f"{name}.")] for name in settings}
    kept = {name: value for name, value in settings.items() if name not in names}
    kept = {name: _without(v, inner[name]) if isinstance(v, dict) and inner[name] else v for name, v in kept.items()}
    return {name: value for name, value in kept.items() if value != {}}


def _refuse_shared_uploads(cells: Sequence[Cell]) -> None:
    uploads = [cell for cell in cells if cell.config.push_to_hub and cell.config.hub_model_id is not None]
    if len(uploads) > 1:
        remedy = "every cell would upload to it; leave it out, and each has a repository of its own"
        raise ConfigError(f"hub_model_id={quoted(uploads[0].config.hub_model_id)}: {remedy}")


def _file_name(settled: Mapping[str, str]) -> str:
    """``setting=value,setting=value`` as file systems and shells take it: other characters are escaped as in URLs. A
    long name ends in a hash."""
    name = ",".join(f"{setting}={quote(text, safe='+@')}" for setting, text in settled.items())
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 13]}-{_digest(name)}"


def _as_typed(value: Any) -> str:
    """A value as it was given, for messages."""
    return str(value) if isinstance(value, Word) and not is_url(value) else value_text(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _reads_otherwise(text: str) -> bool:
    """Whether a text would be read as a number, null, true or the like."""
    try:
        return not isinstance(read_value(text), str)
    except ConfigError:
        return False


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return quoted(value_text(settings[name])) if name in settings else "not given"
