"""The tree of errors: which codes and bases each class has, and that the command line catches no other classes."""

from __future__ import annotations

import ast
import signal
from pathlib import Path

import pytest

import stable_rlhf
from stable_rlhf import errors
from stable_rlhf.config import refuse_changes
from stable_rlhf.console import tell
from stable_rlhf.errors import Exit, Interrupted, StableRLHFError

CLI = Path(stable_rlhf.__file__).parent / "cli"

TREE: dict[str, tuple[Exit, type[Exception]]] = {
    "StableRLHFError": (Exit.FAILED, Exception),
    "ConfigError": (Exit.BAD_INPUT, ValueError),
    "PromptError": (Exit.BAD_INPUT, ValueError),
    "RunError": (Exit.BAD_INPUT, ValueError),
    "NoRunError": (Exit.BAD_INPUT, FileNotFoundError),
    "RewardError": (Exit.REWARD, RuntimeError),
    "RewardUnavailable": (Exit.REWARD, errors.RewardError),
    "RewardInputError": (Exit.BAD_INPUT, errors.RewardError),
    "CheckpointError": (Exit.BAD_INPUT, RuntimeError),
    "SaveError": (Exit.DISK, errors.CheckpointError),
    "NoRoomError": (Exit.DISK, errors.SaveError),
    "DivergenceError": (Exit.FAILED, ArithmeticError),
    "GuardStop": (Exit.GUARD, RuntimeError),
    "OutOfMemoryError": (Exit.FAILED, RuntimeError),
    "UploadError": (Exit.FAILED, RuntimeError),
}
"""Name -> (exit code, the class by which it could be caught before there was a tree)."""


def test_every_error_is_in_the_tree_with_its_exit_code_and_its_former_base() -> None:
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    ours = {name for name, value in classes.items() if issubclass(value, BaseException)}
    assert ours == {*TREE, "Interrupted"}
    for name, (code, base) in TREE.items():
        assert issubclass(classes[name], StableRLHFError), name
        assert classes[name].exit_code is code, name
        assert issubclass(classes[name], base), name


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("['http://h/x?key=secret', 'builtin'] here", "['http://h/x', 'builtin'] here"),
        ("the server https://me:secret@h:1/y: gone", "the server https://h:1/y: gone"),
        ('"http://h?token=it\'s-secret", not', '"http://h", not'),
        ("(HTTP://[::1]:80/x?q=secret).", "(HTTP://[::1]:80/x)."),
        ("http://me:sec/ret@h/p x", "http://h/p x"),
        ("http://me:secret?1@h/p x", "http://h/p x"),
        ("http://h:secret/p?s=1 x", "http://h x"),
        ("see https://h/@me/x, then", "see https://h/@me/x, then"),
    ],
)
def test_an_error_and_a_line_show_urls_without_their_secrets(
    said: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(errors.ConfigError(said)) == shown
    assert str(errors.GuardStop(f"{errors.RewardError(said)}")) == shown
    tell(said)
    assert capsys.readouterr().err == f"{shown}\n"


def test_a_resume_shows_no_secret_of_the_rewards_that_differ() -> None:
    here, there = (
        {"reward": {"functions": [f"https://me:pass@host/{path}?token=secret", "builtin"][: 3 - len(path)]}}
        for path in ("a", "bb")
    )
    with pytest.raises(errors.CheckpointError) as raised:
        refuse_changes(here, there)
    assert "https://host/a" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "pass" not in str(raised.value)


def test_a_signal_ends_a_command_with_128_and_its_number_and_is_not_caught_as_an_exception() -> None:
    assert Interrupted(signal.SIGINT).exit_code == 130
    assert Interrupted(signal.SIGTERM).exit_code == 143
    assert str(Interrupted(signal.SIGTERM)) == "stopped by SIGTERM"
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_the_command_line_catches_no_class_but_ours_and_ctrl_c(path: Path) -> None:
    allowed = {*TREE, "Interrupted", "KeyboardInterrupt"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} catches everything"
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            assert caught <= allowed, f"{path.name}:{node.lineno}"


def test_the_tree_is_caught_in_one_place() -> None:
    found = [
        path.name
        for path in CLI.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and "StableRLHFError" in ast.dump(node.type or ast.Constant(None))
    ]
    # Of a run that an error has ended, the report's own error is only told.
    assert sorted(found) == ["main.py", "train.py"]
