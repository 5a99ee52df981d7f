"""What counts as noticed, on a repository of one function and its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import __main__ as runner
from tests.mutants.changes import Change

FILE = "src/double.py"
SOUND = "tests/test_double.py"
BROKEN = "tests/test_broken.py"
FILES = {
    FILE: "def double(x):\n    return 2 * x\n",
    SOUND: "from double import double\n\ndef test_double():\n    assert double(2) == 4\n",
    BROKEN: "def test_broken():\n    assert 'what it says' is None\n",
}


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are of these files, whose tests need no torch."""

    def write(folder: Path) -> None:
        for name, text in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    monkeypatch.setattr(runner, "copy_repository", write)


def test_changes_are_noticed_survive_or_are_not_tried_each_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        Change(file=FILE, was="2 * x", becomes="3 * x", tests=(SOUND,)),
        Change(file=FILE, was="2 * x", becomes="x + x", tests=(SOUND,)),  # that before it is taken back
        Change(file=FILE, was="def double", becomes="def treble", tests=(SOUND,)),  # the tests cannot import it
        Change(file=FILE, was="2 * x", becomes="3 * x", tests=(BROKEN,)),
    ]
    assert runner.try_all(changes, jobs=1) == runner.Counts(noticed=2, survived=1, untried=1)
    printed = capsys.readouterr().out
    assert printed.startswith(f"error: {BROKEN}: fails without any change\n")
    assert "what it says" in printed
    assert printed.endswith(f"survived: {FILE}: 2 * x  ->  x + x  [{SOUND}]\n")


def test_tests_that_do_not_end_are_ended_and_have_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "TIMEOUT", 1.0)
    runner.copy_repository(tmp_path)
    (tmp_path / FILE).write_text("while True: pass")
    assert runner.failure_of(tmp_path, [SOUND]) == "not done after 1 s"


def test_the_share_is_of_the_changes_that_were_tried() -> None:
    assert runner.Counts(noticed=3, survived=1, untried=4).share == 0.75
    assert runner.Counts(untried=4).share == 1.0


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        (runner.Counts(noticed=95, survived=5), 0),
        (runner.Counts(noticed=94, survived=6), 1),
        (runner.Counts(noticed=99, untried=1), 1),
    ],
)
def test_the_exit_code_asks_for_95_percent_and_tests_that_pass(
    monkeypatch: pytest.MonkeyPatch, counts: runner.Counts, code: int
) -> None:
    monkeypatch.setattr(runner, "try_all", lambda changes, jobs: counts)
    assert runner.main(["--area", "control"]) == code


def test_a_sample_is_the_same_at_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[Change]] = []

    def keep(changes: list[Change], jobs: int) -> runner.Counts:
        drawn.append(changes)
        return runner.Counts()

    monkeypatch.setattr(runner, "try_all", keep)
    for seed in ("1", "1", "2"):
        assert runner.main(["--sample", "20", "--seed", seed]) == 0
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(changes) for changes in drawn] == [20, 20, 20]
    assert not any(change.equivalent for changes in drawn for change in changes)
