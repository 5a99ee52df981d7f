"""The list of changed lines fits the sources and the tests as they are."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.changes import ROOT, Change, change, load

CHANGES = load()
AREAS = {"control", "ops", "learner", "rollout", "checkpoints", "training", "rewards"}
"""The folders whose faults a run may not show."""


@cache
def text(file: str) -> str:
    path = ROOT / file
    return path.read_text() if path.is_file() else ""


@cache
def functions_of(file: str) -> frozenset[str]:
    """Names of the test functions of a file; for a method ``Class::name``."""
    tree = ast.parse(text(file))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = {f"{node.name}::{name}" for node in classes for name in functions(node.body)}
    return frozenset(functions(tree.body) | methods)


def functions(body: list[ast.stmt]) -> set[str]:
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def is_there(test: str) -> bool:
    """Whether pytest finds it: a file or a folder, or a function of a file."""
    file, _, name = test.partition("::")
    return (ROOT / file).exists() and (not name or name.partition("[")[0] in functions_of(file))


def parses(made: Change) -> bool:
    try:
        ast.parse(text(made.file).replace(made.was, made.becomes))
    except SyntaxError:
        return False
    return True


def test_every_text_to_change_occurs_once_in_its_file() -> None:
    lost = [f"{text(c.file).count(c.was)} times: {c}" for c in CHANGES if text(c.file).count(c.was) != 1]
    assert not lost, "\n".join(lost)


def test_every_change_changes_something_and_still_parses() -> None:
    wrong = [str(c) for c in CHANGES if c.was == c.becomes or not parses(c)]
    assert not wrong, "\n".join(wrong)


def test_every_change_names_tests_that_are_there_or_why_none_can_notice_it() -> None:
    wrong = [str(c) for c in CHANGES if not (c.tests or c.equivalent) or not all(map(is_there, c.tests))]
    assert not wrong, "\n".join(wrong)


def test_no_change_is_listed_twice() -> None:
    counts = Counter((c.file, c.was, c.becomes) for c in CHANGES)
    assert [entry for entry, count in counts.items() if count > 1] == []


def test_the_areas_whose_faults_are_silent_are_covered() -> None:
    assert {c.area for c in CHANGES if not c.equivalent} >= AREAS


@pytest.mark.parametrize(
    "entry",
    [
        ["not a mapping"],
        {"file": "src/stable_rlhf/files.py", "was": "a"},
        {"file": "src/stable_rlhf/files.py", "was": "a", "becomes": "b", "test": ["tests/test_docs.py"]},
        {"file": "src/stable_rlhf/files.py", "was": "a", "becomes": "b", "tests": "tests/test_docs.py"},
        {"file": "src/stable_rlhf/files.py", "was": 1, "becomes": "b"},
        {"file": "src/stable_rlhf/files.py", "was": "a", "becomes": "b", "equivalent": True},
    ],
)
def test_an_entry_that_is_not_a_change_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match=r"^list\.yaml: "):
        change(entry, "list.yaml")


def test_a_text_that_does_not_occur_once_is_not_changed() -> None:
    made = Change(file="src/stable_rlhf/files.py", was="a", becomes="b")
    assert made.apply("an x") == "bn x"
    with pytest.raises(ValueError, match="occurs 2 times"):
        made.apply("a a")


def test_areas_are_folders_of_the_package_or_files_at_its_root() -> None:
    files = ["src/stable_rlhf/control/safe.py", "src/stable_rlhf/files.py"]
    assert [Change(file=file, was="a", becomes="b").area for file in files] == ["control", "files"]
    assert all(Path(c.file).parts[:2] == ("src", "stable_rlhf") for c in CHANGES)
