"""What wheel and sdist contain: everything that a run needs, and nothing of the workshop."""

from __future__ import annotations

import os
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

builders = pytest.importorskip("hatchling.build", reason="hatchling, of the extra dev, builds the files")

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "stable_rlhf"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def source_files() -> set[str]:
    """The files of the package in this checkout, by their names in an installation."""
    found = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist) of this checkout, built in this process."""
    folder, before = tmp_path_factory.mktemp("dist"), Path.cwd()
    os.chdir(ROOT)  # a build backend is called in the project's folder
    try:
        names = [build(str(folder)) for build in (builders.build_wheel, builders.build_sdist)]
    finally:
        os.chdir(before)
    return folder / names[0], folder / names[1]


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        (licence,) = [name for name in wheel.namelist() if name.endswith("LICENSE")]
    assert names == source_files()
    assert {"stable_rlhf/py.typed", "stable_rlhf/assets/recipes/smollm2-sentiment.yaml"} <= names
    assert licence
    for name, url in PROJECT["urls"].items():
        assert f"Project-URL: {name}, {url}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_sdist_has_what_builds_the_wheel_and_its_tests_and_no_more(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"src/{name}" for name in source_files()} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "tests/conftest.py"} <= names
    outside = {name.split("/")[0] for name in names}
    assert outside <= {
        *("src", "tests", "docs", "PKG-INFO", "pyproject.toml", ".gitignore"),
        *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
    }


def test_neither_is_large(built: tuple[Path, Path]) -> None:
    """The built-in pair is the most of both; PyPI takes 100 MB a file."""
    for file in built:
        assert file.stat().st_size < 60e6, file.name
