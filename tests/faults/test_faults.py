"""The short form of `make faults` (tests/faults): a few of each fault, with the same code and the same counts."""

from __future__ import annotations

import pytest

from tests.faults import __main__ as suite
from tests.faults import disks, kills, survivals, sweeps
from tests.faults.counts import Counts

SEED = 4
SHORT = {
    "runs killed at random": 6,
    "sweeps killed at random": 3,
    "figures that are NaN": len(survivals.WHERE),
    "reward servers that fail": 2,
    "clocks that jump": 1,
    "a run on a full disk": 1,
    "a run whose files may not be so long": 1,
}


def test_every_fault_of_a_run_has_a_short_form_here() -> None:
    assert SHORT.keys() == {*kills.FAULTS, *sweeps.FAULTS, *survivals.FAULTS, *disks.FAULTS}
    assert suite.FAULTS.keys() == suite.COUNTS.keys() > SHORT.keys()
    assert all(SHORT[name] < suite.COUNTS[name] for name in SHORT)


@pytest.mark.parametrize("fault", SHORT)
def test_nothing_is_lost(fault: str) -> None:
    try:
        counts = suite.FAULTS[fault](SHORT[fault], SEED)
    except PermissionError as error:
        pytest.skip(str(error))
    assert counts.lost == ()
    assert counts.survived == counts.tried == SHORT[fault]
    if fault == "runs killed at random":  # two of them at operations of a save
        assert int(counts.how.split()[0]) >= 2


def test_what_is_lost_is_printed_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"clocks that jump": Counts(3, 2, ("seed 5: late",)), "a run on a full disk": Counts(8, 8, (), "as told")}
    for name, counts in found.items():
        monkeypatch.setitem(suite.FAULTS, name, lambda count, seed, counts=counts: counts)
    assert suite.main(["--only", "clocks that jump", "--only", "a run on a full disk", "--seed", "5"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "seed 5"
    assert shown[1].split() == ["fault", "tried", "survived", "lost", "seconds"]
    assert shown[2].split() == ["clocks", "that", "jump", "3", "2", "1", "0.0"]
    assert shown[3] == "  lost: seed 5: late"
    assert shown[4].endswith("as told")
    assert suite.main(["--only", "a run on a full disk"]) == 0


def test_a_fault_that_is_not_survived_is_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite can fail: with a guard that sees nothing, a NaN ends the run with another code."""
    monkeypatch.setattr(survivals, "WHERE", ("log-prob",))
    monkeypatch.setattr(survivals, "WHEN", ((3,),))
    monkeypatch.setattr(survivals.Tiny, "arguments", _unguarded(survivals.Tiny.arguments))
    counts = survivals.inject_nan(1, SEED)
    assert (counts.tried, counts.survived, len(counts.lost)) == (1, 0, 1)
    assert "objective/kl is nan" in counts.lost[0]


def _unguarded(arguments):
    def without(self, run: str, *more: str) -> list[str]:
        given = arguments(self, run, *more)
        at = given.index("--guard.snapshot_steps")
        return [*given[:at], *given[at + 2 :], "--guard.enabled", "false"]

    return without
