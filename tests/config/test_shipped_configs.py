"""Every recipe is a run that starts: its settings are known, checked, and of a real preset."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from stable_rlhf.config import loading
from stable_rlhf.config.config import Config
from stable_rlhf.config.files import RECIPES, recipe_names
from stable_rlhf.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(RECIPES.glob("*.yaml"))


def test_every_preset_has_a_file_of_its_name_and_nothing_in_the_folder_is_left_unread() -> None:
    assert set(PRESETS) <= {file.stem for file in FILES}
    assert sorted(RECIPES.iterdir()) == FILES
    assert set(recipe_names()) == {file.stem for file in FILES}
    assert (ROOT / "configs").resolve() == RECIPES.resolve()  # the repository has them in one place


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_parses_to_its_preset_with_what_it_says(file: Path) -> None:
    given = yaml.safe_load(file.read_text())
    assert given["preset"] in PRESETS  # in so many words, so that a reader sees what runs
    config = loading.load_config([f"recipe:{file.stem}"])
    assert config == loading.load_config(["--config", str(file)])
    assert config == Config.from_preset(**given)
    if file.stem in PRESETS:
        assert config == Config(preset=file.stem)
    else:  # an experiment: another run than its preset
        assert config != Config(preset=given["preset"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_begins_with_what_it_is_and_the_command_that_runs_it(file: Path) -> None:
    comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert len(comment[0].split()) > 5
    assert any(line.split("#")[1].strip() == f"stable-rlhf train recipe:{file.stem}" for line in comment)


def test_help_lists_the_recipes() -> None:
    shown = " ".join(loading.help_text([loading.HELP_ALL], "train").split())
    listed = shown.partition("recipe:NAME for one that ships with the package: ")[2].partition(". The first")[0]
    assert listed.replace("- ", "-").split(", ") == recipe_names()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_is_rewarded_by_what_is_there_outside_the_repository(file: Path) -> None:
    """Or by what its own comment tells to make."""
    for name in Config.from_yaml(file).reward.functions:
        module, _, function = name.partition(":")
        if function:
            assert callable(getattr(importlib.import_module(module), function))
            assert module.startswith("stable_rlhf.")
        else:
            assert name == "builtin" or f"--output {name}\n" in file.read_text()
